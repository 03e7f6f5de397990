"""`SearchConfig`: what a search varies, what it minimises, and how long it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError
from .fields import check_choice, check_number, check_types, check_whole

__all__ = ["BUDGETS", "OBJECTIVES", "REFINING", "SIZES", "STRATEGIES", "SearchConfig"]

STRATEGIES = ("gp", "predictor", "evolution", "random", "sobol", "tpe")
REFINING = ("predictor", "evolution")  # these share the budget of the best candidate anew, and vary no space
OBJECTIVES = ("kl", "loss", "accuracy", "custom")
SIZES = ("ratio", "parameters", "bytes", "macs")
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")
BUDGETS = (*SIZES, *SPEEDS)


@dataclass(frozen=True)
class SearchConfig:
    """How to look for a better config than the one given, which is trial 0.

    Args:
        trials (`int`, *optional*, defaults to 60): candidates in all, trial 0 included. A candidate whose plan and
            repair were seen before is answered from the journal and counts.
        strategy (`tuple[str, ...]`, *optional*, defaults to `("gp",)`): who proposes, one after the other on one
            journal: `gp`, `random`, `sobol`, `tpe` (needs the extra `tpe`) vary the `space`; `predictor` and
            `evolution` refine how the best candidate so far shares its budget over the layers. `"gp:40"` gives a
            strategy 40 trials; those without a number share the rest.
        space (`dict[str, Any]`, *optional*): changes of the default space, by field of [`PruningConfig`]: a number,
            text or list fixes a field (`{"repair.damping": 0.02}`), a mapping gives or adds a dimension:
            `{"low", "high"}` with `"log": true` or `"whole": true` (a number), also with `"size": n` (a vector) and
            `"centred": true` (its sum stays 0), `{"choices": [...]}`, or `{"simplex": [...]}` (weights that add up
            to 1; the list names what is weighted). With `"kept"` a point keeps that share of the
            config's own weights: by default no calibration source falls below half of its weight, so that text which
            the selection does not speak for is not given up; `{"calibration.domain_weights": {"kept": 0.0}}` lets it.
        objective (`str`, *optional*, defaults to `"kl"`): minimised on selection text: `kl` (to the dense model, over
            its 128 most likely next tokens and the rest as one), `loss`, `accuracy` (of multiple-choice rows, see
            `tasks`; 1 - accuracy is minimised) or `custom` (the function passed to `prune` or `search_plan`).
        tasks (`tuple[str, ...]`, *optional*): files of multiple-choice rows for `accuracy`.
        selection_tokens (`int`, *optional*, defaults to 24576): tokens a promising trial sees.
        first_tokens (`int`, *optional*, defaults to 6144): tokens every trial sees. It sees the rest only if it could
            still beat the best so far.
        sequence_length (`int`, *optional*, defaults to 512): tokens per selection window.
        finalists (`int`, *optional*, defaults to 4): how many of the best are measured again at the end, beside trial
            0, on `final_tokens` that no trial has seen; the best of them wins. Of a Pareto search as many of its front
            (two at least), spread over it with both ends.
        final_tokens (`int`, *optional*, defaults to 32768): see there.
        redraw (`bool`, *optional*, defaults to `False`): draw the calibration windows anew in the winner's domain
            weights, where those leave much of the pool unused, and keep plan and repair that come of it if they are
            better on the `final_tokens`. One more calibration pass; not for clusters, `pareto` and `ratios`.
        initial (`int`, *optional*, defaults to 10): quasi-random candidates around trial 0 before `gp` fits its first
            model, trial 0 included.
        surrogate (`str`, *optional*, defaults to `"gp"`): `gp`, or `saas` (fully Bayesian with sparse axis-aligned
            priors, for wide spaces; about ten times slower; not for `pareto`).
        batch (`int`, *optional*, defaults to 1): candidates proposed at a time, each knowing of those pending; at
            least as many as there are processes.
        pareto (`str`, *optional*): quality against this cost: `ratio`, `parameters`, `bytes`, `macs`, or the speed
            `prefill_tokens_per_second` or `decode_tokens_per_second`. The pruning ratio then is a dimension of the
            space, and a front of plans comes back, of at most `finalists` and trial 0.
        ratios (`tuple[float, ...]`, *optional*): nested plans for several pruning ratios: what goes at a lower one goes
            at every higher one. The objective is the mean of its logarithm over them.
        minutes (`float`, *optional*): no trial starts after so many minutes of searching; those before a resume count.

    Raises:
        ConfigError: a field is out of range.
    """

    trials: int = 60
    strategy: tuple[str, ...] = ("gp",)
    space: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "kl"
    tasks: tuple[str, ...] = ()
    selection_tokens: int = 24576
    first_tokens: int = 6144
    sequence_length: int = 512
    finalists: int = 4
    final_tokens: int = 32768
    redraw: bool = False
    initial: int = 10
    surrogate: str = "gp"
    batch: int = 1
    pareto: str | None = None
    ratios: tuple[float, ...] = ()
    minutes: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_types(self, "search.")
        if not self.strategy:
            raise ConfigError(f"`search.strategy` is empty. Name at least one of {', '.join(STRATEGIES)}.")
        check_whole("search.trials", self.trials, 1, what="candidates, trial 0 included")
        self.shares()
        object.__setattr__(self, "space", _plain(self.space))
        check_choice("search.objective", self.objective, OBJECTIVES)
        if self.objective == "accuracy" and not self.tasks:
            raise ConfigError("`search.objective='accuracy'` needs `search.tasks`: files of multiple-choice rows.")
        check_whole("search.sequence_length", self.sequence_length, 2, what="tokens per selection window")
        for name in ("selection_tokens", "first_tokens", "final_tokens"):
            check_whole(f"search.{name}", getattr(self, name), 2, what="tokens of selection text")
        if self.first_tokens > self.selection_tokens:
            raise ConfigError("`search.first_tokens` should be at most `search.selection_tokens`.")
        check_whole("search.finalists", self.finalists, 1, what="candidates measured again at the end")
        check_whole("search.initial", self.initial, 1, what="quasi-random candidates")
        check_choice("search.surrogate", self.surrogate, ("gp", "saas"))
        check_whole("search.batch", self.batch, 1, what="candidates proposed at a time")
        if self.pareto is not None:
            check_choice("search.pareto", self.pareto, BUDGETS)
        ratios = tuple(sorted({float(ratio) for ratio in self.ratios}))
        object.__setattr__(self, "ratios", ratios)
        for ratio in ratios:
            check_number("search.ratios", ratio, 0.0, 1.0, what="pruning ratios", open_high=True)
        if ratios and self.pareto:
            raise ConfigError("`search.ratios` and `search.pareto` are both set. Search one or the other.")
        if self.minutes is not None:
            check_number("search.minutes", self.minutes, 0.0, 1e6, what="minutes")

    def shares(self) -> tuple[tuple[str, int], ...]:
        """Strategies in their order and the trials of each; trial 0 is the first one's.

        Raises:
            ConfigError: an unknown strategy, or more trials than there are.
        """
        named: list[tuple[str, int | None]] = []
        for entry in self.strategy:
            name, colon, count = str(entry).partition(":")
            check_choice("search.strategy", name, STRATEGIES)
            if colon and not (count.isdecimal() and int(count)):
                raise ConfigError(f"`search.strategy` {entry!r} should be a name, or a name:trials such as gp:40.")
            named.append((name, int(count) if count else None))
        left = self.trials - sum(count or 0 for _, count in named)
        free = sum(count is None for _, count in named)
        if left < free or (left and not free):
            raise ConfigError(
                f"`search.trials` {self.trials} and the trials named in `search.strategy` {list(self.strategy)} do not "
                "fit together. Leave one strategy without a number, or make them add up."
            )
        shares = []
        for name, own in named:
            if own is None:
                own = -(-left // free)
                left, free = left - own, free - 1
            shares.append((name, own))
        return tuple(shares)


def _plain(space: Any) -> dict[str, Any]:
    """A space as the JSON types that its journal and config file hold, so that it equals what comes back from them."""
    if not isinstance(space, Mapping):
        raise ConfigError(f"`search.space` should be a mapping from fields to values or ranges. Found {space!r}.")
    try:
        return json.loads(json.dumps(dict(space)))
    except TypeError as error:
        raise ConfigError(f"`search.space` should hold numbers, texts, lists and mappings only: {error}.") from error
