"""Results on disk: one JSON file per experiment, written anew, whole, after every row.

`{"experiment", "protocols": {digest: ...}, "machines": {digest: ...}, "runs": {digest: ...}, "rows": [...]}`. A row
names by digest the protocol (model, texts, tokens, dtype) and the machine (commit, versions, processor, threads) that
it was measured under, and its `key` is a digest of config, model and texts: what has a row is not measured again.
`runs` says which keys a scale and its calibration text give; files of before have none. Several processes may write
into one folder: a write reads the file anew, and [`claimed`] shares the work out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_adaprune.locks import drop_lock, has_no_locks, take_lock

PLACE = Path(__file__).parent / "results" / "experiments"
# What every row holds; `results`, `speed` or `cost` say what was measured.
FIELDS = (
    "key", "label", "ratio", "seed", "status", "config", "protocol", "machine", "seconds", "peak_bytes",
)  # fmt: skip

Entry = tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]  # a row, its protocol, its machine


def digest_of(value: Any) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Book:
    """The rows of one experiment.

    Args:
        folder (`Path`): of the results; rows of other experiments in it are found too.
        name (`str`): of the experiment.
        fresh (`bool`, *optional*): measure everything again.
    """

    def __init__(self, folder: Path, name: str, fresh: bool = False) -> None:
        self.path, self.fresh = folder / f"{name}.json", fresh
        self.data: dict[str, Any] = {"experiment": name, "protocols": {}, "machines": {}, "runs": {}, "rows": []}
        self.reread()
        self.written: set[str] = set()

    def reread(self) -> None:
        """Take over what other processes have written since."""
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def has(self, key: str) -> bool:
        """Whether a row is there and was measured."""
        if self.fresh:
            return key in self.written
        return any(row["key"] == key and row["status"] == "done" for row in self.data["rows"])

    def elsewhere(self, keys: Iterable[str]) -> Entry | None:
        """A row that was measured for another experiment of the folder, under the first key that there is one for."""
        if self.fresh:
            return None
        others = [path for path in sorted(self.path.parent.glob("*.json")) if path != self.path]
        read = [json.loads(path.read_text()) for path in others]
        for key in keys:
            for other in read:
                for row in other["rows"]:
                    if row["key"] == key and row["status"] == "done":
                        return row, other["protocols"][row["protocol"]], other["machines"][row["machine"]]
        return None

    def add(self, row: Mapping[str, Any], protocol: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Keep a row at once; one of the same key gives way."""
        row = {**row, "protocol": digest_of(protocol), "machine": digest_of(machine)}
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ValueError(f"a row of {self.path.name} lacks {', '.join(missing)}.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.with_suffix(".lock")):
            self.reread()
            self.data["protocols"][row["protocol"]] = dict(protocol)
            self.data["machines"][row["machine"]] = dict(machine)
            self.data["rows"] = [*(old for old in self.data["rows"] if old["key"] != row["key"]), dict(row)]
            self._write()
        self.written.add(row["key"])

    def name_run(self, facts: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Keep which rows belong to a scale and its texts, those among them that were there before.

        Args:
            facts (`Mapping`): what the run reads besides what protocols say, as JSON.
            keys (iterable of `str`): of all rows that it gives, measured or not.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.with_suffix(".lock")):
            self.reread()
            runs, digest = self.data.setdefault("runs", {}), digest_of(facts)
            before = set(runs.get(digest, {"keys": ()})["keys"])
            named = before.union(keys)
            if named != before:
                runs[digest] = {"facts": dict(facts), "keys": sorted(named)}
                self._write()

    def _write(self) -> None:
        # A kill between two writes leaves the file of the row before.
        waiting = self.path.with_suffix(f".{os.getpid()}.part")
        waiting.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(waiting, self.path)


def read_results(path: Path) -> dict[str, Any]:
    """A results file; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"protocols": {}, "machines": {}, "rows": []}


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process, and no other one that writes into the folder, has a piece of the work.

    Args:
        folder (`Path`): of the results.
        name (`str`): of the piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder / f".{digest_of(name)}.lock")
    except OSError as failure:
        if not has_no_locks(failure):
            raise
        yield True  # several processes would do the same work, and the last one's file would win
        return
    try:
        yield lock is not None
    finally:
        if lock is not None:
            drop_lock(lock)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Wait until no other process has a lock, and hold it; nothing where the file system has none."""
    try:
        while (lock := take_lock(place)) is None:
            time.sleep(0.02)  # writes take milliseconds
    except OSError as failure:
        if not has_no_locks(failure):
            raise
        yield
        return
    try:
        yield
    finally:
        drop_lock(lock)
