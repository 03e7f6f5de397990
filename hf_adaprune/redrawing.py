"""After a search: calibration windows drawn in the mixture that it found.

Trials weight the windows of one pool, of which every source has an equal share: a winner that trusts two of four
sources is measured on half of the pool. Drawn by its weights, as many windows all count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .calibration import TokenBlocks
from .compensation import Repair, repair_plan
from .config import PruningConfig
from .costs import Costs
from .masking import masked
from .plan import PruningPlan
from .search.journal import mean_value
from .sites import ModelSites
from .stages import Clock, cached_repairs, decide, gather_texts, own_repair
from .trials import Measure
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Redrawn", "mixture_drawn", "redraw"]

# A pool of which nine tenths count as much as equal windows would is left as it is.
EFFECTIVE = 0.9


@dataclass(frozen=True, eq=False)
class Redrawn:
    """A decision on windows drawn anew.

    Args:
        config ([`PruningConfig`]): with `calibration.shares`.
        plan ([`PruningPlan`]): what it decides.
        repairs (`dict[str, Repair]`): cached ones, where the config's schedule asks for them.
        value (`float`): the search's objective on the selection windows that no trial saw.
        blocks, held_out ([`TokenBlocks`]): the windows.
    """

    config: PruningConfig
    plan: PruningPlan
    repairs: Mapping[str, Repair]
    value: float
    blocks: TokenBlocks | None
    held_out: TokenBlocks | None


def mixture_drawn(config: PruningConfig, shares: Sequence[float]) -> PruningConfig | None:
    """A config whose domain weights are shares of the windows too; `None` where nothing is to be gained.

    Args:
        config ([`PruningConfig`]): a winner's.
        shares (sequence of `float`): of the windows that every source has now, positive, adding up to 1.

    Returns:
        [`PruningConfig`]: sources that would give less than half a window are left out. `None` without weights, for
        weights on clusters, and where the weighted windows are worth 90 % of as many equal ones (by Kish's effective
        sample size).
    """
    own = config.calibration
    if not own.domain_weights or own.clusters:
        return None
    total = sum(own.domain_weights)
    weights = [weight / total for weight in own.domain_weights]
    spread = sum(weight**2 / share for weight, share in zip(weights, shares, strict=True) if weight > 0)
    if 1 / spread > EFFECTIVE:
        return None
    kept = [index for index, weight in enumerate(weights) if weight * own.samples >= 0.5]
    drawn = tuple(weights[index] for index in kept)
    sources = tuple(own.sources[index] for index in kept)
    # The weights stay beside the shares: a source too short for its share still counts as much.
    return config.with_changes(calibration={"sources": sources, "shares": drawn, "domain_weights": drawn})


def redraw(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    measure: Measure,
    *,
    folder: str | None = None,
    costs: Costs | None = None,
    clock: Clock | None = None,
    workers: Alone | None = None,
) -> Redrawn:
    """Draw the windows, decide and repair as the config says, and measure on fresh selection windows.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        config ([`PruningConfig`]): from [`mixture_drawn`], without a search.
        measure ([`Measure`]): the search's, with fresh windows.
        folder (`str`, *optional*): for Gram matrices on disk.
        costs ([`Costs`], *optional*): what budgets are about.
        clock ([`Clock`], *optional*): counts seconds.
        workers ([`Alone`], *optional*): processes that share the windows; all of them have to call this.

    Raises:
        CalibrationError: the text is too short for a window of every source.
    """
    workers, clock = workers or Alone(), clock or Clock()
    text = config.with_changes(calibration={"report": (), "selection": ()})  # compared for overlaps before the search
    blocks, held_out, _ = workers.each(partial(gather_texts, sites, tokenizer, text, True))
    plan, statistics = decide(sites, blocks, config, folder=folder, clock=clock, costs=costs, workers=workers)
    repairs: Mapping[str, Repair] = cached_repairs(sites, plan, statistics, config)
    own = own_repair(config)
    compared = repairs
    if not repairs and own.method != "none" and statistics is not None:  # as trials were compared
        weights = statistics.sample_weights(config.calibration.domain_weights)
        compared = repair_plan(sites, plan, statistics, weights, own)
    del statistics

    def measured() -> Any:
        with masked(sites, plan, compared, narrow=True):
            return measure.rows(measure.windows, measure.windows + measure.fresh)

    value = mean_value(workers.lead(measured))
    clock.stop("redraw")
    return Redrawn(config, plan, repairs, value, blocks, held_out)
