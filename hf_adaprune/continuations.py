"""Log-likelihoods of continuations. A context that several follow is read once: its keys and values serve them all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .documents import eval_mode, input_device
from .errors import CalibrationError
from .evaluation import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["log_likelihoods"]

_Tokens = tuple[int, ...]
_Shared = tuple[_Tokens, list[_Tokens]]


def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> tuple[list[float], int]:
    """Log-likelihood in nats of every continuation after its context, summed over its tokens.

    Args:
        model (`PreTrainedModel`): a causal language model.
        pairs (sequence of `tuple`): token ids of a context and of a continuation, one at least of each. What is longer
            than the model's positions loses its first tokens.
        batch_size (`int`, *optional*, defaults to 16): continuations per forward; those of one context stay together.

    Returns:
        `tuple[list[float], int]`: in the order of the pairs, and the number of scored tokens.

    Raises:
        CalibrationError: a context or a continuation has no tokens.
    """
    if not all(context and continuation for context, continuation in pairs):
        raise CalibrationError("a context and its continuation have one token each at least. Is the tokenizer its own?")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    cut = [_fitted(tuple(context), tuple(continuation), longest) for context, continuation in pairs]
    followers: dict[_Tokens, dict[_Tokens, None]] = {}
    for context, continuation in cut:
        followers.setdefault(context, {})[continuation] = None
    shared = [(context, list(own)) for context, own in followers.items() if _is_worth_sharing(context, list(own))]
    alone = sorted(set(cut) - {(context, own) for context, several in shared for own in several})
    found: dict[tuple[_Tokens, _Tokens], float] = {}
    with eval_mode(model), torch.inference_mode():
        for batch in _batches(shared, batch_size):
            scores = _after_cache(model, batch)
            if scores is None:  # no cache to share
                alone += [(context, own) for context, several in batch for own in several]
            else:
                found.update(scores)
        alone.sort(key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        for start in range(0, len(alone), batch_size):
            found.update(_at_once(model, alone[start : start + batch_size]))
    return [found[pair] for pair in cut], sum(len(continuation) for _, continuation in cut)


def _fitted(context: _Tokens, continuation: _Tokens, longest: int | None) -> tuple[_Tokens, _Tokens]:
    """The last tokens that fit, of which the first one is not scored."""
    whole = context + continuation
    whole = whole[-(longest + 1) :] if longest else whole
    scored = min(len(continuation), len(whole) - 1)
    return whole[:-scored], whole[-scored:]


def _is_worth_sharing(context: _Tokens, several: Sequence[_Tokens]) -> bool:
    """Whether a shared context takes no second forward, or one that spares half of the tokens at least."""
    count, own = len(several), sum(map(len, several))
    return count > 1 and (own == count or 2 * (len(context) + own) <= count * len(context) + own)


def _batches(shared: Iterable[_Shared], batch_size: int) -> Iterator[list[_Shared]]:
    """Contexts of one length, so that none is padded, with as many continuations as a forward may have."""
    lengths: dict[int, list[_Shared]] = {}
    for own in shared:
        lengths.setdefault(len(own[0]), []).append(own)
    for _, group in sorted(lengths.items(), reverse=True):
        batch: list[_Shared] = []
        for own in sorted(group):
            if batch and sum(len(several) for _, several in [*batch, own]) > batch_size:
                yield batch
                batch = []
            batch.append(own)
        yield batch


def _after_cache(model: PreTrainedModel, batch: Sequence[_Shared]) -> dict[tuple[_Tokens, _Tokens], float] | None:
    """Scores of what follows contexts of one length; `None` where the model hands back no cache that can be shared."""
    first, cache = _forward(model, torch.tensor([context for context, _ in batch]), 1, use_cache=True)
    if not hasattr(cache, "reorder_cache"):
        return None
    pairs = [(row, continuation) for row, (_, several) in enumerate(batch) for continuation in several]
    losses = {pair: token_losses(first[pair[0]], torch.tensor(pair[1][:1])).sum() for pair in pairs}
    longer = [pair for pair in pairs if len(pair[1]) > 1]
    if longer:
        cache.reorder_cache(torch.tensor([row for row, _ in longer], device=first.device))
        # Right of a causal model's tokens padding changes nothing, so no mask is needed.
        ids = _padded([continuation[:-1] for _, continuation in longer])
        logits, _ = _forward(model, ids, ids.shape[1], past_key_values=cache, use_cache=True)
        for own, pair in zip(logits, longer, strict=True):
            rest = torch.tensor(pair[1][1:])
            losses[pair] = losses[pair] + token_losses(own[: len(rest)], rest).sum()
    return {(batch[row][0], continuation): -float(loss) for (row, continuation), loss in losses.items()}


def _at_once(model: PreTrainedModel, pairs: Sequence[tuple[_Tokens, _Tokens]]) -> dict[tuple[_Tokens, _Tokens], float]:
    """Scores of continuations that are read with their contexts."""
    # Continuations of one token after one context have equal inputs.
    inputs = list(dict.fromkeys((context + continuation)[:-1] for context, continuation in pairs))
    skipped = min(len(context) for context, _ in pairs) - 1
    ids = _padded(inputs)
    logits, _ = _forward(model, ids, ids.shape[1] - skipped, use_cache=False)
    by_input = dict(zip(inputs, logits, strict=True))
    found = {}
    for context, continuation in pairs:
        start = len(context) - 1 - skipped
        part = by_input[(context + continuation)[:-1]][start : start + len(continuation)]
        found[context, continuation] = -float(token_losses(part, torch.tensor(continuation)).sum())
    return found


def _padded(rows: Sequence[_Tokens]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _forward(model: PreTrainedModel, ids: torch.Tensor, keep: int, **options: Any) -> tuple[torch.Tensor, Any]:
    """Logits `[rows, keep, vocabulary]` of the last positions, and the cache."""
    # The head is applied to these positions alone where the model can.
    known = inspect.signature(model.forward).parameters
    last: Mapping[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in known else {}
    output = model(input_ids=ids.to(input_device(model)), **options, **last)
    return output.logits[:, -keep:], getattr(output, "past_key_values", None)
