"""Where the time goes until a run's first step."""

from __future__ import annotations

import time


class StartTime:
    """Seconds since the process began, each in exactly one part.

    Args:
        began: seconds since the epoch; None: when this process began.
    """

    def __init__(self, began: float | None = None) -> None:
        if began is None:
            import psutil

            began = psutil.Process().create_time()
        self._last = began
        self.parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """All since the part before belongs to this one."""
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + max(now - self._last, 0.0)
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"ready for the first step after {sum(self.parts.values()):.1f} s: {parts}"
