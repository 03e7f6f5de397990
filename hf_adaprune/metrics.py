"""The metrics: pure functions from statistics and sample weights to scores; higher = keep.

A new metric is one function and one entry in `METRICS`. A metric scores reader columns `[columns]`, which are then
folded into units, or units `[units]` directly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .elements import ELEMENT_TERMS
from .errors import StatisticsError
from .moments import covariance, damped_inverse, need
from .site import Site
from .statistics import Needs, SiteStatistics, Statistics, standing_weights

__all__ = ["METRICS", "Context", "Metric", "block_costs", "block_influence", "greedy_costs"]


@dataclass(frozen=True)
class Context:
    """What a metric may look at beside the site: the sample weights and how the config wants matrices joined.

    Args:
        statistics ([`Statistics`]): of the whole model.
        weights (`torch.Tensor`): sample weights `[samples]`; 2 counts a sample twice.
        reduction (`str`): how the matrices of a coupled group are joined.
        damping, damping_scale: ridge of the metrics that invert moments.
        seed (`int`): of random scores.
    """

    statistics: Statistics
    weights: torch.Tensor
    reduction: str = "sum"
    damping: float = 0.01
    damping_scale: str = "column"
    seed: int = 0

    def of(self, site: Site) -> SiteStatistics:
        """Statistics of a site."""
        return self.statistics.sites[site.name]

    @property
    def gradient_weights(self) -> torch.Tensor:
        """Weights of the samples that have gradients, `[gradient samples]`; see [`standing_weights`].

        Every domain has about as many of them, however many samples it has.
        """
        return standing_weights(self.weights, self.statistics.domain, self.statistics.gradient_index)


NOTHING = Needs()
MetricFunction = Callable[[Site, str, Context], torch.Tensor]


@dataclass(frozen=True)
class Metric:
    """An entry of the table.

    Args:
        function (`Callable`): `(site, unit kind, context)` to scores.
        level (`str`): `columns` (folded into units afterwards) or `units`.
        fold (`str`): how columns become units: `sum` or `mean`.
        needs ([`Needs`]): what it reads from the statistics.
        source (`str`): paper and equation.
        linear (`bool`): linear in the sample weights.
    """

    function: MetricFunction
    level: str = "units"
    fold: str = "sum"
    needs: Needs = NOTHING
    source: str = ""
    linear: bool = False


def _random(site: Site, kind: str, context: Context) -> torch.Tensor:
    # A stable hash of the name: one site's numbers do not depend on which other sites there are. The seed goes into it,
    # because torch's CPU generator reads the lower 32 bits only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{context.seed}:{site.name}".encode()))
    return torch.rand(site.units(kind), generator=generator)


def _magnitude(site: Site, kind: str, context: Context) -> torch.Tensor:
    parts = []
    for number, writer in enumerate(site.writers):
        rows = writer.weight.float().square().sum(-1).cpu()
        parts.append(site.writer_units(number, kind, rows))
    parts.append(site.fold(column_norms(site), kind).sum(-1))
    return _join([part.sqrt() for part in parts if part is not None], context.reduction)


def _wanda(site: Site, kind: str, context: Context) -> torch.Tensor:
    squares = need(context.of(site).squares, "sums of squares", site)
    norms = (squares * context.weights[:, None]).sum(0) / context.weights.sum()
    return site.reader.weight.float().abs().mean(-2).flatten().cpu() * norms.sqrt()


def _flap(scores: torch.Tensor, site: Site) -> torch.Tensor:
    # FLAP's code squares the attention metric before pooling, the MLP metric not (2312.11983, code).
    return scores.square() if site.kind == "attention" else scores


def _ifv(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _flap(_variance(site, context), site)


def _wifv(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _flap(_variance(site, context) * column_norms(site), site)


def _wifn(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _flap(_wanda(site, kind, context).double(), site)


def _taylor(term: str) -> MetricFunction:
    number = ELEMENT_TERMS.index(term)

    def metric(site: Site, kind: str, context: Context) -> torch.Tensor:
        elements = context.of(site).elements
        if not elements:
            raise StatisticsError(
                f"{site.name}: the statistics hold no element-wise terms. Collect them with needs_of(config)."
            )
        statistics = context.statistics
        chosen = statistics.domain[statistics.gradient_index]
        mixture = torch.zeros(len(statistics.domains)).index_add(0, chosen, context.gradient_weights.float())
        parts = []
        for number_of_writer, writer in enumerate(site.writers):
            rows = torch.einsum("d,d...->...", mixture, elements[writer.path][:, number])
            parts.append(site.writer_units(number_of_writer, kind, rows))
        columns = torch.einsum("d,d...->...", mixture, elements[site.reader.path][:, number])
        parts.append(site.fold(columns.flatten(), kind).sum(-1))
        return _join([part for part in parts if part is not None], context.reduction)

    return metric


def _join(parts: list[torch.Tensor], reduction: str) -> torch.Tensor:
    stacked = torch.stack(parts)
    if reduction in ("first", "last"):
        return parts[0 if reduction == "first" else -1]
    if reduction == "max":
        return stacked.amax(0)
    if reduction == "prod":
        return stacked.prod(0)
    return stacked.sum(0) if reduction == "sum" else stacked.mean(0)


def _unit_terms(site: Site, kind: str, context: Context) -> torch.Tensor:
    """Signed first-order terms by unit, `[gradient samples, segments, units]`."""
    return site.fold(need(context.of(site).first_order, "first-order terms", site), kind).sum(-1).double()


def _fisher(site: Site, kind: str, context: Context) -> torch.Tensor:
    squares = _unit_terms(site, kind, context).square().sum(1)
    return (squares * context.gradient_weights[:, None]).sum(0)


def _first_order(site: Site, kind: str, context: Context) -> torch.Tensor:
    return (_unit_terms(site, kind, context).sum(1).abs() * context.gradient_weights[:, None]).sum(0)


def _obs_with(
    site: Site, kind: str, context: Context, output_weights: torch.Tensor | None, greedy: bool = False
) -> torch.Tensor:
    moments, _, tokens = covariance(site, context.statistics, context.weights)
    inverse = damped_inverse(moments, context.damping, context.damping_scale)
    weight = site.reader.weight.to(inverse.device).double()
    if output_weights is not None:
        weight = weight * output_weights.to(inverse.device).sqrt()[:, None]
    costs = greedy_costs if greedy else block_costs
    return costs(weight, inverse, site.units(kind)) * tokens


def block_costs(weight: torch.Tensor, inverse: torch.Tensor, units: int) -> torch.Tensor:
    """Squared output error per token when one unit is removed and the rest refitted, `[units]` on the CPU.

    `tr(W_S [(C^-1)_SS]^-1 W_S^T)` for each block S of neighbouring columns: the exact optimal-brain-surgeon cost.

    Args:
        weight (`torch.Tensor`): `[outputs, columns]`, or `[experts, outputs, channels]`.
        inverse (`torch.Tensor`): inverse damped moments `[columns, columns]`, or one per expert.
        units (`int`): how many equal blocks the columns (of all experts) form.
    """
    if weight.dim() == 3:
        return _costs_by_expert(block_costs, weight, inverse, units)
    size = weight.shape[1] // units
    if size == 1:
        return (weight.square().sum(0) / inverse.diagonal()).cpu()
    return _refit_errors(weight.reshape(-1, units, size).permute(1, 2, 0), _diagonal_blocks(inverse, units)).cpu()


def _costs_by_expert(
    costs_of: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    weight: torch.Tensor,
    inverse: torch.Tensor,
    units: int,
) -> torch.Tensor:
    """Costs of every expert by itself, `[units]`; summed where a unit is a whole expert."""
    per_expert = max(1, units // len(weight))
    costs = torch.cat([costs_of(own, moments, per_expert) for own, moments in zip(weight, inverse, strict=True)])
    return costs.reshape(units, -1).sum(1)


def _diagonal_blocks(inverse: torch.Tensor, units: int) -> torch.Tensor:
    size = len(inverse) // units
    return inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _refit_errors(own: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """What `block_costs` says, from columns by unit `[units, size, outputs]` and blocks `[units, size, size]`."""
    if blocks.shape[-1] == 1:
        return torch.linalg.vector_norm(own, dim=(1, 2)).square() / blocks[:, 0, 0]
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), own, upper=False)
    return whitened.square().sum((1, 2))


def greedy_costs(weight: torch.Tensor, inverse: torch.Tensor, units: int) -> torch.Tensor:
    """What each unit adds to the squared output error per token when units leave one after the other, cheapest first.

    After every removal weights and inverse moments are down-dated (ZipLM, 2302.04089, algorithm 1), so the sum over the
    units removed so far is the exact error of removing them together. Single columns leave in small batches whose
    error is shared out in the order of the batch. Always increasing along the order, so that ranking keeps it; where
    the error of a unit is lower than one before it, the sum is an upper bound.

    Args:
        weight (`torch.Tensor`): `[outputs, columns]`, or `[experts, outputs, channels]`.
        inverse (`torch.Tensor`): inverse damped moments `[columns, columns]`, or one per expert.
        units (`int`): how many equal blocks the columns (of all experts) form.
    """
    if weight.dim() == 3:
        return _costs_by_expert(greedy_costs, weight, inverse, units)
    size = weight.shape[1] // units
    batch = max(1, units // 48) if size == 1 else 1
    added = torch.zeros(units, dtype=torch.float64)
    # A pivoted block Cholesky factorisation of the inverse. The inverse itself stays as it is: only the rows of what
    # leaves are ever down-dated, by the rows of the factor so far, beside the diagonal blocks that costs are made of.
    # Memory is by unit, those still there first, so that nothing is copied but the last ones into the gaps.
    left = torch.arange(units, device=inverse.device)
    columns = weight.T.reshape(units, size, -1).clone(memory_format=torch.contiguous_format)
    blocks = _diagonal_blocks(inverse, units).clone(memory_format=torch.contiguous_format)
    rows = inverse.new_empty(units * size, units * size)  # [columns, rows of the factor so far]
    gone, highest = 0, 0.0
    while gone < units * size:
        there = units - gone // size
        costs = _refit_errors(columns[:there], blocks[:there])
        chosen = costs.double().topk(min(batch, there), largest=False).indices
        own = _unit_columns(left[chosen], size), _unit_columns(chosen, size)
        # `index_select` is several times faster than brackets where whole rows are taken.
        known = rows.index_select(0, own[1])[:, :gone]
        above = inverse.index_select(0, own[0])
        leaving = above.index_select(1, own[0]).addmm(known, known.T, alpha=-1)
        factor = torch.linalg.cholesky(leaving)
        weights = torch.linalg.solve_triangular(factor, columns.index_select(0, chosen).flatten(0, 1), upper=False)
        errors = weights.square().sum(1).reshape(len(chosen), size).sum(1).cpu()
        for unit, error in zip(left[chosen].tolist(), errors.tolist(), strict=True):
            # A hair above the last one, or sorting would change the order of units that share a cost.
            highest = max(highest * (1 + 1e-9), error)
            added[unit] = highest
        there -= len(chosen)
        gaps, last = _gaps(chosen, there)
        left[gaps], columns[gaps], blocks[gaps] = left[last], columns[last], blocks[last]
        rows.unflatten(0, (units, size))[gaps, :, :gone] = rows.unflatten(0, (units, size))[last, :, :gone]
        stays = there * size
        new = above.index_select(1, _unit_columns(left[:there], size)).addmm(known, rows[:stays, :gone].T, alpha=-1)
        new = torch.linalg.solve_triangular(factor, new, upper=False).T
        columns[:there].flatten(0, 1).addmm_(new, weights, alpha=-1)
        by_unit = new.reshape(there, size, len(factor))
        blocks[:there].baddbmm_(by_unit, by_unit.transpose(1, 2), alpha=-1)
        rows[:stays, gone : gone + len(factor)] = new
        gone += len(factor)
    return added


def _gaps(chosen: torch.Tensor, there: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places among the first `there` that the chosen leave, and what stands behind them and stays."""
    behind = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
    behind[chosen[chosen >= there] - there] = False
    return chosen[chosen < there], torch.where(behind)[0] + there


def _unit_columns(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _obs(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _obs_with(site, kind, context, None)


def _obs_greedy(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _obs_with(site, kind, context, None, greedy=True)


def output_importance(site: Site, context: Context) -> torch.Tensor:
    """Mean squared gradient of the loss at the reader's outputs per token, `[outputs]`."""
    squares = need(context.of(site).output_gradients, "output gradients", site)
    weights = context.gradient_weights
    tokens = (context.statistics.tokens[context.statistics.gradient_index] * weights).sum()
    return (squares * weights[:, None]).sum(0).double() / tokens


def _obs_gradient(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _obs_with(site, kind, context, output_importance(site, context))


def _obs_gradient_greedy(site: Site, kind: str, context: Context) -> torch.Tensor:
    return _obs_with(site, kind, context, output_importance(site, context), greedy=True)


def block_influence(context: Context) -> torch.Tensor:
    """ShortGPT's influence of every layer (2403.03853, eq. 1): one minus the cosine of input and output, `[layers]`.

    Raises:
        StatisticsError: no cosines were kept, or no window weighs anything.
    """
    cosine = context.statistics.cosine
    if cosine is None:
        raise StatisticsError("the statistics hold no layer cosines. Collect them with needs_of(config).")
    weights = context.weights[:, None].double()
    tokens = (context.statistics.tokens[:, None] * weights).sum(0)
    influence = 1 - (cosine * weights).sum(0) / tokens
    if not torch.isfinite(influence).all():
        raise StatisticsError(
            "block influence is not finite: no window weighs anything, or weights are not finite. Check "
            "calibration.domain_weights, and give text of the domains that they weigh."
        )
    return influence


def _influence_share(site: Site, kind: str, context: Context) -> torch.Tensor:
    units = site.units(kind)
    return torch.full((units,), float(block_influence(context)[site.layer]) / units)


# -- what the metrics share ------------------------------------------------------------------------------------------


def column_norms(site: Site) -> torch.Tensor:
    """Squared norm of every reader column, `[columns]`, float32."""
    return site.reader.weight.float().square().sum(-2).flatten().cpu()


def _variance(site: Site, context: Context) -> torch.Tensor:
    kept, weights = context.of(site), context.weights[:, None]
    tokens = _tokens(site, context)
    mean = (kept.sums * weights).sum(0).double() / tokens
    squares = need(kept.squares, "sums of squares", site)
    return ((squares * weights).sum(0).double() / tokens - mean.square()).clamp(min=0)


def _tokens(site: Site, context: Context) -> torch.Tensor:
    counts = context.of(site).counts
    if counts.dim() == 1:
        return (counts * context.weights).sum().double().clamp(min=1)
    served = (counts * context.weights[:, None]).sum(0).double().clamp(min=1)
    return served.repeat_interleave(site.group_size)


# -- the table --------------------------------------------------------------------------------------------------------

_WITH_GRADIENTS = Needs(gradients=True)
_WITH_ELEMENTS = Needs(elements=True)
_WITH_SQUARES = Needs(squares=True)
_PRUNER = "LLM-Pruner, 2305.11627, section 3.2"

METRICS: dict[str, Metric] = {
    "random": Metric(_random, source="uniform random numbers by seed and site"),
    "magnitude": Metric(_magnitude, source="L2 norm of each coupled matrix's rows or columns"),
    "wanda_sp": Metric(_wanda, "columns", needs=_WITH_SQUARES, source="Wanda-sp, in the code of 2312.11983"),
    "ifv": Metric(_ifv, "columns", needs=_WITH_SQUARES, source="FLAP, 2312.11983, input feature variance"),
    "wifv": Metric(_wifv, "columns", needs=_WITH_SQUARES, source="FLAP, 2312.11983, eq. 5"),
    "wifn": Metric(_wifn, "columns", needs=_WITH_SQUARES, source="FLAP, 2312.11983, weighted input feature norm"),
    "taylor_vector": Metric(_taylor("vector"), needs=_WITH_ELEMENTS, source=_PRUNER),
    "taylor_element_first": Metric(_taylor("first"), needs=_WITH_ELEMENTS, source=_PRUNER),
    "taylor_element_second": Metric(_taylor("second"), needs=_WITH_ELEMENTS, source=_PRUNER),
    "taylor_element_mixed": Metric(_taylor("mixed"), needs=_WITH_ELEMENTS, source=_PRUNER),
    "first_order": Metric(
        _first_order, needs=_WITH_GRADIENTS, source="mean absolute first-order term of a unit", linear=True
    ),
    "fisher": Metric(
        _fisher,
        needs=_WITH_GRADIENTS,
        source="sum over segments of 64 tokens of the squared first-order term",
        linear=True,
    ),
    "obs": Metric(_obs, needs=Needs(gram=True), source="exact block cost with refit; ZipLM, 2302.04089, eq. 3"),
    "obs_gradient": Metric(
        _obs_gradient, needs=Needs(gram=True, gradients=True), source="the same, outputs weighted by squared gradients"
    ),
    "obs_greedy": Metric(
        _obs_greedy, needs=Needs(gram=True), source="the same, units leaving one after the other; ZipLM, algorithm 1"
    ),
    "obs_gradient_greedy": Metric(
        _obs_gradient_greedy,
        needs=Needs(gram=True, gradients=True),
        source="the same, outputs weighted by squared gradients",
    ),
    "block_influence": Metric(_influence_share, needs=Needs(cosine=True), source="ShortGPT, 2403.03853, eq. 1"),
}
