"""Which rows may stand in one table: those of one model, one report text, one scale and one calibration text.

A protocol tells models and report texts apart. What a run reads besides stands in `runs` of a results file, with the
keys that it gives; a row that reads no such thing, as the dense model, is a row of several runs. Rows that no run
names, as those of older files, are one group per protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import digest_of

__all__ = ["Group", "Row", "groups_of"]

Row = Mapping[str, Any]
_Lot = tuple[Mapping[str, Any], list[Row]]  # what rows share, and the rows


@dataclass(frozen=True)
class Group:
    """Rows of which means over seeds may be taken.

    Args:
        title (`str`): of their table; two groups of a file never have the same.
        protocol (`Mapping`): of the first row.
        rows (`tuple`): in the file's order.
    """

    title: str
    protocol: Mapping[str, Any]
    rows: tuple[Row, ...]


def groups_of(data: Mapping[str, Any]) -> list[Group]:
    """The groups of a results file, those that no run names first.

    Args:
        data (`Mapping`): of [`benchmarks.results.read_results`].
    """
    runs = list(data.get("runs", {}).values())
    named = {key for run in runs for key in run["keys"]}
    # The dense model reads no calibration text, so it stands beside rows of before whoever names it.
    lots = _lots(data, {}, [row for row in data["rows"] if not row["ratio"] or row.get("key") not in named])
    for run in runs:
        lots += _lots(data, run["facts"], [row for row in data["rows"] if row.get("key") in run["keys"]])
    # A run that has nothing of its own yet, or nothing that depends on its scale, says what another one says.
    held = [{id(row) for row in rows} for _, rows in lots]
    lots = [
        lot
        for number, lot in enumerate(lots)
        if not any(held[number] < other for other in held) and held[number] not in held[:number]
    ]
    firsts = [rows[0] for _, rows in lots]
    titles = _told_apart([_title(data, row) for row in firsts], [facts for facts, _ in lots])
    return [
        Group(title, data["protocols"][rows[0]["protocol"]], tuple(rows))
        for title, (_, rows) in zip(titles, lots, strict=True)
    ]


def _lots(data: Mapping[str, Any], read: Mapping[str, Any], rows: Sequence[Row]) -> list[_Lot]:
    """Rows by what they were measured on."""
    found: dict[str, _Lot] = {}
    for row in rows:
        facts = {**_measured_on(data, row), **read}
        found.setdefault(digest_of(facts), (facts, []))[1].append(row)
    return list(found.values())


def _measured_on(data: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """What a row's protocol says of model, report text and speed. The first seed has tasks besides, the others not."""
    said = data["protocols"][row["protocol"]]
    facts = {name: own for name, own in said["model"].items() if name in ("weights", "dtype")}
    if "report" in said:
        facts |= {"report": digest_of(said["report"])[:8], "report_window": said.get("report_window")}
    facts |= said.get("speed", {})
    return facts | (_processor(data, row) if _is_timed(said) else {})


def _is_timed(protocol: Mapping[str, Any]) -> bool:
    return bool({"speed", "cost"} & set(protocol.get("measures", ())))


def _processor(data: Mapping[str, Any], row: Row) -> dict[str, Any]:
    machine = data["machines"][row["machine"]]
    return {"cpu": machine["cpu"], "threads": machine["threads"]}


def _title(data: Mapping[str, Any], row: Row) -> str:
    said = data["protocols"][row["protocol"]]
    parts = [", ".join(said["model"][name] for name in ("name", "dtype") if name in said["model"])]
    if report := said.get("report"):
        parts.append(", ".join(f"{name} ({tokens:,} tokens)" for name, (tokens, _) in report.items()))
    if _is_timed(said):
        machine = _processor(data, row)
        parts.append(f"{machine['cpu']}, {machine['threads']} threads")
    return "; ".join(parts)


def _told_apart(titles: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles with what differs between groups of the same one: names of folders and files need not tell them apart."""
    found = []
    for title, own in zip(titles, facts, strict=True):
        alike = [other for name, other in zip(titles, facts, strict=True) if name == title]
        values = {name: {str(other[name]) for other in alike if name in other} for name in own}
        said = [f"{name.replace('_', ' ')} {own[name]}" for name in own if len(values[name]) > 1]
        if any(set(other) - set(own) for other in alike):
            said.append("scale and calibration text not recorded")
        found.append("; ".join([title, *([", ".join(said)] if said else [])]) + ".")
    return found
