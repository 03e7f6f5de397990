"""Strategies without a model of the objective, and TPE through optuna: what the others are measured against."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import MissingDependencyError
from .dimensions import Choice
from .problem import Proposal, View

__all__ = ["need_optuna", "propose_random", "propose_sobol", "propose_tpe"]


def propose_random(view: View, count: int) -> Sequence[Proposal]:
    """Uniform draws; flat on simplices."""
    found = []
    for number in range(view.number, view.number + count):
        generator = torch.Generator().manual_seed(view.seed * 1_000_003 + number)
        found.append(Proposal(view.space.from_cube(torch.rand(view.space.width, generator=generator))))
    return found


def propose_sobol(view: View, count: int) -> Sequence[Proposal]:
    """The next points of a scrambled Sobol sequence."""
    engine = torch.quasirandom.SobolEngine(view.space.width, scramble=True, seed=view.seed)
    engine.fast_forward(view.done)
    return [Proposal(view.space.from_cube(draw)) for draw in engine.draw(count, dtype=torch.float64)]


def need_optuna() -> Any:
    """The library behind `tpe`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError(
            "the strategy `tpe` is optuna's, which the extra `tpe` brings: pip install hf_adaprune[tpe]."
        ) from error
    return optuna


def propose_tpe(view: View, count: int) -> Sequence[Proposal]:
    """Tree-structured Parzen estimator (AdaPruner's optimiser, 2503.06184 eq. 7-11) as optuna implements it.

    A simplex is sampled as free coordinates in [0, 1] that are scaled to add up to 1; pending candidates are told as
    running trials, from which optuna keeps away.

    Raises:
        MissingDependencyError: optuna is not installed.
    """
    optuna = need_optuna()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Versions differ in what they call experimental, default or deprecated of the very same sampler.
            warnings.simplefilter("ignore")
            return _ask_tpe(view, count, optuna)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _ask_tpe(view: View, count: int, optuna: Any) -> list[Proposal]:
    sampler = optuna.samplers.TPESampler(
        seed=(view.seed * 1_000_003 + view.number) % 2**32, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler)
    ranges = _ranges(view, optuna)
    for trial, value, _ in view.observations():
        if view.space.holds(trial.point) and math.isfinite(value):
            values = _parameters(view, trial.point)
            study.add_trial(optuna.trial.create_trial(params=values, distributions=ranges, value=value))
    proposals = []
    for _ in range(count):
        asked = study.ask(ranges)
        proposals.append(Proposal(_point(view, asked.params)))
    return proposals


def _ranges(view: View, optuna: Any) -> dict[str, Any]:
    names = view.space.names()
    ranges: dict[str, Any] = {}
    for dimension, span in view.space.spans():
        if isinstance(dimension, Choice):
            ranges[dimension.path] = optuna.distributions.CategoricalDistribution(list(range(dimension.width)))
        else:
            for index, (low, high) in zip(range(span.start, span.stop), dimension.bounds(), strict=True):
                ranges[names[index]] = optuna.distributions.FloatDistribution(low, high)
    return ranges


def _parameters(view: View, point: Any) -> dict[str, Any]:
    low, high = view.space.bounds()
    names, vector = view.space.names(), view.space.encode(point).clamp(low, high).tolist()
    values: dict[str, Any] = {}
    for dimension, span in view.space.spans():
        own = vector[span]
        if isinstance(dimension, Choice):
            values[dimension.path] = own.index(max(own))
        else:
            values.update(zip(names[span], own, strict=True))
    return values


def _point(view: View, values: dict[str, Any]) -> dict[str, Any]:
    names = view.space.names()
    coordinates: list[float] = []
    for dimension, span in view.space.spans():
        if isinstance(dimension, Choice):
            coordinates += [float(index == values[dimension.path]) for index in range(dimension.width)]
        else:
            coordinates += [values[name] for name in names[span]]
    return view.space.decode(torch.tensor(coordinates, dtype=torch.float64))
