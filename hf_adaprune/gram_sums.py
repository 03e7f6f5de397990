"""Gram matrices while windows are added: sums that do not depend on the order, in the memory of the result."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import StatisticsError
from .site import Site
from .sites import ModelSites
from .workers import Alone

__all__ = ["STRIP", "GramSums", "exact_products", "strip_elements", "summing_bytes", "summing_dtype"]

# Columns of a strip: wide enough for efficient products, narrow beside the triangle that strips cut off.
STRIP = 192
_SAFETENSORS = {torch.float32: "F32", torch.float64: "F64"}


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that came from bfloat16 use bfloat16 units: the products are exact either way.

    Products of other values are taken in full float32, whatever the caller (or an outer context) allows. To be opened
    around products only, never around a model: a rotary embedding needs all bits of its positions.
    """
    modules: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cuda)
    backends = [module.matmul for module in modules]
    before = [backend.fp32_precision for backend in backends]
    fast = dtype == torch.bfloat16
    backends[0].fp32_precision = "bf16" if fast else "ieee"
    backends[1].fp32_precision = "tf32" if fast else "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def summing_dtype(device: torch.device) -> torch.dtype:
    """Of sums on a device: float64, but float32 on Apple's GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


class GramSums:
    """Sums of `x xᵀ` over the tokens of a site, `[domains, columns, columns]`, for experts one more dimension of them.

    The product of a batch is float32. Added in float64, float32 numbers of which none is 2**29 times smaller than a
    partial sum lose nothing, and what others lose is far below what the one rounding at the end leaves: the sum is the
    same in whatever order, and by however many processes, batches are added. Only the strips on and below the diagonal
    exist: a float64 number takes as much as the two float32 numbers that it stands for, so this is no larger than the
    result but for the strips' corners ([`summing_bytes`]), and the products above the diagonal are saved.

    Args:
        site ([`Site`]): whose inputs are multiplied.
        domains (`int`): how many matrices there are.
        place (`str`): `model`, `cpu` or `disk`.
        folder (`str`, *optional*): of files on disk.

    Raises:
        StatisticsError: no room on the disk.
    """

    def __init__(self, site: Site, domains: int, place: str, folder: str | Path | None = None) -> None:
        self.site, self.place, self.folder = site, place, Path(folder or ".")
        self.lead = (domains, site.groups) if site.kind == "experts" else (domains,)
        self.columns = site.group_size if site.kind == "experts" else site.columns
        self.edges = [
            (start, min(self.columns, start + STRIP)) for start in range(0, self.columns, STRIP)
        ]  # fmt: skip
        self.device = site.reader.parameter.device if place == "model" else torch.device("cpu")
        # In float32 the order of additions is seen in the last bits. Such devices were not run.
        self.dtype = summing_dtype(self.device)
        many = int(np.prod(self.lead))
        shapes = [(*self.lead, stop - start, stop) for start, stop in self.edges]
        flat = self._allocate((sum(int(np.prod(shape)) for shape in shapes),), self.dtype, "sums")
        sizes = [many * (stop - start) * stop for start, stop in self.edges]
        self.strips = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def add(self, index: tuple[int, ...], rows: torch.Tensor, dtype: torch.dtype) -> None:
        """Add the products of a batch.

        Args:
            index (`tuple[int, ...]`): domain, and expert where there are several.
            rows (`torch.Tensor`): `[tokens, columns]`, float32.
            dtype (`torch.dtype`): that the rows came from; see [`exact_products`].
        """
        for (start, stop), strip in zip(self.edges, self.strips, strict=True):
            with exact_products(dtype):
                product = rows[:, start:stop].T @ rows[:, :stop]
            strip[index] += product.to(strip.device)

    def add_up(self, workers: Alone) -> None:
        """Sum over processes, on all."""
        for strip in self.strips:
            workers.add_up(strip)

    def whole(self) -> torch.Tensor:
        """The matrices, float32 and symmetric to the last bit; what they were summed in is given back."""
        result = self._allocate((*self.lead, self.columns, self.columns), torch.float32, "")
        for (start, stop), strip in zip(self.edges, self.strips, strict=True):
            result[..., start:stop, :stop] = strip
            # The corner of a strip holds both halves of its square, whose products may differ in the last bit.
            square = result[..., start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).mT)
            result[..., :start, start:stop] = strip[..., :start].mT
            del strip  # Windows does not remove a file that is mapped
        self.strips = []
        if self.place == "disk":
            self._path("sums").unlink()
        return result

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> torch.Tensor:
        if self.place != "disk":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return _on_disk(shape, dtype, self._path(what), self.site.name)

    def _path(self, what: str) -> Path:
        return self.folder / (f"{self.site.name}.{what}.safetensors" if what else f"{self.site.name}.safetensors")


def summing_bytes(sites: ModelSites, domains: int) -> int:
    """Bytes of the Gram matrices of a model at the end of a pass: sums of all sites, and the result of the largest.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        domains (`int`): matrices of a site, for experts of one of them.
    """
    sums = results = 0
    for site in sites:
        columns, many = (site.group_size, site.groups) if site.kind == "experts" else (site.columns, 1)
        sums += 8 * many * strip_elements(columns)
        results = max(results, 4 * many * columns**2)
    return domains * (sums + results)


def strip_elements(columns: int) -> int:
    """Elements of the strips of a matrix of so many columns."""
    stops = [min(columns, start + STRIP) for start in range(0, columns, STRIP)]
    return sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))


def _on_disk(shape: tuple[int, ...], dtype: torch.dtype, path: Path, name: str) -> torch.Tensor:
    """Zeros that are the body of a safetensors file, mapped into memory page by page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = int(np.prod(shape)) * dtype.itemsize
    header = json.dumps({"gram": {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [0, size]}})
    head = header.encode()
    head += b" " * (-len(head) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + size)
            if hasattr(os, "posix_fallocate"):  # a page without room would end the process when it is touched
                file.flush()
                os.posix_fallocate(file.fileno(), 0, 8 + len(head) + size)
    except OSError as error:
        raise StatisticsError(
            f"{name}: no room for its Gram matrices, {size / 2**20:,.0f} MiB in {path.parent} ({error.strerror}). Free "
            "some space, name another disk (TMPDIR, or --run-dir where a run is kept), or hold them in memory "
            "(gram_place='cpu')."
        ) from error
    numbers = np.float32 if dtype == torch.float32 else np.float64
    mapped = np.memmap(path, dtype=numbers, mode="r+", offset=8 + len(head), shape=shape)
    return torch.from_numpy(mapped)
