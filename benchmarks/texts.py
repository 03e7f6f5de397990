"""The texts of a run: which sources play which role, read once, kept apart, known by their digests.

Nothing is shipped: texts come from the Hub by name, from files, or (`--smoke`) from the interpreter itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_adaprune import TextSource
from hf_adaprune.calibration import report_blocks
from hf_adaprune.choices import ChoiceRow, read_rows
from hf_adaprune.documents import Documents, distinct_names, json_rows, read_source, refuse_overlap
from hf_adaprune.errors import CalibrationError
from hf_adaprune.stages import text_part
from hf_adaprune.token_blocks import TokenBlocks

CHARACTERS = 8_000_000  # per source
HELD_OUT = 5  # every fifth document (or stretch of a single one) of a calibration domain is report text of the matrix


@dataclass(frozen=True)
class Sources:
    """Names of texts by role.

    Args:
        calibration, selection, report (`tuple[str, ...]`): sources as `PruningConfig` takes them.
        rows (`tuple[str, ...]`): multiple choice: files of rows, or names of lm-eval's tasks.
    """

    calibration: tuple[str, ...]
    selection: tuple[str, ...]
    report: tuple[str, ...]
    rows: tuple[str, ...] = ()


HUB = Sources(
    calibration=("allenai/c4:en:train", "Salesforce/wikitext:wikitext-103-raw-v1:train"),
    selection=("allenai/c4:en:validation", "Salesforce/wikitext:wikitext-103-raw-v1:validation"),
    report=("Salesforce/wikitext:wikitext-2-raw-v1:test", "allenai/c4:realnewslike:validation"),
    rows=("piqa", "arc_easy"),
)
SMOKE = Sources(("python:prose", "python:code"), ("python",), ("python",))


def in_folder(folder: Path) -> Sources:
    """The sources of a folder with `calibration`, `selection` and `report`; files of rows are told by their content.

    Raises:
        CalibrationError: one of the three is missing.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for role in ("calibration", "selection", "report"):
        texts: list[str] = []
        rows: list[str] = []
        for path in sorted((folder / role).glob("*")):
            if path.suffix in (".txt", ".jsonl", ".json", ".parquet"):
                (rows if _holds_rows(path) else texts).append(str(path))
        if not texts:
            raise CalibrationError(
                f"there is no text in {folder / role}. --data takes a folder with calibration/, selection/ and report/ "
                "(txt, jsonl, parquet); or name sources with --calibration, --selection and --report."
            )
        found[role] = texts, rows
    texts_of = {role: tuple(texts) for role, (texts, _) in found.items()}
    return Sources(texts_of["calibration"], texts_of["selection"], texts_of["report"], tuple(found["report"][1]))


def _holds_rows(path: Path) -> bool:
    return path.suffix == ".jsonl" and "choices" in next(iter(json_rows(path)), {})


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in memory.

    Args:
        calibration, selection, report (`tuple[TextSource, ...]`): by role.
        rows (`dict[str, tuple[ChoiceRow, ...]]`): the first multiple-choice rows of every file, by name.
        all_rows (`dict[str, tuple[ChoiceRow, ...]]`): all of them.
        tasks (`tuple[str, ...]`): tasks that lm-eval fetches.
    """

    calibration: tuple[TextSource, ...]
    selection: tuple[TextSource, ...]
    report: tuple[TextSource, ...]
    rows: dict[str, tuple[ChoiceRow, ...]] = field(default_factory=dict)
    all_rows: dict[str, tuple[ChoiceRow, ...]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Names and digests by role, as JSON."""
        said: dict[str, Any] = {
            role: {source.name: text_digest(source.texts) for source in getattr(self, role)}
            for role in ("calibration", "selection", "report")
        }
        said["rows"] = {name: [len(rows), rows_digest(rows)] for name, rows in self.rows.items()}
        return {**said, "tasks": list(self.tasks)}

    def domains(self) -> Texts:
        """Calibration domains cut in two: what calibrates, and what is reported of the same kind."""
        calibration, report = zip(*(held_out(source) for source in self.calibration), strict=True)
        return replace(self, calibration=calibration, report=report)

    def windows(self, tokenizer: Any, tokens: int, length: int) -> dict[str, TokenBlocks]:
        """Report windows by source, cut by the perplexity protocol."""
        return {
            source.name: report_blocks(source, tokenizer, tokens=tokens, sequence_length=length)
            for source in self.report
        }


def read(sources: Sources, tokenizer: Any, characters: int = CHARACTERS, task_rows: int | None = None) -> Texts:
    """Read all texts once, and refuse those that overlap.

    Args:
        sources ([`Sources`]): their names.
        tokenizer: whose chat template renders rows of messages.
        characters (`int`, *optional*): at most so many per source.
        task_rows (`int`, *optional*): the first so many rows of every file are [`Texts.rows`].

    Raises:
        CalibrationError: a text is missing or two roles share text.
    """
    read_as: dict[str, list[Documents]] = {}
    for role in ("calibration", "selection", "report"):
        read_as[role] = []
        for source in getattr(sources, role):
            # A txt file is one document, which no limit cuts.
            documents = read_source(
                source, tokenizer=tokenizer, limit_characters=characters, part=text_part(source, role)
            )
            read_as[role].append(documents)
    refuse_overlap(read_as)
    files = [name for name in sources.rows if Path(name).suffix == ".jsonl"]
    tasks = tuple(name for name in sources.rows if name not in files)
    calibration, selection, report = read_as.values()
    # Results are kept by name: report texts, files of rows, and the tasks of lm-eval, which are asked for by theirs.
    named = [*tasks, *(documents.name for documents in report), *(Path(file).stem for file in files)]
    names = distinct_names(named)[len(tasks) :]
    all_rows = dict(zip(names[len(report) :], (tuple(read_rows(file)) for file in files), strict=True))
    rows = {name: own[:task_rows] for name, own in all_rows.items()}
    return Texts(_named(calibration), _named(selection), _named(report, names[: len(report)]), rows, all_rows, tasks)


def _named(read: Sequence[Documents], names: Sequence[str] | None = None) -> tuple[TextSource, ...]:
    names = distinct_names(documents.name for documents in read) if names is None else names
    return tuple(TextSource(name, documents.texts) for name, documents in zip(names, read, strict=True))


def held_out(source: TextSource) -> tuple[TextSource, TextSource]:
    """A source in two that share no document; a single document is cut at its blank lines into a hundred stretches."""
    texts: Sequence[str] = source.texts
    if len(texts) < HELD_OUT:
        texts = _stretches("\n\n".join(texts), 100)
    kept = [text for index, text in enumerate(texts) if index % HELD_OUT != HELD_OUT - 1]
    # Pages are quoted and copied: what stands in both parts is not reported.
    seen = {" ".join(text.split()) for text in kept}
    left = [text for text in texts[HELD_OUT - 1 :: HELD_OUT] if " ".join(text.split()) not in seen]
    return TextSource(source.name, kept), TextSource(source.name, left)


def _stretches(text: str, count: int) -> list[str]:
    size, start, parts = max(1, len(text) // count), 0, []
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        parts.append(text[start:end])
        start = end
    return parts


def text_digest(texts: Sequence[str]) -> str:
    """A short digest of documents."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def rows_digest(rows: Sequence[ChoiceRow]) -> str:
    """A short digest of multiple-choice rows."""
    said = json.dumps([[row.id, row.context, row.choices, row.label] for row in rows])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
