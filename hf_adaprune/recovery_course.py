"""How far a recovery is, by steps or by the clock, what the learning rate is there, and what it goes on from."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.utils import logging as transformers_logging

from .parallel import processes
from .recovery_config import RecoveryConfig
from .run_folder import RunFolder, digest_of_file

__all__ = ["Checkpoints", "Course", "schedule_shape"]

logger = logging.getLogger(__name__)

# A schedule is a function of steps; with so many of them it is one of the share of the training that is over.
RESOLUTION = 100_000
LOGGED = 50  # rows of the log


class Course(TrainerCallback):
    """How far a training is, by steps or by the clock; ends it when time is up.

    Of several processes the first one has the clock: learning rates and the end are the same on all.

    Args:
        config ([`RecoveryConfig`]): its `minutes`, and windows per step.
        steps (`int`): of the training, where the clock does not end it.
        started (`float`): what `time.perf_counter()` said when the time began to run.
        windows (`float`): of the training text, by how many batches a step reads; to say when it has been read once.
    """

    def __init__(self, config: RecoveryConfig, steps: int, started: float, windows: float) -> None:
        self.limit = None if config.minutes is None else config.minutes * 60
        self.workers = processes()
        self.steps, self.started, self.done = steps, started, 0
        self.first: float | None = None
        self.begun, self.over = 0, False
        self.epoch = windows / (config.batch_size * config.gradient_accumulation)
        self.told = 0.0
        self.bar: Any = None

    def share(self, done: int | None = None) -> float:
        """Share of the training that is over in the middle of the next step.

        Args:
            done (`int`, *optional*): steps before it, for who counts them himself: a scheduler is asked when a step is
                made and not yet told of. The clock needs no count.
        """
        if self.limit is None:
            return min(((self.done if done is None else done) + 0.5) / self.steps, 1.0)
        return min(self._next() / self.limit, 1.0)

    def _next(self) -> float:
        """Seconds from the start to the middle of the next step; every process has to ask, and gets the same."""
        steps = self.done - self.begun

        def expected() -> float:
            now = time.perf_counter()
            return now - self.started + (0.0 if self.first is None or not steps else (now - self.first) / steps / 2)

        return self.workers.lead(expected)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where an earlier run stopped."""
        self.first, self.done, self.begun = time.perf_counter(), state.global_step, state.global_step
        self.told = self.share() if self.done else 0.0
        total = None if self.limit else self.steps
        self.bar = transformers_logging.tqdm(total=total, initial=self.done, desc="recovery", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count, and stop where another step would end later than it should."""
        self.bar.update()
        if self.done <= self.epoch < self.done + 1 and (self.limit or self.steps > self.epoch + 1):
            logger.info("the training text was read once after %d steps; it is read again.", self.done + 1)
        self.done += 1
        share = self.share()
        if share >= self.told + 1 / LOGGED or self.done in (1, self.steps):
            self.told, control.should_log = share, True
        if self.limit is not None and share >= 1.0:
            control.should_log = control.should_training_stop = self.over = True
        self.over = self.over or self.done >= self.steps

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.bar.close()


class Checkpoints(TrainerCallback):
    """Checkpoints of a training in the folder of its run: after a while, and when the user breaks off.

    A checkpoint counts when its note is there, with the digests of all its files; the one before it goes only then.

    Args:
        run ([`RunFolder`]): of the recovery.
        minutes (`float`): between two checkpoints.
        course ([`Course`]): of the training.
    """

    NAME = "training"

    def __init__(self, run: RunFolder, minutes: float, course: Course) -> None:
        self.run, self.seconds, self.course = run, minutes * 60, course
        self.last = time.perf_counter()
        self.interrupted = False
        self.trainer: Any = None

    @property
    def folder(self) -> Path:
        """Where the trainer writes."""
        return self.run.place / self.NAME

    def resume(self) -> str | None:
        """The checkpoint to go on from, if there is a whole one; takes over what the trainer does not keep itself."""
        found = self.run.read(self.NAME)
        if found is None:
            return None
        note = found[1]
        place = self.folder / note["checkpoint"]
        try:
            whole = all(digest_of_file(place / name) == digest for name, digest in note["files"].items())
        except OSError:
            whole = False
        if not whole:
            self.run.damaged(self.NAME)
            return None
        self.trainer.tokens_seen = note["tokens"]
        self.course.started -= note["seconds"]
        return str(place)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C ends the step and saves; the second one is an ordinary one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def stop(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, before)
            self.interrupted = True
            logger.warning("interrupted: this step is finished and saved; interrupt again to stop at once.")

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def raise_if_interrupted(self) -> None:
        """What Ctrl-C does otherwise, once everything is saved."""
        if self.interrupted:
            raise KeyboardInterrupt

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The time to the first checkpoint begins."""
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where it is time; losses are logged first, for the trainer keeps no half of a mean."""
        if self.course.over:
            return  # the trained weights are kept themselves
        if self.interrupted or time.perf_counter() - self.last >= self.seconds:
            control.should_log = control.should_save = True
            control.should_training_stop = control.should_training_stop or self.interrupted

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the note, and delete earlier checkpoints."""
        place = self.folder / f"checkpoint-{state.global_step}"
        files = sorted(path for path in place.rglob("*") if path.is_file())
        digests = {path.relative_to(place).as_posix(): digest_of_file(path) for path in files}
        seconds = time.perf_counter() - self.course.started
        note = {"checkpoint": place.name, "files": digests, "tokens": self.trainer.tokens_seen, "seconds": seconds}
        self.run.keep(self.NAME, {}, note)
        for other in self.folder.glob("checkpoint-*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        self.last = time.perf_counter()


def schedule_shape(config: RecoveryConfig) -> Callable[[float], float]:
    """The config's schedule as a function of the share of the training that is over, times the highest rate.

    Args:
        config ([`RecoveryConfig`]): its `scheduler`, `warmup` and `decay`.
    """
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    own = {"num_decay_steps": round(config.decay * RESOLUTION)} if config.scheduler == "warmup_stable_decay" else {}
    found: Any = get_scheduler(
        config.scheduler,
        stand_in,
        num_warmup_steps=round(config.warmup * RESOLUTION),
        num_training_steps=RESOLUTION,
        scheduler_specific_kwargs=own,
    )
    function = found.lr_lambdas[0]
    return lambda share: float(function(share * RESOLUTION))
