"""Text of a recovery: windows to train on, windows that are held out, and report text."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .calibration import packed_blocks, report_blocks
from .config import CalibrationConfig, Source
from .documents import Documents, distinct_names, read_source, refuse_overlap
from .errors import CalibrationError, ConfigError
from .pipeline import as_sources
from .positions import learned_positions
from .recovery_config import DEFAULT_TOKENS, RecoveryConfig
from .stages import text_part
from .teacher_cache import vocabulary_of
from .token_blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["report_texts", "training_texts"]

logger = logging.getLogger(__name__)


def training_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RecoveryConfig,
    sources: Sequence[Source] | Source,
    *,
    selection: Sequence[Source] | Source = (),
    report: Sequence[Source] | Source = (),
) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Training windows and those held out, in `config.shares` of the sources.

    They begin with BOS where the tokenizer begins every text with it.

    Args:
        model (`PreTrainedModel`): the student; `self` is sampled from it.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        config ([`RecoveryConfig`]): how many windows, how long.
        sources (`str`, [`TextSource`] or a list of them): training text.
        selection (the same, *optional*): text that must not overlap with it.
        report (the same, *optional*): more of it, on which perplexity is reported: dense, before and after.

    Raises:
        CalibrationError: too little text, or overlaps.
        ConfigError: shares that do not fit the sources.
    """
    own = as_sources(sources)
    if not own:
        raise CalibrationError("there is no training text. Name at least one source, for example a jsonl file.")
    shares = config.shares or (1.0,) * len(own)
    if len(shares) != len(own):
        raise ConfigError(f"`shares` should have one number per source ({len(own)}). Found {len(shares)}.")
    shares = tuple(share / sum(shares) for share in shares)
    length = config.sequence_length
    wanted = None if config.minutes is not None else -(-(config.tokens or DEFAULT_TOKENS) // length)
    read: dict[str, list[Documents]] = {}
    for role, named in (("training", own), ("selection", as_sources(selection)), ("report", as_sources(report))):
        part = "calibration" if role == "training" else role
        # What `self` says has its share, held-out windows included.
        spoken = ((wanted or config.held_out * 8) + config.held_out) * length * 5 // 4
        own_shares = shares if role == "training" else (1 / len(own),) * len(named)
        read[role] = [
            read_source(
                source, tokenizer=tokenizer, model=model, seed=config.seed, part=text_part(source, part),
                self_tokens=max(math.ceil(share * spoken), length),
            )
            for source, share in zip(named, own_shares, strict=True)
        ]  # fmt: skip
    refuse_overlap(read)
    parts: list[TokenBlocks] = []
    for documents, share in zip(read["training"], shares, strict=True):
        most = None if wanted is None else max(round(share * wanted), 1) + max(round(share * config.held_out), 1)
        parts.append(
            packed_blocks(
                documents, tokenizer, sequence_length=length, samples=most, seed=config.seed,
                vocab_size=vocabulary_of(model),
            )
        )  # fmt: skip
    names = tuple(documents.name for documents in read["training"])
    train: list[TokenBlocks] = []
    held: list[TokenBlocks] = []
    for blocks, share in zip(parts, shares, strict=True):
        # The windows that come first do not depend on how long the training is.
        aside = min(max(round(share * config.held_out), 1) if config.held_out else 0, len(blocks) // 4)
        held.append(blocks.select(slice(0, aside)))
        train.append(blocks.select(slice(aside, len(blocks))))
    if wanted is None and config.shares:
        # Without a number of tokens the source that is scarcest for its share says how much of the others is read.
        pairs = list(zip(train, shares, strict=True))
        room = min(len(own) / share for own, share in pairs if share)
        train = [own.select(slice(0, max(int(share * room), 1))) for own, share in pairs]
    held_out = _joined(held, names)
    if config.held_out and not len(held_out):
        raise CalibrationError(
            "the training text has fewer than four windows, too few to hold one out. Give more text, shorter windows "
            "(`sequence_length`), or set `held_out` to 0."
        )
    return _joined(train, names), held_out if len(held_out) else None


def report_texts(model: Any, tokenizer: PreTrainedTokenizerBase, report: Any) -> dict[str, TokenBlocks]:
    """Windows of every report source, by name, as long as `prune` takes them or as learned positions allow.

    Args:
        model (`PreTrainedModel`): the student.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        report (`str`, [`TextSource`] or a list of them): the sources.

    Raises:
        CalibrationError: a source cannot be read, or is too short.
    """
    own = CalibrationConfig()
    length = min(own.evaluation_length, learned_positions(model) or own.evaluation_length)
    if report and length < own.evaluation_length:
        logger.warning("perplexity is reported on windows of %d tokens: the model has no more positions.", length)
    read = [
        read_source(source, tokenizer=tokenizer, model=model, part=text_part(source, "report"))
        for source in as_sources(report)
    ]
    return {
        name: report_blocks(documents, tokenizer, tokens=own.evaluation_tokens, sequence_length=length)
        for name, documents in zip(distinct_names(documents.name for documents in read), read, strict=True)
    }


def _joined(parts: Sequence[TokenBlocks], names: tuple[str, ...]) -> TokenBlocks:
    domain = torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
    ids, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "attention_mask"))
    return TokenBlocks(ids, mask, domain, names)
