"""What a command line says: the options of every command, and the config that those of `prune` and `search` make.

Nothing here imports torch or transformers, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cli_publish import add_export_arguments, add_push_arguments
from .cli_recover import add_recover_arguments
from .cli_run import add_run_arguments
from .cli_search import SEARCH_FIELDS, SUFFIXES, add_search_arguments, read_budgets, read_space
from .config import RECIPES, UNITS, PruningConfig
from .errors import ConfigError
from .parts import SCHEDULES
from .search_config import BUDGETS

__all__ = ["build_config", "command_line"]

# Options of `prune` and the fields of PruningConfig that they set.
FIELDS = {
    "target_parameters": ("target_parameters",),
    "target_bytes": ("target_bytes",),
    "pruning_ratio": ("pruning_ratio",),
    "units": ("units",),
    "uniform": ("uniform",),
    "channel_multiple": ("channel_multiple",),
    "layer_by_layer": ("layer_by_layer",),
    "repair_schedule": ("repair", "schedule"),
    "seed": ("seed",),
    "calibration": ("calibration", "sources"),
    "selection": ("calibration", "selection"),
    "report": ("calibration", "report"),
    "samples": ("calibration", "samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "budget": ("budgets",),
}
READERS = {"budget": read_budgets, "space": read_space}
SIZES = {"pruning_ratio", "target_parameters", "target_bytes"}


def _count(text: str) -> int:
    """A whole number, with k, M or G for thousands, millions and thousand millions."""
    scale = SUFFIXES.get(text[-1:].lower(), 1)
    try:
        return round(float(text[:-1]) * scale) if scale > 1 else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number such as 110000000 or 110M") from error


def command_line(runs: Mapping[str, Callable[[argparse.Namespace, Sequence[str]], None]]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        runs (`Mapping[str, Callable]`): what every command does, by its name; left in `run` of what is parsed.
    """
    from . import __version__

    parser = argparse.ArgumentParser(prog="hf-adaprune", description="Structured pruning of causal language models.")
    parser.add_argument("--version", action="version", version=f"hf_adaprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    loads = argparse.ArgumentParser(add_help=False)
    loads.add_argument("model", metavar="MODEL", help="folder or id on the Hub")
    loads.add_argument("--gguf-file", metavar="NAME", help="a GGUF file in MODEL, which is dequantised")
    loads.add_argument("--revision", help="of MODEL on the Hub")
    loads.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16 (default: the checkpoint's)")
    loads.add_argument("--device", help="where to work, such as cuda (default: cpu)")
    loads.add_argument("--trust-remote-code", action="store_true", help="run code that MODEL brings")
    prune = commands.add_parser("prune", parents=[loads, common], help="prune a model and save it")
    _prune_arguments(prune)
    prune.add_argument("--plan", metavar="FILE", help="carry out this plan instead of deciding one")
    prune.set_defaults(run=runs["prune"])
    search = commands.add_parser("search", parents=[loads, common], help="look for the best way to prune, then do it")
    _prune_arguments(search)
    add_search_arguments(search)
    search.set_defaults(run=runs["search"])

    recover = commands.add_parser("recover", parents=[loads, common], help="train a pruned model by its dense model")
    add_recover_arguments(recover, _count)
    recover.set_defaults(run=runs["recover"])

    evaluate = commands.add_parser("evaluate", parents=[loads, common], help="perplexity, tasks and speed of a model")
    evaluate.add_argument(
        "--report", nargs="+", action="extend", metavar="SOURCE", help="texts to measure perplexity on (alone: python)"
    )
    evaluate.add_argument(
        "--tasks", nargs="+", action="extend", metavar="NAME", default=[],
        help="multiple-choice rows (FILE.jsonl), or tasks of lm-eval by name",
    )  # fmt: skip
    evaluate.add_argument("--latency", action="store_true", help="tokens per second, prefill and decode")
    evaluate.add_argument("--tokens", type=_count, help="tokens of every report source")
    evaluate.add_argument("--sequence-length", type=int, help="window of perplexity")
    evaluate.set_defaults(run=runs["evaluate"])

    show = commands.add_parser("show", parents=[common], help="what a plan or a checkpoint keeps, what a search found")
    show.add_argument("path", metavar="PLAN|CHECKPOINT|JOURNAL", help="a JSON file, a checkpoint's folder, a journal")
    show.add_argument("--plot", metavar="FILE", help="draw it, too: .png, .svg or .pdf")
    show.set_defaults(run=runs["show"])

    add_export_arguments(commands, common).set_defaults(run=runs["export"])
    add_push_arguments(commands, common)
    commands.choices["push"].set_defaults(run=runs["push"])

    demo = commands.add_parser("demo", parents=[common], help="prune a small model and compare it with itself")
    demo.add_argument("--model", metavar="MODEL", help="folder or id on the Hub (default: SmolLM2-135M from PyPI)")
    demo.add_argument("--output", metavar="DIR", help="keep the pruned model there")
    demo.add_argument("--pruning-ratio", type=float, metavar="R", help="share of decoder-layer parameters to remove")
    demo.set_defaults(run=runs["demo"])
    return parser


def _prune_arguments(prune: argparse.ArgumentParser) -> None:
    # Defaults are PruningConfig's and its recipes' own: an option that is not given says nothing.
    default = PruningConfig()
    source: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "SOURCE"}
    add = prune.add_argument
    add("--output", metavar="DIR", help="folder of the pruned model; new or empty")
    budget = prune.add_mutually_exclusive_group()
    budget.add_argument(
        "--pruning-ratio", type=float, metavar="R",
        help=f"share of decoder-layer parameters to remove ({default.pruning_ratio})",
    )  # fmt: skip
    budget.add_argument("--target-parameters", type=_count, metavar="N", help="parameters to keep in all, such as 110M")
    budget.add_argument("--target-bytes", type=_count, metavar="N", help="bytes of the weights to keep, such as 220M")
    budget.add_argument(
        "--budget", action="append", metavar="KIND=VALUE",
        help=f"hold to this, and to others given so: KIND is one of {', '.join(BUDGETS)}, VALUE such as 0.3 or 110M",
    )  # fmt: skip
    add("--recipe", metavar="NAME", help=f"how: {', '.join(RECIPES)} (default)")
    add("--config", metavar="FILE.json", help="fields of PruningConfig, or the pruning_config.json of another run")
    add("--calibration", **source, help="texts to measure on: files, data sets (name:config:split), self or python")
    add("--selection", **source, help="texts that a search chooses on; never part of the others")
    add("--report", **source, help="texts to report perplexity on, dense and pruned")
    add("--samples", type=int, metavar="N", help=f"calibration windows ({default.calibration.samples})")
    add("--sequence-length", type=int, metavar="N", help=f"tokens per window ({default.calibration.sequence_length})")
    add("--units", nargs="+", action="extend", metavar="UNIT", help=f"what may go, of {', '.join(UNITS)}")
    add("--uniform", action="store_true", default=None, help="every layer equally wide: loads without this package")
    add("--channel-multiple", type=int, metavar="N", help="keep MLP widths multiples of N")
    add(
        "--repair-schedule", metavar="NAME",
        help=f"{', '.join(SCHEDULES)}: sequential repairs better than cached, the default, and takes longer",
    )  # fmt: skip
    add("--layer-by-layer", action="store_true", default=None, help="hold one layer of the model in memory at a time")
    add("--seed", type=int, metavar="N", help="of everything drawn at random")
    add_run_arguments(prune)
    add(
        "--dry-run",
        action="store_true",
        help="check everything and estimate size, memory, disk and time; write nothing",
    )


def build_config(arguments: argparse.Namespace) -> PruningConfig:
    """The config of a command line: options override `--config`, which overrides the recipe that it does not name.

    Args:
        arguments (`argparse.Namespace`): of `prune` or `search`.

    Raises:
        ConfigError: unknown names, values out of range, a file that is no config, or one with another recipe.
    """
    changes: dict[str, Any] = {}
    for option, (name, *inner) in {**FIELDS, **SEARCH_FIELDS}.items():
        value = getattr(arguments, option, None)
        if value is None:
            continue
        value = READERS[option](value) if option in READERS else tuple(value) if isinstance(value, list) else value
        if inner:
            changes.setdefault(name, {})[inner[0]] = value
        else:
            changes[name] = value
    if {"budgets", *SIZES} & set(changes):
        # One budget replaces another that a config file sets.
        changes = {"target_parameters": None, "target_bytes": None, "budgets": {}, **changes}
    asked = _config_file(Path(arguments.config)) if arguments.config else {}
    if arguments.recipe and {"version", "recipe_name"} & set(asked):
        # One that a run has written holds every field: a recipe beside it would have nothing left to say.
        raise ConfigError(
            f"`--recipe {arguments.recipe}` would change nothing: {arguments.config} says how by itself. Leave out one "
            "of them, or write a file with nothing but the fields that differ from the recipe."
        )
    if "version" in asked:
        return PruningConfig.from_dict(asked).with_changes(**changes)
    recipe = arguments.recipe or asked.pop("recipe_name", "default")
    return PruningConfig.recipe(recipe).with_changes(**asked).with_changes(**changes)


def _config_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config at {path}. Check the path.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("config", {}), dict):
        raise ConfigError(f"{path} should hold a JSON object with fields of PruningConfig.")
    return dict(data.get("config", data))
