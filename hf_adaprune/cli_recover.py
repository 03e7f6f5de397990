"""The command `recover`: a pruned checkpoint is trained by its dense model, and saved with what it was."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cli_model import Loader
from .cli_run import add_run_arguments, begin_afresh, check_run_place, kept_beside
from .errors import ConfigError, UnsupportedModelError
from .recovery_config import DEFAULT_TOKENS, LoraSettings, RecoveryConfig

__all__ = ["add_recover_arguments", "recovery_config", "run_recover"]

# Options, and the fields of RecoveryConfig that they set.
FIELDS = (
    "tokens", "minutes", "learning_rate", "temperature", "alpha", "hidden_weight", "batch_size",
    "gradient_accumulation", "sequence_length", "top_k", "precision", "seed",
)  # fmt: skip


def add_recover_arguments(recover: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add the command's options.

    Args:
        recover (`argparse.ArgumentParser`): of the command.
        count (`Callable`): reads a number such as 10M.
    """
    default = RecoveryConfig()
    source: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "SOURCE", "default": []}
    add = recover.add_argument
    add("--teacher", metavar="DENSE", required=True, help="the dense model: folder or id on the Hub")
    add("--output", metavar="DIR", required=True, help="folder of the recovered model; new or empty")
    add("--calibration", **source, help="texts to train on: files, data sets (name:config:split) or python (alone)")
    add("--selection", **source, help="texts that training must not see")
    add("--report", **source, help="texts to report perplexity on, before and after; never part of the training text")
    length = recover.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="M", help="train for so long")
    length.add_argument("--tokens", type=count, metavar="N", help=f"train on so many tokens ({DEFAULT_TOKENS:,})")
    add("--lora", type=int, nargs="?", const=LoraSettings().rank, metavar="RANK", help="train adapters, and merge them")
    add("--learning-rate", type=float, metavar="R", help=f"its highest value ({default.learning_rate:g})")
    add("--temperature", type=float, metavar="T", help=f"of teacher and student ({default.temperature:g})")
    add("--alpha", type=float, metavar="A", help=f"share of the divergence in the loss ({default.alpha:g})")
    add(
        "--hidden-weight",
        type=float,
        metavar="W",
        help=f"weight of hidden states' distance ({default.hidden_weight:g})",
    )
    add("--batch-size", type=int, metavar="N", help=f"windows per forward ({default.batch_size})")
    add("--gradient-accumulation", type=int, metavar="N", help=f"forwards per step ({default.gradient_accumulation})")
    add("--sequence-length", type=int, metavar="N", help=f"tokens per window ({default.sequence_length})")
    add("--top-k", type=int, metavar="K", help="cache the teacher's K likeliest tokens before training")
    add("--precision", help="bf16, fp32 or auto")
    add("--frozen-embeddings", action="store_true", help="leave embeddings and head as they are")
    add("--seed", type=int, metavar="N", help="of text and order")
    add_run_arguments(recover)


def recovery_config(arguments: argparse.Namespace) -> RecoveryConfig:
    """The config of a command line.

    Raises:
        ConfigError: values out of range.
    """
    changes = {name: getattr(arguments, name) for name in FIELDS if getattr(arguments, name) is not None}
    lora = None if arguments.lora is None else LoraSettings(arguments.lora)
    return RecoveryConfig(**changes, lora=lora, train_embeddings=not arguments.frozen_embeddings)


def run_recover(
    arguments: argparse.Namespace,
    words: Sequence[str],
    answer: Callable[[argparse.Namespace, Mapping[str, Any], str], None],
    say: Callable[[str], Any],
) -> None:
    """Check everything, train, save and tell.

    Args:
        arguments (`argparse.Namespace`): of the command line.
        words (sequence of `str`): the command line.
        answer (`Callable`): writes the result.
        say (`Callable`): writes a line for people.

    Raises:
        AdaPruneError: before any training, for what cannot work.
    """
    config = recovery_config(arguments)
    from .saving import check_output

    output = check_output(arguments.output)
    check_run_place(arguments)
    begin_afresh(arguments)
    loader = Loader.of(arguments)
    _check_pair(loader, arguments, config)
    from .recovery import check_student, recover
    from .reporting import text_table

    check_student(None, config)
    sources = arguments.calibration or ["python"]
    with kept_beside(arguments, words, output, say, True) as run_dir:
        model, tokenizer = loader.model(), loader.tokenizer()
        result = recover(
            model, tokenizer, arguments.teacher, config, sources=sources, selection=arguments.selection,
            report=arguments.report, run_dir=run_dir,
        )  # fmt: skip
        result.save_pretrained(output)
    lines = [
        (f"held out, {name}", *(f"{result.held_out[when][name].value:.4f}" for when in ("before", "after")))
        for name in ("kl", "loss")
        if result.held_out
    ]
    lines += [
        (f"{name}, perplexity", f"{found['before'].value:.3f}", f"{found['recovered'].value:.3f}")
        for name, found in result.evaluation.items()
    ]
    speed = result.tokens / max(result.minutes * 60, 1e-9)
    parts = [
        f"{loader.name} -> {output}: {result.tokens:,} tokens in {result.minutes:.1f} minutes ({speed:,.0f} tokens/s)",
        text_table(("text, measure", "before", "after"), lines) if lines else "",
    ]
    data = {
        **result.to_dict()["recovery"],
        "output": str(output),
        "evaluation": result.to_dict()["evaluation"],
    }
    answer(arguments, data, "\n\n".join(part for part in parts if part))


def _check_pair(loader: Loader, arguments: argparse.Namespace, config: RecoveryConfig) -> None:
    """Look at both configs, without weights."""
    from transformers import AutoConfig

    sizes = {}
    for name in (loader.name, arguments.teacher):
        options = loader.options if name == loader.name else {}
        try:
            found = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError) as error:
            raise UnsupportedModelError(f"the config of {name} could not be loaded: {error}") from error
        sizes[name] = getattr(found.get_text_config(), "vocab_size", None)
        if name == loader.name and getattr(found, "quantization_config", None) and config.lora is None:
            raise UnsupportedModelError(
                f"{name} holds quantised weights, which cannot be trained. Add --lora to train adapters beside them."
            )
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"teacher and student should have one vocabulary. Found {sizes[arguments.teacher]} tokens "
            f"({arguments.teacher}) and {sizes[loader.name]} ({loader.name}). Name the model that was pruned."
        )
