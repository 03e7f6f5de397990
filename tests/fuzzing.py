"""Anything in the place of a plan, a config, a journal, a checkpoint: read, or refused by an error of the package.

`test_hostile` draws a few hundred examples of every kind, `benchmarks/fuzz.py` as many as one likes, and counts them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from plans import pruning_plans

from hf_adaprune import PruningConfig, PruningPlan
from hf_adaprune.card import model_card
from hf_adaprune.choices import read_rows
from hf_adaprune.cli_search import read_budgets, read_space
from hf_adaprune.description import describe
from hf_adaprune.documents import read_source
from hf_adaprune.errors import AdaPruneError
from hf_adaprune.publication import check_checkpoint
from hf_adaprune.search.journal import Journal

__all__ = ["KINDS", "Kind", "spoiled"]

NUMBERS = st.one_of(st.integers(), st.integers(-(10**40), 10**40), st.floats(), st.sampled_from([2**31, 2**63, 1e308]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["python", "../x", "1"]))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DEEP = st.builds(
    lambda depth, ends: ends[0] * depth + ends[1] * depth,
    st.integers(1, 200_000),
    st.sampled_from([("[", ""), ("[", "]"), ('{"a":', ""), ('{"a":[', "]}")]),
)

HEADER = {
    "kind": "search",
    "format": 1,
    "version": "0.1.0",
    "config": {"search": {"trials": 2, "objective": "kl"}},
    "space": {"dimensions": {}},
    "logarithmic": True,
    "windows": [2, 4, 2],
}
TRIAL = {
    "kind": "trial",
    "number": 0,
    "strategy": "gp",
    "point": {"repair.damping": 0.1, "allocation.profile": [0.0, 1.0]},
    "key": "abc",
    "rows": [[8.0, 1.5], [8.0, 2.5]],
    "costs": {"ratio": 0.2},
    "widths": {"layers.0.mlp": 3},
    "seconds": 1.0,
    "predicted": [0.0, 1.0],
    "answered_by": None,
    "error": "",
}
FINAL = {"kind": "final", "number": 0, "rows": [[8.0, 1.5]]}
WINNER = {"kind": "winner", "number": 0}
EVENTS = (HEADER, TRIAL, {**TRIAL, "number": 1}, FINAL, WINNER)
ROW = {"id": 1, "task": "t", "context": "the model", "choices": ["reads", "rain"], "label": 1}
CHAT = {"messages": [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "stone"}]}
RECORDS = ("config.json", "pruning_config.json", "pruning_plan.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Kind:
    """Something that is read from a stranger.

    Args:
        inputs (`Callable`): gets a checkpoint; what comes in its place: text or bytes.
        reads (`Callable`): gets a folder to write in, the input and a checkpoint; yields what reads it, one after the
            other.
    """

    inputs: Callable[[Path], st.SearchStrategy]
    reads: Callable[[Path, Any, Path], Iterable[Callable[[], Any]]]

    def answers(self, place: Path, given: Any, checkpoint: Path) -> tuple[int, int]:
        """Let everything read the input: how often it was taken, and how often refused with a message.

        Args:
            place (`Path`): a folder to write in.
            given: the input.
            checkpoint (`Path`): a pruned checkpoint; not changed.
        """
        taken = refused = 0
        for read in self.reads(place, given, checkpoint):
            try:
                read()
                taken += 1
            except AdaPruneError as error:
                assert str(error)
                refused += 1
        return taken, refused


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in JSON data."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


@st.composite
def spoiled(draw: st.DrawFn, data: Any) -> Any:
    """Data with one or two places replaced by anything, taken out, or given another name."""
    copy = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 2))):
        options = places(copy)
        if not options:
            break
        *way, last = draw(st.sampled_from(options))
        place = copy
        for key in way:
            place = place[key]
        action = draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
        if action == "replace":
            place[last] = draw(JSON)
        elif action == "rename" and isinstance(place, dict):
            place[draw(st.text(max_size=8))] = place.pop(last)
        else:
            del place[last]
    return copy


# -- plans, configs, journals -----------------------------------------------------------------------------------------


def _as_plan(place: Path, given: str, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "any_plan.json"
    file.write_text(given, encoding="utf-8")
    yield lambda: PruningPlan.load(file)
    yield lambda: describe(file)


def _as_config(place: Path, given: str, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "any_config.json"
    file.write_text(given, encoding="utf-8")
    yield lambda: PruningConfig.from_pretrained(file)
    value = json.loads(given)
    if isinstance(value, dict):
        yield lambda: PruningConfig.from_dict(value)
        yield lambda: PruningConfig().with_changes(**value)


def _as_journal(place: Path, given: str, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "any_journal.jsonl"
    file.write_text(given, encoding="utf-8")

    def use() -> None:
        journal = Journal.load(file)
        journal.best()
        journal.winner()

    yield use


@st.composite
def _journals(draw: st.DrawFn) -> str:
    lines: list[Any] = list(EVENTS)
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(st.one_of(JSON, spoiled(lines[place])))
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


@st.composite
def _torn_journals(draw: st.DrawFn) -> bytes:
    """Whole events, cut anywhere, with a byte changed."""
    data = bytearray(b"".join(json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in EVENTS))
    del data[draw(st.integers(1, len(data))) :]
    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def _as_anything(place: Path, given: str | bytes, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "anything.jsonl"
    file.write_bytes(given.encode() if isinstance(given, str) else given)
    yield lambda: PruningPlan.load(file)
    yield lambda: Journal.load(file)
    yield lambda: PruningConfig.from_pretrained(file)
    yield lambda: read_rows(file)
    yield lambda: read_source(str(file))
    yield lambda: describe(file)


def _as_torn_journal(place: Path, given: bytes, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "torn.jsonl"
    file.write_bytes(given)
    yield lambda: Journal.load(file)
    header = {key: value for key, value in HEADER.items() if key not in ("kind", "format")}
    yield lambda: Journal.start(file, header, resume=True)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@st.composite
def _records(draw: st.DrawFn, checkpoint: Path) -> tuple[str, str]:
    """A record of a checkpoint, and what stands there instead."""
    name = draw(st.sampled_from(RECORDS))
    there = checkpoint / name
    whole = json.loads(there.read_text(encoding="utf-8")) if there.exists() else {"weight_map": {"a": "b"}}
    return name, draw(st.one_of(spoiled(whole).map(json.dumps), JSON.map(json.dumps), DEEP))


def _as_checkpoint(place: Path, given: tuple[str, str], checkpoint: Path) -> Iterable[Callable[[], Any]]:
    name, text = given
    folder = place / "any_checkpoint"
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    for record in RECORDS:  # what an earlier example has spoiled
        (folder / record).unlink(missing_ok=True)
        if (checkpoint / record).exists():
            shutil.copy(checkpoint / record, folder / record)
    (folder / name).write_text(text, encoding="utf-8")
    yield lambda: describe(folder)
    yield lambda: check_checkpoint(folder)
    yield lambda: PruningConfig.from_pretrained(folder)
    yield lambda: model_card(folder, "me/tiny")


def _as_header(place: Path, given: bytes, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    folder = place / "any_weights"
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(given)
    yield lambda: describe(folder)
    yield lambda: check_checkpoint(folder)


def _framed(header: str) -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode()


ENTRY = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
HEADERS = st.one_of(
    st.binary(max_size=60), st.one_of(spoiled(ENTRY).map(json.dumps), JSON.map(json.dumps), DEEP).map(_framed)
)

# -- rows and words of a command line ---------------------------------------------------------------------------------


def _as_rows(place: Path, given: str, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    file = place / "any_rows.jsonl"
    file.write_text(given, encoding="utf-8")
    yield lambda: read_rows(file)
    yield lambda: read_source(str(file))


def _as_words(place: Path, given: str, checkpoint: Path) -> Iterable[Callable[[], Any]]:
    yield lambda: read_budgets([given])
    yield lambda: read_budgets([f"parameters={given}"])
    yield lambda: read_space(given)
    yield lambda: read_space("{" + given + "}")


PLANS = pruning_plans().flatmap(lambda plan: JSON | spoiled(plan.to_dict())).map(json.dumps)
CONFIGS = st.one_of(JSON, spoiled(PruningConfig.recipe("default", search={}).to_dict())).map(json.dumps)
ROWS = st.one_of(JSON, spoiled(ROW), spoiled(CHAT)).map(json.dumps)
WORDS = st.one_of(st.text(max_size=30), JSON.map(json.dumps))
KINDS = {
    "plan": Kind(lambda _: PLANS, _as_plan),
    "config": Kind(lambda _: CONFIGS, _as_config),
    "journal": Kind(lambda _: _journals(), _as_journal),
    "torn journal": Kind(lambda _: _torn_journals(), _as_torn_journal),
    "any bytes": Kind(lambda _: st.binary(max_size=60), _as_anything),
    "deep JSON": Kind(lambda _: DEEP, _as_anything),
    "records of a checkpoint": Kind(_records, _as_checkpoint),
    "weight headers": Kind(lambda _: HEADERS, _as_header),
    "rows": Kind(lambda _: ROWS, _as_rows),
    "budgets and spaces": Kind(lambda _: WORDS, _as_words),
}
