"""The repair of a plan as a stop of a run: which schedule, and whether it helps on windows that it has not seen."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from .clock import Clock
from .compensation import Repair, counted_windows, output_error, repair_plan
from .config import PruningConfig, RepairConfig
from .errors import StatisticsError
from .evaluation import per_window_loss, run_layers
from .layerwise import Kept, regional_weights, sequential_repairs
from .masking import masked
from .plan import PruningPlan, split_site_name
from .quiet import quiet_bars, quiet_model
from .run_artefacts import kept_repair, repair_name
from .run_folder import RunFolder, once_noted
from .sites import ModelSites
from .statistics import Statistics, spread_weights
from .token_blocks import TokenBlocks
from .tracing import watched_inputs

__all__ = [
    "RepairReport",
    "cached_repairs",
    "check_repairs",
    "choose_repairs",
    "counted_held_out",
    "is_repaired",
    "lowest",
    "own_repair",
    "relative_weights",
    "say_what_stays_unrepaired",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairReport:
    """What a repair did to one site (or block) on held-out calibration windows.

    Args:
        name (`str`): site or layer.
        before, after (`float`): squared output error per token without and with the repair; domains count by their
            weights.
        kept (`bool`): a repair that does not lower the error is dropped.
    """

    name: str
    before: float
    after: float
    kept: bool


_Repaired = tuple[dict[str, Repair], str, tuple[RepairReport, ...], dict[int, dict[str, torch.Tensor]]]


def cached_repairs(
    sites: ModelSites,
    plan: PruningPlan,
    statistics: Statistics | None,
    config: PruningConfig,
    run: RunFolder | None = None,
) -> dict[str, Repair]:
    """The repairs that the dense model's moments give, where the config's schedule asks for them.

    A stop of its own, so that the statistics, by far the largest thing in memory, can be let go before the next one.

    Args:
        sites ([`ModelSites`]): the dense model.
        plan ([`PruningPlan`]): which units stay.
        statistics ([`Statistics`], *optional*): of the dense model; not needed for what `run` has.
        config ([`PruningConfig`]): how.
        run ([`RunFolder`], *optional*): keeps the repair of every site.
    """
    own = own_repair(config)
    if not _is_cached(config) or (statistics is None and not is_repaired(run, plan, config)):
        return {}
    weights = None if statistics is None else statistics.sample_weights(config.calibration.domain_weights)
    say_what_stays_unrepaired(plan, own)
    place = repair_name("cached", config, plan)
    repairs: dict[str, Repair] = {}
    for name, kept in transformers_logging.tqdm(list(plan.changed()), desc="repair", unit="site"):
        one = PruningPlan(plan.model_type, plan.num_layers, {name: kept})

        def make(one: PruningPlan = one) -> dict[str, Repair]:
            assert weights is not None
            with quiet_bars():
                return repair_plan(sites, one, statistics, weights, own)

        repairs.update(kept_repair(run, f"{place}/{name}", make))
    return repairs


def say_what_stays_unrepaired(plan: PruningPlan, config: RepairConfig) -> None:
    """Warn of sites that a repair by biases cannot repair: experts, which have none.

    Args:
        plan ([`PruningPlan`]): which units stay.
        config ([`RepairConfig`]): method.
    """
    cut = [name for name, kept in plan.changed() if split_site_name(name)[1] == "experts" and not kept.is_empty]
    if config.method == "bias" and cut:
        logger.warning(
            "%d of %d cut sites stay unrepaired, their experts have no bias: %s. repair.method='least_squares' repairs "
            "experts, too.",
            len(cut),
            len(list(plan.changed())),
            ", ".join(cut),
        )


def _is_cached(config: PruningConfig) -> bool:
    own = own_repair(config)
    return own.method != "none" and own.schedule != "sequential"


def is_repaired(run: RunFolder | None, plan: PruningPlan, config: PruningConfig) -> bool:
    """Whether nothing is left to do that needs statistics, because an earlier run kept every cached repair."""
    if run is None:
        return False
    place = repair_name("cached", config, plan)
    names = [name for name, _ in plan.changed()] if _is_cached(config) else []
    return all(run.read(f"{place}/{name}") is not None for name in names)


def own_repair(config: PruningConfig) -> RepairConfig:
    """The repair that the rest of a config leaves possible."""
    walks = config.layer_by_layer and config.repair.method == "least_squares"
    schedule = "sequential" if walks else config.repair.schedule
    return replace(config.repair, intercept=config.repair.intercept and not config.uniform, schedule=schedule)


def choose_repairs(
    sites: ModelSites,
    plan: PruningPlan,
    cached: Mapping[str, Repair],
    blocks: TokenBlocks | None,
    held_out: TokenBlocks | None,
    config: PruningConfig,
    clock: Clock | None = None,
    run: RunFolder | None = None,
) -> _Repaired:
    """Repair a plan by the config's schedule, and drop repairs that do not help on held-out windows.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        plan ([`PruningPlan`]): which units stay.
        cached (`dict[str, Repair]`): the cached repairs.
        blocks ([`TokenBlocks`], *optional*): the calibration windows.
        held_out ([`TokenBlocks`], *optional*): windows that no repair has seen.
        config ([`PruningConfig`]): how.
        clock ([`Clock`], *optional*): counts seconds.
        run ([`RunFolder`], *optional*): keeps the repairs of every layer, and what held-out windows said of them.

    Returns:
        `tuple`: repairs by site, the schedule they came from, reports, and weights of regionally optimised layers.
    """
    clock = clock or Clock()
    own = own_repair(config)
    if blocks is None:
        return {}, "none", (), {}
    weights = config.calibration.domain_weights
    held_out = counted_held_out(held_out, weights)
    place = partial(repair_name, config=config, plan=plan)
    schedule = own.schedule if own.method != "none" else "none"
    repairs = dict(cached)
    if schedule in ("sequential", "best"):
        with quiet_model(sites.model):
            kept = Kept(run, place("walked"))
            walked = sequential_repairs(sites, plan, blocks, own, weights, kept)
        # A walk's repairs build on one another and on the pruned model's inputs, so they stay or go as a whole.
        other = {"cached": repairs} if schedule == "best" else {"none": {}}
        candidates = {"sequential": walked, **other}
        schedule = once_noted(run, place("choice"), lambda: _better(sites, plan, candidates, held_out, weights))
        repairs = dict(candidates[schedule])
        clock.stop("repair")
    reports: tuple[RepairReport, ...] = ()
    if held_out is not None and repairs and schedule == "cached":
        checked, held = repairs, held_out

        def check() -> list[dict[str, Any]]:
            return list(map(vars, check_repairs(sites, plan, checked, held, weights)))

        found = once_noted(run, place("check"), check)
        reports = tuple(RepairReport(**report) for report in found)
        repairs = {report.name: repairs[report.name] for report in reports if report.kept}
        clock.stop("check repair")
    blockwise: dict[int, dict[str, torch.Tensor]] = {}
    if own.regional_steps > 0:
        with quiet_model(sites.model):
            blockwise, measured = regional_weights(
                sites, plan, repairs, blocks, own, config.seed, Kept(run, place("regional")), weights
            )
        reports += tuple(RepairReport(name, before, after, after < before) for name, before, after in measured)
        clock.stop("regional repair")
    return repairs, schedule, reports, blockwise


def counted_held_out(held_out: TokenBlocks | None, domain_weights: tuple[float, ...]) -> TokenBlocks | None:
    """The held-out windows that have a say; `None` where none has."""
    counted = None if held_out is None else counted_windows(held_out, domain_weights)
    if counted is None or len(counted):
        return counted
    logger.warning(
        "repairs are not checked: all held-out windows are of domains with weight 0. Raise repair.holdout or "
        "calibration.samples."
    )
    return None


def relative_weights(blocks: TokenBlocks, domain_weights: tuple[float, ...]) -> torch.Tensor:
    """Weights of windows by the rule of statistics, float64 `[windows]`, the largest of them 1."""
    weights = spread_weights(blocks.domain, len(blocks.domains), domain_weights).double()
    # Equal weights become ones to the last bit, and a product with one changes nothing.
    return weights / weights.max()


def _better(
    sites: ModelSites,
    plan: PruningPlan,
    candidates: Mapping[str, dict[str, Repair]],
    held_out: TokenBlocks | None,
    domain_weights: tuple[float, ...] = (),
) -> str:
    """Name of the candidate with the lowest loss on held-out windows; the first one where there are none."""
    losses = dict.fromkeys(candidates, 0.0)
    for name, repairs in candidates.items():
        if held_out is None:
            break
        with masked(sites, plan, repairs):
            sums = per_window_loss(sites.model, held_out)
        sums = (sums * relative_weights(held_out, domain_weights)[:, None]).sum(0)
        losses[name] = float(sums[0] / sums[1])
    logger.info("held-out loss: %s", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    best = lowest(losses)
    if best == "none":
        logger.warning("the sequential repair was dropped, it did not lower the loss on held-out windows.")
    return best


def lowest(losses: Mapping[str, float]) -> str:
    """The name of the lowest loss, the first one of equals; one that is not a number is never lower than another."""
    return min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))


def check_repairs(
    sites: ModelSites,
    plan: PruningPlan,
    repairs: Mapping[str, Repair],
    held_out: TokenBlocks,
    domain_weights: tuple[float, ...] = (),
) -> tuple[RepairReport, ...]:
    """Output errors with and without each repair, on windows that no repair has seen; one forward pass over them.

    Args:
        sites ([`ModelSites`]): the dense model, or a layer of it.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`): by site.
        held_out ([`TokenBlocks`]): the windows, one of which has a weight above 0 at least; see [`counted_held_out`].
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows.

    Raises:
        StatisticsError: an error is not finite; with the name of the site.
    """
    errors = {name: torch.zeros(2, dtype=torch.float64) for name in repairs}
    weights = relative_weights(held_out, domain_weights)
    weight = 1.0  # of the window that runs

    def adds(name: str) -> Callable[[int, torch.Tensor], None]:
        site, kept = sites.by_name[name], plan.sites[name]

        def sink(expert: int, rows: torch.Tensor) -> None:
            for number, repair in enumerate((None, repairs[name])):
                errors[name][number] += weight * output_error(site, kept, repair, rows, expert).cpu()

        return sink

    with contextlib.ExitStack() as stack:
        for name in repairs:
            stack.enter_context(watched_inputs(sites, sites.by_name[name], adds(name)))
        # One window after the other, so that there is no padding.
        for window in transformers_logging.tqdm(range(len(held_out)), desc="check repair", unit="window"):
            weight = float(weights[window])
            run_layers(sites.model, held_out.select([window]))
    tokens = float((weights * held_out.attention_mask.sum(1)).sum())
    reports = []
    for name, found in errors.items():
        if not torch.isfinite(found).all():
            raise StatisticsError(
                f"{name}: outputs are not finite on held-out windows. Load the model in bfloat16 or float32 (float16 "
                "overflows on massive activations) and check its weights."
            )
        before, after = (found / tokens).tolist()
        reports.append(RepairReport(name, before, after, after < before))
    dropped = [report.name for report in reports if not report.kept]
    if dropped:
        logger.warning(
            "repairs of %d of %d sites were dropped, they did not lower the error on held-out windows: %s",
            len(dropped),
            len(reports),
            ", ".join(dropped),
        )
    return tuple(reports)
