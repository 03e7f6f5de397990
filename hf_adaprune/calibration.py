"""Documents become token blocks with a domain, deterministically.

Calibration windows are shuffled and packed; selection and report text follows the perplexity protocol (the text as it
stands, cut into windows). Where the tokenizer begins every text with BOS, so does every window.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .documents import Documents, Readable, distinct_names, read_source
from .errors import CalibrationError
from .token_blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "begin_token",
    "calibration_blocks",
    "packed_blocks",
    "report_blocks",
    "window_counts",
]

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 20_000
SHORTEST_WINDOW = 8
SURPLUS_TOKENS = 512


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that a tokenizer puts before every text by itself; `None` where it puts none there.

    What the tokenizer does counts, not what it says of itself: many have a BOS token that they do not add.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
    """
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        return None
    with_special, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if with_special[:1] == [bos] != bare[:1] else None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, needed: int, seed: str) -> list[int]:
    """At least `needed` tokens (or all there are) of the shuffled documents; a larger `needed` only appends."""
    spans: list[tuple[int, int, int]] = []
    for index, text in enumerate(documents.texts):
        start = 0
        while start < len(text):
            end = min(start + CHUNK_CHARACTERS, len(text))
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            if text[start:end].strip():
                spans.append((index, start, end))
            start = end
    random.Random(seed).shuffle(spans)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    waiting = iter(spans)
    while len(ids) < needed:
        batch: list[str] = []
        characters = 0
        # Four characters per token is what English takes; another round follows where it was too few.
        while characters < 4 * (needed - len(ids)) and (span := next(waiting, None)) is not None:
            batch.append(documents.texts[span[0]][span[1] : span[2]])
            characters += len(batch[-1])
        if not batch:
            break
        for tokens in _encode(tokenizer, batch):
            ids += tokens + separator
    return ids


def _windows(ids: Sequence[int], length: int, first: int | None) -> list[list[int]]:
    """Cut tokens into windows that begin with `first`, where it is a token; the last one may be shorter."""
    shortest = 1 if first is None else 2
    if length < shortest:
        raise CalibrationError(f"`sequence_length` should be at least {shortest}. Found {length}.")
    windows: list[list[int]] = []
    start = 0
    while start < len(ids):
        # A chat template begins with it too, and it stands there once.
        begin = [] if first is None or ids[start] == first else [first]
        end = start + length - len(begin)
        windows.append([*begin, *ids[start:end]])
        start = end
    return windows


def _blocks(
    windows: Sequence[Sequence[int]],
    domain: Sequence[int],
    domains: tuple[str, ...],
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
) -> TokenBlocks:
    largest = max(max(window) for window in windows)
    if vocab_size is not None and largest >= vocab_size:
        raise CalibrationError(
            f"tokenizer and model do not belong together: the tokenizer made token {largest}, the model knows "
            f"{vocab_size} tokens (0 to {vocab_size - 1}). Load the tokenizer of this model."
        )
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    pad = pad if vocab_size is None or pad < vocab_size else 0
    ids = torch.tensor([[*window, *[pad] * (length - len(window))] for window in windows])
    mask = torch.arange(length) < torch.tensor([[len(window)] for window in windows])
    return TokenBlocks(ids, mask, torch.tensor(list(domain)), domains)


def window_counts(samples: int, shares: Sequence[float]) -> list[int]:
    """Windows of each source: one, and of the others its share, by largest remainders.

    Args:
        samples (`int`): in all, one per source at least.
        shares (sequence of `float`): positive, in any unit.
    """
    left = samples - len(shares)
    ideal = [max(share / sum(shares) * samples - 1, 0.0) for share in shares]
    scale = left / sum(ideal) if left else 0.0
    counts = [math.floor(entry * scale) for entry in ideal]
    order = sorted(range(len(shares)), key=lambda index: (counts[index] - ideal[index] * scale, index))
    for index in order[: left - sum(counts)]:
        counts[index] += 1
    return [1 + count for count in counts]


def calibration_blocks(
    sources: Sequence[Readable],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    shares: Sequence[float] = (),
    seed: int = 0,
    model: PreTrainedModel | None = None,
    vocab_size: int | None = None,
    allow_fewer: bool = False,
) -> TokenBlocks:
    """Calibration windows of several sources; each source is one domain.

    Documents are shuffled (long ones in chunks cut at line starts), tokenised without special tokens, packed end to end
    with the end-of-sequence token between them, and cut into windows. More `samples` extend a domain's windows. The
    windows of the domains alternate: the first few are of every domain, and any first part has the pool's mixture.

    A tokenizer that begins every text with BOS ([`begin_token`]) has every window begin with it: BOS, then
    `sequence_length - 1` tokens of text. Where the text has BOS there already (from a chat template), it is that one.

    Args:
        sources (sequence of `str`, `TextSource` or `Documents`): see [`read_source`].
        tokenizer: the model's tokenizer; it needs no padding token.
        samples (`int`): windows in all. What a short source lacks, the others give.
        sequence_length (`int`): tokens per window, BOS among them.
        shares (sequence of `float`, *optional*): of the windows, one per source; equal where not given. Every source
            gives at least one window.
        seed (`int`, *optional*, defaults to 0): of shuffling, and of `self`.
        model (*optional*): needed by `self`.
        vocab_size (`int`, *optional*): the model's vocabulary, to check the token ids against.
        allow_fewer (`bool`, *optional*, defaults to `False`): take the windows there are, with a warning, where the
            text is too short for `samples`.

    Raises:
        CalibrationError: too little text, windows without room for text, or tokens that the model does not have.
    """
    if not sources or samples < len(sources):
        raise CalibrationError(
            f"`samples` should give each of at least one source a window. Found {samples} for {len(sources)} sources."
        )
    counts = window_counts(samples, shares or (1.0,) * len(sources))
    read = [
        read_source(source, tokenizer=tokenizer, model=model, seed=seed, self_tokens=count * sequence_length * 5 // 4)
        for source, count in zip(sources, counts, strict=True)
    ]
    names = distinct_names(documents.name for documents in read)

    first = begin_token(tokenizer)
    packed: list[list[list[int]]] = [[] for _ in read]
    short: set[int] = set()
    while True:
        for index, count in enumerate(counts):
            if len(packed[index]) < count:
                ids = _pack(read[index], tokenizer, count * sequence_length, f"{seed}:{names[index]}")
                cut = _windows(ids, sequence_length, first)
                packed[index] = [window for window in cut if len(window) == sequence_length]
                if len(packed[index]) < count:
                    short.add(index)
                    counts[index] = len(packed[index])
                    if not counts[index]:
                        tokens = cut[0] if cut else []
                        return _only_window(tokens, names, sequence_length, tokenizer, vocab_size, index)
        missing = samples - sum(counts)
        if not missing:
            break
        others = [index for index in range(len(read)) if index not in short]
        if not others and allow_fewer:
            logger.warning(
                "the calibration text has %d windows of %d tokens; %d were asked for.",
                sum(counts),
                sequence_length,
                samples,
            )
            break
        if not others:
            raise CalibrationError(
                f"the calibration text has {sum(counts)} windows of {sequence_length} tokens; {samples} were asked "
                f"for. Give more text, or lower calibration.samples to {sum(counts)} or calibration.sequence_length."
            )
        for position, index in enumerate(others):
            counts[index] += missing // len(others) + (position < missing % len(others))
    # Any first part of the pool, such as the windows with gradients, has every domain, and the pool's mixture.
    order = sorted(
        (rank > 0, (rank + 0.5) / count, index, rank) for index, count in enumerate(counts) for rank in range(count)
    )
    windows = [packed[index][rank] for *_, index, rank in order]
    return _blocks(windows, [index for *_, index, _ in order], tuple(names), sequence_length, tokenizer, vocab_size)


def packed_blocks(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    samples: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """Windows of one source, packed as [`calibration_blocks`] packs them: `samples` of them, or all there are.

    They begin with BOS where the tokenizer begins every text with it.

    Args:
        documents (`Documents`): the texts.
        tokenizer: the model's tokenizer.
        sequence_length (`int`): tokens per window, BOS among them.
        samples (`int`, *optional*): at most so many windows.
        seed (`int`, *optional*, defaults to 0): of shuffling.
        vocab_size (`int`, *optional*): the model's vocabulary, to check the token ids against.

    Raises:
        CalibrationError: not one whole window, no room for text, or tokens that the model does not have.
    """
    most = sum(map(len, documents.texts)) + len(documents.texts)
    ids = _pack(
        documents, tokenizer, most if samples is None else samples * sequence_length, f"{seed}:{documents.name}"
    )
    cut = _windows(ids, sequence_length, begin_token(tokenizer))
    windows = [window for window in cut if len(window) == sequence_length][: samples or most]
    if not windows:
        raise CalibrationError(
            f"source {documents.name!r} is too short: {len(cut[0]) if cut else 0} tokens, one window needs "
            f"{sequence_length}; give more text or shorter windows."
        )
    return _blocks(windows, [0] * len(windows), (documents.name,), sequence_length, tokenizer, vocab_size)


def _only_window(
    tokens: list[int],
    names: list[str],
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
    index: int,
) -> TokenBlocks:
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    if len(names) > 1 or len(tokens) < SHORTEST_WINDOW:
        raise CalibrationError(
            f"source {names[index]!r} is too short: {len(tokens)} tokens, one window needs {length}; give more text or "
            "lower calibration.sequence_length."
        )
    logger.warning("calibration: one window of %d tokens is all the text there is (%d asked for).", len(tokens), length)
    return _blocks([tokens], [0], tuple(names), length, tokenizer, vocab_size)


def report_blocks(
    source: Readable,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    sequence_length: int,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """Windows by the perplexity protocol, for selection and report text.

    The texts are joined as they stand, tokenised once without special tokens and cut into non-overlapping windows; the
    first `tokens` tokens count. A last partial window of at least two tokens is padded.

    A tokenizer that begins every text with BOS ([`begin_token`]) has every window begin with it: BOS, which counts
    among the `tokens`, then `sequence_length - 1` tokens of text. The first of them is scored given BOS, as in the
    rolling log-likelihood of lm-evaluation-harness, and BOS is not.

    Args:
        source (`str`, `TextSource` or `Documents`): see [`read_source`].
        tokenizer: the model's tokenizer.
        tokens (`int`): how many tokens at most, BOS among them.
        sequence_length (`int`): tokens per window, BOS among them.
        seed (`int`, *optional*, defaults to 0): of `self`.
        model (*optional*): needed by `self`.
        vocab_size (`int`, *optional*): the model's vocabulary, to check the token ids against.

    Raises:
        CalibrationError: fewer than two tokens, windows without room for text, or tokens that the model does not have.
    """
    documents = read_source(source, tokenizer=tokenizer, model=model, seed=seed, self_tokens=tokens * 5 // 4)
    text = documents.separator.join(documents.texts)
    characters = tokens * 8
    while True:
        ids = _encode(tokenizer, [text[:characters]])[0]
        # A cut changes tokens near it, so what counts ends far before it.
        if characters >= len(text) or len(ids) >= tokens + SURPLUS_TOKENS:
            break
        characters *= 2
    windows = _windows(ids[:tokens], sequence_length, begin_token(tokenizer))
    # With BOS before each the windows hold more than `tokens`; all but the last one are whole.
    starts = range(0, tokens, sequence_length)
    windows = [window[: tokens - start] for start, window in zip(starts, windows, strict=False)]
    found = sum(map(len, windows))
    if found < tokens:
        logger.warning("source %r has %d tokens; %d were asked for.", documents.name, found, tokens)
    windows = [window for window in windows if len(window) >= 2]
    if not windows:
        raise CalibrationError(
            f"source {documents.name!r} is too short: {found} tokens, and predicting one takes 2. Give more text."
        )
    return _blocks(windows, [0] * len(windows), (documents.name,), sequence_length, tokenizer, vocab_size)
