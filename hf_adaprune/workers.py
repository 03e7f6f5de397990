"""Who does the work of a search: one process here; several, with the same methods, in `parallel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["Alone"]

T = TypeVar("T")


class Alone:
    """One process. Several are [`hf_adaprune.parallel.Processes`]; all of them have to make the same calls in order.

    Attributes:
        count (`int`): how many processes there are.
        rank (`int`): which one this is, from 0 on.
    """

    count = 1
    rank = 0

    def share(self, value: T) -> T:
        """The first process's value, on all."""
        return value

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, in their order, on all."""
        return values

    def lead(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all; what it raises is raised on all."""
        return make()

    def each(self, make: Callable[[], T]) -> T:
        """What this process makes; where one of them raises, all do, so that none waits for another forever."""
        return make()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over the processes, in place, on all."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, count={self.count})"
