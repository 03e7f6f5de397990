"""Text sources are read into documents, and texts with different roles are kept apart.

A source is a file, a data set, texts in memory, what comes with CPython (`python`), or sampled from the model (`self`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import TextSource
from .errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Documents",
    "Readable",
    "distinct_names",
    "eval_mode",
    "input_device",
    "json_rows",
    "read_source",
    "refuse_overlap",
]

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PYTHON_SOURCES = ("python", "python:prose", "python:code")
ROW_FIELDS = "text, content, messages, conversations, instruction (input, output), prompt (completion or response)"
STREAM_CHARACTERS = 8_000_000
PARAGRAPH_CHARACTERS = 80
SELF_LENGTH, SELF_BATCH = 512, 8
CODE_PER_PROSE = 3


@dataclass(frozen=True)
class Documents:
    """The texts of one source.

    Args:
        name (`str`): the domain's name.
        texts (`tuple[str, ...]`): the documents as they stand, empty ones among them.
        separator (`str`, *optional*, defaults to two newlines): what the perplexity protocol joins them with.
    """

    name: str
    texts: tuple[str, ...] = field(repr=False)
    separator: str = "\n\n"


Readable = str | TextSource | Documents


def distinct_names(names: Iterable[str]) -> list[str]:
    """Names in their order, those that were there before numbered: files of one stem are several texts.

    Args:
        names (iterable of `str`): `test, test, dev` becomes `test, test-2, dev`.
    """
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(own for own in itertools.chain([name], numbered) if own not in found))
    return found


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode for the time of a `with`; afterwards every module has its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model's input ids belong on."""
    return next(model.get_input_embeddings().parameters()).device


def read_source(
    source: Readable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    seed: int = 0,
    limit_characters: int | None = None,
    self_tokens: int = 16_384,
    part: tuple[int, int] | None = None,
) -> Documents:
    """Read a source of text.

    Args:
        source (`str`, `TextSource` or `Documents`): a file (txt: one document as it stands; jsonl, json and parquet:
            one document per row), `python` (or `python:prose`, `python:code`: the help topics and the standard library
            of the running interpreter), `self` (sampled from the model), or a data set `name[:config][:split]`.
        tokenizer (*optional*): whose chat template renders rows of messages; needed by `self`.
        model (*optional*): needed by `self`.
        seed (`int`, *optional*, defaults to 0): of `self`.
        limit_characters (`int`, *optional*): stop after the document that reaches this many. Data sets are streamed and
            stop at 8 million characters where nothing is given.
        self_tokens (`int`, *optional*, defaults to 16384): how many tokens `self` samples.
        part (`tuple[int, int]`, *optional*): (k, n) keeps every n-th document beginning with the k-th, so that two
            parts of one source share no document. `python` is cut by topic and by module.

    Raises:
        CalibrationError: the source does not exist, cannot be read, or holds no text.
    """
    if isinstance(source, str) and "\n" in source:
        raise CalibrationError(
            f"a source should be the name of a text. Found the text itself ({source[:40]!r}...); write "
            "TextSource(name, [text])."
        )
    if source == "":
        raise CalibrationError("a source should be the name of a text. Found an empty one; name a file or a data set.")
    if part is not None and not 0 <= part[0] < part[1]:
        raise CalibrationError(f"`part` should be (k, n) with 0 <= k < n. Found {part!r}.")
    if isinstance(source, Documents):
        found = source
    elif isinstance(source, TextSource):
        found = Documents(source.name, source.texts)
    elif source in PYTHON_SOURCES:
        found = Documents(source, _python_documents(source, part or (0, 1)))
        part = None
    elif source == "self":
        if model is None or tokenizer is None:
            raise CalibrationError(
                "source `self` is sampled from the model: it needs `model` and `tokenizer`. Pass both."
            )
        found = Documents("self", tuple(_sample(model, tokenizer, self_tokens, limit_characters, seed)))
    elif _is_file_name(source):
        found = _read_file(Path(source).expanduser(), tokenizer, limit_characters)
    else:
        name = source.split(":")[0].rsplit("/", 1)[-1]
        rows = _stream(source)
        found = Documents(name, tuple(_limited(_texts(rows, tokenizer, source), limit_characters or STREAM_CHARACTERS)))
    texts: Iterable[str] = found.texts if part is None else found.texts[part[0] :: part[1]]
    texts = tuple(_limited(texts, limit_characters))
    if not any(text.strip() for text in texts):
        raise CalibrationError(
            f"source {found.name!r} is empty: it holds no text, or only blanks. Give another source."
        )
    return Documents(found.name, texts, found.separator)


def _limited(texts: Iterable[str], limit: int | None) -> Iterator[str]:
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if limit is not None and characters >= limit:
            return


def _is_file_name(source: str) -> bool:
    # One slash alone may be a data set's `owner/name`.
    path = Path(source)
    return (
        os.path.isfile(source)
        or path.suffix in SUFFIXES
        or source[0] in "/.~"
        or source.count("/") > 1
        or "\\" in source
    )


def _read_file(path: Path, tokenizer: PreTrainedTokenizerBase | None, limit: int | None) -> Documents:
    if not path.is_file():
        raise CalibrationError(f"there is no file at {path} (looked in {path.resolve().parent}). Check the path.")
    if path.suffix not in SUFFIXES:
        raise CalibrationError(
            f"{path} should end in one of {', '.join(SUFFIXES)}. Found {path.suffix!r}; rename or convert it."
        )
    if path.suffix == ".txt":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return Documents(path.stem, (file.read(-1 if limit is None else limit),), separator="")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} should be text in UTF-8: {error}. Convert it.") from error
    rows = _parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    return Documents(path.stem, tuple(_limited(_texts(rows, tokenizer, str(path)), limit)))


def json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSON-lines file; a file that is one JSON array yields its items.

    Raises:
        CalibrationError: a line is not JSON, or the file is no UTF-8; the message names the line.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.lstrip().startswith("["):
                    yield from json.loads(line + file.read())
                    return
                if line.strip():
                    yield json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}, line {max(number, 1)} should be one JSON object in UTF-8: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} should be a parquet file: {error}.") from error


def _stream(source: str) -> Iterable[Any]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise CalibrationError(f"a data set should be written name[:config][:split]. Found {source!r}.")
    if len(rest) == 1 and rest[0] in ("train", "validation", "test"):
        rest = ["", rest[0]]
    config, split = [*rest, "", ""][:2]
    try:
        import datasets

        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # `datasets` raises its own, the hub's, fsspec's and the network's exceptions
        raise CalibrationError(
            f"source {source!r} is no file here and could not be loaded as a data set ({type(error).__name__}: "
            f"{error}). Check the name (name[:config][:split]) and the network, or give a file (txt, jsonl, parquet), "
            "`python` or `self`."
        ) from error


def _texts(rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield _row_text(row, tokenizer, f"{where}, row {number}")


def _row_text(row: Any, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    if not isinstance(row, Mapping):
        raise CalibrationError(
            f"{where} should be an object with fields like {ROW_FIELDS}. Found {type(row).__name__}."
        )
    for name in ("text", "content"):
        if isinstance(row.get(name), str):
            return str(row[name])
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        roles = {"human": "user", "gpt": "assistant"}
        try:
            messages = [
                {"role": roles.get(role, role), "content": turn["content"] if "content" in turn else turn["value"]}
                for turn in turns
                for role in [turn["role"] if "role" in turn else turn["from"]]
            ]
        except (KeyError, TypeError) as error:
            raise CalibrationError(
                f"{where}: each message should have role and content (or from and value)."
            ) from error
        return _render(messages, tokenizer, where)
    asked = [row.get(name) for name in ("instruction", "input")] if row.get("instruction") else [row.get("prompt")]
    answer = next((row[name] for name in ("output", "completion", "response") if row.get(name)), None)
    question = "\n\n".join(str(piece) for piece in asked if piece)
    if not question:
        if named := [name for name in ("text", "content") if name in row]:
            found = row[named[0]]
            raise CalibrationError(
                f"{where}: `{named[0]}` should be a string. Found {type(found).__name__} ({found!r:.80})."
            )
        raise CalibrationError(
            f"{where} has no text that is understood. Found the fields {', '.join(row) or '(none)'}; understood: "
            f"{ROW_FIELDS}. Rename a field."
        )
    messages = [{"role": "user", "content": question}]
    return _render(messages + ([{"role": "assistant", "content": str(answer)}] if answer else []), tokenizer, where)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(str(message["content"]) for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise CalibrationError(f"{where}: the tokenizer's chat template refused the messages: {error}.") from error


def _paragraphs(text: str) -> Iterator[str]:
    # Web text has a paragraph per line, wrapped text a paragraph per block; both are whitespace-collapsed.
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in block.split("\n")]
        whole = any(len(line) >= PARAGRAPH_CHARACTERS for line in lines)
        yield from (line for line in (lines if whole else [" ".join(lines)]) if len(line) >= PARAGRAPH_CHARACTERS)


@functools.cache
def _python_kinds() -> dict[str, tuple[str, ...]]:
    try:
        from pydoc_data import topics as module

        topics = dict(module.topics)
    except ImportError:  # some distributions leave it out
        topics = {}
    root = Path(os.__file__).parent
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [name for name in names if not skipped & set(name.parts) and not name.name.startswith("_sysconfigdata")]
    # The alphabet would put whole packages side by side; the hash of a name mixes them, equally on every machine.
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    code = [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]
    seen: set[int] = set()
    kinds: dict[str, tuple[str, ...]] = {}
    for kind, texts in (("prose", [topics[name] for name in sorted(topics)]), ("code", code)):
        kept = []
        for text in texts:
            # Topics quote each other at length and modules share licences: only the first keeps a passage.
            blocks = [(block, {hash(line) for line in _paragraphs(block)}) for block in text.split("\n\n")]
            kept.append("\n\n".join(block for block, hashes in blocks if not hashes & seen))
            seen.update(*(hashes for _, hashes in blocks))
        kinds[kind] = tuple(text for text in kept if len(text) >= 500)
    return kinds


def _python_documents(source: str, part: tuple[int, int]) -> tuple[str, ...]:
    prose, code = (_python_kinds()[kind][part[0] :: part[1]] for kind in ("prose", "code"))
    if source != "python":
        return prose if source == "python:prose" else code
    # There is 25 times as much code as prose. All of it would make the default a pure code domain; three parts of code
    # leave a third of it enough for 128 windows of 1,024 tokens.
    mixed: list[str] = []
    waiting, room = iter(code), 0
    for text in prose:
        mixed.append(text)
        room += CODE_PER_PROSE * len(text)
        while room > 0 and (module := next(waiting, None)) is not None:
            mixed.append(module)
            room -= len(module)
    return tuple(mixed) or code


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, limit: int | None, seed: int
) -> Iterator[str]:
    device = input_device(model)
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = tokenizer.eos_token_id if eos is None else eos
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ordinary = torch.tensor(sorted(set(range(min(config.vocab_size, len(tokenizer)))) - set(tokenizer.all_special_ids)))
    positions = getattr(config, "max_position_embeddings", None) or SELF_LENGTH + 1
    length = min(SELF_LENGTH, positions - 1, max(32, -(-tokens // SELF_BATCH)))
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Plain sampling from the model's own distribution, whatever its generation_config prefers.
    plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
    sizes = {"max_new_tokens": length, "min_new_tokens": min(32, length), "eos_token_id": eos, "pad_token_id": pad}
    untyped: Any = model
    texts: list[str] = []
    sampled = characters = 0
    accelerators = [device] if device.type in ("cuda", "xpu") else []
    kind = device.type if accelerators else "cuda"
    with torch.random.fork_rng(devices=accelerators, device_type=kind), eval_mode(model), torch.inference_mode():
        torch.manual_seed(seed)
        while sampled < tokens and (limit is None or characters < limit):
            starts = ordinary[torch.randint(len(ordinary), (SELF_BATCH, 1))]
            prompt = (starts if first is None else torch.full_like(starts, first)).to(device)
            new = untyped.generate(prompt, attention_mask=torch.ones_like(prompt), **plain, **sizes)
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            characters = sum(map(len, texts))
            # Padding after an early end counts as none; what is decoded is tokenised again and may shrink.
            sampled += int((new[:, 1:] != pad).sum()) or 1
    return iter(texts)


def refuse_overlap(named: Mapping[str, Sequence[Documents]]) -> None:
    """Check that texts with different roles share nothing: neither a document nor more than a few paragraphs.

    Paragraphs of at least 80 characters are compared, whitespace collapsed. Two roles overlap where they share a whole
    document of that length, or at least three paragraphs that are more than 2 % of the smaller role's.

    Args:
        named (mapping of `str` to sequence of `Documents`): the documents by role: calibration, selection, report.

    Raises:
        CalibrationError: two roles overlap; the message names both sources and the first passage they share.
    """
    roles: list[tuple[str, dict[int, tuple[str, str]], set[int]]] = []
    for role, sources in named.items():
        passages: dict[int, tuple[str, str]] = {}
        whole: set[int] = set()
        for documents in sources:
            for text in documents.texts:
                complete = " ".join(text.split())
                units = list(_paragraphs(text)) or [complete]
                passages.update((hash(unit), (documents.name, unit[:80])) for unit in units if unit)
                if len(complete) >= PARAGRAPH_CHARACTERS:
                    whole.add(hash(complete))
                    passages.setdefault(hash(complete), (documents.name, complete[:80]))
        for other_role, other_passages, other_whole in roles:
            shared = [key for key in other_passages if key in passages]
            many = len(shared) >= 3 and len(shared) > 0.02 * min(len(passages), len(other_passages))
            identical = [key for key in shared if key in whole and key in other_whole]
            if identical or many:
                first = (identical or shared)[0]
                raise CalibrationError(
                    f"{other_role} source {other_passages[first][0]!r} and {role} source {passages[first][0]!r} "
                    f"overlap: they share {len(shared)} paragraphs, the first being {passages[first][1]!r}. What "
                    "calibrates, what a search minimises and what is reported should be different texts; give another "
                    "source for one of them."
                )
        roles.append((role, passages, whole))
