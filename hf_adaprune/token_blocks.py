"""Windows of tokens, each of one domain: a value with a digest, which splits into parts that do not overlap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import CalibrationError

__all__ = ["TokenBlocks"]


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Windows of tokens, each of one domain.

    Args:
        input_ids (`torch.Tensor` of shape `[windows, length]`): token ids, int64.
        attention_mask (`torch.Tensor` of shape `[windows, length]`): bool; False is padding, on the right.
        domain (`torch.Tensor` of shape `[windows]`): int64 index into `domains`.
        domains (`tuple[str, ...]`): the domains' names.

    Attributes:
        digest (`str`): sha256 over ids, mask and domains; ids under padding do not count.

    Raises:
        CalibrationError: shapes do not fit together, or the padding is not on the right.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Check shapes and padding, and compute the digest."""
        ids, mask, domain = self.input_ids.long().cpu(), self.attention_mask.bool().cpu(), self.domain.long().cpu()
        if ids.dim() != 2 or mask.shape != ids.shape or domain.shape != ids.shape[:1]:
            raise CalibrationError(
                "token blocks need ids and mask [windows, length] and domain [windows]. "
                f"Found {list(ids.shape)}, {list(mask.shape)} and {list(domain.shape)}."
            )
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise CalibrationError("padding should be on the right of a window. Found tokens after padding.")
        if len(domain) and not 0 <= int(domain.min()) <= int(domain.max()) < len(self.domains):
            raise CalibrationError(f"`domain` should index into the {len(self.domains)} `domains`.")
        digest = hashlib.sha256(json.dumps([list(ids.shape), list(self.domains)]).encode())
        for tensor in (ids * mask, mask, domain):
            digest.update(tensor.contiguous().numpy().tobytes())
        values = {"input_ids": ids, "attention_mask": mask, "domain": domain, "digest": digest.hexdigest()}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of tokens that are no padding."""
        return int(self.attention_mask.sum())

    def facts(self) -> dict[str, Any]:
        """What a record says of them, as JSON types; `begins_with` is the token that all of several windows begin with.

        It is BOS where the tokenizer begins a text with that, and mostly `None` where it does not.
        """
        starts = self.input_ids[:, :1].flatten()
        alike = len(starts) > 1 and bool((starts == starts[0]).all())
        return {
            "tokens": self.tokens,
            "windows": len(self),
            "sequence_length": self.input_ids.shape[1],
            "begins_with": int(starts[0]) if alike else None,
            "domains": list(self.domains),
            "sha256": self.digest,
        }

    def select(self, indices: Sequence[int] | torch.Tensor | slice) -> TokenBlocks:
        """The windows at `indices`, in that order; the tuple of domains stays whole."""
        index = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.long)
        return TokenBlocks(self.input_ids[index], self.attention_mask[index], self.domain[index], self.domains)

    def split(self, fraction: float, seed: int) -> tuple[TokenBlocks, TokenBlocks]:
        """Two disjoint parts (kept, held out), both in the order of this one.

        A domain keeps at least one window as long as others can give what is held out.

        Args:
            fraction (`float`): share of windows to hold out, in [0, 1), of every domain to within one window. A
                positive fraction holds out at least one window where there are two.
            seed (`int`): of the choice within each domain.

        Raises:
            CalibrationError: the fraction is out of range.
        """
        if not 0.0 <= fraction < 1.0:
            raise CalibrationError(f"`fraction` should be in [0, 1): the share to hold out. Found {fraction!r}.")
        total = min(max(int(fraction * len(self) + 0.5), int(fraction > 0)), max(len(self) - 1, 0))
        generator = torch.Generator().manual_seed(seed)
        held = torch.zeros(len(self), dtype=torch.bool)
        sizes = torch.bincount(self.domain, minlength=len(self.domains)).tolist()
        for index, count in enumerate(_held_out(sizes, total)):
            members = (self.domain == index).nonzero().flatten()
            held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
        return self.select((~held).nonzero().flatten()), self.select(held.nonzero().flatten())

    def batches(self, size: int) -> Iterator[TokenBlocks]:
        """Yield the windows in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))


def _held_out(sizes: list[int], total: int) -> list[int]:
    """How many windows each domain gives where `total` are held out: its share, to within one."""
    counts: list[int] = []
    windows, seen = sum(sizes), 0
    for size in sizes:
        seen += size
        # Rounding the running total, not each domain, makes the parts add up to `total`.
        counts.append((2 * seen * total + windows) // (2 * windows) - sum(counts) if windows else 0)
    for index, size in enumerate(sizes):
        if not 0 < size == counts[index]:
            continue
        # An empty domain could not be weighted, so the one furthest behind its share gives a window instead.
        behind = [size * total - windows * count for size, count in zip(sizes, counts, strict=True)]
        able = [other for other, own in enumerate(sizes) if own - counts[other] > 1 and behind[other] >= 0]
        if able:
            counts[index] -= 1
            counts[max(able, key=lambda other: behind[other])] += 1
    return counts
