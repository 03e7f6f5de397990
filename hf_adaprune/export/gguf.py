"""GGUF files for llama.cpp, written tensor by tensor and moved to their place when they are whole."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import AdaPruneError, CheckpointError, ConfigError, MissingDependencyError, UnsupportedModelError
from ..sites import uncompiled
from ..whole_files import scratch_folder
from .gguf_layout import Entry, Layout, layout_of
from .gguf_tokenizer import Vocabulary, read_vocabulary

__all__ = ["TYPES", "architecture_of", "export_gguf"]

logger = logging.getLogger(__name__)

# Names of ours, gguf's name for a tensor and for a file.
TYPES: Mapping[str, tuple[str, str]] = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_BLOCK = 32  # numbers that share a scale in Q8_0
_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / _BLOCK}
_F16_MAX = 65504.0
_SPARE = 16 * 2**20  # bytes beside the weights: vocabulary, merges and alignment


@dataclass(frozen=True)
class _Planned:
    """A tensor and the type that it gets."""

    entry: Entry
    kind: str

    @property
    def bytes(self) -> int:
        return round(self.entry.parameters * _BYTES[self.kind])


def export_gguf(
    model_or_folder: Any,
    file: str | os.PathLike[str],
    *,
    type: Literal["f16", "bf16", "f32", "q8_0"] = "f16",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, pruned or not, as a GGUF file that llama.cpp runs.

    Models whose layers are equally wide keep their architecture. Llama, Mistral and Qwen 2 models whose layers differ
    are written as `deci`, llama.cpp's architecture with sizes per layer. What llama.cpp would compute wrongly is
    refused.

    Args:
        model_or_folder (`PreTrainedModel` or `str`): a model, or the folder of a checkpoint.
        file (`str`): the file, usually `*.gguf`. It appears when it is complete; nothing is left after a failure.
        type (`str`, *optional*, defaults to `"f16"`): of the matrices: `f32`, `f16`, `bf16` or `q8_0`. Norms and biases
            are always float32. Matrices whose rows Q8_0 cannot hold (not a multiple of 32) become `f16`, with a
            warning.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): written into the file. May be left out with a folder that
            holds one.
        overwrite (`bool`, *optional*, defaults to `False`): replace a file that exists.

    Returns:
        `Path`: the file.

    Raises:
        CheckpointError: the file exists or cannot be written, or the disk is too small.
        ConfigError: no such type, or no tokenizer.
        MissingDependencyError: `gguf` is not installed.
        UnsupportedModelError: llama.cpp does not know such a model or tokenizer, a number does not fit the type, or
            parts of the model are compiled (`torch.compile` of the whole may be).

    Example:

    ```python
    from hf_adaprune.export import export_gguf

    export_gguf("smollm2-pruned", "smollm2-pruned.gguf", type="q8_0")
    ```
    """
    target = Path(file)
    if type not in TYPES:
        raise ConfigError(f"`type` should be one of {', '.join(TYPES)}. Found {type!r}.")
    _gguf()
    _check_target(target, overwrite)
    model, tokenizer = _loaded(model_or_folder, tokenizer)
    layout = layout_of(model)
    vocabulary = read_vocabulary(tokenizer, layout.vocabulary, model)
    plan = [_Planned(entry, _kind(entry, TYPES[type][0])) for entry in layout.tensors]
    odd = sum(planned.kind == "F16" for planned in plan) if type == "q8_0" else 0
    if odd:
        logger.warning(
            "%d of %d matrices have rows that are no multiple of %d, which Q8_0 cannot hold, and are written as F16. "
            "Prune with channel_multiple=%d to avoid it.",
            odd, sum(not planned.entry.exact for planned in plan), _BLOCK, _BLOCK,
        )  # fmt: skip
    needed = sum(planned.bytes for planned in plan)
    name = getattr(model, "name_or_path", "") or target.stem
    _check_space(target, needed)
    _write_whole(target, overwrite, lambda place: _write(place, layout, vocabulary, plan, type, Path(name).name))
    return target


def architecture_of(file: str | os.PathLike[str]) -> str:
    """The architecture that a GGUF file names."""
    return str(_gguf().GGUFReader(file).fields["general.architecture"].contents())


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "GGUF files need the library `gguf`, which the extra of that name brings: pip install hf_adaprune[gguf]."
        ) from error
    return gguf


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir() or (target.exists() and not overwrite):
        raise CheckpointError(
            f"{target} {'is a folder' if target.is_dir() else 'exists'}. Name another file"
            + ("." if target.is_dir() else ", or allow it to be replaced (overwrite=True, `--overwrite`).")
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {target.absolute().parent}. Make it first, or name another file.")


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.absolute().parent).free
    if free < needed + _SPARE:
        raise CheckpointError(
            f"{target.absolute().parent} has {free / 2**20:,.0f} MiB free, the file needs about "
            f"{(needed + _SPARE) / 2**20:,.0f} MiB. Free some space or name another disk."
        )


def _loaded(model_or_folder: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model, and the tokenizer that is asked for."""
    if not isinstance(model_or_folder, (str, os.PathLike)):
        if tokenizer is None:
            raise ConfigError("`tokenizer` is missing: llama.cpp runs no model without one. Pass the model's own.")
        return uncompiled(model_or_folder), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..loading import install

    install()
    folder = os.fspath(model_or_folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except AdaPruneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UnsupportedModelError(f"the model of {folder} could not be loaded: {error}") from error
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UnsupportedModelError(
                f"the tokenizer of {folder} could not be loaded, and llama.cpp needs one: {error} Pass tokenizer=."
            ) from error
    return model, tokenizer


def _kind(entry: Entry, wanted: str) -> str:
    if entry.exact:
        return "F32"
    return "F16" if wanted == "Q8_0" and entry.shape[-1] % _BLOCK else wanted


def _write_whole(target: Path, overwrite: bool, write: Any) -> None:
    """Write beside the target and move there at the end."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(target.absolute().parent, f".{target.name}.partial"))
        except OSError as error:
            raise CheckpointError(
                f"{target.absolute().parent} is not writable ({error.strerror}). Name another."
            ) from error
        try:
            partial = folder / target.name
            write(partial)
            partial.chmod(0o644)
            _check_target(target, overwrite)  # somebody else may have written meanwhile
            partial.replace(target)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error}. Nothing was left behind.") from error


def _write(place: Path, layout: Layout, vocabulary: Vocabulary, plan: list[_Planned], type: str, name: str) -> None:
    import numpy as np

    gguf = _gguf()
    writer = gguf.GGUFWriter(place, layout.arch)
    try:
        writer.add_name(name)
        writer.add_file_type(int(gguf.LlamaFileType[TYPES[type][1]]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in layout.keys.items():
            _add(writer, f"{layout.arch}.{key}", value)
        _add_vocabulary(writer, vocabulary)
        for planned in plan:
            kind = gguf.GGMLQuantizationType[planned.kind]
            writer.add_tensor_info(
                planned.entry.name, planned.entry.shape, np.dtype(np.float32), planned.bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned in plan:
            writer.write_tensor_data(_encoded(planned, gguf))
    finally:
        writer.close()


def _encoded(planned: _Planned, gguf: Any) -> Any:
    """The bytes of a tensor, as numpy's array."""
    value = planned.entry.read().to("cpu", torch.float32)
    largest = float(value.abs().max()) if value.numel() else 0.0
    limit = {"F16": _F16_MAX, "Q8_0": 127 * _F16_MAX}.get(planned.kind, torch.finfo(torch.bfloat16).max)
    if not largest <= limit:  # not a number is not, either
        raise UnsupportedModelError(
            f"{planned.entry.name} holds {largest:g}, and {planned.kind} ends at {limit:g}. "
            + ("Repair the model first." if largest != largest else "Export as f32 or bf16.")
        )
    kind = gguf.GGMLQuantizationType[planned.kind]
    return gguf.quants.quantize(value.contiguous().numpy(), kind)


def _add(writer: Any, key: str, value: int | float | str | list[int]) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
