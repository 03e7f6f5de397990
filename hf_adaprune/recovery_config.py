"""What a recovery training does: `RecoveryConfig`, with every default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .errors import ConfigError
from .fields import check_choice, check_number, check_seed, check_types, check_whole
from .parts import WEIGHT

__all__ = ["LoraSettings", "RecoveryConfig"]

PRECISIONS = ("auto", "bf16", "fp32")
# Of transformers' schedules those that need nothing but a warmup and a length: others ask for a least learning rate or
# for the numbers of an evaluation.
SCHEDULERS = (
    "warmup_stable_decay", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)  # fmt: skip
DEFAULT_TOKENS = 1_000_000


@dataclass(frozen=True)
class LoraSettings:
    """Adapters that are trained instead of the weights, and merged into them afterwards (arXiv 2106.09685).

    Args:
        rank (`int`, *optional*, defaults to 16): of the adapters.
        alpha (`float`, *optional*): their scale is `alpha / rank`; twice the rank where not given.
        targets (`tuple[str, ...]`, *optional*): names of the modules that get one; all linear ones but the head where
            not given.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self, "lora.")
        check_whole("lora.rank", self.rank, 1, what="the rank of the adapters")
        if self.alpha is not None:
            check_number("lora.alpha", self.alpha, 0.0, 1e6, what="scale of the adapters times their rank")


@dataclass(frozen=True)
class RecoveryConfig:
    """How a pruned model is trained to speak like the dense one again.

    Args:
        tokens (`int`, *optional*): tokens to train on; 1,000,000 where neither this nor `minutes` is given.
        minutes (`float`, *optional*): time to train for, instead of a number of tokens: caching a teacher and the
            steps, not reading texts and measuring. The schedule follows the clock: the learning rate is down when time
            is up; how far training gets depends on the machine.
        learning_rate (`float`, *optional*, defaults to 2e-4): its highest value.
        temperature (`float`, *optional*, defaults to 1.0): of teacher and student in the divergence.
        alpha (`float`, *optional*, defaults to 1.0): share of the divergence; the rest is the language-model loss.
        hidden_weight (`float`, *optional*, defaults to 0.0): weight of the distance between hidden states.
        hidden_layers (`str`, *optional*, defaults to `"last"`): whose: the `last` hidden states, or those after `all`
            layers that are left.
        batch_size (`int`, *optional*, defaults to 4): windows per forward.
        gradient_accumulation (`int`, *optional*, defaults to 1): forwards per step.
        sequence_length (`int`, *optional*, defaults to 512): tokens per window.
        scheduler (`str`, *optional*, defaults to `"warmup_stable_decay"`): a schedule of transformers' `get_scheduler`:
            this one, `linear`, `cosine`, `cosine_with_restarts`, `polynomial`, `constant`, `constant_with_warmup` or
            `inverse_sqrt`.
        warmup (`float`, *optional*, defaults to 0.05): share of the training in which the learning rate rises.
        decay (`float`, *optional*, defaults to 0.3): share of the training in which it falls, in `warmup_stable_decay`.
        weight_decay (`float`, *optional*, defaults to 0.0): of AdamW.
        max_grad_norm (`float`, *optional*, defaults to 1.0): longer gradients are scaled to this length.
        lora ([`LoraSettings`], *optional*): train adapters and merge them, instead of the weights.
        train_embeddings (`bool`, *optional*, defaults to `True`): whether embeddings and head are trained, where there
            are no adapters.
        precision (`str`, *optional*, defaults to `"auto"`): `bf16` (autocast; weights that are trained are float32),
            `fp32`, or `auto`: the first where the device multiplies bfloat16 in hardware.
        top_k (`int`, *optional*): cache the teacher's so many most likely tokens before training. Worth it where the
            text is read more than once.
        shares (`tuple[float, ...]`, *optional*): of the training tokens by source; equal where not given.
        held_out (`int`, *optional*, defaults to 16): windows of these sources that training never sees, on which loss
            and divergence are measured before and after. 0 measures nothing.
        seed (`int`, *optional*, defaults to 0): of text, order and adapters; below 2**32.
    """

    tokens: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-4
    temperature: float = 1.0
    alpha: float = 1.0
    hidden_weight: float = 0.0
    hidden_layers: str = "last"
    batch_size: int = 4
    gradient_accumulation: int = 1
    sequence_length: int = 512
    scheduler: str = "warmup_stable_decay"
    warmup: float = 0.05
    decay: float = 0.3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: LoraSettings | None = None
    train_embeddings: bool = True
    precision: str = "auto"
    top_k: int | None = None
    shares: tuple[float, ...] = field(default=())
    held_out: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self)
        if self.tokens is not None and self.minutes is not None:
            raise ConfigError("`tokens` and `minutes` both say how long to train. Give one of them.")
        if self.tokens is not None:
            check_whole("tokens", self.tokens, 2, what="tokens to train on")
        if self.minutes is not None:
            check_number("minutes", self.minutes, 0.0, 1e7, what="time to train for")
            if not self.minutes:
                raise ConfigError("`minutes` should be above 0. To train nothing, do not call recover().")
        check_number("learning_rate", self.learning_rate, 0.0, 1.0, what="the highest value of the learning rate")
        check_number("temperature", self.temperature, 1e-3, 1e3, what="what logits are divided by")
        check_number("alpha", self.alpha, 0.0, 1.0, what="share of the divergence in the loss")
        check_number("hidden_weight", self.hidden_weight, 0.0, 1e6, what="weight of the hidden states' distance")
        check_choice("hidden_layers", self.hidden_layers, ("last", "all"))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("scheduler", self.scheduler, SCHEDULERS)
        for name in ("batch_size", "gradient_accumulation"):
            check_whole(name, getattr(self, name), 1, what="windows per forward, or forwards per step")
        check_whole("sequence_length", self.sequence_length, 8, what="tokens per window")
        check_whole("held_out", self.held_out, 0, what="windows that are measured before and after")
        check_number("warmup", self.warmup, 0.0, 1.0, what="share of the training")
        check_number("decay", self.decay, 0.0, 1.0, what="share of the training")
        if self.warmup + self.decay > 1:
            raise ConfigError(f"`warmup` and `decay` should be at most 1 together. Found {self.warmup + self.decay:g}.")
        check_seed(self.seed)
        check_number("weight_decay", self.weight_decay, 0.0, 1e3, what="of AdamW")
        check_number("max_grad_norm", self.max_grad_norm, 0.0, 1e9, what="the longest gradient")
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1, what="tokens of the teacher per position")
            if self.hidden_weight:
                raise ConfigError("`top_k` caches outputs only: `hidden_weight` needs the teacher itself. Drop one.")
        for share in self.shares:
            check_number("shares", share, 0.0, WEIGHT, what="training tokens by source")
        if self.shares and math.fsum(self.shares) <= 0:
            raise ConfigError("`shares` should be non-negative with a positive sum: training tokens by source.")

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of the optimiser."""
        return self.batch_size * self.gradient_accumulation * self.sequence_length

    def with_changes(self, **changes: Any) -> RecoveryConfig:
        """This config with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "shares": list(self.shares)} | (
            {} if self.lora is None else {"lora": {**asdict(self.lora), "targets": list(self.lora.targets)}}
        )
