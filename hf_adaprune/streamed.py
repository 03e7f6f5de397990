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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from .activations import ActivationStore
from .allocation_checks import tell_unread_fields
from .architectures import Architecture
from .budgets import check_budgets
from .clock import Clock
from .config import PruningConfig, Source
from .costs import Costs
from .errors import CheckpointError, ConfigError
from .footprint import disk_by_layer, peak_by_layer
from .importance import Scores
from .layer_scores import forward_only_config, score_layers
from .layer_writing import LayerWriter
from .layerwise import Kept
from .model_config import check_configs, own_architecture
from .offloading import check_finite, load_offloaded, other_weights
from .pipeline import PruningResult, Sizes, as_sources, note_provenance
from .plan import PruningPlan
from .public import base_model_name
from .quiet import quiet_global_values, quiet_model
from .run_artefacts import kept_blocks, kept_layer_scores
from .run_facts import bytes_digest, run_facts
from .run_folder import SPARE_BYTES, RunFolder, locked_output, open_run
from .saving import check_output, write_records
from .shards import ShardWriter, check_shards, digests_of
from .sites import ModelSites, find_sites, uncompiled
from .skeleton import bound_skeleton
from .stages import decide_by, gather_texts, needs_text, what_to_collect
from .statistics import Needs, Statistics
from .surgery import apply_plan
from .token_blocks import TokenBlocks
from .whole_files import check_apart, check_no_folder, check_writable, place_of, room_for, scratch_folder, whole_folder
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SHARD_SIZE", "StreamedResult", "prune_to_disk"]

logger = logging.getLogger(__name__)

SHARD_SIZE = "500MB"  # tensors wait in memory until a shard is full


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
    config: PruningConfig | Mapping[str, Any] | str | None = None,
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
        config ([`PruningConfig`], `dict` or `str`, *optional*): what to do: a config, its fields or the name of a
            recipe; the recipe `default` where not given.
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
        CheckpointError: the folder cannot be written, lacks space, is being written by another run, or does not reload;
            or transformers does not save the model's configs. Nothing is left behind then but `run_dir`.
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
    config = PruningConfig.read("default" if config is None else config)
    if calibration is not None:
        config = config.with_changes(calibration={"sources": as_sources(calibration)})
    config = forward_only_config(config)
    limit = int(convert_file_size_to_int(max_shard_size))
    target = check_output(output_dir)
    check_apart({"output_dir": output_dir, "run_dir": run_dir})
    if plan_path is not None:
        check_no_folder("plan_path", plan_path)
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
        check_configs(live)
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
            tell_unread_fields(config)
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
            layers = LayerWriter(sites, self.dense, config, self.store, self.kept, clock)
            schedule, evaluation = layers.write(writer, plan, means, blocks, held_out, reports)
            outside = _without_tied(sites.model, prefix)
            digests = layers.digests | digests_of(outside)
            cut = apply_plan(_skeleton(sites), plan, layers.biased)
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
                tuple(layers.reports),
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
                    check_shards(folder, cut, digests, tied)
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


def _without_tied(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Weights outside of the layers, each tied one once."""
    found = {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}
    for tied, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in found and source in found and torch.equal(found[tied], found[source]):
            del found[tied]
    return found
