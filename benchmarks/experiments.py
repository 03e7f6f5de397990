"""The experiments, as data: what varies, in which cases, with which seeds, and what is measured. Nothing runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_adaprune import RECIPES, PruningConfig

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = (0, 1, 2)  # of the calibration windows, of everything drawn, and of a search
EVERYTHING = (
    "calibration.domain_weights",
    "importance.metrics",
    "importance.normalization",
    "allocation.profile",
    "allocation.attention_balance",
    "repair.damping",
)
_CALIBRATION = ("calibration.domain_weights",)
_METRICS = ("importance.metrics", "importance.normalization")


@dataclass(frozen=True)
class Case:
    """One line of a table: a config, and how often it is measured.

    Args:
        label (`str`): of the line.
        ratio (`float`): pruning ratio; 0 is the dense model.
        recipe (`str`, *optional*, defaults to `"default"`): where the config starts.
        changes (`dict[str, Any]`, *optional*): of the config, as [`PruningConfig.with_changes`] takes them.
        searches (`tuple[tuple[str, ...], ...]`, *optional*): one search after the other, each with the fields it may
            vary; it starts from the winner of the one before, and they share the trials.
        peer (`str`, *optional*): another project's code instead of a config.
        domain (`int`, *optional*): the calibration source that calibrates alone, by number.
        seeds (`tuple[int, ...]`, *optional*): the experiment's where not given.
    """

    label: str
    ratio: float
    recipe: str = "default"
    changes: Mapping[str, Any] = field(default_factory=dict)
    searches: tuple[tuple[str, ...], ...] = ()
    peer: str | None = None
    domain: int | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, and what a run on it is asked to do; its cost is measured in a process of its own.

    Args:
        label (`str`): of the line.
        layers, width, channels, heads, groups, vocabulary (`int`): of the model; heads have 64 dimensions.
        samples (`int`): calibration windows of 512 tokens.
        gradient_samples (`int`): those that get gradients.
        trials (`int`): of a search; 0 is none.
    """

    label: str
    layers: int = 16
    width: int = 576
    channels: int = 1536
    heads: int = 9
    groups: int = 3
    vocabulary: int = 49152
    samples: int = 32
    gradient_samples: int = 8
    trials: int = 0


@dataclass(frozen=True)
class Experiment:
    """A question and its cases.

    Args:
        name (`str`): of the experiment, of its results file and of its table.
        varies (`str`): what differs between the lines.
        cases (`tuple[Case, ...]` or `tuple[Shape, ...]`): the lines.
        measures (`tuple[str, ...]`): `perplexity` of report text, `tasks` (multiple choice, the first rows of every
            file, first seed only), `all tasks` (all rows), `speed`, `cost` (seconds and peak memory of every stop),
            `computed` (what an estimate says, nothing is run).
        seeds (`tuple[int, ...]`, *optional*): of every case that names none.
        matrix (`bool`, *optional*): report text of every calibration domain, held out of it, instead of report text.
    """

    name: str
    varies: str
    cases: tuple[Case, ...] | tuple[Shape, ...]
    measures: tuple[str, ...] = ("perplexity",)
    seeds: tuple[int, ...] = SEEDS
    matrix: bool = False


@dataclass(frozen=True)
class Scale:
    """How much text a measurement reads, and how often it is repeated."""

    samples: int = 256
    sequence_length: int = 512
    gradient_samples: int = 48
    report_tokens: int = 16384
    report_window: int = 1024
    task_rows: int = 250
    trials: int = 24
    selection_tokens: int = 24576
    first_tokens: int = 6144
    final_tokens: int = 16384
    prompt: int = 512
    new_tokens: int = 32
    runs: int = 7
    divisor: int = 1
    cost_divisor: int = 1
    tokens_per_column: float = 2.0


FULL = Scale()
SMOKE = Scale(
    samples=8, sequence_length=32, gradient_samples=4, report_tokens=256, report_window=64, task_rows=4, trials=3,
    selection_tokens=192, first_tokens=96, final_tokens=96, prompt=32, new_tokens=4, runs=2, divisor=8,
    cost_divisor=16, tokens_per_column=0.0,
)  # fmt: skip

PEERS = {"torch-pruning": "Taylor", "torch-pruning-mlp": "Taylor, MLP only"}

DENSE = Case("dense", 0.0, "magnitude", seeds=(0,))
# Scores by magnitude draw nothing and read no text, so that seeds would repeat them.
_SURE = {"magnitude": (0,)}


def _quality() -> tuple[Case, ...]:
    recipes = [Case(name, ratio, name, seeds=_SURE.get(name)) for name in sorted(RECIPES) for ratio in RATIOS]
    searches = [Case("search", ratio, searches=(EVERYTHING,)) for ratio in RATIOS]
    # The repair that takes minutes, at the ratios of the README's table and of the aim for tasks; the experiment on
    # repairs has the others.
    slow: dict[str, Any] = {"repair": {"schedule": "sequential"}}
    walks = [Case("default, sequential repair", ratio, changes=slow) for ratio in (0.2, 0.3, 0.5)]
    walks += [Case("search, sequential repair", ratio, changes=slow, searches=(EVERYTHING,)) for ratio in (0.2, 0.5)]
    peers = [Case(f"Torch-Pruning, {name}", ratio, peer=peer) for peer, name in PEERS.items() for ratio in RATIOS]
    return (DENSE, *recipes, *walks, *searches, *peers)


def _repairs() -> tuple[Case, ...]:
    def case(label: str, **repair: Any) -> tuple[Case, ...]:
        return tuple(Case(label, ratio, changes={"repair": repair}) for ratio in (0.2, 0.5))

    return (
        DENSE,
        *case("none", method="none"),
        *case("bias", method="bias"),
        *case("least squares", method="least_squares", schedule="cached"),
        *case("least squares with intercept", method="least_squares", intercept=True),
        *case("least squares, sequential", method="least_squares", schedule="sequential", target_mix=0.0),
        *case("sequential, towards the dense stream", method="least_squares", schedule="sequential", target_mix=0.5),
        # Minutes a row, so at one ratio.
        *case("least squares, then regional", method="least_squares", regional_steps=32)[:1],
    )


def _allocations() -> tuple[Case, ...]:
    methods: dict[str, dict[str, Any]] = {
        "global": {"method": "global"},
        "uniform": {"method": "uniform"},
        "logarithmic over depth": {"method": "logarithmic"},
        "similarity of layers": {"method": "similarity"},
        "FLAP, UL-UM": {"method": "flap", "structure": "UL-UM"},
        "FLAP, AL-AM": {"method": "flap", "structure": "AL-AM"},
    }
    return (DENSE, *(Case(label, 0.2, changes={"allocation": own}) for label, own in methods.items()))


def _searched() -> tuple[Case, ...]:
    varied: dict[str, tuple[tuple[str, ...], ...]] = {
        "both fixed": (),
        "calibration searched": (_CALIBRATION,),
        "metrics searched": (_METRICS,),
        "both, joint": ((*_CALIBRATION, *_METRICS),),
        "both, one after the other": (_CALIBRATION, _METRICS),
        "everything": (EVERYTHING,),
    }
    return (DENSE, *(Case(label, 0.2, searches=searches) for label, searches in varied.items()))


def _tokens() -> tuple[Case, ...]:
    counts = (16, 64, 256)
    lines = [
        Case(f"{count} windows", ratio, changes={"calibration": {"samples": count}})
        for count in counts
        for ratio in (0.2, 0.5)
    ]
    return (DENSE, *lines)


def _selection() -> tuple[Case, ...]:
    def case(tokens: int) -> Case:
        search = {"selection_tokens": tokens, "first_tokens": tokens // 4}
        return Case(f"{tokens:,} tokens", 0.2, changes={"search": search}, searches=(EVERYTHING,))

    return (DENSE, Case("no search", 0.2), *map(case, (6144, 24576)))


def _domains() -> tuple[Case, ...]:
    # A pass of its own for every domain and seed, so a quarter of the windows.
    return (DENSE, Case("all", 0.2, changes={"calibration": {"samples": 64, "gradient_samples": 16}}))


def _speeds() -> tuple[Case, ...]:
    forms: dict[str, dict[str, Any]] = {
        "widths as they fall": {},
        "multiples of 32": {"channel_multiple": 32},
        "multiples of 128": {"channel_multiple": 128},
        "equal layers": {"uniform": True},
        "equal layers, multiples of 32": {"uniform": True, "channel_multiple": 32},
    }
    return tuple(
        Case(label, ratio, changes=dict(own), seeds=(0,)) for label, own in forms.items() for ratio in (0.2, 0.4)
    ) + tuple(Case("whole layers (shortgpt)", ratio, "shortgpt", seeds=(0,)) for ratio in (0.2, 0.4))


_SHAPES = (
    Shape("base"),
    *(Shape(f"{layers} layers", layers=layers) for layers in (8, 32)),
    Shape("width 1,024", width=1024, channels=2816, heads=16, groups=4),
    Shape("64 windows", samples=64),
    Shape("24 windows with gradients", gradient_samples=24),
    *(Shape(f"{trials} trials", trials=trials) for trials in (8, 24)),
    Shape("0.6 B parameters", 28, 1024, 3072, 16, 8, 151936, 16, 4),
)
# Shapes of published models; their weights are not needed for arithmetic.
COMPUTED: dict[str, tuple[str, dict[str, int]]] = {
    "7 B": ("llama", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}),
    "70 B": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}),
    "8 x 7 B, mixture of experts": ("mixtral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}),
}  # fmt: skip


def _computed() -> tuple[Case, ...]:
    lines = []
    for name, (family, _) in COMPUTED.items():
        units = ("expert_channel", "kv_group") if family == "mixtral" else ("channel", "kv_group")
        own: dict[str, Any] = {"units": units}
        lines.append(Case(name, 0.2, changes=own, seeds=(0,)))
        lines.append(Case(f"{name}, layer by layer", 0.2, changes={**own, "layer_by_layer": True}, seeds=(0,)))
    return tuple(lines)


def _questions() -> tuple[Case, ...]:
    # What 500 questions cannot tell apart: the two peers that they put first, and what is to be ahead of them.
    slow: dict[str, Any] = {"repair": {"schedule": "sequential"}}
    lines: list[Case] = []
    for ratio in (0.2, 0.3):
        lines += [Case(name, ratio, name) for name in ("shortgpt", "flap", "default")]
        lines.append(Case("search", ratio, searches=(EVERYTHING,)))
    lines.append(Case("default, sequential repair", 0.2, changes=slow))
    lines.append(Case("search, sequential repair", 0.2, changes=slow, searches=(EVERYTHING,)))
    return (DENSE, *lines)


EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        Experiment("quality", "recipes, search and peers by pruning ratio", _quality(), ("perplexity", "tasks")),
        Experiment("questions", "all rows of the tasks", _questions(), ("all tasks",), (0,)),
        Experiment("searched", "what a search may vary: calibration, metrics, jointly or apart", _searched()),
        Experiment("repair", "how the kept matrices are repaired", _repairs()),
        Experiment("allocation", "how the budget is shared by the layers", _allocations()),
        Experiment("calibration_tokens", "calibration windows of 512 tokens", _tokens()),
        Experiment("selection_tokens", "selection text of a search", _selection()),
        Experiment("domains", "calibration domain (64 windows) against report domain", _domains(), matrix=True),
        Experiment("speed", "tokens per second by ratio and width multiple", _speeds(), ("perplexity", "speed"), (0,)),
        Experiment("cost", "time and memory by layers, width, windows and trials", _SHAPES, ("cost",), (0,)),
        Experiment("computed_cost", "estimates for large models, nothing run", _computed(), ("computed",), (0,)),
    )
}


def expand(experiment: Experiment, sources: int) -> tuple[Case, ...]:
    """The cases, with one line per calibration source in the matrix of domains."""
    cases = tuple(case for case in experiment.cases if isinstance(case, Case))
    if not experiment.matrix:
        return cases
    alone = (replace(case, domain=number) for case in cases if case.ratio for number in range(sources))
    return (*cases, *alone)


def config_of(case: Case, seed: int, scale: Scale, texts: Any) -> PruningConfig:
    """The config of a case, without its searches.

    Args:
        case ([`Case`]): the line.
        seed (`int`): of everything drawn.
        scale ([`Scale`]): how much text is read.
        texts (`Texts`): see [`benchmarks.texts`].
    """
    sources = texts.calibration if case.domain is None else (texts.calibration[case.domain],)
    changes = {name: dict(own) if isinstance(own, Mapping) else own for name, own in case.changes.items()}
    changes.pop("search", None)
    calibration = {
        "sources": sources,
        "samples": scale.samples,
        "sequence_length": scale.sequence_length,
        "gradient_samples": scale.gradient_samples,
        **changes.pop("calibration", {}),
    }
    for name in ("samples", "gradient_samples"):
        if name in case.changes.get("calibration", {}):
            calibration[name] = max(len(sources), calibration[name] // scale.divisor)
    repair = {"min_tokens_per_column": scale.tokens_per_column, **changes.pop("repair", {})}
    repair["regional_steps"] = repair.get("regional_steps", 0) // scale.divisor
    if repair.get("method") == "none":
        repair["holdout"] = 0.0
    return PruningConfig.recipe(
        case.recipe, pruning_ratio=case.ratio, calibration=calibration, repair=repair, seed=seed, **changes
    )


def search_of(case: Case, start: PruningConfig, free: tuple[str, ...], scale: Scale, texts: Any) -> PruningConfig:
    """A search from a config, in which every field but the free ones stays as it is.

    Args:
        case ([`Case`]): the line.
        start ([`PruningConfig`]): trial 0.
        free (`tuple[str, ...]`): fields that vary.
        scale ([`Scale`]): how much text is read.
        texts (`Texts`): with selection text.
    """
    asked = dict(case.changes.get("search", {}))
    for name in ("selection_tokens", "first_tokens"):
        if name in asked:
            asked[name] = max(2 * scale.sequence_length, asked[name] // scale.divisor)
    fixed = [path for path in EVERYTHING if path not in free]
    space = {path: value for path in fixed if (value := _value(start, path)) is not None}
    trials = max(2, scale.trials // len(case.searches))
    search = {
        "trials": trials,
        "initial": min(10, max(2, trials // 3)),
        "selection_tokens": scale.selection_tokens,
        "first_tokens": scale.first_tokens,
        "final_tokens": scale.final_tokens,
        "sequence_length": scale.sequence_length,
        "space": space,
        **asked,
    }
    return start.with_changes(calibration={"selection": texts.selection}, search=search)


def _value(config: PruningConfig, path: str) -> Any:
    """A field's value as JSON; `None` where no search would vary it."""
    if path == "calibration.domain_weights":
        return list(config.calibration.domain_weights) if len(config.calibration.sources) > 1 else None
    if path == "allocation.profile":
        return list(config.allocation.profile)
    part, _, name = path.partition(".")
    value = getattr(getattr(config, part), name)
    return dict(value) if isinstance(value, Mapping) else value
