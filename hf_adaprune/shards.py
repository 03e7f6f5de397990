"""Checkpoints written as their tensors come, and compared with what was written without holding them."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import CheckpointError
from .loading import install
from .offloading import layer_weights, load_offloaded, other_weights
from .sites import ModelSites, find_sites

__all__ = ["ShardWriter", "check_shards", "digests_of"]

_NAME, _INDEX = "model", "model.safetensors.index.json"


class ShardWriter:
    """Safetensors shards and their index, under the names that transformers gives them.

    Tensors wait in memory until a shard is full; a layer that is larger than a shard gets shards of its own.

    Args:
        folder (`Path`): an existing folder.
        limit (`int`): bytes of a shard.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, torch.Tensor] = {}
        self._shards: list[dict[str, int]] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors by name."""
        for name, tensor in tensors.items():
            if self._waiting and sum(t.nbytes for t in self._waiting.values()) + tensor.nbytes > self.limit:
                self.flush()
            self._waiting[name] = tensor.detach().cpu().contiguous()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            save_file(self._waiting, self._path(len(self._shards)), metadata={"format": "pt"})
            self._shards.append({name: tensor.nbytes for name, tensor in self._waiting.items()})
            self._waiting = {}

    def start_again(self) -> None:
        """Delete what was written."""
        for number in range(len(self._shards)):
            self._path(number).unlink()
        self._waiting, self._shards = {}, []

    def close(self, parameters: int) -> None:
        """Give the shards their names, and write the index where there are several.

        Args:
            parameters (`int`): of the model, for the index.
        """
        self.flush()
        count = len(self._shards)
        places: dict[str, str] = {}
        for number, tensors in enumerate(self._shards):
            name = f"{_NAME}.safetensors" if count == 1 else f"{_NAME}-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / name)
            places.update(dict.fromkeys(tensors, name))
        if count > 1:
            size = sum(sum(tensors.values()) for tensors in self._shards)
            index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / _INDEX).write_text(text, encoding="utf-8")

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A checksum of every tensor's bytes, by name."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        found[name] = zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
    return found


@torch.no_grad()
def check_shards(
    folder: str | os.PathLike[str], sites: ModelSites, digests: Mapping[str, int], names: Iterable[str] = ()
) -> None:
    """Load a checkpoint as `AutoModelForCausalLM` does, its layers left on disk, and compare every tensor.

    Args:
        folder (`str`): the checkpoint.
        sites ([`ModelSites`]): the pruned model without weights.
        digests (`dict[str, int]`): by the parameter's name, what [`digests_of`] said of what was written.
        names (iterable of `str`, *optional*): further names that may be loaded: tied ones.

    Raises:
        CheckpointError: what differs.
    """
    install()
    with tempfile.TemporaryDirectory(prefix=".reload-", dir=folder) as place:
        try:
            loaded: Any = load_offloaded(folder, sites, place, dtype=sites.model.dtype, output_loading_info=True)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint does not reload: {error}. Please report this model's architecture."
            ) from error
        again, info = loaded
        wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
        if wrong:
            raise CheckpointError(f"the checkpoint does not reload to the same model: {wrong}.")
        found = find_sites(again, sites.architecture)
        seen: set[str] = set()

        def compare(tensors: Mapping[str, torch.Tensor]) -> None:
            for name, digest in digests_of(tensors).items():
                seen.add(name)
                if digests.get(name, digest if name in names else None) != digest:
                    raise CheckpointError(f"the checkpoint does not reload to the same model: {name} differs.")

        prefix = f"{sites.architecture.layers}."
        with other_weights(found):
            compare({name: value for name, value in again.state_dict().items() if not name.startswith(prefix)})
        for number in range(len(found.layers)):
            with layer_weights(found, number):
                compare(found.layers[number].state_dict(prefix=f"{prefix}{number}."))
        if set(digests) - seen:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(set(digests) - seen))}.")
