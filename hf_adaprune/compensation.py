"""Repairs: the closed-form update of the matrix that reads pruned units. Computes, never assigns.

All of them answer one question: which weights on the kept inputs reproduce best what the dense matrix made of all
inputs? With moments of the dense model the answer takes seconds for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.utils import logging as transformers_logging

from .config import RepairConfig
from .errors import CalibrationError, StatisticsError
from .gram_sums import exact_products, summing_dtype
from .moments import cholesky, covariance, ridge_diagonal, second_moments
from .plan import PruningPlan, SitePlan
from .site import Site
from .sites import ModelSites
from .statistics import Statistics, spread_weights
from .token_blocks import TokenBlocks

__all__ = [
    "Moments",
    "Repair",
    "check_enough_tokens",
    "counted_windows",
    "output_error",
    "repair_from_moments",
    "repair_plan",
]


@dataclass(frozen=True, eq=False)
class Repair:
    """New values of a reader that has lost columns.

    Args:
        weight (`torch.Tensor`): `[outputs, columns kept]`, float32 on the CPU; for experts
            `[experts kept, outputs, channels kept]`.
        bias (`torch.Tensor`, *optional*): `[outputs]`; `None` leaves the bias as it is.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a reader's inputs: the covariance around `mean`, per token.

    Args:
        covariance (`torch.Tensor`): `[columns, columns]` or, of those that stay with all, `[columns, columns kept]`,
            float64; for experts `[experts, channels, channels]`, not centred.
        mean (`torch.Tensor`): `[columns]`.
        shift (`torch.Tensor`, *optional*): what the target has beside the dense matrix's output on these inputs: its
            second moments with the inputs that stay, `[outputs, columns kept]`, not centred.
        shift_mean (`torch.Tensor`, *optional*): its mean, `[outputs]`.
    """

    covariance: torch.Tensor
    mean: torch.Tensor
    shift: torch.Tensor | None = None
    shift_mean: torch.Tensor | None = None


def repair_plan(
    sites: ModelSites,
    plan: PruningPlan,
    statistics: Statistics | None,
    weights: torch.Tensor,
    config: RepairConfig,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Repair]:
    """Repair every site that a plan cuts, from cached moments of the dense model.

    Args:
        sites ([`ModelSites`]): the dense model.
        plan ([`PruningPlan`]): which units stay.
        statistics ([`Statistics`]): with Gram matrices for least squares; sums are enough for `bias`.
        weights (`torch.Tensor`): sample weights, `[samples]`.
        config ([`RepairConfig`]): method, damping, intercept.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`): of the algebra. float32 is twice as fast, enough
            for a trial, and not for a model that is kept.

    Returns:
        `dict[str, Repair]`: by site name; empty where the method is `none`.

    Raises:
        StatisticsError: a repair is not finite, or too large for the dtype of the weights; with the name of the site.
    """
    if config.method == "none" or statistics is None:
        return {}
    repairs = {}
    for name, kept in transformers_logging.tqdm(list(plan.changed()), desc="repair", unit="site"):
        site = sites.by_name[name]
        if kept.is_empty or (site.kind == "experts" and config.method == "bias"):
            continue
        if config.method == "bias":
            kept_sums = statistics.sites[name].sums * weights[:, None]
            tokens = (statistics.tokens * weights).sum().double()
            mean = kept_sums.sum(0).double() / tokens
            repairs[name] = bias_repair(site, kept, mean)
        elif site.kind != "experts" and not config.intercept:
            matrix, _, _ = second_moments(site, statistics, weights, dtype)
            weight = site.reader.weight.to(matrix.device).to(matrix.dtype)
            columns = site.column_index(kept).to(matrix.device)
            repairs[name] = _fitting(site, Repair(_regress(weight, matrix, columns, config).float().cpu()))
        else:
            matrix, mean, _ = covariance(site, statistics, weights)
            repairs[name] = repair_from_moments(site, kept, Moments(matrix, mean), config)
    return repairs


def bias_repair(site: Site, kept: SitePlan, mean: torch.Tensor) -> Repair:
    """FLAP's compensation (2312.11983, eq. 7): the mean contribution of the removed columns moves into the bias.

    Args:
        site ([`Site`]): attention or MLP.
        kept ([`SitePlan`]): what stays.
        mean (`torch.Tensor`): mean input, `[columns]`.

    Raises:
        StatisticsError: the bias is not finite, or too large for the dtype of the weights.
    """
    weight = site.reader.weight.cpu().double()
    columns = site.column_index(kept)
    removed = torch.ones(site.columns, dtype=torch.bool)
    removed[columns] = False
    bias = weight[:, removed] @ mean.cpu().double()[removed]
    if site.reader.bias is not None:
        bias = bias + site.reader.bias.detach().cpu().double()
    return _fitting(site, Repair(weight[:, columns].float(), bias.float()))


def repair_from_moments(site: Site, kept: SitePlan, moments: Moments, config: RepairConfig) -> Repair:
    """Ridge regression of the dense output on the kept inputs, pulled towards the original weights.

    `W_K* = (W C[:, K] + d W_K) (C_KK + d)^-1`, `b* = b + W mu - W_K* mu_K`, with d diagonal (see
    `RepairConfig.damping_scale`). Without an intercept C is the second moment and b stays.

    Args:
        site ([`Site`]): the site, still dense.
        kept ([`SitePlan`]): what stays.
        moments ([`Moments`]): of its inputs.
        config ([`RepairConfig`]): damping and intercept.

    Raises:
        StatisticsError: the moments are not finite, or the repair is not, or too large for the dtype of the weights.
    """
    if not all(torch.isfinite(sums.sum()) for sums in (moments.covariance, moments.shift) if sums is not None):
        raise StatisticsError(
            f"{site.name}: moments of the reader's inputs are not finite. Weights or activations overflow; load the "
            "model in bfloat16 or float32 (float16 overflows on massive activations) and check its weights."
        )
    if site.kind == "experts":
        return _fitting(site, _repair_experts(site, kept, moments, config))
    matrix, mean = moments.covariance, moments.mean
    weight = site.reader.weight.to(matrix.device).double()
    columns = site.column_index(kept).to(matrix.device)
    extra = None if moments.shift is None else moments.shift.to(matrix.device)
    if not config.intercept:
        return _fitting(site, Repair(_regress(weight, matrix, columns, config, extra, mean).float().cpu()))
    extra_mean = torch.zeros(len(weight)).to(mean) if moments.shift_mean is None else moments.shift_mean
    if extra is not None:
        extra = extra - torch.outer(extra_mean, mean[columns]).to(extra.device)
    new = _regress(weight, matrix, columns, config, extra)
    shift = weight @ mean + extra_mean - new @ mean[columns]
    if site.reader.bias is not None:
        shift = shift + site.reader.bias.detach().to(shift.device).to(shift.dtype)
    return _fitting(site, Repair(new.float().cpu(), shift.float().cpu()))


def _fitting(site: Site, repair: Repair) -> Repair:
    """The repair, whose numbers the dtype of the weights can hold."""
    highest = torch.finfo(site.reader.parameter.dtype).max
    for values in (repair.weight, repair.bias):
        # Not a number compares as false.
        if values is not None and values.numel() and not float(values.abs().max()) <= highest:
            raise StatisticsError(
                f"{site.name}: the repair is not finite in {site.reader.parameter.dtype}. Raise repair.damping, load "
                "the model in bfloat16 or float32, or set repair.method='none'."
            )
    return repair


def _regress(
    weight: torch.Tensor,
    matrix: torch.Tensor,
    columns: torch.Tensor,
    config: RepairConfig,
    shift: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
) -> torch.Tensor:
    """New weights on the kept columns. A `mean` turns covariances into second moments; `shift` is of these columns.

    Block by block: a second matrix as large as the first would set the peak of memory.
    """
    inner = _block(matrix, columns, columns, mean)
    ridge = ridge_diagonal(inner, config.damping, config.damping_scale)
    kept = weight.index_select(1, columns)
    inner.diagonal().add_(ridge)
    # Columns are scaled to one diagonal: a massive activation would cost float32 all its digits.
    scale = inner.diagonal().clamp(min=1e-30).rsqrt()
    factor = cholesky(inner.mul_(scale).mul_(scale[:, None]))
    del inner
    if shift is not None:
        moved = shift * scale
        kept = kept + (torch.cholesky_solve(moved.T, factor) * scale[:, None]).T
    # The dense weights on the kept columns solve for themselves, so only what the removed ones add is left to solve.
    stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=matrix.device)
    stays[columns] = True
    removed = (~stays).nonzero().flatten()
    between = _block(matrix, removed, columns, mean).T * scale[:, None]
    own = weight.index_select(1, removed)
    if len(removed) < len(weight):
        return kept + own @ (torch.cholesky_solve(between, factor) * scale[:, None]).T
    return kept + (torch.cholesky_solve(between @ own.T, factor) * scale[:, None]).T


def _block(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    """Some rows and columns of a matrix (which may have these columns alone), plus those of a mean's product."""
    block = matrix.index_select(0, rows)
    if block.shape[1] > len(columns):
        block = block.index_select(1, columns)
    if mean is None:
        return block
    return block.add_(torch.outer(mean.index_select(0, rows), mean.index_select(0, columns)))


def _repair_experts(site: Site, kept: SitePlan, moments: Moments, config: RepairConfig) -> Repair:
    experts, width = kept.kept_groups, kept.kept_per_group
    channels = torch.tensor(kept.kept).reshape(len(experts), width) % site.group_size
    weights = []
    for expert, own in zip(experts, channels, strict=True):
        matrix = moments.covariance[expert]
        weight = site.reader.weight[expert].to(matrix.device).double()
        weights.append(_regress(weight, matrix, own.to(matrix.device), config).float().cpu())
    return Repair(torch.stack(weights))


def output_error(
    site: Site, kept: SitePlan, repair: Repair | None, rows: torch.Tensor, expert: int = 0
) -> torch.Tensor:
    """Squared error of a reader's outputs after a cut, summed over tokens and outputs.

    Args:
        site ([`Site`]): the site, still dense.
        kept ([`SitePlan`]): what stays.
        repair ([`Repair`], *optional*): new weights; the old ones where not given.
        rows (`torch.Tensor`): what the dense model's reader reads, `[tokens, columns]`; of experts what
            [`hf_adaprune.tracing.watched_inputs`] shows.
        expert (`int`, *optional*, defaults to 0): whose rows these are. One that goes counts for nothing: its tokens
            find others.

    Returns:
        `torch.Tensor` of shape `[]`: on the rows' device, of [`summing_dtype`].
    """
    weight, columns, slot = site.reader.weight.detach(), site.column_index(kept), 0
    if site.kind == "experts":
        if expert not in kept.kept_groups:
            return torch.zeros((), dtype=summing_dtype(rows.device), device=rows.device)
        slot = kept.kept_groups.index(expert)
        start = slot * kept.kept_per_group
        weight = weight[expert]
        columns = torch.tensor(kept.kept[start : start + kept.kept_per_group]) % site.group_size
    stays, values = columns.to(rows.device), rows.float()
    # The difference of the weights first, so that no large outputs cancel; a copy of one matrix at a time.
    difference = weight.to(rows.device, torch.float32, copy=True)
    bias = torch.zeros(len(difference), device=rows.device)
    if repair is None:
        gone = torch.ones(difference.shape[1], dtype=torch.bool, device=rows.device).index_fill(0, stays, False)
        difference, values = difference[:, gone], values[:, gone]
    else:
        own = repair.weight if site.kind != "experts" else repair.weight[slot]
        difference[:, stays] -= own.to(difference)
        if repair.bias is not None:
            old = torch.zeros_like(bias) if site.reader.bias is None else site.reader.bias.detach().to(bias)
            bias = old - repair.bias.to(bias)
    with exact_products(torch.float32):
        change = values @ difference.T + bias
    return change.to(summing_dtype(rows.device)).square().sum()


def counted_windows(blocks: TokenBlocks, domain_weights: tuple[float, ...] = ()) -> TokenBlocks:
    """The windows of domains with a weight above 0: what repairs are made of and judged on. All without weights.

    Args:
        blocks ([`TokenBlocks`]): calibration windows, or held-out ones.
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows.
    """
    counts = spread_weights(blocks.domain, len(blocks.domains), domain_weights) > 0
    return blocks if bool(counts.all()) else blocks.select(counts.nonzero().flatten())


def check_enough_tokens(sites: ModelSites, tokens: float, config: RepairConfig, kept: Mapping[str, SitePlan]) -> None:
    """Refuse a least-squares repair from fewer tokens than its widest matrix can bear.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokens (`float`): of the windows that count, see [`counted_windows`].
        config ([`RepairConfig`]): method, and how many tokens an input needs.
        kept (`dict[str, SitePlan]`): what stays of the sites that are repaired.

    Raises:
        CalibrationError: with the number of tokens that would do.
    """
    if config.method != "least_squares" or config.min_tokens_per_column <= 0:
        return
    readers = [(sites.by_name[name], own) for name, own in kept.items()]
    widest = max((len(site.column_index(own)) for site, own in readers if site.kind != "experts"), default=0)
    needed = config.min_tokens_per_column * widest
    if tokens < needed:
        raise CalibrationError(
            f"{int(tokens)} calibration tokens are too few to repair matrices with {widest} inputs: at least "
            f"{math.ceil(needed)} are needed ({config.min_tokens_per_column:g} per input). Raise calibration.samples "
            "or calibration.sequence_length, give more text, or set repair.method='none'."
        )
