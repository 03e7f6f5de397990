"""`prune_to_disk()`: a model that does not fit in memory is pruned one decoder layer at a time, into a folder.

Two walks over the layers. The first measures and scores, and a plan is decided; the second repairs each layer on the
pruned model's own activations, cuts it and writes it. Nothing of a layer stays when the next one comes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from .activations import ActivationStore
from .architectures import Architecture
from .budgets import check_budgets
from .clock import Clock
from .compensation import Repair, repair_plan
from .config import PruningConfig, Source
from .costs import Costs
from .errors import CheckpointError, ConfigError
from .evaluation import Measurement, mean_over_windows, per_window_loss, perplexity, run_layers
from .footprint import disk_by_layer, peak_by_layer
from .importance import Scores
from .layer_scores import forward_only_config, layer_part, score_layers
from .layerwise import Kept, part_of_plan, repairs_by_layer
from .masking import masked
from .model_config import own_architecture
from .offloading import check_finite, check_layer, layer_weights, load_offloaded, other_weights
from .pipeline import PruningResult, Sizes, as_sources, note_provenance
from .plan import PruningPlan
from .public import base_model_name
from .quiet import quiet_bars, quiet_model
from .repairing import (
    RepairReport,
    check_repairs,
    counted_held_out,
    lowest,
    own_repair,
    relative_weights,
    say_what_stays_unrepaired,
)
from .run_artefacts import kept_blocks, kept_layer_scores, repair_name
from .run_facts import bind_layer, bytes_digest, run_facts
from .run_folder import SPARE_BYTES, RunFolder, locked_output, open_run
from .saving import check_output, quiet_global_values, write_records
from .shards import ShardWriter, check_shards, digests_of
from .sites import ModelSites, find_sites, uncompiled
from .skeleton import bound_skeleton
from .stages import decide_by, gather_texts, needs_text, what_to_collect
from .statistics import Needs, Statistics
from .streaming import HiddenStream
from .surgery import apply_plan, cut_layer
from .token_blocks import TokenBlocks
from .whole_files import check_writable, place_of, room_for, scratch_folder, whole_folder
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SHARD_SIZE", "StreamedResult", "prune_to_disk"]

logger = logging.getLogger(__name__)

SHARD_SIZE = "500MB"  # tensors wait in memory until a shard is full

Layers = Generator[tuple[int, dict[str, Repair]], None, None]


@dataclass(frozen=True, eq=False)
class StreamedResult(PruningResult):
    """What came of a run of [`prune_to_disk`]: a [`PruningResult`] without a model, for that is in a folder.

    Args:
        folder (`Path`): the checkpoint.
        expected_peak_bytes (`int`): main memory at the peak, as it was stated before the run.
    """

    folder: Path = field(default_factory=Path)
    expected_peak_bytes: int = 0

    def save_pretrained(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """The model is saved already.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"the pruned model is saved in {self.folder} already. Copy that folder.")

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish the folder; see [`hf_adaprune.push_to_hub`]."""
        from .hub import push_to_hub

        return push_to_hub(self.folder, repo_id, **options)


def prune_to_disk(
    model: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: PruningConfig | None = None,
    output_dir: str | os.PathLike[str] = "pruned",
    *,
    calibration: Sequence[Source] | Source | None = None,
    plan: PruningPlan | None = None,
    plan_path: str | os.PathLike[str] | None = None,
    architecture: Architecture | None = None,
    max_shard_size: str | int = SHARD_SIZE,
    check: bool = True,
    run_dir: str | os.PathLike[str] | None = None,
) -> StreamedResult:
    """Prune a causal language model with one decoder layer in memory at a time, and save the result layer by layer.

    For models that are larger than memory. The numbers are those of [`prune`] with `repair.schedule="sequential"`, but
    there is no backward pass, so metrics that need one are left out with a warning (see [`forward_only_config`]), and
    perplexity is measured on the masked model rather than the cut one.

    Args:
        model (`PreTrainedModel` or `str`): a model that was loaded with a `device_map` that leaves its layers on disk
            or CPU; or a folder or id on the Hub, which is loaded so. The model stays as it is.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): that of `model` where a name was given.
        config ([`PruningConfig`], *optional*): what to do; the recipe `default` where not given.
        output_dir (`str`, *optional*, defaults to `"pruned"`): a folder that does not exist or is empty. Activations
            that exceed `config.activation_bytes` go to files beside it, for the time of the run.
        calibration (`str`, [`TextSource`] or a list of them, *optional*): sources instead of the config's.
        plan ([`PruningPlan`], *optional*): carry out this plan instead of deciding one.
        plan_path (`str`, *optional*): the plan is written here as soon as it is decided.
        architecture ([`Architecture`], *optional*): of a family that is not built in.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`): of the files of weights. So much waits in memory.
        check (`bool`, *optional*, defaults to `True`): load the checkpoint again, its layers left on disk, and compare
            every tensor with what was written, bit by bit.
        run_dir (`str`, *optional*): folder in which windows and every layer's scores and repairs are kept when they are
            done. After a kill the same call goes on from there to the same checkpoint: layers that are done are run and
            written again, but not measured or solved for. Remove it when you have the result.

    Returns:
        [`StreamedResult`]

    Raises:
        UnsupportedModelError: the model cannot be pruned.
        ConfigError, BudgetError, CalibrationError: before any work is lost.
        CheckpointError: the folder cannot be written, lacks space, is being written by another run, or does not reload.
            Nothing is left behind then but `run_dir`.
        RunError: `run_dir` is of a run with other inputs; the message says which.

    Example:

    ```python
    from hf_adaprune import PruningConfig, prune_to_disk

    config = PruningConfig.recipe("flap", pruning_ratio=0.2, calibration={"sources": "text.txt"})
    result = prune_to_disk("meta-llama/Llama-3.1-70B", config=config, output_dir="llama-pruned")
    ```
    """
    from accelerate.utils import convert_file_size_to_int

    clock = Clock()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("prune_to_disk works in one process. Start it without `accelerate launch`.")
    config = PruningConfig.recipe("default") if config is None else config
    if calibration is not None:
        config = config.with_changes(calibration={"sources": as_sources(calibration)})
    config = forward_only_config(config)
    limit = int(convert_file_size_to_int(max_shard_size))
    target = check_output(output_dir)
    if plan_path is not None:
        check_writable(plan_path)
        Path(plan_path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_output(target))

        def folder(what: str) -> str:
            return str(stack.enter_context(scratch_folder(room_for(target), f".{place_of(target).name}.{what}")))

        live: Any = model
        if isinstance(model, (str, os.PathLike)):
            live, tokenizer = _loaded(model, tokenizer, config, folder("converted"))
        live = uncompiled(live)
        found = find_sites(live, own_architecture(live, architecture))
        run = _Run(found, _skeleton(found), config, target, limit, clock)
        stack.enter_context(other_weights(found))
        stack.enter_context(quiet_model(live))
        run.check_disk()
        run.kept = stack.enter_context(open_run(run_dir))
        run.store = ActivationStore(config.activation_bytes, folder("activations"))
        return run.walk(tokenizer, plan, plan_path, check)


def _loaded(name: Any, tokenizer: Any, config: PruningConfig, folder: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    if tokenizer is None and needs_text(config):
        tokenizer = AutoTokenizer.from_pretrained(name)
    skeleton = bound_skeleton(AutoConfig.from_pretrained(name))
    return load_offloaded(name, skeleton, folder, dtype="auto"), tokenizer


def _skeleton(sites: ModelSites) -> ModelSites:
    """The same model without weights, hooks and parts elsewhere."""
    model = sites.model
    with torch.device("meta"):
        bare = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    bare.generation_config = copy.deepcopy(model.generation_config)
    return find_sites(bare, sites.architecture)


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


class _Run:
    """What the walks of one run share."""

    def __init__(
        self, sites: ModelSites, dense: ModelSites, config: PruningConfig, target: Path, limit: int, clock: Clock
    ) -> None:
        self.sites, self.dense, self.config = sites, dense, config
        self.target, self.limit, self.clock = target, limit, clock
        self.store = ActivationStore()
        self.kept: RunFolder | None = None
        self.before = Sizes.of(dense)
        self.costs = Costs.of(dense, config)
        self.expected = peak_by_layer(dense, config, limit)
        self.digests: dict[str, int] = {}
        self.biased: dict[str, Repair] = {}
        self.reports: list[RepairReport] = []

    def check_disk(self) -> None:
        """Refuse a disk without room for the checkpoint and for activations that do not fit in memory."""
        written, spilled = disk_by_layer(self.dense, self.config)
        needed = written + spilled + SPARE_BYTES
        room = room_for(self.target)
        free = shutil.disk_usage(room).free
        if free < needed:
            raise CheckpointError(
                f"{room} has {free / 2**20:,.0f} MiB free; the checkpoint and "
                f"{spilled / 2**20:,.0f} MiB of activations need up to {needed / 2**20:,.0f} MiB. Free some space, "
                "name another disk, or give fewer calibration windows."
            )

    def walk(
        self, tokenizer: Any, plan: PruningPlan | None, plan_path: str | os.PathLike[str] | None, check: bool
    ) -> StreamedResult:
        """Both walks, and the record."""
        sites, config, clock = self.sites, self.config, self.clock
        prefix = f"{sites.architecture.layers}."
        check_finite(own for own in sites.model.named_parameters() if not own[0].startswith(prefix))
        if plan is None:
            check_budgets(self.dense, config, self.costs)
        else:
            self.dense.check(plan)
        logger.info("layer by layer: about %s MiB of memory at the peak.", f"{self.expected / 2**20:,.0f}")
        needs = what_to_collect(config, plan)
        if self.kept is not None:
            self._bind(self.kept, tokenizer, plan)
        clock.stop("find sites")
        read = partial(gather_texts, sites, tokenizer, config, needs is not None)
        blocks, held_out, reports = kept_blocks(self.kept, Alone(), read)
        clock.stop("texts")

        measure = partial(self._measure, blocks)
        if plan is None:
            plan, means = decide_by(self.dense, config, needs, measure, self.costs, clock)
        else:
            means = None if needs is None else measure(needs, None)[2]
        if plan_path is not None:
            plan.save(plan_path)

        with whole_folder(self.target) as folder:
            writer = ShardWriter(folder, self.limit)
            schedule, evaluation = self._write(writer, plan, means, blocks, held_out, reports)
            outside = _without_tied(sites.model, prefix)
            self.digests.update(digests_of(outside))
            cut = apply_plan(_skeleton(sites), plan, self.biased)
            after = Sizes.of(cut)
            writer.add(revert_weight_conversion(cut.model, outside))
            note_provenance(cut, config, plan)
            with quiet_global_values():
                # Everything but weights, which an empty state dict leaves out; shards that had their names would go.
                cut.model.save_pretrained(folder, state_dict={})
            writer.close(after.total)
            clock.stop("save")
            result = StreamedResult(
                None,
                tokenizer,
                config,
                plan,
                self.before,
                after,
                tuple(self.reports),
                schedule,
                evaluation,
                {} if blocks is None else blocks.facts(),
                clock.seconds,
                None,
                base_model_name(sites.model),
                self.target,
                self.expected,
            )
            write_records(result, folder)
            if check:
                tied = [name for name in sites.model.state_dict() if name not in outside]
                with quiet_global_values():
                    check_shards(folder, cut, self.digests, tied)
                clock.stop("check")
        return result

    def _bind(self, run: RunFolder, tokenizer: Any, plan: PruningPlan | None) -> None:
        """Refuse a folder of a run with other inputs; the layers' weights are compared when they are in memory."""
        outside = _without_tied(self.sites.model, f"{self.sites.architecture.layers}.")
        own = {"weights outside of the layers": bytes_digest(outside)}
        run.bind(run_facts(self.sites, tokenizer, self.config, plan, **own))
        readers = sum(site.columns * site.outputs for site in self.dense)
        run.check_space(4 * readers, "the repairs")

    def _measure(
        self, blocks: TokenBlocks | None, needs: Needs | None, current: PruningPlan | None
    ) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
        round_of = "dense" if current is None else current.digest[:12]

        def measured() -> tuple[Scores, torch.Tensor | None, Statistics | None]:
            kept = Kept(self.kept, f"layers/{round_of}")
            return score_layers(self.sites, blocks, needs, self.config, current, self.store, kept)

        found = kept_layer_scores(self.kept, f"rounds/{round_of}", measured)
        self.clock.stop("statistics")
        return found

    def _write(
        self,
        writer: ShardWriter,
        plan: PruningPlan,
        means: Statistics | None,
        blocks: TokenBlocks | None,
        held_out: TokenBlocks | None,
        reports: Mapping[str, TokenBlocks],
    ) -> tuple[str, dict[str, dict[str, Measurement]]]:
        """The second walk: repair, cut and write layer after layer; and what came of it."""
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


def _without_tied(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Weights outside of the layers, each tied one once."""
    found = {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in found and source in found and torch.equal(found[tied], found[source]):
            del found[tied]
    return found
