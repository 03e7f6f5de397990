"""What a search may ask for: refused before any work where it cannot be, and told to the one pass where it can."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .allocation_checks import can_allocate, whole_parts
from .budgets import check_budgets
from .config import PruningConfig
from .costs import Costs
from .errors import ConfigError
from .metrics import METRICS
from .offers import protected_layers
from .parts import ALLOCATIONS
from .search.dimensions import Choice, Simplex
from .search.problem import View
from .search.space import Space, default_space
from .search_config import REFINING
from .sites import ModelSites
from .stages import check_gradient_windows, what_to_collect
from .statistics import Needs

__all__ = [
    "check_reach",
    "check_search",
    "named_objective",
    "named_space",
    "search_needs",
    "strategy",
    "trial_needs",
]

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
    method = search.space.get("allocation.method")
    if refining and ("allocation.ratios" in search.space or not (method is None or isinstance(method, Mapping))):
        raise ConfigError(
            f"the strategy {refining[0]!r} decides `allocation.method` and `allocation.ratios`, which `search.space` "
            "fixes. Take them out of the space, or use gp."
        )
    _check_methods(config)
    if search.pareto is not None and config.budgets:
        raise ConfigError("`search.pareto` varies the size, which `budgets` would fix. Leave out one of them.")
    sizes = [name for name in ("search.pareto", "search.ratios") if getattr(search, name.partition(".")[2])]
    if "pruning_ratio" in search.space:
        if search.ratios:
            raise ConfigError("`search.space` names 'pruning_ratio', which `search.ratios` sets. Leave out one.")
        sizes.append("search.space['pruning_ratio']")
    # Budgets hold beside the ratios of nested plans, and nowhere else.
    targets = ["target_parameters", "target_bytes", *(["budgets"] if "pruning_ratio" in search.space else [])]
    given = [name for name in targets if getattr(config, name)]
    if sizes and given:
        raise ConfigError(f"`{sizes[0]}` says what goes by ratio, which `{given[0]}` would fix. Leave out one of them.")
    if search.pareto is not None and search.surrogate == "saas":
        raise ConfigError("`search.surrogate='saas'` knows one objective, and `search.pareto` has two. Leave out one.")
    if search.tasks and search.objective != "accuracy":
        raise ConfigError(
            f"`search.tasks` are rows for the objective accuracy, and `search.objective` is {search.objective!r}. Set "
            "it to 'accuracy' (--objective accuracy), or leave the tasks out."
        )
    if search.objective != "custom" and search.objective != "accuracy" and search.selection_tokens < 4:
        raise ConfigError("`search.selection_tokens` is too small to measure anything.")
    for name, _ in search.shares():
        strategy(name)


def _check_methods(config: PruningConfig) -> None:
    """Refuse methods of a space that have no place for the whole parts of `units`: every trial with one would fail."""
    assert config.search is not None
    space = config.search.space
    if not {"allocation.method", "allocation.structure"} & set(space):
        return

    def values(name: str) -> list[str]:
        given = space.get(f"allocation.{name}", getattr(config.allocation, name))
        return [str(value) for value in (given.get("choices", ()) if isinstance(given, Mapping) else [given])]

    # Names that are none are told of with the rest of the space.
    asked = [
        (f"`{method}`" + (f" with the structure {structure}" if method == "flap" else ""), method, structure)
        for method in values("method")
        for structure in values("structure")[: None if method == "flap" else 1]
        if method in ALLOCATIONS
    ]
    failing = [name for name, method, structure in asked if not can_allocate(config.units, method, structure)]
    if failing:
        whole = whole_parts(config.units)
        mixed = len(whole) < len(config.units)
        raise ConfigError(
            f"`search.space` lets `allocation.method` be {', '.join(failing)}, which cannot let go of "
            f"{', '.join(whole)} of `units`; `global`{' and `flap` with the structure AL-AM' if mixed else ''} can. "
            f"Leave the former out of the space, or take {', '.join(whole)} out of `units`."
        )


def named_objective(config: PruningConfig, objective: Callable[[Any], Any] | None) -> PruningConfig:
    """The config whose search says `custom` where a function is minimised: records name what was measured.

    Args:
        config ([`PruningConfig`]): with or without a search.
        objective (`Callable`, *optional*): the function, which takes the place of the config's objective.
    """
    if objective is None or config.search is None:
        return config
    return config.with_changes(search={"objective": "custom", "tasks": ()})


def check_reach(sites: ModelSites, config: PruningConfig, costs: Costs) -> None:
    """Refuse sizes that no allowed plan has, and layers that the model lacks, before any text is read.

    Args:
        sites ([`ModelSites`]): the model.
        config ([`PruningConfig`]): with or without a search, which is looked at as well: what it fixes, its choices of
            `protected_layers`, and the highest of its ratios.
        costs ([`Costs`]): of the same model.

    Raises:
        BudgetError: with the range that can be reached.
        ConfigError: a layer that the model lacks, nothing in the model may go, or the space is none.
    """
    check_budgets(sites, _highest_ratio(config), costs)
    if config.search is None:
        return
    space = named_space(config)
    chosen = {dimension.path: dimension for dimension in space.dimensions if isinstance(dimension, Choice)}
    if "protected_layers" in chosen:
        for layers in chosen["protected_layers"].values:
            protected_layers(sites, space.apply(config, {"protected_layers": layers}))
    # Trial 0 is the config with what the space fixes, and it has to have a plan.
    first = space.apply(config, {path: dimension.default for path, dimension in chosen.items()})
    if first != config:
        check_budgets(sites, _highest_ratio(first), costs)


def named_space(config: PruningConfig) -> Space:
    """The space of a config's search before the calibration text is read: domains have numbers for names.

    Args:
        config ([`PruningConfig`]): with its search.

    Raises:
        ConfigError: see [`hf_adaprune.search.space.default_space`].
    """
    return default_space(config, tuple(str(number) for number in range(config.calibration.domain_count)))


def _highest_ratio(config: PruningConfig) -> PruningConfig:
    """The config at the highest ratio that its search may ask for: what has to be in reach before any work."""
    if config.search is None or not config.search.ratios:
        return config
    highest = max(config.search.ratios)
    budgets = config.budgets and {**config.budgets, "ratio": max(highest, config.budgets.get("ratio", 0.0))}
    return config.with_changes(pruning_ratio=highest, budgets=budgets)


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


def trial_needs(config: PruningConfig) -> Needs | None:
    """What the one pass has to keep for one trial: it is compared with cached repairs, whatever the config's schedule.

    Args:
        config ([`PruningConfig`]): of the trial.

    Returns:
        [`Needs`]: `None` where no text is needed at all.
    """
    return what_to_collect(config.with_changes(repair={"schedule": "cached"}), None)


def search_needs(config: PruningConfig, domains: int) -> Needs:
    """What the one pass has to keep for every trial of a search.

    Args:
        config ([`PruningConfig`]): where it starts, with its search.
        domains (`int`): calibration domains.

    Raises:
        ConfigError: an unknown metric, or fewer windows with gradients than domains.
    """
    space = default_space(config, tuple(str(number) for number in range(domains)))
    needs = trial_needs(space.apply(config, space.default)) or Needs()
    weighted = False
    for dimension in space.dimensions:
        for value in dimension.values if isinstance(dimension, Choice) else ():
            needs = needs | (trial_needs(space.apply(config, {**space.default, dimension.path: value})) or Needs())
        if dimension.path == "importance.metrics" and isinstance(dimension, Simplex):
            for name in dimension.members:
                if name not in METRICS:
                    raise ConfigError(f"no metric {name!r}. Known: {', '.join(sorted(METRICS))}.")
                needs = needs | METRICS[name].needs
        weighted = weighted or dimension.path == "calibration.domain_weights"
    weighted = weighted or bool(space.apply(config, {}).calibration.domain_weights)  # fixed by the space, too
    check_gradient_windows(config, needs)
    return replace(needs, per_domain=needs.per_domain or (weighted and domains > 1))
