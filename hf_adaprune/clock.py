"""Seconds of the stops of a run."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Counts the seconds of every stop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stop(self, name: str) -> None:
        """Book the time since the last stop under a name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now
