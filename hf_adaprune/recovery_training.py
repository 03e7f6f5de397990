"""The training of a recovery: the student as it is trained and as it was, the Trainer, checkpoints to go on from."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .adapters import name_without_adapters
from .distillation import DistillationTrainer, Windows
from .documents import input_device
from .quiet import quiet_global_values
from .recovery_config import DEFAULT_TOKENS, RecoveryConfig
from .recovery_course import Checkpoints, Course, schedule_shape
from .run_folder import RunFolder
from .surgery import cast_parameters
from .teacher_cache import cache_teacher
from .token_blocks import TokenBlocks
from .whole_files import scratch_folder

__all__ = ["train"]

logger = logging.getLogger(__name__)

ENDLESS = 10**7  # steps of a training that the clock ends


class _RecoveryTrainer(DistillationTrainer):
    course: Course
    shape: Callable[[float], float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda done: self.shape(self.course.share(done))
            )
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
        named = {name_without_adapters(name): dtype for name, dtype in before.items()}
        cast_parameters(model, named)
    finally:
        model.__dict__.pop("peft_config", None)


def train(
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
