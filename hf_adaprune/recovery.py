"""`recover()`: a pruned model learns from the dense one until it speaks like it again.

Texts are packed, some windows are set aside and measured before and after, and [`DistillationTrainer`] does the rest.
The weights come back in the dtypes they had, so that what was 2 bytes stays 2 bytes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .adapters import is_peft
from .config import CONFIG_NAME, CalibrationConfig, PruningConfig, Source
from .documents import input_device
from .errors import ConfigError, MissingDependencyError, PlanError, UnsupportedModelError
from .evaluation import Measurement, kl_divergence, mean_over_windows, per_window_loss, perplexity
from .fields import as_part
from .model_config import check_configs, own_architecture
from .names import name_of, rename
from .pipeline import PruningResult, as_sources
from .plan import PruningPlan
from .positions import check_lengths
from .recovery_config import RecoveryConfig
from .recovery_course import Checkpoints
from .recovery_result import RecoveryResult
from .recovery_texts import report_texts, training_texts
from .recovery_training import train
from .run_artefacts import kept_blocks
from .run_facts import bytes_digest, config_facts, text_digests, tokenizer_digest
from .run_folder import RunFolder, once_noted, open_run
from .sites import find_sites, uncompiled
from .teacher_cache import vocabulary_of
from .token_blocks import TokenBlocks
from .training import AdaPrunerCallback
from .training_files import plan_in
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_student", "recover"]

logger = logging.getLogger(__name__)

CHECKPOINT_MINUTES = 5.0


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | str | os.PathLike[str],
    config: RecoveryConfig | Mapping[str, Any] | None = None,
    *,
    sources: Sequence[Source] | Source,
    selection: Sequence[Source] | Source = (),
    report: Sequence[Source] | Source = (),
    pruning: PruningResult | str | os.PathLike[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
) -> RecoveryResult:
    """Train a pruned model to predict what the dense one predicts, in place.

    Args:
        model (`PreTrainedModel`): the pruned model.
        tokenizer (`PreTrainedTokenizerBase`): of both.
        teacher (`PreTrainedModel` or `str`): the dense model, its folder, or its id on the Hub.
        config ([`RecoveryConfig`] or `dict`, *optional*): how long and how, a config or its fields.
        sources (`str`, [`TextSource`] or a list of them): training text, as calibration sources are written.
        selection (the same, *optional*): text that training must not see; overlaps are refused.
        report (the same, *optional*): more of it, on which perplexity is reported: dense, before and after.
        pruning ([`PruningResult`] or `str`, *optional*): where the model came from: what [`prune`] returned, or the
            folder of the pruned checkpoint. Found by the folder that the model was loaded from where not given; what
            stands there is not used, with a warning, where the model has been cut again since.
        callbacks (list of `TrainerCallback`, *optional*): of the Trainer. With an [`AdaPrunerCallback`] the model may
            be the dense one, which shrinks while it learns from its former self; `tokens` has to say how
            long, or the callback's `every` when to cut.
        run_dir (`str`, *optional*): folder that keeps windows, measurements, a cached teacher, checkpoints and trained
            weights. After a kill the same call with the pruned model goes on from the last checkpoint; with
            `tokens` to the same weights, with `minutes` for what is left of them. Ctrl-C finishes the step and saves.
            Remove the folder when the result is saved. One process, and no [`AdaPrunerCallback`].
        checkpoint_minutes (`float`, *optional*, defaults to 5): between two checkpoints, which take the disk of two
            times weights and moments of the optimizer.

    Returns:
        [`RecoveryResult`]

    Raises:
        RunError: `run_dir` is of a run with other inputs (the message says which), or in use by another process.
        CheckpointError: its disk lacks room, or transformers would not save the student's configs as they are.
        ConfigError: `pruning` is of a model of other widths, or something else that contradicts; before any training.
        CalibrationError, UnsupportedModelError, MissingDependencyError: before any training.

    Example:

    ```python
    result = recover(pruned, tokenizer, "HuggingFaceTB/SmolLM2-135M", RecoveryConfig(minutes=30), sources="text.jsonl")
    result.save_pretrained("smollm2-recovered")
    ```
    """
    config = RecoveryConfig() if config is None else as_part("config", config, RecoveryConfig)
    model = uncompiled(model)
    check_student(model, config)
    check_configs(model)
    _check_cuts(config, callbacks)
    if run_dir is not None:
        _check_resumable(callbacks)
    provenance, plan = _provenance(model, pruning)
    name = str(teacher) if isinstance(teacher, (str, os.PathLike)) else name_of(teacher)
    with open_run(run_dir) as run:
        texts = partial(training_texts, model, tokenizer, config, sources, selection=selection, report=report)
        read = texts() if run is None else None
        dense = _load_teacher(teacher, model)
        if vocabulary_of(dense) != vocabulary_of(model):
            raise ConfigError(
                f"teacher and student should have one vocabulary. Found {vocabulary_of(dense)} tokens (teacher) and "
                f"{vocabulary_of(model)} (student). Name the model that the student was pruned from."
            )
        check_lengths(dense, {"sequence_length": config.sequence_length})
        layers = _layer_map(model, dense, plan) if config.hidden_weight and config.hidden_layers == "all" else None
        if run is not None:
            run.bind(_facts(model, dense, tokenizer, config, sources, selection, report))
        windows, held_out, _ = kept_blocks(run, Alone(), lambda: (*(read or texts()), {}))
        assert windows is not None
        reports = report_texts(model, tokenizer, report)
        evaluation = {
            source: {
                "dense": _kept_perplexity(run, "dense", dense, blocks),
                "before": _kept_perplexity(run, "before", model, blocks),
            }
            for source, blocks in reports.items()
        }
        measured = {"before": _kept_measure(run, "before", model, dense, held_out)} if held_out is not None else {}
        for callback in callbacks:
            if isinstance(callback, AdaPrunerCallback):
                callback.saves_base = False
                # No trainer's `processing_class` will bring it.
                callback.tokenizer = callback.tokenizer or tokenizer
        started = time.perf_counter()
        checkpoints = None if run is None else partial(Checkpoints, run, checkpoint_minutes)
        rename(model, "")
        tokens, steps, minutes, log = train(model, dense, windows, config, layers, started, callbacks, run, checkpoints)
        if held_out is not None:
            measured["after"] = _kept_measure(run, "after", model, dense, held_out)
        for source, blocks in reports.items():
            evaluation[source]["recovered"] = _kept_perplexity(run, "recovered", model, blocks)
    for callback in callbacks:
        if isinstance(callback, AdaPrunerCallback) and callback.plan is not None:
            plan, provenance = callback.plan, callback.record(model)
    return RecoveryResult(
        model, tokenizer, config, tokens, steps, minutes, measured, log, windows.facts(), provenance, plan, name,
        evaluation, max((blocks.input_ids.shape[1] for blocks in reports.values()), default=None),
    )  # fmt: skip


def _kept_perplexity(run: RunFolder | None, which: str, model: Any, blocks: TokenBlocks) -> Measurement:
    place = f"perplexity/{which} {blocks.digest[:12]}"
    return Measurement(**once_noted(run, place, lambda: dict(vars(perplexity(model, blocks)))))


def _kept_measure(
    run: RunFolder | None, when: str, model: Any, dense: Any, blocks: TokenBlocks
) -> dict[str, Measurement]:
    def made() -> dict[str, Any]:
        return {name: dict(vars(value)) for name, value in _measure(model, dense, blocks).items()}

    return {name: Measurement(**value) for name, value in once_noted(run, f"held out {when}", made).items()}


# -- before training --------------------------------------------------------------------------------------------------


def check_student(model: Any, config: RecoveryConfig) -> None:
    """Refuse what cannot be trained, or cannot be trained here.

    Args:
        model (`PreTrainedModel`, *optional*): the student; without it the installation alone is looked at.
        config ([`RecoveryConfig`]): whether there are adapters, and how long windows are.

    Raises:
        UnsupportedModelError: quantised weights without `lora`, or adapters that are there already.
        MissingDependencyError: adapters without peft.
        CalibrationError: windows longer than its learned positions.
    """
    if is_peft(model):
        raise UnsupportedModelError(
            "the student has adapters, and a recovered checkpoint holds none. Give it without them (merge_and_unload() "
            "keeps what they learned); `lora` (--lora) trains adapters of its own, and merges them."
        )
    if config.lora is None and getattr(model, "quantization_method", None) is not None:
        raise UnsupportedModelError(
            "the student's weights are quantised and cannot be trained. Set `lora` (--lora) to train adapters beside "
            "them, or load the checkpoint without quantisation."
        )
    if config.lora is not None:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "adapters are made by peft: pip install peft. Or train without `lora`."
            ) from error
    if model is not None:
        check_lengths(model, {"sequence_length": config.sequence_length})


def _check_cuts(config: RecoveryConfig, callbacks: Sequence[TrainerCallback]) -> None:
    """With a clock nobody knows how many steps there will be, so fractions of them come too late or never.

    And hidden states of all layers are compared by their numbers, which change when one goes.
    """
    for callback in callbacks:
        if isinstance(callback, AdaPrunerCallback):
            schedule = callback.schedule
            if config.hidden_weight and config.hidden_layers == "all" and "layer" in callback.config.units:
                raise ConfigError(
                    "`hidden_layers='all'` compares layer by layer, and the AdaPrunerCallback may remove some of them. "
                    "Set it to 'last', or take `layer` out of the callback's `units`."
                )
            if config.minutes is None:
                continue
            if schedule.mode == "progressive" and schedule.every is None:
                raise ConfigError(
                    "cuts while training need to know how long it is. Give `tokens` for `minutes`, or tell the "
                    "AdaPrunerCallback `every` how many steps to cut."
                )


def _check_resumable(callbacks: Sequence[TrainerCallback]) -> None:
    if any(isinstance(callback, AdaPrunerCallback) for callback in callbacks):
        raise ConfigError(
            "`run_dir` cannot restart a model that shrinks while it learns. Leave it out, or train with a "
            "DistillationTrainer and resume_from_checkpoint."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("`run_dir` is for one process. Leave it out, or start without `accelerate launch`.")


def _facts(
    model: Any, dense: Any, tokenizer: Any, config: RecoveryConfig, sources: Any, selection: Any, report: Any
) -> dict[str, Any]:
    """What a recovery is about: with any of it changed it cannot go on."""
    from . import __version__

    own = CalibrationConfig(sources=as_sources(sources), selection=as_sources(selection), report=as_sources(report))
    named = PruningConfig(calibration=own)
    said = named.to_dict()["calibration"]
    return {
        "version of hf_adaprune": __version__,
        "config": config.to_dict(),
        "sources": {role: said[role] for role in ("sources", "selection", "report")},
        "texts": text_digests(named),
        "tokenizer": tokenizer_digest(tokenizer),
        "student": config_facts(model),
        "teacher": config_facts(dense),
        "weights of the student": bytes_digest(dict(model.named_parameters())),
        "weights of the teacher": bytes_digest(dict(dense.named_parameters())),
    }


def _provenance(model: Any, pruning: Any) -> tuple[dict[str, Any], PruningPlan | None]:
    """The record and the plan of the pruned model, nothing where they are of what it was before a later cut."""
    record, plan = _found(model, pruning)
    if not record or _is_of(model, record, plan):
        return record, plan
    if pruning is not None:
        raise ConfigError(
            "`pruning` is the record of a model of other widths than this one's. Give what the last prune() returned, "
            "or the folder that this model was saved to."
        )
    logger.warning(
        "%s holds the record of the model as it was loaded, and it has been cut since: the recovered one has no record "
        "and no plan. Give pruning= what the last prune() returned.",
        name_of(model),
    )
    return {}, None


def _is_of(model: Any, record: Mapping[str, Any], plan: PruningPlan | None) -> bool:
    """Whether a model has the sizes that a record says and the widths that a plan leaves."""
    try:
        sites = find_sites(model, own_architecture(model, None))
    except UnsupportedModelError:
        return True  # quantised: what cannot be cut has not been
    if record.get("after", {}).get("decoder", sites.decoder_parameters) != sites.decoder_parameters:
        return False
    whole = {site.name: site.whole for site in sites}
    try:
        if plan is not None:
            plan.then(PruningPlan(sites.architecture.model_type, len(sites.layers), whole))
    except PlanError:
        return False
    return True


def _found(model: Any, pruning: Any) -> tuple[dict[str, Any], PruningPlan | None]:
    if isinstance(pruning, PruningResult):
        return pruning.to_dict(), pruning.plan
    folder = Path(pruning or name_of(model) or "-")
    if pruning is not None and not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"`pruning` should be the folder of a pruned checkpoint. {folder} holds no {CONFIG_NAME}.")
    try:
        text = (folder / CONFIG_NAME).read_text(encoding="utf-8") if (folder / CONFIG_NAME).is_file() else "{}"
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG_NAME} cannot be read: {error}. Is the copy complete?") from error
    return data, plan_in(folder)


def _load_teacher(teacher: Any, model: Any) -> Any:
    if isinstance(teacher, torch.nn.Module):
        return teacher
    from transformers import AutoModelForCausalLM

    try:
        dense: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"the teacher {teacher} could not be loaded: {error}") from error
    return dense.to(input_device(model))


def _layer_map(model: Any, dense: Any, plan: PruningPlan | None) -> dict[int, int]:
    own, other = (entry.config.get_text_config().num_hidden_layers for entry in (model, dense))
    kept = list(plan.kept_layers()) if plan is not None and plan.num_layers == other else list(range(own))
    if len(kept) != own or (plan is None and own != other):
        raise ConfigError(
            f"the student has {own} layers and the teacher {other}, and no plan says which correspond. Pass `pruning`, "
            "or set hidden_layers='last'."
        )
    return dict(enumerate(kept))


def _measure(model: Any, dense: Any, blocks: TokenBlocks) -> dict[str, Measurement]:
    loss = mean_over_windows("loss", per_window_loss(model, blocks))
    return {"loss": loss, "kl": kl_divergence(model, dense, blocks)}
