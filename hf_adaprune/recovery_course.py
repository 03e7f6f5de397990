"""How far a recovery is, by steps or by the clock, and what the learning rate is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, get_scheduler
from transformers.utils import logging as transformers_logging

from .recovery_config import RecoveryConfig

__all__ = ["Course", "schedule_shape"]

logger = logging.getLogger(__name__)

# A schedule is a function of steps; with so many of them it is one of the share of the training that is over.
RESOLUTION = 100_000
LOGGED = 50  # rows of the log


class Course(TrainerCallback):
    """How far a training is, by steps or by the clock; ends it when time is up.

    Args:
        config ([`RecoveryConfig`]): its `minutes`, and windows per step.
        steps (`int`): of the training, where the clock does not end it.
        started (`float`): what `time.perf_counter()` said when the time began to run.
        windows (`int`): of the training text, to say when it has been read once.
    """

    def __init__(self, config: RecoveryConfig, steps: int, started: float, windows: int) -> None:
        self.limit = None if config.minutes is None else config.minutes * 60
        self.steps, self.started, self.done = steps, started, 0
        self.first: float | None = None
        self.epoch = windows / (config.batch_size * config.gradient_accumulation)
        self.told = 0.0
        self.bar: Any = None

    def share(self) -> float:
        """Share of the training that is over in the middle of the next step."""
        if self.limit is None:
            return min((self.done + 0.5) / self.steps, 1.0)
        return min((time.perf_counter() - self.started + self._step() / 2) / self.limit, 1.0)

    def _step(self) -> float:
        return 0.0 if self.first is None or not self.done else (time.perf_counter() - self.first) / self.done

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.first = time.perf_counter()
        self.bar = transformers_logging.tqdm(total=None if self.limit else self.steps, desc="recovery", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count, and stop where another step would end later than it should."""
        self.bar.update()
        if self.done <= self.epoch < self.done + 1 and (self.limit or self.steps > self.epoch + 1):
            logger.info("the training text was read once after %d steps; it is read again.", self.done + 1)
        self.done += 1
        if self.share() >= self.told + 1 / LOGGED or self.done in (1, self.steps):
            self.told, control.should_log = self.share(), True
        if self.limit is not None and time.perf_counter() - self.started + self._step() / 2 >= self.limit:
            control.should_log = control.should_training_stop = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.bar.close()


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
