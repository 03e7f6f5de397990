"""Cuts of a model that trains: what goes, how it is repaired, and what is left.

One process cuts the model. With several it is masked, and cut when training ends: a wrapped model cannot change its
shapes.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .adapters import base_of, merged
from .compensation import check_enough_tokens
from .config import PruningConfig
from .cut_schedule import CutSchedule
from .errors import CalibrationError
from .evaluation import per_window_loss
from .importance import unit_of
from .masking import masked
from .model_config import known_architecture
from .optimizer_state import OptimizerFollower
from .pipeline import Decision, carry_out, decide_and_repair, note_provenance
from .plan import PruningPlan
from .positions import check_windows
from .quiet import quiet_bars, quiet_model
from .search_checks import search_needs
from .sites import ModelSites, find_sites
from .stages import check_gradient_windows, check_weights, gather_texts, what_to_collect
from .token_blocks import TokenBlocks
from .training_checks import has_budget
from .training_masks import UnitMasks, cut_copy, take_repairs
from .training_text import dataset_blocks
from .workers import Alone

if TYPE_CHECKING:
    from .architectures import Architecture

__all__ = ["Cuts"]

logger = logging.getLogger(__name__)

_LOSS_WINDOWS = 8  # of held-out text, for the losses before and after a cut
# Windows of one of many cuts, and how many of them go backward, unless the user says so.
_SAMPLES, _GRADIENT_SAMPLES = 64, 16


class Cuts:
    """The cuts of one training, one after the other.

    Args:
        config ([`PruningConfig`]): what to prune and how; its ratio is that of the end.
        schedule ([`CutSchedule`]): how often.
        samples (`int`, *optional*): calibration windows per cut.
        architecture ([`Architecture`], *optional*): of a family that is not built in.

    Attributes:
        plan ([`PruningPlan`], *optional*): everything that went so far.
        first (`dict[str, int]`): sizes before the first cut.
        blocks (`tuple`, *optional*): calibration windows and held-out ones, once they are read.
        workers ([`Alone`]): the processes that train.
    """

    def __init__(
        self, config: PruningConfig, schedule: CutSchedule, samples: int | None, architecture: Architecture | None
    ) -> None:
        self.config, self.schedule, self.samples, self.architecture = config, schedule, samples, architecture
        self.plan: PruningPlan | None = None
        self.first: dict[str, int] = {}
        self.blocks: tuple[TokenBlocks | None, TokenBlocks | None] | None = None
        self.workers = Alone()
        self._from_sources = True
        self._masks = UnitMasks()

    @property
    def is_masked(self) -> bool:
        """Whether cuts are masks until training ends."""
        return self.workers.count > 1 and self.schedule.mode != "at_end"

    def sites(self, base: Any) -> ModelSites:
        """Sites of the model as it is now."""
        return find_sites(base, known_architecture(base.config, self.architecture))

    def sizes(self, base: Any) -> dict[str, int]:
        """Elements of decoder and model and bytes, of the model or of what masks will leave of it."""
        return _sizes(self.sites(base), self.plan if self._masks.on else None)

    def begin(self, base: Any) -> None:
        """Forget what was cut before: the model is what a training begins with, without masks of one that failed."""
        self._masks.take_off()
        self.plan = None
        self.first = self.sizes(base)

    def mask(self, base: Any) -> None:
        """Mask what the plan says, where the model is not cut."""
        if self.is_masked and self.plan is not None:
            self._masks.put_on(self.sites(base), self.plan)

    def read(self, base: Any, tokenizer: Any, dataloader: Any, *, from_sources: bool) -> None:
        """Read calibration windows and held-out ones, on all processes those of the first.

        Args:
            base (`PreTrainedModel`): what will be cut.
            tokenizer (`PreTrainedTokenizerBase`): for the config's sources.
            dataloader (`DataLoader`): the trainer's.
            from_sources (`bool`): read the config's sources instead; a search reads nothing else.

        Raises:
            CalibrationError: no text, too little, or windows longer than the model's learned positions.
        """
        self._from_sources = from_sources
        # Of the first process: data sets and collators need not give the same windows everywhere.
        self.blocks = self.workers.lead(
            lambda: self._source_blocks(base, tokenizer) if from_sources else self._data_blocks(base, dataloader)
        )

    def cut(
        self, model: Any, optimizer: Any, tokenizer: Any, ratio: float, is_last: bool
    ) -> tuple[dict[str, float], PruningPlan]:
        """Cut a model once more, or mask more of it, in place.

        Args:
            model (`nn.Module`): the trainer's, with its adapters.
            optimizer (`Optimizer`, *optional*): whose state is cut with the parameters.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): for searches.
            ratio (`float`): share of the first decoder that is gone afterwards.
            is_last (`bool`): whether the config's own budget is due.

        Returns:
            `tuple`: numbers for the log, and the plan of this cut.

        Raises:
            CalibrationError: no text was read.
            UnsupportedModelError: training has broken the weights since it began.
        """
        base = base_of(model)
        check_weights(self.sites(base))
        if self.blocks is None:
            raise CalibrationError("no calibration text was read before this cut. Please report this.")
        with merged(model), quiet_bars() if self.config.search is None else contextlib.nullcontext():
            if self.is_masked:
                numbers, plan = self._mask_more(base, tokenizer, ratio, is_last)
            else:
                sites = self.sites(base)
                made, numbers = self._decided(sites, tokenizer, ratio, is_last)
                follower = None if optimizer is None else OptimizerFollower(optimizer, model)
                cut = carry_out(sites, made, None if follower is None else follower.follow)
                if follower is not None:
                    follower.finish()
                note_provenance(cut, made.config, made.plan)
                numbers["pruning/loss_after"] = self._loss(base)
                plan = made.plan
        self.plan = plan if self.plan is None else self.plan.then(plan)
        self.mask(base)
        sizes = self.sizes(base)
        numbers |= {
            "pruning/parameters": sizes["total"],
            "pruning/decoder_parameters": sizes["decoder"],
            "pruning/ratio": 1 - sizes["decoder"] / self.first["decoder"],
        }
        return numbers | _mean_widths(self.sites(base), self.plan if self.is_masked else None), plan

    def finish(self, model: Any) -> None:
        """Cut what was masked until now."""
        assert self.plan is not None
        self._masks.take_off()
        with merged(model):
            cut = carry_out(self.sites(base_of(model)), Decision(self.config, self.plan))
            note_provenance(cut, self.config, self.plan)

    def _decided(
        self, sites: ModelSites, tokenizer: Any, ratio: float, is_last: bool
    ) -> tuple[Decision, dict[str, float]]:
        """What the next cut removes and how it is repaired; the model is untouched.

        Several processes share the windows, and all go by what the first one decides.
        """
        blocks, held_out = self.blocks or (None, None)
        config = self._config_of(sites, ratio, is_last)
        needs = what_to_collect(config, None)
        if config.search is not None:
            needs = search_needs(config, config.calibration.domain_count)
        before = self._loss(sites.model)
        made = decide_and_repair(sites, tokenizer, config, blocks, held_out, needs=needs, workers=self.workers)
        return self.workers.share(replace(made, search=None)), {"pruning/loss_before": before}

    def _config_of(self, sites: ModelSites, ratio: float, is_last: bool) -> PruningConfig:
        """The config of one cut: it removes what is left to remove of the share that is due."""
        config = self.config
        if not self._from_sources:  # weights are of the sources' windows
            config = config.with_changes(calibration={"domain_weights": (), "clusters": 0})
        if self.schedule.mode != "progressive":
            return config
        if self.samples is None:
            domains = config.calibration.domain_count if self._from_sources else 1
            gradients = min(config.calibration.gradient_samples, max(_GRADIENT_SAMPLES, domains))
            config = config.with_changes(calibration={"gradient_samples": gradients})
        if is_last and has_budget(config):
            return config
        own = max(0.0, 1 - self.first["decoder"] * (1 - ratio) / sites.decoder_parameters)
        return config.with_changes(pruning_ratio=own, target_parameters=None, target_bytes=None, budgets={})

    def _mask_more(
        self, base: Any, tokenizer: Any, ratio: float, is_last: bool
    ) -> tuple[dict[str, float], PruningPlan]:
        """A cut of a model that is wrapped: decided on a copy that is really cut; the model takes the repairs."""
        self._masks.take_off()
        copied = self.workers.each(lambda: self.sites(cut_copy(self.sites(base), self.plan)))
        made, numbers = self._decided(copied, tokenizer, ratio, is_last)
        with masked(copied, made.plan, made.repairs):
            numbers["pruning/loss_after"] = self._loss(copied.model)
        take_repairs(self.sites(base), made.plan if self.plan is None else self.plan.then(made.plan), made.repairs)
        return numbers, made.plan

    def _loss(self, model: Any) -> float:
        """Mean loss per token on a few windows that no repair has seen."""
        blocks, held_out = self.blocks or (None, None)
        text = held_out if held_out is not None and len(held_out) else blocks
        if text is None:
            return float("nan")
        with quiet_model(model):
            sums = per_window_loss(model, text.select(slice(0, _LOSS_WINDOWS))).sum(0)
        return float(sums[0] / sums[1])

    def _count(self) -> int:
        """Calibration windows per cut."""
        own = self.config.calibration.samples
        return self.samples or (min(own, _SAMPLES) if self.schedule.mode == "progressive" else own)

    def _source_blocks(self, base: Any, tokenizer: Any) -> tuple[TokenBlocks | None, TokenBlocks | None]:
        config = self.config
        needs = what_to_collect(config, None)
        check_gradient_windows(config, needs)
        measures = config.search is not None or needs is not None
        samples = max(self._count(), len(config.calibration.sources))
        asked = config.with_changes(calibration={"samples": samples, "report": ()})
        blocks, held_out, _ = gather_texts(self.sites(base), tokenizer, asked, measures)
        return blocks, held_out

    def _data_blocks(self, base: Any, dataloader: Any) -> tuple[TokenBlocks, TokenBlocks | None]:
        config, sites = self.config, self.sites(base)
        if config.calibration.domain_weights or config.calibration.clusters:
            logger.warning(
                "calibration.domain_weights and calibration.clusters are not used: the data set's windows are one "
                "domain. Give data='calibration' to weigh the config's sources."
            )
        blocks = dataset_blocks(dataloader, self._count(), config.calibration.sequence_length, config.seed)
        check_windows(base, blocks, "Truncate the samples of the training data, which training reads, too")
        held_out = None
        if config.repair.method != "none" and config.repair.holdout > 0 and len(blocks) > 1:
            blocks, held_out = blocks.split(config.repair.holdout, config.seed)
        widest = {site.name: site.whole for site in sites if unit_of(site, config.units)}
        check_enough_tokens(sites, blocks.tokens, config.repair, widest)
        return blocks, held_out


def _sizes(sites: ModelSites, plan: PruningPlan | None) -> dict[str, int]:
    removed = 0 if plan is None else sum(sites.by_name[n].removed_parameters(kept) for n, kept in plan.changed())
    total = sites.total_parameters - removed
    size = next(sites.model.parameters()).element_size()
    return {"decoder": sites.decoder_parameters - removed, "total": total, "bytes": total * size}


def _mean_widths(sites: ModelSites, plan: PruningPlan | None) -> dict[str, float]:
    widths: dict[str, list[int]] = {}
    for site in sites:
        kept = plan.sites.get(site.name) if plan is not None else None
        widths.setdefault(site.kind, []).append(len(kept.kept) if kept is not None else site.groups * site.group_size)
    names = {"mlp": "channels", "attention": "heads", "experts": "expert_channels"}
    return {f"pruning/mean_{names[kind]}": sum(values) / len(sites.layers) for kind, values in widths.items()}
