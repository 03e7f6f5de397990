"""Multiple-choice questions: rows in a file, and accuracy as lm-evaluation-harness scores it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .continuations import log_likelihoods
from .documents import json_rows
from .errors import CalibrationError
from .evaluation import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChoiceRow", "multiple_choice", "per_row_errors", "read_rows"]


@dataclass(frozen=True)
class ChoiceRow:
    """A multiple-choice question: `choices[label]` is the right continuation of `context`."""

    id: str
    task: str
    context: str
    choices: tuple[str, ...]
    label: int


def read_rows(path: str | Path) -> list[ChoiceRow]:
    """Read multiple-choice rows `{"id", "task", "context", "choices": [...], "label": int}` from a jsonl file.

    Raises:
        CalibrationError: there is no such file, or a row lacks a field or has a label outside of its choices.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"there is no file of multiple-choice rows at {path}. Check the path.")
    rows = []
    for number, row in enumerate(json_rows(path), start=1):
        missing = {"id", "task", "context", "choices", "label"} - set(row if isinstance(row, dict) else ())
        if missing:
            raise CalibrationError(
                f"{path}, row {number} lacks {', '.join(sorted(missing))}. A row is an object with id, task, context, "
                "choices and label."
            )
        choices, label = row["choices"], row["label"]
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not texts or not isinstance(row["context"], str):
            raise CalibrationError(
                f"{path}, row {number}: `context` should be a string and `choices` two or more non-empty strings."
            )
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise CalibrationError(f"{path}, row {number}: `label` should be 0 to {len(choices) - 1}. Found {label!r}.")
        rows.append(ChoiceRow(str(row["id"]), str(row["task"]), row["context"], tuple(choices), label))
    if not rows:
        raise CalibrationError(f"{path} holds no rows. Give a file of multiple-choice questions.")
    return rows


def _encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation as lm-evaluation-harness cuts them (`TemplateLM._encode_pair`)."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    # The context brings the tokens that the tokenizer adds to a text, such as BOS; an empty one is the prefix alone.
    special = None if context else False
    whole = _encode(tokenizer, stripped + continuation, special)
    if not whole:
        raise CalibrationError(f"the tokenizer makes no token of {stripped + continuation!r}. Is it the model's own?")
    before = _encode(tokenizer, stripped, special) if context else []
    first = _prefix_token(tokenizer)
    # The choice may melt into the context's last token; one token is scored at least, and one conditions it.
    start = min(len(before) or int(whole[0] == first), len(whole) - 1)
    if start:
        return before if start == len(before) else whole[:start], whole[start:]
    return [0 if first is None else first], whole


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool | None) -> list[int]:
    """Tokens of a text; `special` `None` adds what the tokenizer adds by itself, unless the text begins with it."""
    first = _prefix_token(tokenizer)
    if special is None and first is not None and text.startswith(str(tokenizer.decode([first]))):
        special = False
    options = {} if special is None else {"add_special_tokens": special}
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def _prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What stands before a text that has no context: BOS, or EOS where there is none."""
    token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return token


def multiple_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow], batch_size: int = 16
) -> dict[str, Measurement]:
    """Accuracy on multiple-choice rows, scored as lm-evaluation-harness does.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer: its tokenizer.
        rows (sequence of `ChoiceRow`): see [`read_rows`].
        batch_size (`int`, *optional*, defaults to 16): continuations per forward; a row's context is read once for all
            of its choices.

    Returns:
        `dict[str, Measurement]`: `acc` (the choice of the highest log-likelihood after the context) and `acc_norm` (of
        the highest log-likelihood over the choice's length in characters).

    Raises:
        CalibrationError: there are no rows, or a row makes no tokens.
    """
    scores, tokens = _choice_scores(model, tokenizer, rows, batch_size)
    normed = _by_length(scores, rows)
    return {"acc": _accuracy("acc", scores, rows, tokens), "acc_norm": _accuracy("acc_norm", normed, rows, tokens)}


def per_row_errors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow], batch_size: int = 16
) -> list[float]:
    """1 for every multiple-choice row that the model gets wrong by `acc_norm`, else 0; see [`multiple_choice`]."""
    normed = _by_length(_choice_scores(model, tokenizer, rows, batch_size)[0], rows)
    return [float(values.index(max(values)) != row.label) for values, row in zip(normed, rows, strict=True)]


def _by_length(scores: list[list[float]], rows: Sequence[ChoiceRow]) -> list[list[float]]:
    return [
        [score / len(text) for score, text in zip(values, row.choices, strict=True)]
        for values, row in zip(scores, rows, strict=True)
    ]


def _choice_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChoiceRow], batch_size: int
) -> tuple[list[list[float]], int]:
    """Log-likelihood of every choice of every row, and the number of scored tokens."""
    if not rows:
        raise CalibrationError("there are no multiple-choice rows to score. Give at least one.")
    pairs = [_encode_pair(tokenizer, row.context, " " + text) for row in rows for text in row.choices]
    found, tokens = log_likelihoods(model, pairs, batch_size)
    scores = iter(found)
    return [[next(scores) for _ in row.choices] for row in rows], tokens


def _accuracy(name: str, scores: list[list[float]], rows: Sequence[ChoiceRow], tokens: int) -> Measurement:
    n = len(rows)
    value = sum(values.index(max(values)) == row.label for values, row in zip(scores, rows, strict=True)) / n
    return Measurement(name, value, math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else math.nan, tokens, n)
