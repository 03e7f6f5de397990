"""Laws of configs: a value is taken, and travels as JSON, or it is refused by the name of its field."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaprune import (
    AllocationConfig,
    CalibrationConfig,
    ImportanceConfig,
    LoraSettings,
    PruningConfig,
    RecoveryConfig,
    RepairConfig,
    SearchConfig,
    TextSource,
)
from hf_adaprune.cut_schedule import CutSchedule
from hf_adaprune.errors import ConfigError
from hf_adaprune.parts import sources_of

PARTS = {
    "calibration": CalibrationConfig, "importance": ImportanceConfig, "allocation": AllocationConfig,
    "repair": RepairConfig, "search": SearchConfig,
}  # fmt: skip
KINDS = [PruningConfig, *PARTS.values(), RecoveryConfig, LoraSettings, CutSchedule]
JUNK: list[Any] = [
    "junk", "", "false", b"x", 5, -1, 0.5, float("nan"), float("inf"), 10**400, True, None, [], {}, [0.5], ["a"],
    [None], [[1]], {"a": "b"}, {1: 2}, {"a": float("nan")}, object(), np.float32(0.5), np.array([1, 2]),
    torch.tensor([0.5]), range(2), Path("x"), TextSource("name", ["text"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, field.name) for kind in KINDS for field in fields(kind)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_a_field_takes_a_value_that_travels_or_refuses_it(kind: Any, name: str) -> None:
    for junk in JUNK:
        try:
            made = kind(**{name: junk})
        except ConfigError as error:
            assert len(str(error)) > 10
            continue
        config = made
        if kind in PARTS.values():
            part = next(part for part, own in PARTS.items() if own is kind)
            config = PruningConfig(**{part: made})
        if isinstance(config, PruningConfig) and not _in_memory(config):
            again = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
            assert again == config, junk
        elif kind is RecoveryConfig:
            assert RecoveryConfig(**json.loads(json.dumps(made.to_dict()))) == made, junk


def _in_memory(config: PruningConfig) -> bool:
    own = config.calibration
    return any(isinstance(source, TextSource) for source in (*own.sources, *own.selection, *own.report))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("junk", ["none", 5, True, [], ["a"], [["damping", 0.1]], 0.5, None], ids=repr)
def test_a_part_is_a_mapping_of_its_fields(part: str, junk: Any) -> None:
    if part == "search" and junk is None:
        return
    for make in (lambda: PruningConfig(**{part: junk}), lambda: PruningConfig.from_dict({part: junk})):
        with pytest.raises(ConfigError, match=f"`{part}` should be a mapping of fields"):
            make()


def test_a_mapping_is_its_part() -> None:
    assert PruningConfig(repair={"damping": 0.5}).repair == RepairConfig(damping=0.5)
    assert PruningConfig(search={"trials": 3}).search == SearchConfig(3)
    assert RecoveryConfig(lora={"rank": 3, "targets": "q_proj"}).lora == LoraSettings(3, targets=("q_proj",))
    with pytest.raises(ConfigError, match=r"`lora` has no field rnk\. It has: rank, alpha, targets"):
        RecoveryConfig(lora={"rnk": 3})


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (PruningConfig, {"uniform": "false"}, "`uniform` should be true or false. Found 'false'"),
        (PruningConfig, {"layer_by_layer": 1}, "`layer_by_layer` should be true or false. Found 1"),
        (PruningConfig, {"protected_layers": [0.5]}, "`protected_layers` should be a list of whole numbers"),
        (PruningConfig, {"protected_layers": "0"}, "`protected_layers` should be a list of whole numbers"),
        (PruningConfig, {"units": [1]}, "`units` should be a list of texts"),
        (PruningConfig, {"budgets": {"ratio": "0.2"}}, r"`budgets\['ratio'\]` should be a number"),
        (RepairConfig, {"intercept": "yes"}, "`repair.intercept` should be true or false"),
        (AllocationConfig, {"ratios": [0.5]}, "`allocation.ratios` should be a mapping of names"),
        (CalibrationConfig, {"sources": 5}, "`calibration.sources` should hold file paths"),
        (RecoveryConfig, {"train_embeddings": "false"}, "`train_embeddings` should be true or false"),
        (RecoveryConfig, {"scheduler": "foo"}, "`scheduler` should be one of warmup_stable_decay, linear"),
        (RecoveryConfig, {"scheduler": "reduce_lr_on_plateau"}, "`scheduler` should be one of"),
        (RecoveryConfig, {"scheduler": "cosine_with_min_lr"}, "`scheduler` should be one of"),
        (RecoveryConfig, {"lora": 16}, "`lora` should be a mapping of fields or a LoraSettings"),
        (RecoveryConfig, {"lora": {"targets": [1]}}, "`lora.targets` should be a list of texts"),
        (RecoveryConfig, {"shares": [1.0, float("nan")]}, "`shares` should be in"),
        (RecoveryConfig, {"shares": [1.0, float("inf")]}, "`shares` should be in"),
        (RecoveryConfig, {"shares": "half"}, "`shares` should be a list of numbers"),
        (CutSchedule, {"at": "0.5"}, "`at` should be a list of numbers"),
        (CutSchedule, {"at": float("nan")}, "`at` should be in"),
    ],
)  # fmt: skip
def test_what_was_found_is_told_by_its_field(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**given)


def test_one_value_is_a_list_of_one() -> None:
    assert CutSchedule(at=0.5).at == (0.5,)
    assert PruningConfig(protected_layers=3, units="mlp").protected_layers == (3,)
    assert CalibrationConfig(Path("a.txt")).sources == ("a.txt",)
    assert PruningConfig(protected_layers=np.arange(2)).protected_layers == (0, 1)


@pytest.mark.parametrize("given", [None, (), []])
def test_no_source_is_none(given: Any) -> None:
    assert sources_of("sources", given) == ()


@pytest.mark.parametrize("given", ["", [""], 5, {"a": 1}, [None], [["a.txt"]]])
def test_what_is_no_source_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="`sources` should hold file paths"):
        sources_of("sources", given)
