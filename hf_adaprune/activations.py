"""Activations on their way through the layers: in memory up to a budget, beyond it in files.

Files are read and written in the ordinary way. Pages of a mapped file would count as resident memory, which is what the
budget is for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from .errors import CheckpointError

__all__ = ["ActivationStore", "Activations"]


class ActivationStore:
    """The memory that all activations of a run share, and the folder for what does not fit.

    Args:
        budget (`int`, *optional*): bytes of memory; no limit where not given.
        folder (`str`, *optional*): an existing folder, owned by the caller. Needed with a budget.
    """

    def __init__(self, budget: int | None = None, folder: str | Path | None = None) -> None:
        self.budget = budget
        self.folder = None if folder is None else Path(folder)
        self.used = 0

    def claim(self, size: int) -> bool:
        """Take so many bytes of the budget; False where they are not left."""
        if self.budget is not None and self.used + size > self.budget:
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        """Give bytes back."""
        self.used -= size

    def place(self) -> Path:
        """A new folder for the files of one list of activations."""
        assert self.folder is not None
        return Path(tempfile.mkdtemp(prefix="activations_", dir=self.folder))


class Activations:
    """A list of tensors, one per window or batch, each in memory or in a file. Tensors come and go on the CPU.

    Args:
        store ([`ActivationStore`], *optional*): whose memory they take; memory without limit where not given.
    """

    def __init__(self, store: ActivationStore | None = None) -> None:
        self.store = store or ActivationStore()
        self._entries: list[torch.Tensor | Path] = []
        self._folder: Path | None = None

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the entries in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        """Read an entry."""
        entry = self._entries[index]
        return entry if isinstance(entry, torch.Tensor) else load(entry.read_bytes())["activations"]

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        """Replace an entry by a tensor of the same size."""
        entry = self._entries[index]
        if isinstance(entry, torch.Tensor):
            self._entries[index] = _own(tensor)
        else:
            _write(_own(tensor), entry)

    def append(self, tensor: torch.Tensor) -> None:
        """Add an entry; it stays where it finds room."""
        tensor = _own(tensor)
        if self.store.claim(tensor.nbytes):
            self._entries.append(tensor)
            return
        self._folder = self._folder or self.store.place()
        path = self._folder / f"{len(self._entries):06d}.safetensors"
        _write(tensor, path)
        self._entries.append(path)

    def close(self) -> None:
        """Give memory back and delete files."""
        for entry in self._entries:
            if isinstance(entry, torch.Tensor):
                self.store.release(entry.nbytes)
            else:
                entry.unlink(missing_ok=True)
        self._entries = []


def _write(tensor: torch.Tensor, path: Path) -> None:
    try:
        save_file({"activations": tensor}, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"activations could not be written beside the output ({error}). Free some space, raise `activation_bytes`, "
            "or give fewer calibration windows."
        ) from error


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own on the CPU: a view would keep what it looks at."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
