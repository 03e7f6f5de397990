"""Results on disk: one JSON file per experiment, written anew, whole, after every row.

`{"experiment", "protocols": {digest: ...}, "machines": {digest: ...}, "rows": [...]}`. A row names by digest the
protocol (model, texts, tokens, dtype) and the machine (commit, versions, processor, threads) that it was measured
under, and its `key` is a digest of config, model and texts: what has a row is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parent / "results" / "experiments"
# What every row holds; `results`, `speed` or `cost` say what was measured.
FIELDS = (
    "key", "label", "ratio", "seed", "status", "config", "protocol", "machine", "seconds", "peak_bytes",
)  # fmt: skip


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
        self.data: dict[str, Any] = {"experiment": name, "protocols": {}, "machines": {}, "rows": []}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
        self.others = [path for path in sorted(folder.glob("*.json")) if path != self.path]
        self.written: set[str] = set()

    def has(self, key: str, label: str) -> bool:
        """Whether a row is there; one of another experiment that measured the same is taken over under this label."""
        if key in self.written:
            return True
        if self.fresh:
            return False
        if any(row["key"] == key and row["status"] == "done" for row in self.data["rows"]):
            return True
        for path in self.others:
            other = json.loads(path.read_text())
            for row in other["rows"]:
                if row["key"] == key and row["status"] == "done":
                    self._file(
                        {**row, "label": label}, other["protocols"][row["protocol"]], other["machines"][row["machine"]]
                    )
                    return True
        return False

    def add(self, row: Mapping[str, Any], protocol: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Keep a row at once; one of the same key gives way."""
        self._file({**row, "protocol": digest_of(protocol), "machine": digest_of(machine)}, protocol, machine)
        self.written.add(row["key"])

    def _file(self, row: Mapping[str, Any], protocol: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        missing = [name for name in FIELDS if name not in row]
        if missing:
            raise ValueError(f"a row of {self.path.name} lacks {', '.join(missing)}.")
        self.data["protocols"][row["protocol"]] = dict(protocol)
        self.data["machines"][row["machine"]] = dict(machine)
        self.data["rows"] = [*(old for old in self.data["rows"] if old["key"] != row["key"]), dict(row)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A kill between two writes leaves the file of the row before.
        waiting = self.path.with_suffix(".json.part")
        waiting.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(waiting, self.path)


def read_results(path: Path) -> dict[str, Any]:
    """A results file; empty where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"protocols": {}, "machines": {}, "rows": []}
