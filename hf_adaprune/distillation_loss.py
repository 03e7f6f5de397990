"""The loss of distillation and its gradient, a slice of positions at a time: full logits never exist in float32.

    loss = sum over scored positions of  alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(label, student)

(Hinton et al., arXiv 1503.02531, with the mixture written as a share). The gradient with respect to the student's
logits is known in closed form, `alpha T (q_T - p_T) + (1 - alpha) (q - onehot)`, so the forward computes it while the
logits of a slice are there and lets go of them. What the backward needs is the gradient of the hidden states and of
the head, which are both small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError
from .gram_sums import summing_dtype

__all__ = ["DistillationTerms", "FullTeaching", "Teaching", "TopTeaching", "distill_hidden", "distill_logits"]

# Matrix products want many positions at a time, element-wise work wants buffers that stay in a CPU's cache.
SLICE_POSITIONS = 1024
CACHE_ELEMENTS = 2**19
# What the student leaves to tokens outside the teacher's top is known to float32's rounding only.
LEAST_REST = 1e-6


@dataclass(frozen=True, eq=False)
class FullTeaching:
    """What a teacher in memory says at the scored positions: logits, or hidden states that its head makes them of.

    Args:
        hidden (`torch.Tensor`): `[positions, hidden]`, or logits `[positions, vocabulary]` where there is no head.
        weight (`torch.Tensor`, *optional*): of the head, `[vocabulary, hidden]`.
        bias (`torch.Tensor`, *optional*): of the head, `[vocabulary]`.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def logits(self, part: slice) -> torch.Tensor:
        """Logits `[positions, vocabulary]` of a slice of the positions."""
        if self.weight is None:
            return self.hidden[part]
        return torch.nn.functional.linear(self.hidden[part], self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class TopTeaching:
    """What a cached teacher says: its most likely tokens; all others are one event.

    Args:
        tokens (`torch.Tensor`): ids `[positions, k]`.
        log_probabilities (`torch.Tensor`): of these `[positions, k]`, at the temperature of the loss.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor


Teaching = FullTeaching | TopTeaching


@dataclass(frozen=True)
class DistillationTerms:
    """How the two losses are joined.

    Args:
        temperature (`float`, *optional*, defaults to 1.0): of both distributions in the divergence.
        alpha (`float`, *optional*, defaults to 1.0): share of the divergence; the rest is the language-model loss.

    Raises:
        ConfigError: out of range.
    """

    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Check both."""
        if not 0.0 < self.temperature < math.inf:
            raise ConfigError(f"`temperature` should be above 0, mostly 1 to 4. Found {self.temperature!r}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(
                f"`alpha` should be in [0, 1]: the share of the divergence, the rest is the language-model loss. "
                f"Found {self.alpha!r}."
            )


def distill_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teaching: Teaching | None,
    targets: torch.Tensor,
    terms: DistillationTerms,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head and loss in one: summed loss over positions, from the student's last hidden states.

    Args:
        hidden (`torch.Tensor`): `[positions, hidden]`.
        weight (`torch.Tensor`): of the student's head, `[vocabulary, hidden]`.
        bias (`torch.Tensor`, *optional*): of the head, `[vocabulary]`.
        teaching ([`FullTeaching`] or [`TopTeaching`], *optional*): at these positions; `None` where `alpha` is 0.
        targets (`torch.Tensor`): the next tokens `[positions]`.
        terms ([`DistillationTerms`]): temperature and share.

    Returns:
        `tuple` of three scalars in float32: the summed loss, which has a gradient, the summed divergence (without
        `T^2`; 0 where `alpha` is 0) and the summed cross entropy (0 where `alpha` is 1).
    """
    kind = hidden.device.type
    # Inside autocast a custom function gets what it is given: it has to ask for the precision itself.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    grads = torch.is_grad_enabled()
    found: Any = _Fused.apply(hidden, weight, bias, teaching, targets, terms, dtype, grads)
    return found


def distill_logits(
    logits: torch.Tensor, teaching: Teaching | None, targets: torch.Tensor, terms: DistillationTerms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of [`distill_hidden`] from logits `[positions, vocabulary]` that are there already."""
    found: Any = _OnLogits.apply(logits, teaching, targets, terms)
    return found


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teaching: Teaching | None,
        targets: torch.Tensor,
        terms: DistillationTerms,
        dtype: torch.dtype,
        grads: bool,
    ) -> tuple[torch.Tensor, ...]:
        # Products are asked for in `dtype` by hand; autocast would only look at every one of them again.
        with torch.autocast(hidden.device.type, enabled=False):
            head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            inputs = hidden.to(dtype)
            needs = [grads and need for need in ctx.needs_input_grad[:3]]
            grad_hidden = torch.empty_like(inputs) if needs[0] else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
            sums = torch.zeros(2, dtype=summing_dtype(hidden.device), device=hidden.device)
            for part in _slices(len(inputs), SLICE_POSITIONS):
                logits = torch.nn.functional.linear(inputs[part], head, offset)
                sums += _losses_into_gradients(logits, teaching, targets, part, terms)
                if grad_hidden is not None:
                    torch.mm(logits, head, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight += logits.t() @ inputs[part]
                if grad_bias is not None:
                    grad_bias += logits.sum(0, dtype=torch.float32)
                del logits
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return _as_outputs(ctx, sums, terms)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was already differentiated; compute it again for a second backward.")
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        found = [None if own is None else own.to(torch.float32).mul_(scale).to(dtype) for own, dtype in pairs]
        ctx.gradients = None
        return (*found, None, None, None, None, None)


class _OnLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        teaching: Teaching | None,
        targets: torch.Tensor,
        terms: DistillationTerms,
    ) -> tuple[torch.Tensor, ...]:
        gradient = logits.detach().clone()
        with torch.autocast(logits.device.type, enabled=False):
            sums = _losses_into_gradients(gradient, teaching, targets, slice(0, len(logits)), terms)
        ctx.gradient = gradient
        return _as_outputs(ctx, sums, terms)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        return (ctx.gradient * scale.to(ctx.gradient.dtype), None, None, None)


def _as_outputs(ctx: Any, sums: torch.Tensor, terms: DistillationTerms) -> tuple[torch.Tensor, ...]:
    divergence, entropy = sums.unbind()
    loss = terms.alpha * terms.temperature**2 * divergence + (1 - terms.alpha) * entropy
    found = (loss.float(), divergence.float(), entropy.float())
    ctx.mark_non_differentiable(*found[1:])
    return found


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _losses_into_gradients(
    logits: torch.Tensor, teaching: Teaching | None, targets: torch.Tensor, part: slice, terms: DistillationTerms
) -> torch.Tensor:
    """Summed divergence and cross entropy `[2]`; the logits `[positions, vocabulary]` become the loss's gradient."""
    if terms.alpha and teaching is None:
        raise ConfigError("`alpha` above 0 needs a teacher. Name one, or set `alpha` to 0.")
    dense = teaching.logits(part) if isinstance(teaching, FullTeaching) and terms.alpha else None
    if dense is not None and dense.shape != logits.shape:
        raise ConfigError(
            f"teacher and student should have one vocabulary. Found {dense.shape[-1]} tokens (teacher) and "
            f"{logits.shape[-1]} (student). Name the model that the student was pruned from."
        )
    # A GPU would wait for many small kernels where a CPU waits for memory.
    rows = max(CACHE_ELEMENTS // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    sums = torch.zeros(2, dtype=summing_dtype(logits.device), device=logits.device)
    for own in _slices(len(logits), rows):
        there = slice(part.start + own.start, part.start + own.stop)
        gradient: torch.Tensor | None = None
        if terms.alpha:
            log_q = _log_softmax(logits[own], terms.temperature)
            if dense is not None:
                divergence, gradient = _full(log_q, _log_softmax(dense[own], terms.temperature))
            else:
                assert isinstance(teaching, TopTeaching)
                divergence, gradient = _top(log_q, teaching.tokens[there], teaching.log_probabilities[there])
            sums[0] += divergence
            if terms.alpha * terms.temperature != 1:
                gradient.mul_(terms.alpha * terms.temperature)
        if terms.alpha < 1:
            own_log_q = _log_softmax(logits[own], 1.0)
            wide = summing_dtype(own_log_q.device)
            index = targets[there, None].to(logits.device)
            sums[1] -= own_log_q.gather(-1, index).sum(dtype=wide)
            entropy = own_log_q.exp_().scatter_add_(-1, index, own_log_q.new_full(index.shape, -1.0))
            entropy.mul_(1 - terms.alpha)
            gradient = entropy if gradient is None else gradient.add_(entropy)
        assert gradient is not None
        logits[own] = gradient.to(logits.dtype)
    return sums


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    # Not divided in place: `float()` of float32 is the caller's own tensor.
    return torch.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, -1)


def _full(log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed KL(p || q), and its gradient `q - p` with respect to the logits of `q`; `log_q` is overwritten."""
    p, wide = log_p.exp(), summing_dtype(log_p.device)
    divergence = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum(dtype=wide)
    if not math.isfinite(divergence):
        # A token that the teacher excludes contributes nothing, though 0 times infinity is not a number.
        divergence = (p * log_p).masked_fill_(p == 0, 0.0).sum(dtype=wide)
    return divergence, log_q.exp_().sub_(p)


def _top(
    log_q: torch.Tensor, tokens: torch.Tensor, log_probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed KL over the teacher's top tokens and the rest as one event, with its gradient; `log_q` is overwritten.

    With shares `p_r` and `q_r` of the rest the gradient is `q - p` at the top tokens, `q (1 - p_r / q_r)` elsewhere.
    """
    index, wide = tokens.to(log_q.device).long(), summing_dtype(log_q.device)
    log_p = log_probabilities.to(log_q.device).float()
    # Stored in half precision the shares may add up to a little more than one.
    log_p = log_p - log_p.logsumexp(-1, keepdim=True).clamp(min=0.0)
    top = log_q.gather(-1, index)
    p, q = log_p.exp(), top.exp()
    p_rest = (1 - p.sum(-1, keepdim=True)).clamp_(min=0.0)
    everything = index.shape[-1] == log_q.shape[-1]
    q_rest = (1 - q.sum(-1, keepdim=True)).clamp_(min=LEAST_REST)
    divergence = (p * (log_p - top)).masked_fill(p == 0, 0.0).sum(dtype=wide)
    if not everything:
        rest = p_rest * (p_rest.clamp(min=torch.finfo(torch.float32).tiny) / q_rest).log()
        divergence = divergence + rest.sum(dtype=wide)
    gradient = log_q.exp_().mul_(1 - p_rest / q_rest)
    return divergence, gradient.scatter_(-1, index, q - p)
