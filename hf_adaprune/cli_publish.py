"""Commands that hand a pruned checkpoint on: to llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_export_arguments", "run_export"]


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
