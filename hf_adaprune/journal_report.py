"""What the journal of a search says, as a summary for people and programs; `journal_plot` draws it."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .reporting import text_table
from .search.dimensions import Choice, Dimension, Number, Simplex, Vector
from .search.gaussian_process import coverage, fit_surrogate
from .search.journal import Estimate, Journal, Trial, compare, mean_value
from .search.loop import front
from .search.problem import Slot, View
from .search.space import Space
from .search_config import SearchConfig

__all__ = ["Finalist", "JournalSummary", "Scale", "describe_journal", "differences", "search_of", "space_of"]

FEWEST = 12  # trials in the space below which a surrogate's lengthscales are mostly their prior
LEVEL = 0.8
_KINDS = {"number": Number, "vector": Vector, "simplex": Simplex, "choice": Choice}


@dataclass(frozen=True)
class Scale:
    """How differences to trial 0 are shown: percent of a positive objective, points of accuracy, or as they are.

    Args:
        logarithmic (`bool`): differences are those of logarithms.
        unit (`str`): `%`, `points` or nothing.
    """

    logarithmic: bool
    unit: str

    @classmethod
    def of(cls, journal: Journal) -> Scale:
        """The scale of a journal's objective."""
        if journal.logarithmic:
            return cls(True, "%")
        objective = search_of(journal).get("objective")
        return cls(False, "points" if objective == "accuracy" else "")

    def value(self, difference: float) -> float:
        """A difference as it is shown."""
        if self.logarithmic:
            return 100 * math.expm1(min(difference, 20.0))
        return 100 * difference if self.unit else difference

    def error(self, estimate: Estimate) -> float:
        """The standard error of a difference as it is shown."""
        if self.logarithmic:
            return 100 * math.exp(min(estimate.value, 20.0)) * estimate.error
        return 100 * estimate.error if self.unit else estimate.error

    def said(self, estimate: Estimate) -> str:
        """A difference with its standard error."""
        error = self.error(estimate)
        spread = "" if math.isnan(error) else f" ± {error:.2f}"
        return f"{self.value(estimate.value):+.2f}{spread} {self.unit}".rstrip()


@dataclass(frozen=True)
class Finalist:
    """A finalist on text that no trial has seen.

    Args:
        number (`int`): of the trial.
        strategy (`str`): who proposed it.
        value (`float`): the objective.
        difference ([`Estimate`], *optional*): to trial 0 on the same windows, as [`compare`] gives it.
    """

    number: int
    strategy: str
    value: float
    difference: Estimate | None


@dataclass(frozen=True)
class JournalSummary:
    """What a journal says; see [`describe_journal`].

    Args:
        path (`str`, *optional*): of the journal.
        facts (`dict[str, Any]`): version, objective, strategies, windows, budget and space of the search.
        trials, answered, failed (`int`): candidates; those answered from an earlier one; those that had no plan.
        strategies (`dict[str, int]`): trials by who proposed them.
        seconds (`float`): median of the trials that were measured.
        best (`int`, *optional*): the best trial that saw the most selection windows, and `best_difference` to trial 0.
        winner (`int`, *optional*): chosen on fresh text; `None` while a search is unfinished.
        chosen (`int`, *optional*): the trial that is described: the winner, or the best so far; of a Pareto search
            (whose winner is merely the largest plan) the front's nearest to trial 0 in its cost.
        finalists (`tuple[Finalist, ...]`): by value.
        front (`tuple[dict, ...]`): of a Pareto search: `trial`, `value` and `costs`.
        mixtures (`dict`): by field, what each member weighs in trial 0 and in the chosen trial.
        changes (`dict`): the other fields: their values in trial 0 and in the chosen trial.
        importance (`dict[str, float]`): by coordinate, the share of the inverse lengthscales of a Gaussian process.
        correlation (`dict[str, float]`): by coordinate, Spearman's rho between it and the objective.
        layers (`dict[str, float]`): by site, what the accuracy predictor's trees found important.
        coverage (`tuple[int, int]`): Gaussian process: trials within their 80 % prediction interval, and predicted.
        predictor (`dict[str, float]`): quality of the accuracy predictor on pairs that it has not seen.
        scale ([`Scale`]): how differences are shown.
    """

    path: str | None
    facts: Mapping[str, Any]
    trials: int
    answered: int
    failed: int
    strategies: Mapping[str, int]
    seconds: float
    best: int | None
    best_difference: Estimate | None
    winner: int | None
    chosen: int | None
    finalists: tuple[Finalist, ...]
    front: tuple[Mapping[str, Any], ...]
    mixtures: Mapping[str, Mapping[str, tuple[float, float]]]
    changes: Mapping[str, tuple[Any, Any]]
    importance: Mapping[str, float]
    correlation: Mapping[str, float]
    layers: Mapping[str, float]
    coverage: tuple[int, int]
    predictor: Mapping[str, float]
    scale: Scale = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; numbers that are not known are `None`."""
        return _finite(json.loads(json.dumps({"kind": "journal", **asdict(self)})))

    @property
    def text(self) -> str:
        """All of it, in sections."""
        return "\n\n".join(part for part in (self._head(), self._ends(), self._choice(), self._honesty()) if part)

    def __str__(self) -> str:
        """See `text`."""
        return self.text

    def _head(self) -> str:
        name = "journal" if self.path is None else Path(self.path).name
        by = ", ".join(f"{name} {count}" for name, count in self.strategies.items())
        odd = [
            f"{count} {what}"
            for count, what in ((self.answered, "answered from the journal"), (self.failed, "failed"))
            if count
        ]
        lines = [f"{name}: {self.trials} trials ({by})" + "".join(f", {part}" for part in odd)]
        lines += [f"{key}: {value}" for key, value in self.facts.items() if value not in ("", None, [], {})]
        if not math.isnan(self.seconds):
            lines.append(f"seconds per trial: {self.seconds:.1f} (median)")
        if self.best_difference is not None:
            said = self.scale.said(self.best_difference)
            lines.append(f"best on selection text: trial {self.best}, {said} against trial 0")
        if self.winner is None:
            lines.append("no winner yet: the search is not finished")
        elif not self.front:
            lines.append(f"winner: trial {self.winner}")
        elif self.chosen:
            lines.append(f"of the front, trial {self.chosen} is nearest to trial 0 in size")
        return "\n".join(lines)

    def _ends(self) -> str:
        rows = [
            (
                f"{final.number}{' (winner)' if final.number == self.winner else ''}",
                final.strategy,
                f"{final.value:.4g}",
                "-" if final.difference is None or not final.number else self.scale.said(final.difference),
            )
            for final in self.finalists
        ]
        parts = [text_table(("fresh text, trial", "by", "objective", "to trial 0"), rows)] if rows else []
        if self.front:
            kinds = list(self.front[0]["costs"])
            cells = [
                (str(p["trial"]), *(f"{p['costs'][kind]:,.4g}" for kind in kinds), f"{p['value']:.4g}")
                for p in self.front
            ]
            parts.append(text_table(("front, trial", *kinds, "objective"), cells))
        return "\n\n".join(parts)

    def _choice(self) -> str:
        parts = []
        title = f"trial {self.chosen}"
        for path, members in self.mixtures.items():
            rows = [(name, f"{old:.3f}", f"{new:.3f}") for name, (old, new) in members.items()]
            parts.append(text_table((path, "trial 0", title), rows))
        if self.changes and self.chosen:
            rows = [(path, _short(old), _short(new)) for path, (old, new) in self.changes.items()]
            parts.append(text_table(("field", "trial 0", title), rows))
        names = sorted(self.correlation, key=lambda name: -self.importance.get(name, abs(self.correlation[name])))
        rows = [
            (name, f"{self.importance[name]:.3f}" if name in self.importance else "-", f"{self.correlation[name]:+.2f}")
            for name in names
        ]
        if rows:
            parts.append(text_table(("which dimensions matter", "share", "Spearman"), rows))
        if self.layers:
            first = sorted(self.layers.items(), key=lambda entry: -entry[1])[:10]
            parts.append(text_table(("which sites matter", "share"), [(name, f"{share:.3f}") for name, share in first]))
        return "\n\n".join(parts)

    def _honesty(self) -> str:
        lines = []
        inside, total = self.coverage
        if total:
            lines.append(
                f"Gaussian process: {inside} of {total} measured trials ({100 * inside / total:.0f} %) lie in their "
                f"{100 * LEVEL:.0f} % prediction interval"
            )
        if self.predictor.get("pairs") and not math.isnan(self.predictor["r2"]):
            lines.append(
                f"accuracy predictor: R2 {self.predictor['r2']:.2f}, Spearman {self.predictor['spearman']:.2f} on "
                f"held-out pairs ({self.predictor['pairs']:.0f} pairs)"
            )
        return "\n".join(lines)


def describe_journal(journal: Journal) -> JournalSummary:
    """What a journal says, finished or not.

    Args:
        journal ([`Journal`]): loaded, or of a search in memory.

    Returns:
        [`JournalSummary`]
    """
    scale, winner, best = Scale.of(journal), journal.winner(), journal.best()
    chosen = winner or best
    space, measured = space_of(journal), differences(journal)
    fresh = {final.number: final.rows for final in journal.finals}
    finals = [
        Finalist(
            number,
            journal.trials[number].strategy,
            mean_value(rows),
            compare(rows, fresh[0], journal.logarithmic) if 0 in fresh else None,
        )
        for number, rows in fresh.items()
    ]
    pareto = search_of(journal).get("pareto")
    count = search_of(journal).get("finalists", SearchConfig.finalists)
    points = front(journal, pareto, count) if pareto and (fresh or winner is not None) else []
    if points and pareto is not None:
        here = journal.trials[0].costs.get(pareto, 0.0)
        chosen = min((trial for trial, _ in points), key=lambda trial: abs(trial.costs[pareto] - here))
    mixtures, changes = ({}, {}) if chosen is None else _chosen(space, journal.trials[0], chosen)
    own = [trial.seconds for trial in journal.trials if trial.rows and trial.answered_by is None]
    in_space = [(t, e) for t, e in measured if space.holds(t.point) and "allocation.ratios" not in t.point]
    quality, layers = _predictor(journal)
    return JournalSummary(
        None if journal.path is None else str(journal.path),
        _facts(journal, space),
        len(journal.trials),
        sum(trial.answered_by is not None for trial in journal.trials),
        sum(not trial.rows for trial in journal.trials),
        dict(Counter(trial.strategy for trial in journal.trials)),
        statistics.median(own) if own else math.nan,
        None if best is None else best.number,
        None if best is None else journal.estimate(best),
        None if winner is None else winner.number,
        None if chosen is None else chosen.number,
        tuple(sorted(finals, key=lambda final: (final.value, final.number))),
        tuple({"trial": trial.number, "value": value, "costs": dict(trial.costs)} for trial, value in points),
        mixtures,
        changes,
        _importance(space, in_space, journal.logarithmic),
        _correlation(space, in_space),
        layers,
        coverage([(t, e.value) for t, e in measured if t.strategy == "gp"], LEVEL, journal.logarithmic),
        quality,
        scale,
    )


def space_of(journal: Journal) -> Space:
    """The space that a journal's header describes; an empty one where it describes none."""
    told = journal.header.get("space", {})
    dimensions: list[Dimension] = []
    for path, given in told.get("dimensions", {}).items():
        fields = {name: _frozen(value) for name, value in given.items() if name != "kind"}
        dimensions.append(_KINDS[given["kind"]](path=path, **fields))
    return Space(tuple(dimensions), told.get("fixed", {}))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value


def search_of(journal: Journal) -> dict[str, Any]:
    """The fields of the search as its header has them."""
    return journal.header.get("config", {}).get("search") or {}


def differences(journal: Journal) -> list[tuple[Trial, Estimate]]:
    """Trials with a finite difference to trial 0."""
    if not journal.trials or not journal.trials[0].rows:
        return []
    found = [(trial, journal.estimate(trial)) for trial in journal.measured()]
    return [(trial, estimate) for trial, estimate in found if math.isfinite(estimate.value)]


def _facts(journal: Journal, space: Space) -> dict[str, Any]:
    header, search = journal.header, search_of(journal)
    config = header.get("config", {})
    windows = header.get("windows", [])
    calibration = config.get("calibration", {})
    size = {name: config[name] for name in ("target_parameters", "target_bytes") if config.get(name)}
    size = config.get("budgets") or size or ({"ratio": config["pruning_ratio"]} if "pruning_ratio" in config else {})
    if search.get("pareto") or search.get("ratios"):
        size = {}
    facts = {
        "hf_adaprune": header.get("version", ""),
        "model": str(header.get("model", ""))[:12],
        "recipe": config.get("recipe_name", ""),
        "objective": search.get("objective", ""),
        "strategy": ", ".join(search.get("strategy", ())),
        "budget": ", ".join(f"{name} {value:,.12g}" for name, value in size.items()),
        "quality against": search.get("pareto"),
        "ratios": ", ".join(f"{ratio:g}" for ratio in search.get("ratios", ())),
        "calibration": ", ".join(_named(source) for source in calibration.get("sources", ())),
        "selection": ", ".join(_named(source) for source in calibration.get("selection", ())),
        "seed": config.get("seed"),
        "space": f"{len(space.dimensions)} fields, {space.freedom} degrees of freedom" if space.dimensions else "",
    }
    if len(windows) == 3:
        facts["selection windows"] = (
            f"{windows[0]} for every trial, {windows[1]} for promising ones, {windows[2]} fresh"
        )
    return facts


def _named(source: Any) -> str:
    return source if isinstance(source, str) else str(source.get("in_memory", "texts"))


def _chosen(
    space: Space, first: Trial, chosen: Trial
) -> tuple[dict[str, dict[str, tuple[float, float]]], dict[str, tuple[Any, Any]]]:
    """Mixtures, and the other fields that differ, of trial 0 and of a chosen one."""
    mixtures: dict[str, dict[str, tuple[float, float]]] = {}
    for dimension in space.dimensions:
        path = dimension.path
        if isinstance(dimension, Simplex) and path in first.point and path in chosen.point:
            both = [dimension.weights(trial.point[path]) for trial in (first, chosen)]
            mixtures[path] = dict(zip(dimension.members, zip(*both, strict=True), strict=True))
    # Ratios by site are widths in other words, which the picture draws.
    paths = [path for path in chosen.point if path not in mixtures and path != "allocation.ratios"]
    return mixtures, {path: (first.point.get(path), chosen.point[path]) for path in paths}


# -- what matters -----------------------------------------------------------------------------------------------------


def _merged(space: Space, shares: Sequence[float]) -> dict[str, float]:
    """By coordinate name; the coordinates of a choice say one thing, so the strongest stands for all."""
    found: dict[str, float] = {}
    names = space.names()
    for dimension, span in space.spans():
        own = list(shares[span])
        if isinstance(dimension, Choice):
            found[dimension.path] = max(own, key=abs)
        else:
            found.update(zip(names[span], own, strict=True))
    return found


def _importance(space: Space, known: Sequence[tuple[Trial, Estimate]], logarithmic: bool) -> dict[str, float]:
    """Shares of the inverse lengthscales (over the unit cube) of a Gaussian process on all trials of the space."""
    if len(known) < FEWEST or not space.dimensions:
        return {}
    view = View(space, (), SearchConfig(), (), 0, 0, 0, 0, logarithmic)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports, and of fits that stop at their step limit
        torch.manual_seed(0)
        model = fit_surrogate(view, [(trial, entry.value, entry.error) for trial, entry in known])[0]
    kernel = getattr(model.covar_module, "base_kernel", model.covar_module)
    inverse = 1 / kernel.lengthscale.detach().flatten().double()
    merged = _merged(space, inverse.tolist())
    return {name: share / sum(merged.values()) for name, share in merged.items()}


def _correlation(space: Space, known: Sequence[tuple[Trial, Estimate]]) -> dict[str, float]:
    """Spearman's rho of every coordinate with the difference to trial 0; 0 where either does not vary."""
    if len(known) < 3 or not space.dimensions:
        return {}
    inputs = torch.stack([space.encode(trial.point) for trial, _ in known])
    values = torch.tensor([entry.value for _, entry in known], dtype=torch.float64)
    ranks = torch.stack([_ranks(column) for column in (*inputs.T, values)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    scale = ranks.norm(dim=1)
    products = ranks[:-1] @ ranks[-1]
    rho = torch.where(scale[:-1] * scale[-1] > 0, products / (scale[:-1] * scale[-1]).clamp(min=1e-12), 0.0)
    return _merged(space, rho.tolist())


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, ties sharing their mean."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below.double() + (equal.double() - 1) / 2


def _slots(journal: Journal) -> tuple[Slot, ...]:
    sites, costs = journal.header.get("sites", {}), journal.header.get("unit_parameters", {})
    return tuple(
        Slot(name, int(name.split(".")[1]), name.rsplit(".", 1)[-1], units, costs[name])
        for name, units in sites.items()
        if name in costs
    )


def _predictor(journal: Journal) -> tuple[dict[str, float], dict[str, float]]:
    """Quality of the accuracy predictor and what its trees find important, where a strategy refined allocations."""
    slots = _slots(journal)
    if len(slots) < 2 or not any(trial.strategy in ("predictor", "evolution") for trial in journal.trials):
        return {}, {}
    from .search.predictor import predictor_importance, predictor_quality

    quality = predictor_quality(journal.trials, slots, logarithmic=journal.logarithmic)
    return quality, predictor_importance(journal.trials, slots, logarithmic=journal.logarithmic)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    return "-" if value is None else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
