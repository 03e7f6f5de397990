"""Tiny Trainers for tests: a data set of random tokens, models without dropout, few steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY, tiny_model
from transformers import Trainer, TrainingArguments

from hf_adaprune import PruningConfig
from hf_adaprune.training import AdaPrunerCallback

LENGTH = 16


class Rows(torch.utils.data.Dataset):
    """Random windows that never change."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def pruning_config(**changes: Any) -> PruningConfig:
    """Forty per cent, from sixteen windows."""
    return PruningConfig.recipe(
        "default",
        **{
            "pruning_ratio": 0.4,
            "calibration": {"sequence_length": LENGTH, "samples": 24, "gradient_samples": 6},
            "repair": {"min_tokens_per_column": 0},
            **changes,
        },
    )


def regional_config() -> PruningConfig:
    """The same with layers optimised after the cut."""
    return pruning_config(repair={"min_tokens_per_column": 0, "regional_steps": 4})


def training(
    folder: Path,
    callback: AdaPrunerCallback | None,
    model: Any = None,
    trainer: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    """A Trainer of ten steps of four windows that saves every step."""
    own: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }
    args = TrainingArguments(str(folder), **own)
    callbacks = [] if callback is None else [callback]
    return trainer(
        model if model is not None else tiny_model("llama"), args, train_dataset=Rows(), eval_dataset=Rows(),
        callbacks=callbacks,
    )  # fmt: skip


def progressive(**changes: Any) -> AdaPrunerCallback:
    """Three cuts: before the first step, after the third and after the sixth."""
    config = changes.pop("config", None) or pruning_config()
    return AdaPrunerCallback(config, **{"at": (0.0, 0.3, 0.6), **changes})


class Timed(AdaPrunerCallback):
    """Keeps the seconds inside each of its own events, by event."""

    def __getattribute__(self, name: str) -> Any:
        """An event of the Trainer, with a clock around it."""
        found = super().__getattribute__(name)
        if not name.startswith("on_"):
            return found

        def event(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.__dict__.setdefault("seconds", {}).setdefault(name, []).append(time.perf_counter() - started)

        return event


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Every weight by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
