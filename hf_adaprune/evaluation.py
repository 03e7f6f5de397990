"""Loss, KL to the dense model and perplexity; values with standard errors.

Logits of one batch exist in the model's dtype; float32 exists for 256 positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from .documents import eval_mode, input_device
from .errors import CalibrationError, ConfigError
from .positions import check_windows
from .token_blocks import TokenBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Measurement",
    "TopTokens",
    "kl_divergence",
    "mean_over_windows",
    "per_window_kl",
    "per_window_loss",
    "per_window_top_kl",
    "perplexity",
    "run_layers",
    "scored_logits",
    "token_losses",
    "top_tokens",
]

CHUNK_POSITIONS = 256
BUFFER_POSITIONS = 64
ROUNDING = 1e-6


@dataclass(frozen=True)
class Measurement:
    """A number with its uncertainty.

    Args:
        name (`str`): what was measured.
        value (`float`): the estimate.
        standard_error (`float`): of the estimate, over windows or rows; NaN where there is only one.
        tokens (`int`): scored tokens.
        samples (`int`): windows or rows.
    """

    name: str
    value: float
    standard_error: float
    tokens: int
    samples: int

    def __str__(self) -> str:
        """For tables and logs: `perplexity 12.34 ± 0.05`."""
        return f"{self.name} {self.value:.4g} ± {self.standard_error:.2g}"


def _inputs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    device, longest = input_device(model), int(mask.sum(dim=1).max())
    ids, mask = ids[:, :longest].to(device), mask[:, :longest]
    # Without padding no mask is passed: kernels are faster without, and their rounding would depend on the batch.
    attention = None if bool(mask.all()) else mask.long().to(device)
    return {"input_ids": ids, "attention_mask": attention, "use_cache": False}


def scored_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits `[windows, longest, vocabulary]` on the model's device, without columns that are padding everywhere."""
    logits: torch.Tensor = model(**_inputs(model, ids, mask)).logits
    return logits


def run_layers(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int = 1) -> None:
    """Run the windows as [`per_window_loss`] does, without the head: for what looks on, or stands in for layers.

    Args:
        model (`PreTrainedModel`): a causal language model.
        blocks (`TokenBlocks`): the text.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.
    """
    with eval_mode(model), torch.no_grad():
        for batch in blocks.batches(batch_size):
            model.base_model(**_inputs(model, batch.input_ids, batch.attention_mask))


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_POSITIONS, length)) for start in range(0, length, CHUNK_POSITIONS))


def _log_normalizers(logits: torch.Tensor) -> torch.Tensor:
    """`logsumexp` over the vocabulary, float32 `[positions]`, of logits `[positions, vocabulary]`.

    In place in one small buffer that stays in the cache: five times as fast on a CPU as `torch.logsumexp`, which makes
    float32 copies of everything, at 49,152 tokens of vocabulary.
    """
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    buffer = torch.empty(min(BUFFER_POSITIONS, len(logits)), logits.shape[-1], device=logits.device)
    for start in range(0, len(logits), BUFFER_POSITIONS):
        part = logits[start : start + BUFFER_POSITIONS]
        own = buffer[: len(part)]
        own.copy_(part)
        highest = own.amax(-1, keepdim=True)
        own.sub_(highest).exp_()
        found[start : start + len(part)] = own.sum(-1).log() + highest[:, 0]
    return found


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, float64 `[positions]` on the CPU, of logits `[positions, vocabulary]`."""
    if not len(targets):
        return torch.zeros(0, dtype=torch.float64)
    logits = logits[: len(targets)].detach()
    own = logits.gather(-1, targets.to(logits.device)[:, None])[:, 0].float()
    return (_log_normalizers(logits) - own).cpu().double()


def _token_divergences(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL(dense || model) in nats, float64 `[positions]` on the CPU, of two logits `[positions, vocabulary]`."""
    if logits.shape[-1] != dense.shape[-1]:
        raise ConfigError(
            f"both models should have one vocabulary. Found {dense.shape[-1]} tokens (dense) and {logits.shape[-1]}."
        )
    parts = [torch.zeros(0, dtype=torch.float64)]
    for part in _chunks(len(logits)):
        p = dense[part].to(logits.device).float().log_softmax(-1)
        terms = p.exp() * (p - logits[part].float().log_softmax(-1))
        # A token that the dense model excludes contributes nothing, though 0 times infinity is not a number.
        parts.append(terms.masked_fill_(p == -math.inf, 0.0).sum(-1).cpu().double())
    return torch.cat(parts)


def _sums(
    blocks: TokenBlocks, batch_size: int, values: Callable[[TokenBlocks, int], list[torch.Tensor]]
) -> torch.Tensor:
    """Sum and number `[windows, 2]` of each window's values; `values` gets a batch and its first window's index."""
    if batch_size < 1:
        raise ConfigError(f"`batch_size` should be at least 1. Found {batch_size}.")
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        bar = transformers_logging.tqdm(
            blocks.batches(batch_size), desc="evaluation", unit="batch", total=-(-len(blocks) // batch_size)
        )
        for batch in bar:
            for window in values(batch, len(rows)):
                rows.append(torch.stack([window.sum(), torch.tensor(float(len(window)), dtype=torch.float64)]))
    # Stacked outside of inference mode, so that the result may take part in anything.
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.float64)


def per_window_loss(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int = 1) -> torch.Tensor:
    """Summed next-token loss of every window.

    The first token of a window (BOS, where the tokenizer adds it) is not scored, nor is padding. The loss is float32
    whatever the model's dtype.

    Args:
        model (`PreTrainedModel`): a causal language model; its modules' training flags come back afterwards.
        blocks (`TokenBlocks`): the text.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.

    Returns:
        `torch.Tensor` of shape `[windows, 2]`: summed loss in nats and number of scored tokens, float64, on the CPU.

    Raises:
        CalibrationError: windows longer than the model's learned positions.
    """

    def losses(batch: TokenBlocks, _: int) -> list[torch.Tensor]:
        logits = scored_logits(model, batch.input_ids, batch.attention_mask)
        lengths = batch.attention_mask.sum(dim=1).tolist()
        return [
            token_losses(logits[row, : max(length - 1, 0)], batch.input_ids[row, 1 : max(length, 1)])
            for row, length in enumerate(lengths)
        ]

    check_windows(model, blocks)
    with eval_mode(model):
        return _sums(blocks, batch_size, losses)


def per_window_kl(
    model: PreTrainedModel, dense: PreTrainedModel | torch.Tensor, blocks: TokenBlocks, batch_size: int = 1
) -> torch.Tensor:
    """Summed KL(dense || model) of every window, at the positions that [`per_window_loss`] scores.

    Args:
        model (`PreTrainedModel`): the pruned model.
        dense (`PreTrainedModel` or `torch.Tensor` of shape `[windows, length, vocabulary]`): the dense model or its
            logits; logits where both are one model, seen with and without masks.
        blocks (`TokenBlocks`): the text.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.

    Returns:
        `torch.Tensor` of shape `[windows, 2]`: summed divergence in nats and number of positions, float64, on the CPU.

    Raises:
        CalibrationError: windows longer than a model's learned positions.
        ConfigError: the vocabularies differ.
    """

    def divergences(batch: TokenBlocks, first: int) -> list[torch.Tensor]:
        logits = scored_logits(model, batch.input_ids, batch.attention_mask)
        if isinstance(dense, torch.Tensor):
            reference = dense[first : first + len(batch)]
        else:
            reference = scored_logits(dense, batch.input_ids, batch.attention_mask)
        lengths = [max(length - 1, 0) for length in batch.attention_mask.sum(dim=1).tolist()]
        return [_token_divergences(logits[row, :length], reference[row, :length]) for row, length in enumerate(lengths)]

    for each in (model,) if isinstance(dense, torch.Tensor) else (model, dense):
        check_windows(each, blocks)
    with eval_mode(model), eval_mode(torch.nn.Module() if isinstance(dense, torch.Tensor) else dense):
        return _sums(blocks, batch_size, divergences)


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The most likely next tokens of a model at every position of some windows: all that a divergence mostly is.

    Args:
        tokens (`torch.Tensor`): token ids `[windows, positions, k]`, int32.
        log_probabilities (`torch.Tensor`): of these, `[windows, positions, k]`, float32, descending.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens)


def top_tokens(model: PreTrainedModel, blocks: TokenBlocks, k: int = 128, batch_size: int = 1) -> TopTokens:
    """The `k` most likely next tokens at every position that [`per_window_loss`] scores.

    At `k` 128 they take 1 KiB per position, where logits of 49,152 tokens take 96.

    Args:
        model (`PreTrainedModel`): the dense model.
        blocks (`TokenBlocks`): the text.
        k (`int`, *optional*, defaults to 128): how many.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.
    """
    check_windows(model, blocks)
    tokens, values = [], []
    with eval_mode(model), torch.inference_mode():
        for batch in blocks.batches(batch_size):
            logits = scored_logits(model, batch.input_ids, batch.attention_mask)
            width = blocks.input_ids.shape[1] - 1
            for window in logits:
                parts = [_top(window[part], k) for part in _chunks(min(len(window), width))]
                index, value = (torch.cat(own) for own in zip(*parts, strict=True))
                short = width - len(index)  # batches without padding are shorter
                tokens.append(torch.nn.functional.pad(index, (0, 0, 0, short)))
                values.append(torch.nn.functional.pad(value, (0, 0, 0, short)))
    return TopTokens(torch.stack(tokens).clone(), torch.stack(values).clone())


def _top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    values, index = logits.topk(min(k, logits.shape[-1]))
    return index.int().cpu(), (values - logits.logsumexp(-1, keepdim=True)).cpu()


def per_window_top_kl(
    model: PreTrainedModel, dense: TopTokens, blocks: TokenBlocks, batch_size: int = 1
) -> torch.Tensor:
    """Summed KL(dense || model) of every window over the dense model's top tokens and all others as one event.

    Joining events never raises a divergence, so this is a lower bound of [`per_window_kl`].

    Args:
        model (`PreTrainedModel`): the pruned model.
        dense ([`TopTokens`]): of the dense model on these windows.
        blocks (`TokenBlocks`): the text.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.

    Returns:
        `torch.Tensor` of shape `[windows, 2]`: summed divergence in nats and number of positions, float64, on the CPU.
    """

    def divergences(batch: TokenBlocks, first: int) -> list[torch.Tensor]:
        logits = scored_logits(model, batch.input_ids, batch.attention_mask)
        lengths = [max(length - 1, 0) for length in batch.attention_mask.sum(dim=1).tolist()]
        return [
            _top_divergences(logits[row, :length], dense.tokens[first + row], dense.log_probabilities[first + row])
            for row, length in enumerate(lengths)
        ]

    check_windows(model, blocks)
    with eval_mode(model):
        return _sums(blocks, batch_size, divergences)


def _top_divergences(logits: torch.Tensor, tokens: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL over top tokens and the rest, float64 `[positions]` on the CPU, of logits `[positions, vocabulary]`."""
    own = logits.gather(-1, tokens[: len(logits)].to(logits.device).long()).float()
    # To the CPU first: Apple's GPUs have no float64, and few tokens are left of the vocabulary.
    log_q = (own - _log_normalizers(logits)[:, None]).cpu().double()
    log_p = dense[: len(logits)].cpu().double()
    p, q = log_p.exp(), log_q.exp()
    top = (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1)
    # What is left of 1 is known to float32's rounding; below it, a logarithm would make divergence out of noise.
    p_rest, q_rest = (1 - p.sum(-1)).clamp(min=0), (1 - q.sum(-1)).clamp(min=ROUNDING)
    rest = torch.where(p_rest > 0, p_rest * (p_rest.clamp(min=1e-300) / q_rest).log(), 0.0)
    return top + rest


def mean_over_windows(name: str, sums: torch.Tensor) -> Measurement:
    """Mean per token of what [`per_window_loss`] or [`per_window_kl`] returns.

    The standard error is that of a ratio of means over windows: with mean m, sums s and counts n of W windows,
    `W / (W - 1) * sum((s - m n)^2) / sum(n)^2`.

    Args:
        name (`str`): of the measurement.
        sums (`torch.Tensor` of shape `[windows, 2]`): sums and counts. The difference of two such sums (counts kept)
            gives a paired comparison.

    Raises:
        CalibrationError: nothing was scored.
    """
    total, count = sums.sum(dim=0).tolist()
    if not count:
        raise CalibrationError("no token was scored: every window has fewer than two tokens. Give longer text.")
    mean, windows = total / count, len(sums)
    squares = float(((sums[:, 0] - mean * sums[:, 1]) ** 2).sum())
    error = math.sqrt(squares * windows / (windows - 1)) / count if windows > 1 else math.nan
    return Measurement(name, mean, error, int(count), windows)


def perplexity(model: PreTrainedModel, blocks: TokenBlocks, batch_size: int = 1) -> Measurement:
    """`exp` of the mean next-token loss; the standard error follows by the delta method over windows.

    Args:
        model (`PreTrainedModel`): a causal language model.
        blocks (`TokenBlocks`): the text, as [`~hf_adaprune.calibration.report_blocks`] cuts it.
        batch_size (`int`, *optional*, defaults to 1): windows per forward.

    Raises:
        CalibrationError: nothing was scored, or windows longer than the model's learned positions.
    """
    loss = mean_over_windows("loss", per_window_loss(model, blocks, batch_size))
    value = float(torch.tensor(loss.value, dtype=torch.float64).exp())  # infinite rather than an OverflowError
    return Measurement("perplexity", value, value * loss.standard_error, loss.tokens, loss.samples)


def kl_divergence(
    model: PreTrainedModel, dense: PreTrainedModel | torch.Tensor, blocks: TokenBlocks, batch_size: int = 1
) -> Measurement:
    """Mean KL(dense || model) per token in nats; arguments as in [`per_window_kl`].

    Raises:
        CalibrationError: nothing was scored, or windows longer than a model's learned positions.
        ConfigError: the vocabularies differ.
    """
    return mean_over_windows("kl", per_window_kl(model, dense, blocks, batch_size))
