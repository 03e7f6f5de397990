"""`recover()`: a pruned model learns from the dense one until it speaks like it again.

Texts are packed, some windows are set aside and measured before and after, and [`DistillationTrainer`] does the rest.
The weights come back in the dtypes they had, so that what was 2 bytes stays 2 bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .calibration import TokenBlocks
from .config import CONFIG_NAME, CalibrationConfig, PruningConfig, Source
from .distillation import DistillationTrainer, Windows, cache_teacher, vocabulary_of
from .documents import input_device
from .errors import ConfigError, MissingDependencyError, UnsupportedModelError
from .evaluation import Measurement, kl_divergence, mean_over_windows, per_window_loss, perplexity
from .pipeline import PruningResult, Sizes, as_sources
from .plan import PruningPlan
from .recovery_config import DEFAULT_TOKENS, RecoveryConfig
from .recovery_course import Checkpoints, Course, schedule_shape
from .recovery_texts import report_texts, training_texts
from .run_artefacts import bytes_digest, kept_blocks, text_digests, tokenizer_digest
from .run_folder import RunFolder, once_noted, open_run
from .saving import PLAN_NAME, quiet_global_values, save_pruned
from .sites import find_sites
from .surgery import cast_parameters
from .training import AdaPrunerCallback
from .whole_files import scratch_folder
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RecoveryResult", "check_student", "recover"]

logger = logging.getLogger(__name__)

CHECKPOINT_MINUTES = 5.0
ENDLESS = 10**7  # steps of a training that the clock ends


@dataclass(frozen=True, eq=False)
class RecoveryResult:
    """What came of a recovery.

    Args:
        model (`PreTrainedModel`): the object that went in, trained; adapters are merged.
        tokenizer (`PreTrainedTokenizerBase`): as given.
        config ([`RecoveryConfig`]): what was asked for.
        tokens, steps (`int`): trained on.
        minutes (`float`): the training took, with caching the teacher.
        held_out (`dict[str, dict[str, Measurement]]`): `before` and `after`: `loss` and `kl` to the teacher on windows
            that training never saw.
        log (`tuple[dict[str, float], ...]`): losses, learning rate and gradient norm by step.
        text (`dict[str, Any]`): windows, domains and digest of the training text.
        pruning (`dict[str, Any]`): what `pruning_config.json` said about the pruned checkpoint.
        plan ([`PruningPlan`], *optional*): of the pruned checkpoint.
        teacher (`str`): its name.
        evaluation (`dict[str, dict[str, Measurement]]`): perplexity per report source: `dense` (the teacher), `before`
            and `pruned`, which is the recovered model.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: RecoveryConfig
    tokens: int
    steps: int
    minutes: float
    held_out: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    log: tuple[Mapping[str, float], ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    plan: PruningPlan | None = None
    teacher: str = ""
    evaluation: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)

    @property
    def after(self) -> Sizes:
        """The model's sizes, which training does not change."""
        return Sizes.of(find_sites(self.model))

    def to_dict(self) -> dict[str, Any]:
        """What the pruned checkpoint said, with a part `recovery`; JSON types."""
        own = {
            "config": self.config.to_dict(), "teacher": self.teacher, "tokens": self.tokens, "steps": self.steps,
            "minutes": round(self.minutes, 3), "text": dict(self.text), "log": [dict(entry) for entry in self.log],
            "held_out": {
                when: {name: vars(value) for name, value in measured.items()}
                for when, measured in self.held_out.items()
            },
        }  # fmt: skip
        # What was measured when it was pruned is not true of the recovered model.
        own["pruned"] = {"evaluation": self.pruning.get("evaluation", {})}
        evaluation = {
            source: {which: vars(value) for which, value in measured.items()}
            for source, measured in self.evaluation.items()
        }
        return {**self.pruning, "evaluation": evaluation, "recovery": own}

    def save_pretrained(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """Save checkpoint, plan and provenance, and check that they reload; see [`hf_adaprune.save_pruned`]."""
        return save_pruned(self, output_dir, **options)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | str | os.PathLike[str],
    config: RecoveryConfig | None = None,
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
        config ([`RecoveryConfig`], *optional*): how long and how.
        sources (`str`, [`TextSource`] or a list of them): training text, as calibration sources are written.
        selection (the same, *optional*): text that training must not see; overlaps are refused.
        report (the same, *optional*): more of it, on which perplexity is reported: dense, before and after.
        pruning ([`PruningResult`] or `str`, *optional*): where the model came from: what [`prune`] returned, or the
            folder of the pruned checkpoint; found by the model's name where not given.
        callbacks (list of `TrainerCallback`, *optional*): of the Trainer. With an [`AdaPrunerCallback`] the model may
            be the dense one, which shrinks while it learns from its former self; `tokens` has to say how long.
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
        CheckpointError: its disk lacks room.
        ConfigError, CalibrationError, UnsupportedModelError, MissingDependencyError: before any training.

    Example:

    ```python
    result = recover(pruned, tokenizer, "HuggingFaceTB/SmolLM2-135M", RecoveryConfig(minutes=30), sources="text.jsonl")
    result.save_pretrained("smollm2-recovered")
    ```
    """
    config = config or RecoveryConfig()
    check_student(model, config)
    if run_dir is not None:
        _check_resumable(callbacks)
    provenance, plan = _provenance(model, pruning)
    name = (
        str(teacher) if isinstance(teacher, (str, os.PathLike)) else str(getattr(teacher.config, "_name_or_path", ""))
    )
    with open_run(run_dir) as run:
        texts = partial(training_texts, model, tokenizer, config, sources, selection=selection, report=report)
        read = texts() if run is None else None
        dense = _load_teacher(teacher, model)
        if vocabulary_of(dense) != vocabulary_of(model):
            raise ConfigError(
                f"teacher and student should have one vocabulary. Found {vocabulary_of(dense)} tokens (teacher) and "
                f"{vocabulary_of(model)} (student). Name the model that the student was pruned from."
            )
        layers = _layer_map(model, dense, plan) if config.hidden_weight and config.hidden_layers == "all" else None
        if run is not None:
            run.bind(_facts(model, dense, tokenizer, config, sources, selection, report))
        train, held_out, _ = kept_blocks(run, Alone(), lambda: (*(read or texts()), {}))
        assert train is not None
        reports = report_texts(model, tokenizer, report)
        evaluation = {
            source: {
                "dense": _kept_perplexity(run, "dense", dense, blocks),
                "before": _kept_perplexity(run, "before", model, blocks),
            }
            for source, blocks in reports.items()
        }
        measured = {"before": _kept_measure(run, "before", model, dense, held_out)} if held_out is not None else {}
        started = time.perf_counter()
        checkpoints = None if run is None else partial(Checkpoints, run, checkpoint_minutes)
        tokens, steps, minutes, log = _train(model, dense, train, config, layers, started, callbacks, run, checkpoints)
        if held_out is not None:
            measured["after"] = _kept_measure(run, "after", model, dense, held_out)
        for source, blocks in reports.items():
            evaluation[source]["pruned"] = _kept_perplexity(run, "pruned", model, blocks)
    for callback in callbacks:
        if isinstance(callback, AdaPrunerCallback) and callback.plan is not None:
            plan, provenance = callback.plan, callback.record(model)
    text = {
        "windows": len(train), "sequence_length": train.input_ids.shape[1], "domains": list(train.domains),
        "sha256": train.digest,
    }  # fmt: skip
    return RecoveryResult(
        model, tokenizer, config, tokens, steps, minutes, measured, log, text, provenance, plan, name, evaluation
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
        config ([`RecoveryConfig`]): whether there are adapters.

    Raises:
        UnsupportedModelError: quantised weights without adapters.
        MissingDependencyError: adapters without peft.
    """
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
        "weights of the student": bytes_digest(dict(model.named_parameters())),
        "weights of the teacher": bytes_digest(dict(dense.named_parameters())),
    }


def _provenance(model: Any, pruning: Any) -> tuple[dict[str, Any], PruningPlan | None]:
    if isinstance(pruning, PruningResult):
        return pruning.to_dict(), pruning.plan
    folder = Path(pruning or getattr(model.config, "_name_or_path", "") or "-")
    if pruning is not None and not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"`pruning` should be the folder of a pruned checkpoint. {folder} holds no {CONFIG_NAME}.")
    try:
        text = (folder / CONFIG_NAME).read_text(encoding="utf-8") if (folder / CONFIG_NAME).is_file() else "{}"
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG_NAME} cannot be read: {error}. Is the copy complete?") from error
    return data, PruningPlan.load(folder / PLAN_NAME) if (folder / PLAN_NAME).is_file() else None


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


# -- training ---------------------------------------------------------------------------------------------------------


class _RecoveryTrainer(DistillationTrainer):
    course: Course
    shape: Callable[[float], float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self.shape(self.course.share()))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def _autocasts(config: RecoveryConfig, device: torch.device) -> bool:
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


@contextlib.contextmanager
def _as_it_was(model: Any, config: RecoveryConfig) -> Iterator[None]:
    """Afterwards dtypes, flags and config are what they were, whatever a trainer left behind."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    use_cache, environment = model.config.use_cache, os.environ.get("ACCELERATE_MIXED_PRECISION")
    known, dtypes = {name for name, _ in model.named_parameters()}, {}
    if config.lora is None:
        # Steps smaller than half of bfloat16's last digit would be lost: what is trained is float32.
        narrow = {n: torch.float32 for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        dtypes = cast_parameters(model, narrow)
    try:
        yield
    finally:
        for leftover in ("forward", "_original_forward"):
            model.__dict__.pop(leftover, None)
        # A bias that a cut added meanwhile has the dtype that its weight was trained in.
        names = [name for name, _ in model.named_parameters() if name.endswith(".bias") and name not in known]
        added = {name: dtypes[w] for name in names if (w := name.removesuffix("bias") + "weight") in dtypes}
        cast_parameters(model, {**dtypes, **added})
        for module, training in modes:
            module.training = training
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.config.use_cache = use_cache
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        if environment is not None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = environment


@contextlib.contextmanager
def _trained_part(model: Any, config: RecoveryConfig) -> Iterator[Any]:
    """The model to train: all of it, or with adapters, which are merged at the end."""
    if config.lora is None:
        if not config.train_embeddings:
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                if module is not None:
                    module.requires_grad_(False)
        yield model
        return
    import peft

    settings = config.lora
    scale: Any = 2 * settings.rank if settings.alpha is None else settings.alpha
    targets = list(settings.targets) or "all-linear"
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=settings.rank, lora_alpha=scale, target_modules=targets, task_type="CAUSAL_LM"),
    )
    try:
        yield adapted
    except BaseException:
        adapted.unload()
        raise
    else:
        # The sum is rounded once, not the adapter first and then the sum.
        narrow = {n: torch.float32 for n, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        before = cast_parameters(model, narrow)
        adapted.merge_and_unload()
        named = {name.replace(".base_layer.", "."): dtype for name, dtype in before.items()}
        cast_parameters(model, named)
    finally:
        model.__dict__.pop("peft_config", None)


def _train(
    model: Any,
    dense: Any,
    blocks: TokenBlocks,
    config: RecoveryConfig,
    layers: Mapping[int, int] | None,
    started: float,
    callbacks: Sequence[TrainerCallback],
    run: RunFolder | None = None,
    checkpoints: Callable[[Course], Checkpoints] | None = None,
) -> tuple[int, int, float, tuple[dict[str, float], ...]]:
    """Train, or take what an earlier run trained: tokens, steps, minutes and log."""
    device = input_device(model)
    batches = _batches_at_once(device)
    step_tokens = config.step_tokens * batches
    steps = ENDLESS if config.minutes is not None else -(-(config.tokens or DEFAULT_TOKENS) // step_tokens)
    if config.minutes is None and steps * step_tokens > len(blocks) * config.sequence_length + step_tokens:
        times = steps * step_tokens / (len(blocks) * config.sequence_length)
        logger.info("there are %d tokens of training text; they are read %.1f times.", blocks.tokens, times)
    forked = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(tempfile.gettempdir(), "hf_adaprune_recovery"))
        stack.enter_context(torch.random.fork_rng(devices=forked))
        with _as_it_was(model, config):
            torch.manual_seed(config.seed)
            with _trained_part(model, config) as student:
                found = None if run is None else run.read("trained")
                if found is not None and run is not None:
                    shutil.rmtree(run.place / Checkpoints.NAME, ignore_errors=True)
                    tensors, (tokens, done, minutes, log) = found
                    student.load_state_dict(tensors, strict=False)
                    return tokens, done, minutes, tuple(log)
                teacher = dense
                if config.top_k is not None:
                    place = Path(folder if run is None else run.place) / "teacher"
                    teacher = cache_teacher(dense, blocks, place, config.top_k, temperature=config.temperature)
                course = Course(config, steps, started, len(blocks) / batches)
                saver = None if checkpoints is None else checkpoints(course)
                arguments = TrainingArguments(
                    output_dir=str(folder) if saver is None else str(saver.folder),
                    max_steps=steps,
                    per_device_train_batch_size=config.batch_size,
                    gradient_accumulation_steps=config.gradient_accumulation,
                    learning_rate=config.learning_rate,
                    weight_decay=config.weight_decay,
                    max_grad_norm=config.max_grad_norm,
                    bf16=_autocasts(config, device),
                    use_cpu=device.type == "cpu",
                    seed=config.seed,
                    save_strategy="no",  # the checkpoints' callback says when
                    report_to="none",
                    disable_tqdm=True,
                    logging_strategy="no",  # the course says when
                    remove_unused_columns=False,
                )
                trainer = _RecoveryTrainer(
                    student,
                    arguments,
                    train_dataset=Windows(blocks),
                    callbacks=list(callbacks),
                    teacher=teacher,
                    temperature=config.temperature,
                    alpha=config.alpha,
                    hidden_weight=config.hidden_weight,
                    hidden_layers=layers,
                )
                for printer in (PrinterCallback, ProgressCallback):
                    trainer.remove_callback(printer)
                trainer.course = course
                trainer.shape = schedule_shape(config)
                trainer.add_callback(course)
                _run(trainer, saver)
                log = [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history[:-1]]
                done, tokens = trainer.state.global_step, trainer.tokens_seen * arguments.world_size
                minutes = (time.perf_counter() - course.started) / 60
                if run is not None and saver is not None:
                    weights = {name: own for name, own in student.named_parameters() if own.requires_grad}
                    run.keep("trained", weights, [tokens, done, minutes, log])
                    shutil.rmtree(saver.folder, ignore_errors=True)
                    saver.raise_if_interrupted()
                trainer.accelerator.free_memory()
    return tokens, done, minutes, tuple(log)


def _batches_at_once(device: torch.device) -> int:
    """How many times `batch_size` windows a forward reads: once per process, and per GPU where one process has several.

    A Trainer without a launcher spreads a batch over all the GPUs that it sees.
    """
    # Made for these two numbers, which hang on what the launcher and the machine say; nothing is written.
    arguments = TrainingArguments(per_device_train_batch_size=1, use_cpu=device.type == "cpu", report_to="none")
    return arguments.train_batch_size * arguments.world_size


def _run(trainer: _RecoveryTrainer, saver: Checkpoints | None) -> None:
    """Train from the beginning, or from the last checkpoint.

    Raises:
        KeyboardInterrupt: the user broke off, and what was trained is saved.
    """
    if saver is None:
        trainer.train()
        return
    saver.trainer = trainer
    trainer.add_callback(saver)
    own = cast(torch.nn.Module, trainer.model).parameters()
    saved = sum(parameter.nbytes * (3 if parameter.requires_grad else 1) for parameter in own)
    saver.run.check_space(2 * saved, "two checkpoints")
    with saver.listening(), quiet_global_values():
        trainer.train(resume_from_checkpoint=saver.resume())
    if not trainer.course.over:
        saver.raise_if_interrupted()
