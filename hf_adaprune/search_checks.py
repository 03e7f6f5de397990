"""What a search may ask for: refused before any work where it cannot be, and told to the one pass where it can."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .config import PruningConfig
from .errors import ConfigError
from .metrics import METRICS
from .search.dimensions import Choice, Simplex
from .search.problem import View
from .search.space import default_space
from .search_config import REFINING
from .stages import what_to_collect
from .statistics import Needs

__all__ = ["check_search", "search_needs", "strategy"]

_STRATEGIES = {
    "gp": ("gaussian_process", "propose_gp"),
    "random": ("baselines", "propose_random"),
    "sobol": ("baselines", "propose_sobol"),
    "tpe": ("baselines", "propose_tpe"),
    "predictor": ("predictor", "propose_predictor"),
    "evolution": ("evolution", "propose_evolution"),
}
# Fields that a trial can change without a new pass over the calibration text.
_SEARCHABLE = ("importance.", "allocation.", "repair.")
_SINGLE = (
    "pruning_ratio", "channel_multiple", "min_channels", "min_groups", "protected_layers",
    "calibration.domain_weights",
)  # fmt: skip
_NOT = ("allocation.steps", "repair.schedule", "repair.regional_steps", "repair.holdout", "repair.target_mix")


def check_search(config: PruningConfig) -> None:
    """Refuse what a search cannot do, before any work.

    Raises:
        ConfigError: with the field that contradicts it.
        MissingDependencyError: a strategy's library is missing.
    """
    search = config.search
    if search is None:
        return
    if config.allocation.steps > 1:
        raise ConfigError("`search` scores once; set `allocation.steps` to 1.")
    if config.layer_by_layer:
        raise ConfigError("`search` reads cached moments of all layers, which `layer_by_layer` avoids. Leave out one.")
    for path in search.space:
        known = path in _SINGLE or (path.startswith(_SEARCHABLE) and path not in _NOT)
        if not known:
            raise ConfigError(
                f"`search.space` names {path!r}, which a trial from cached statistics cannot change. It may vary "
                f"{', '.join(_SINGLE)} and fields of importance, allocation and repair; set others in the config."
            )
    refining = [name for name, _ in search.shares() if name in REFINING]
    if refining and (config.uniform or search.pareto or search.ratios):
        raise ConfigError(
            f"the strategy {refining[0]!r} refines how one budget is shared by the layers, which `uniform`, "
            "`search.pareto` and `search.ratios` leave no room for. Use gp."
        )
    if search.pareto is not None and config.budgets:
        raise ConfigError("`search.pareto` varies the size, which `budgets` would fix. Leave out one of them.")
    if search.objective != "custom" and search.objective != "accuracy" and search.selection_tokens < 4:
        raise ConfigError("`search.selection_tokens` is too small to measure anything.")
    for name, _ in search.shares():
        strategy(name)


def strategy(name: str) -> Callable[[View, int], Sequence[Any]]:
    """A strategy by name; its libraries load on first use.

    Args:
        name (`str`): one of [`hf_adaprune.search_config.STRATEGIES`].

    Raises:
        MissingDependencyError: the extra that brings its library is not installed.
    """
    module, function = _STRATEGIES[name]
    if name == "tpe":
        from .search.baselines import need_optuna

        need_optuna()
    found: Callable[[View, int], Sequence[Any]] = getattr(
        importlib.import_module(f".search.{module}", __package__), function
    )
    return found


def search_needs(config: PruningConfig, domains: int) -> Needs:
    """What the one pass has to keep for every trial of a search.

    Args:
        config ([`PruningConfig`]): where it starts, with its search.
        domains (`int`): calibration domains.

    Raises:
        ConfigError: an unknown metric, or fewer windows with gradients than weighted domains.
    """
    space = default_space(config, tuple(str(number) for number in range(domains)))
    needs = what_to_collect(space.apply(config, space.default), None) or Needs()
    weighted = False
    for dimension in space.dimensions:
        for value in dimension.values if isinstance(dimension, Choice) else ():
            own = space.apply(config, {**space.default, dimension.path: value})
            needs = needs | (what_to_collect(own, None) or Needs())
        if dimension.path == "importance.metrics" and isinstance(dimension, Simplex):
            for name in dimension.members:
                if name not in METRICS:
                    raise ConfigError(f"no metric {name!r}. Known: {', '.join(sorted(METRICS))}.")
                needs = needs | METRICS[name].needs
        weighted = weighted or dimension.path == "calibration.domain_weights"
    weighted = weighted or bool(config.calibration.domain_weights)
    if weighted and (needs.gradients or needs.elements) and config.calibration.gradient_samples < domains:
        raise ConfigError(
            f"`calibration.gradient_samples` should give each of the {domains} weighted domains a window. Found "
            f"{config.calibration.gradient_samples}."
        )
    return replace(needs, per_domain=needs.per_domain or (weighted and domains > 1))
