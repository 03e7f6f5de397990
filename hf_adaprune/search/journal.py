"""The journal of a search: append-only JSONL, one line per event, so that a kill loses at most the running trial.

The first line says what the search is (space, model, texts, seed); a journal is only continued by the same search.
Every trial is one line, written and flushed to disk when it is done; a line that a kill tore is cut off when it is
resumed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import JournalError
from .space import Point

__all__ = ["Estimate", "Final", "Journal", "Trial", "compare", "mean_value"]

FORMAT = 1
_OPENING = b'{"kind":"search",'
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Trial:
    """One candidate and what it measured.

    Args:
        number (`int`): from 0 on.
        strategy (`str`): who proposed it.
        point (`dict[str, Any]`): fields of the config, by path.
        key (`str`): digest of its plan and repair: equal keys are equal models.
        rows (`tuple`): per selection window the count (tokens, questions) and, for every pruning ratio of the search
            (usually one), the sum of the objective; empty where the candidate failed.
        costs (`dict[str, float]`): `ratio`, `parameters` ... of the candidate.
        widths (`dict[str, int]`): units kept, by site that loses some; 0 where its whole layer goes.
        seconds (`float`): scoring, repair and measuring.
        elapsed (`float`): seconds of the search when this was done, proposals and earlier runs of the journal included.
        predicted (`tuple[float, float]`, *optional*): what a surrogate expected before: mean and standard deviation of
            the difference to trial 0 as [`compare`] gives it; differences of logarithms as `gp` squeezes them, by `gp`.
        answered_by (`int`, *optional*): the earlier trial with the same key, whose rows these are.
        error (`str`): why the candidate could not be built.
    """

    number: int
    strategy: str
    point: Point
    key: str
    rows: Rows = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    elapsed: float = 0.0
    predicted: tuple[float, float] | None = None
    answered_by: int | None = None
    error: str = ""

    @property
    def windows(self) -> int:
        """Selection windows it was measured on."""
        return len(self.rows)


@dataclass(frozen=True)
class Final:
    """A finalist measured again on windows that no trial has seen.

    Args:
        number (`int`): of the trial.
        rows (`tuple`): as in [`Trial`].
    """

    number: int
    rows: Rows


@dataclass(frozen=True)
class Estimate:
    """A difference to trial 0 and its standard error (NaN where one window was measured)."""

    value: float
    error: float


def mean_value(rows: Sequence[Sequence[float]]) -> float:
    """Mean of the objective per token (or question); over several pruning ratios the geometric mean of the means."""
    if not rows:
        return math.inf
    total = sum(row[0] for row in rows)
    means = [sum(row[column] for row in rows) / total for column in range(1, len(rows[0]))]
    if len(means) == 1:
        return means[0]
    return math.exp(sum(math.log(max(mean, 1e-12)) for mean in means) / len(means))


def compare(rows: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], logarithmic: bool) -> Estimate:
    """How far a measurement lies from a reference on the windows that both have seen.

    The windows are the same texts, so what makes a text hard cancels, and the standard error is that of paired
    differences: it says how far the difference may move on other text. With `logarithmic` it is the difference of
    logarithms (averaged over pruning ratios), with the delta method over windows.

    Args:
        rows (sequence of rows): see [`Trial`].
        reference (sequence of rows): the same of what they are compared with, usually trial 0.
        logarithmic (`bool`): compare logarithms; for objectives that are positive.

    Raises:
        JournalError: no window in common.
    """
    windows = min(len(rows), len(reference))
    if not windows:
        raise JournalError("nothing to compare: no selection window was measured in both trials.")
    total = sum(row[0] for row in rows[:windows])
    columns = range(1, len(rows[0]))
    value, influence = 0.0, [0.0] * windows
    for column in columns:
        for sign, part in ((1.0, rows), (-1.0, reference)):
            mean = sum(row[column] for row in part[:windows]) / total
            scale = max(mean, 1e-12) if logarithmic else 1.0
            value += sign * (math.log(scale) if logarithmic else mean) / len(columns)
            for window, row in enumerate(part[:windows]):
                influence[window] += sign * (row[column] - mean * row[0]) / (scale * total * len(columns))
    if windows == 1:
        return Estimate(value, math.nan)
    return Estimate(value, math.sqrt(windows / (windows - 1) * sum(entry * entry for entry in influence)))


class Journal:
    """An append-only file of a search, or a list in memory where no path is given.

    Args:
        path (`str`, *optional*): the JSONL file.

    Attributes:
        header (`dict[str, Any]`): what the search is.
        trials (`list[Trial]`): in order.
        finals (`list[Final]`): the last measurement of the best.
        events (`list[dict[str, Any]]`): everything else, such as the `winner`.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.header: dict[str, Any] = {}
        self.trials: list[Trial] = []
        self.finals: list[Final] = []
        self.events: list[dict[str, Any]] = []

    @classmethod
    def start(cls, path: str | os.PathLike[str] | None, header: Mapping[str, Any], *, resume: bool = False) -> Journal:
        """Begin a journal, or go on with one of the same search.

        Args:
            path (`str`, *optional*): the file; in memory where not given.
            header (`dict[str, Any]`): what the search is, as JSON types.
            resume (`bool`): go on with the file if it is there.

        Raises:
            JournalError: the file is there and `resume` is not set, or it belongs to another search.
        """
        journal = cls(path)
        wanted = json.loads(json.dumps({"format": FORMAT, **header}))
        if journal.path is None:
            journal.header = wanted
            return journal
        if journal.path.exists() and journal.path.stat().st_size:
            if not resume:
                raise JournalError(
                    f"there is a journal at {journal.path}. Go on with it (resume=True, --resume), or name another "
                    "file."
                )
            journal._read(repair=True)
            if journal.header:
                _check_same(journal.path, journal.header, wanted)
                return journal
        journal.path.absolute().parent.mkdir(parents=True, exist_ok=True)
        journal.header = wanted
        journal._append({"kind": "search", **wanted})
        return journal

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Journal:
        """Read a journal without changing it.

        Raises:
            JournalError: no such file, or no journal.
        """
        journal = cls(path)
        assert journal.path is not None
        if not journal.path.is_file():
            raise JournalError(f"there is no journal at {path}. Check the path.")
        journal._read(repair=False)
        if not journal.header:
            raise JournalError(f"{path} is no journal of a search: its first line should say what the search is.")
        return journal

    def add(self, trial: Trial) -> None:
        """Write a trial; it is on the disk when this returns.

        Raises:
            JournalError: it could not be written; the trials before it are on the disk.
        """
        self.trials.append(trial)
        self._append({"kind": "trial", **asdict(trial)})

    def add_final(self, final: Final) -> None:
        """Write a finalist's measurement."""
        self.finals.append(final)
        self._append({"kind": "final", **asdict(final)})

    def add_event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write anything else, under its own kind."""
        event = json.loads(json.dumps({"kind": kind, **data}))
        self.events.append(event)
        self._append(event)

    def event(self, kind: str) -> dict[str, Any] | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event["kind"] == kind), None)

    @property
    def logarithmic(self) -> bool:
        """Whether objectives are compared by their logarithms."""
        return bool(self.header.get("logarithmic"))

    def estimate(self, trial: Trial) -> Estimate:
        """A trial's difference to trial 0.

        Raises:
            JournalError: one of them was not measured.
        """
        return compare(trial.rows, self.trials[0].rows, self.logarithmic)

    def measured(self) -> list[Trial]:
        """Trials that were measured; a failed candidate has no rows."""
        return [trial for trial in self.trials if trial.rows]

    @property
    def elapsed(self) -> float:
        """Seconds that the search had taken when its last trial was done, over all runs."""
        return max((trial.elapsed for trial in self.trials), default=0.0)

    def best(self) -> Trial | None:
        """The trial with the lowest estimate among those that saw the most windows (so not by luck on a few)."""
        known = self.measured()
        most = max((trial.windows for trial in known), default=0)
        full = [trial for trial in known if trial.windows == most]
        return min(full, key=self._rank, default=None)

    def _rank(self, trial: Trial) -> tuple[bool, float, int]:
        value = self.estimate(trial).value
        return not math.isfinite(value), value, trial.number  # NaN sorts nowhere by itself, -inf would win

    def winner(self) -> Trial | None:
        """The trial that won the last measurement; `None` before it."""
        event = self.event("winner")
        if event is None:
            return None
        number = event.get("number")
        if type(number) is not int or not 0 <= number < len(self.trials):
            raise JournalError(f"{self.path} names trial {number!r} as winner, and has {len(self.trials)} trials.")
        return self.trials[number]

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(record, separators=(",", ":"), allow_nan=True) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(
                f"{self.path} could not be written: {error}. What it holds is kept; free some space and go on with it "
                "(resume=True, --resume)."
            ) from error

    def _read(self, repair: bool) -> None:
        assert self.path is not None
        data = self.path.read_bytes()
        good = 0
        if not data.startswith(_OPENING[: len(data)]):
            raise JournalError(
                f"{self.path} is no journal of a search: its first line should say what the search is. Name another "
                "file."
            )
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                self._take(json.loads(line))
            except JournalError:
                raise
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise JournalError(f"{self.path}, line {number} is no event of a search: {error!r}.") from error
            good += len(line)
        if repair and good < len(data):
            with self.path.open("r+b") as file:
                file.truncate(good)

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        if kind == "search":
            if record.get("format") != FORMAT:
                raise JournalError(
                    f"{self.path} has format {record.get('format')!r}; this version reads {FORMAT}. Update hf_adaprune."
                )
            self.header = record
        elif kind == "trial":
            predicted = record.pop("predicted")
            record["point"] = {path: _frozen(value) for path, value in record["point"].items()}
            trial = Trial(**{**record, "rows": _rows(record["rows"]), "predicted": predicted and tuple(predicted)})
            if trial.number != len(self.trials):
                raise JournalError(f"{self.path}: trial {trial.number} stands where {len(self.trials)} should.")
            self.trials.append(trial)
        elif kind == "final":
            self.finals.append(Final(record["number"], _rows(record["rows"])))
        else:
            self.events.append({"kind": kind, **record})


def _rows(rows: Iterable[Iterable[float]]) -> Rows:
    found = tuple(tuple(float(entry) for entry in row) for row in rows)
    if found and (len(found[0]) < 2 or len({len(row) for row in found}) > 1):
        raise ValueError("rows of a trial should hold a count and the same number of sums each")
    if not all(row[0] > 0 for row in found):
        raise ValueError("rows of a trial should count at least one token or question each")
    return found


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = sorted(name for name in set(found) | set(wanted) if found.get(name) != wanted.get(name))
    if different:
        said = "; ".join(
            f"{name}: {_short(found.get(name))} there, {_short(wanted.get(name))} here" for name in different
        )
        raise JournalError(
            f"{path} belongs to another search, so it cannot be resumed ({said}). Give the same arguments, or another "
            "journal; to start from what it found, pass it as warm start."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
