"""Commands that hand a checkpoint on: to the Hub, and to llama.cpp.

As light as the rest of the command line: torch and transformers are imported by what needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_export_arguments", "add_push_arguments", "push", "run_export"]


def add_push_arguments(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command `push`; its `publish` returns what is to be printed.

    Args:
        commands (`argparse._SubParsersAction`): of the command line.
        common (`argparse.ArgumentParser`): arguments of every command.
    """
    parser = commands.add_parser("push", parents=[common], help="publish a pruned model on the Hub")
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of the pruned model")
    add("repo_id", metavar="REPO_ID", help="owner/name; made where it is missing")
    add("--private", action="store_true", default=None, help="make the repository private")
    add("--create-pr", action="store_true", help="open a pull request")
    add("--revision", metavar="BRANCH", help="another branch than main")
    add("--license", metavar="ID", help="for the card, such as apache-2.0 (default: the base model's, if known)")
    add("--base-model", metavar="ID", help="of the dense model on the Hub (default: what the run loaded, if known)")
    add("--journal", metavar="FILE", help="of the search (default: DIR.journal.jsonl, if there)")
    add("--message", metavar="TEXT", help="of the commit")
    add("--remote-code", action="store_true", help="add a file that loads the model without this package")
    parser.set_defaults(publish=push)


def push(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Publish a folder. The token comes from `hf auth login` or HF_TOKEN, never from the command line.

    Args:
        arguments (`argparse.Namespace`): of `push`.

    Returns:
        `tuple[dict[str, Any], str]`: the answer as JSON types and as text.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from .hub import push_to_hub

    bars = not are_progress_bars_disabled()
    if arguments.quiet:
        disable_progress_bars()
    try:
        commit = push_to_hub(
            arguments.folder,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.message,
            license=arguments.license,
            base_model=arguments.base_model,
            journal=arguments.journal,
            remote_code=arguments.remote_code,
        )
    finally:
        if arguments.quiet and bars:
            enable_progress_bars()
    where = commit.pr_url or commit.commit_url
    return {"commit": commit.oid, "url": str(where)}, f"{arguments.folder} -> {where}"


def add_export_arguments(subparsers: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `export gguf` to a command line.

    Args:
        subparsers: of the command line.
        common (`argparse.ArgumentParser`): the options of every command.

    Returns:
        `argparse.ArgumentParser`: of `export gguf`.
    """
    export = subparsers.add_parser("export", help="write a checkpoint in the format of another runtime")
    formats = export.add_subparsers(metavar="FORMAT", required=True)
    gguf = formats.add_parser("gguf", parents=[common], help="a file for llama.cpp")
    gguf.add_argument("folder", metavar="DIR", help="folder of the checkpoint, pruned or not, with its tokenizer")
    gguf.add_argument("file", metavar="FILE", help="the file to write, usually *.gguf")
    kinds = ("f16", "bf16", "f32", "q8_0")
    gguf.add_argument("--type", choices=kinds, default="f16", help="of the matrices (f16); norms stay f32")
    gguf.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return gguf


def run_export(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the file.

    Returns:
        `tuple[dict, str]`: what was done, as JSON types and as a line.
    """
    from .export import export_gguf
    from .export.gguf import architecture_of

    file = export_gguf(arguments.folder, Path(arguments.file), type=arguments.type, overwrite=arguments.overwrite)
    data = {
        "output": str(file), "type": arguments.type, "bytes": file.stat().st_size, "architecture": architecture_of(file)
    }  # fmt: skip
    text = f"{arguments.folder} -> {file}: {data['architecture']}, {arguments.type}, {data['bytes'] / 1e6:,.1f} MB"
    return data, text
