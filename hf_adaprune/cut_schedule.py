"""When a training run cuts, and how far: steps and sizes of progressive pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError
from .fields import check_choice, check_number, check_types, check_whole

__all__ = ["MODES", "CutSchedule", "stage_shares"]

MODES = ("once", "progressive", "at_end")


@dataclass(frozen=True)
class CutSchedule:
    """When to cut and how much of the whole removal is done by then.

    Args:
        mode (`str`, *optional*, defaults to `"progressive"`): `once` (before the first step), `progressive`, or
            `at_end` (after the last step).
        cuts (`int`, *optional*): number of progressive cuts; as many as make each remove about `share` of the current
            decoder where not given.
        share (`float`, *optional*, defaults to 0.05): of the current model, per cut (Adapt-Pruner, arXiv 2502.03460).
        every (`int`, *optional*): a cut every so many optimizer steps, the first before the first step.
        at (`tuple[float, ...]`, *optional*): when to cut, as fractions of the training steps in [0, 1).
        spacing (`str`, *optional*, defaults to `"linear"`): without `every` and `at`, how training is shared by the
            stages that the cuts begin: `linear` (stage `k` of `N` gets `2k / (N (N + 1))`, so later stages train
            longer: Adapt-Accel), `constant` or `cosine`.
        targets (`str`, *optional*, defaults to `"geometric"`): `geometric` (each cut removes the same share of the
            current model) or `linear` (the same number of parameters).

    Raises:
        ConfigError: a field is out of range, or two of them contradict each other.
    """

    mode: str = "progressive"
    cuts: int | None = None
    share: float = 0.05
    every: int | None = None
    at: tuple[float, ...] = ()
    spacing: str = "linear"
    targets: str = "geometric"

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self)
        check_choice("mode", self.mode, MODES)
        check_choice("spacing", self.spacing, ("linear", "constant", "cosine"))
        check_choice("targets", self.targets, ("linear", "geometric"))
        check_number("share", self.share, 0.001, 0.9, what="the share of the current model that a cut removes")
        object.__setattr__(self, "at", tuple(float(fraction) for fraction in self.at))
        for fraction in self.at:
            check_number("at", fraction, 0.0, 1.0, what="fractions of the training steps", open_high=True)
        if list(self.at) != sorted(set(self.at)):
            raise ConfigError(f"`at` should ascend. Found {list(self.at)}.")
        if self.every is not None:
            check_whole("every", self.every, 1, what="optimizer steps between cuts")
        if self.cuts is not None:
            check_whole("cuts", self.cuts, 1, what="cuts")
        if self.at and self.every is not None:
            raise ConfigError("`at` and `every` both say when to cut. Leave out one of them.")
        if self.at and self.cuts not in (None, len(self.at)):
            raise ConfigError(f"`cuts` is {self.cuts}, but `at` names {len(self.at)} times. Leave out `cuts`.")
        if self.mode != "progressive" and (self.at or self.every or self.cuts):
            raise ConfigError(f"`at`, `every` and `cuts` are of mode 'progressive', the mode is {self.mode!r}.")

    def count(self, ratio: float) -> int:
        """How many cuts lead to a pruning ratio.

        Args:
            ratio (`float`): share of the decoder's parameters to remove in all, in [0, 1).
        """
        if self.mode != "progressive":
            return 1
        if self.at:
            return len(self.at)
        return self.cuts or max(1, round(math.log(1 - ratio) / math.log(1 - self.share)))

    def ratios(self, ratio: float) -> tuple[float, ...]:
        """Pruning ratio after every cut, relative to the model before the first one; the last is `ratio`.

        Args:
            ratio (`float`): share of the decoder's parameters to remove in all, in [0, 1).
        """
        count = self.count(ratio)
        if self.targets == "linear":
            inner = [ratio * cut / count for cut in range(1, count)]
        else:
            inner = [1 - (1 - ratio) ** (cut / count) for cut in range(1, count)]
        return (*inner, ratio)

    def steps(self, ratio: float, total: int) -> tuple[int, ...]:
        """The optimizer step after which every cut happens; 0 is before the first one.

        Args:
            ratio (`float`): share of the decoder's parameters to remove in all.
            total (`int`): optimizer steps of the run.

        Raises:
            ConfigError: the run has too few steps for its cuts.
        """
        if self.mode != "progressive":
            return (0,) if self.mode == "once" else (total,)
        count = self.count(ratio)
        if self.every is not None:
            steps = [cut * self.every for cut in range(count)]
        elif self.at:
            # 0.29 * 100 is 28.999999999999996; what is short of a step by rounding alone is that step.
            steps = [int(fraction * total * (1 + 1e-12)) for fraction in self.at]
        else:
            shares = stage_shares(count, self.spacing)
            steps = [int(sum(shares[:cut]) * total + 0.5) for cut in range(count)]
        if len(set(steps)) < count or steps[-1] >= total:
            raise ConfigError(
                f"the run has {total} optimizer steps, too few for {count} cuts after steps "
                f"{', '.join(map(str, steps))} with training after each. Train longer, or set cuts, every or at."
            )
        return tuple(steps)


def stage_shares(stages: int, kind: str = "linear") -> tuple[float, ...]:
    """Share of the training data of every stage of an interleaved run, first stage first; they add up to 1.

    `linear` is `2k / (N (N + 1))` for stage `k` of `N` (Adapt-Accel, arXiv 2502.03460); `cosine` grows like `1 - cos`.

    Args:
        stages (`int`): how many, at least 1.
        kind (`str`, *optional*, defaults to `"linear"`): `linear`, `constant` or `cosine`.

    Raises:
        ConfigError: fewer than one stage, or another kind.
    """
    check_whole("stages", stages, 1, what="stages of training")
    check_choice("kind", kind, ("linear", "constant", "cosine"))
    if kind == "cosine":
        raw: Sequence[float] = [1 - math.cos(math.pi * k / (stages + 1)) for k in range(1, stages + 1)]
    else:
        raw = [float(k) if kind == "linear" else 1.0 for k in range(1, stages + 1)]
    return tuple(value / sum(raw) for value in raw)
