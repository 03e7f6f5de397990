"""The second walk of `prune_to_disk()`: every decoder layer is repaired, cut and written, one in memory at a time.

Held-out and report windows go through the layers beside it, so that a repair that does not help is noticed, and what
came of the run is measured without another walk.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from .activations import ActivationStore
from .clock import Clock
from .compensation import Repair, repair_plan
from .config import PruningConfig
from .evaluation import Measurement, mean_over_windows, per_window_loss, perplexity, run_layers
from .layer_scores import layer_part
from .layerwise import Kept, part_of_plan, repairs_by_layer
from .masking import masked
from .offloading import check_layer, layer_weights
from .plan import PruningPlan
from .quiet import quiet_bars
from .repairing import (
    RepairReport,
    check_repairs,
    counted_held_out,
    lowest,
    own_repair,
    relative_weights,
    say_what_stays_unrepaired,
)
from .run_artefacts import repair_name
from .run_facts import bind_layer
from .run_folder import RunFolder
from .shards import ShardWriter, digests_of
from .sites import ModelSites
from .statistics import Statistics
from .streaming import HiddenStream
from .surgery import cut_layer
from .token_blocks import TokenBlocks

__all__ = ["LayerWriter"]

logger = logging.getLogger(__name__)

Layers = Generator[tuple[int, dict[str, Repair]], None, None]


@dataclass
class _Windows:
    """Windows that go through the layers beside the calibration text.

    Args:
        blocks ([`TokenBlocks`]): the windows.
        how (`str`): through the `dense` layers, the `pruned` ones without repairs, or the `repaired` ones.
        stream ([`HiddenStream`]): their hidden states.
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows, in the loss.
    """

    blocks: TokenBlocks
    how: str
    stream: HiddenStream
    domain_weights: tuple[float, ...] = ()

    def advance(self, number: int, own: PruningPlan, repairs: Mapping[str, Repair], is_dropped: bool) -> None:
        sites = self.stream.sites
        if self.how == "dense":
            with self.stream.at(number):
                run_layers(sites.model, self.blocks)
            return
        takes = "input" if is_dropped else "output"
        with self.stream.at(number, takes), masked(sites, own, repairs if self.how == "repaired" else {}):
            run_layers(sites.model, self.blocks)

    def perplexity(self) -> Measurement:
        sites = self.stream.sites
        with self.stream.at(len(sites.layers), "nothing"), quiet_bars():
            return perplexity(sites.model, self.blocks)

    def loss(self) -> float:
        sites = self.stream.sites
        with self.stream.at(len(sites.layers), "nothing"), quiet_bars():
            sums = per_window_loss(sites.model, self.blocks)
        return mean_over_windows("loss", sums * relative_weights(self.blocks, self.domain_weights)[:, None]).value


@dataclass(eq=False)
class LayerWriter:
    """The second walk, and what it leaves for the rest of the model.

    Args:
        sites ([`ModelSites`]): the model, its layers elsewhere.
        dense ([`ModelSites`]): the same model without weights.
        config ([`PruningConfig`]): what to do.
        store ([`ActivationStore`]): holds hidden states between the layers.
        kept ([`RunFolder`], *optional*): has repairs of an earlier run, and gets new ones.
        clock ([`Clock`]): books the seconds.

    Attributes:
        digests (`dict[str, int]`): of every tensor that was written.
        biased (`dict[str, Repair]`): shapes of repairs that add a bias, by site.
        reports (`list[RepairReport]`): what came of single sites' repairs.
    """

    sites: ModelSites
    dense: ModelSites
    config: PruningConfig
    store: ActivationStore
    kept: RunFolder | None
    clock: Clock
    digests: dict[str, int] = field(default_factory=dict, init=False)
    biased: dict[str, Repair] = field(default_factory=dict, init=False)
    reports: list[RepairReport] = field(default_factory=list, init=False)

    def write(
        self,
        writer: ShardWriter,
        plan: PruningPlan,
        means: Statistics | None,
        blocks: TokenBlocks | None,
        held_out: TokenBlocks | None,
        reports: Mapping[str, TokenBlocks],
    ) -> tuple[str, dict[str, dict[str, Measurement]]]:
        """Repair, cut and write layer after layer.

        Args:
            writer ([`ShardWriter`]): takes the layers' weights.
            plan ([`PruningPlan`]): what stays.
            means ([`Statistics`], *optional*): means of the first walk, for a repair that needs no others.
            blocks ([`TokenBlocks`], *optional*): calibration windows, for the repair that walks.
            held_out ([`TokenBlocks`], *optional*): windows on which a repair has to help, or is left out.
            reports (mapping of `str` to [`TokenBlocks`]): report text by source.

        Returns:
            `tuple`: the schedule of the repair that was kept, and perplexities by report source, `dense` and `pruned`.
        """
        repair = own_repair(self.config)
        weights = self.config.calibration.domain_weights
        held_out = counted_held_out(held_out, weights)
        watched = {("dense", name): self._windows(own, "dense") for name, own in reports.items()}
        watched |= {("pruned", name): self._windows(own, "repaired") for name, own in reports.items()}
        schedule = repair.schedule if repair.method != "none" and blocks is not None else "none"
        walks = schedule == "sequential"
        if walks and held_out is not None:
            watched |= {("check", how): self._windows(held_out, how, weights) for how in ("repaired", "pruned")}
        if walks:
            assert blocks is not None
            kept = Kept(self.kept, repair_name("walked", self.config, plan))
            layers: Layers = repairs_by_layer(self.sites, plan, blocks, repair, weights, self.store, kept)
        else:
            say_what_stays_unrepaired(plan, repair)
            layers = self._by_means(plan, means, held_out)
        self._cut(writer, plan, layers, watched)
        self.clock.stop("repair and write")
        losses = {key[1]: own.loss() for key, own in watched.items() if key[0] == "check"}
        if losses:
            logger.info("held-out loss: sequential %.4f, none %.4f", losses["repaired"], losses["pruned"])
        if losses and lowest(losses) == "pruned":
            logger.warning("the sequential repair was dropped, it did not lower the loss on held-out windows.")
            schedule = "none"
            writer.start_again()
            self.digests, self.biased = {}, {}
            again = {("pruned", name): self._windows(own, "pruned") for name, own in reports.items()}
            self._cut(writer, plan, self._by_means(plan, None, None), again)
            watched |= again
            self.clock.stop("repair and write")
        evaluation = {name: {how: watched[how, name].perplexity() for how in ("dense", "pruned")} for name in reports}
        for own in watched.values():
            own.stream.close()
        return schedule, evaluation

    def _windows(self, blocks: TokenBlocks, how: str, weights: tuple[float, ...] = ()) -> _Windows:
        return _Windows(blocks, how, HiddenStream(self.sites, self.store), weights)

    def _cut(self, writer: ShardWriter, plan: PruningPlan, layers: Layers, watched: Mapping[Any, _Windows]) -> None:
        bar = transformers_logging.tqdm(layers, total=len(self.sites.layers), desc="repair and write", unit="layer")
        with contextlib.closing(layers), quiet_bars():
            for number, repairs in bar:
                bind_layer(self.kept, number, self.sites.layers[number])
                own = part_of_plan(plan, number)
                is_dropped = number in plan.dropped_layers
                for windows in watched.values():
                    windows.advance(number, own, repairs, is_dropped)
                if not is_dropped:
                    self._write_layer(writer, plan, number, repairs)

    def _write_layer(self, writer: ShardWriter, plan: PruningPlan, number: int, repairs: Mapping[str, Repair]) -> None:
        from accelerate.utils import set_module_tensor_to_device

        layer = copy.deepcopy(self.dense.layers[number])
        for name, tensor in self.sites.layers[number].state_dict().items():
            set_module_tensor_to_device(layer, name, tensor.device, value=tensor, dtype=tensor.dtype)
        cut_layer(layer, number, self.sites.architecture, plan, repairs)
        for name, repair in repairs.items():
            if repair.bias is not None:
                self.biased[name] = Repair(*(torch.empty_like(t, device="meta") for t in (repair.weight, repair.bias)))
        new = plan.kept_layers().index(number)
        tensors = layer.state_dict(prefix=f"{self.sites.architecture.layers}.{new}.")
        self.digests.update(digests_of(tensors))
        writer.add(revert_weight_conversion(self.dense.model, tensors))

    @torch.no_grad()
    def _by_means(self, plan: PruningPlan, means: Statistics | None, held_out: TokenBlocks | None) -> Layers:
        """Layers with the repair that needs means alone (or none), each site's checked on held-out windows."""
        repair = own_repair(self.config)
        stream = HiddenStream(self.sites, self.store)
        with contextlib.closing(stream):
            for number in range(len(self.sites.layers)):
                part, own = layer_part(self.sites, number), part_of_plan(plan, number)
                with layer_weights(self.sites, number):
                    check_layer(self.sites, number)
                    repairs = {} if means is None else repair_plan(part, own, means, torch.ones(1), repair)
                    if held_out is not None and means is not None:
                        if repairs:
                            with stream.at(number, "nothing"):
                                weights = self.config.calibration.domain_weights
                                reports = check_repairs(part, own, repairs, held_out, weights)
                            self.reports.extend(reports)
                            repairs = {report.name: repairs[report.name] for report in reports if report.kept}
                        with stream.at(number):
                            run_layers(part.model, held_out)
                    yield number, repairs
