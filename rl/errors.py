"""Exceptions that a user reads as one message: for mistakes that the user can fix, and for a run that had to stop."""

from __future__ import annotations


class _Explained(Exception):
    """An error with its reason and its remedy.

    Args:
        problem: what is wrong, with the offending value.
        reason: why that cannot work.
        fix: what to change.
    """

    def __init__(self, problem: str, *, reason: str = "", fix: str = "") -> None:
        self.problem, self.reason, self.fix = problem, reason, fix
        super().__init__(
            "\n".join(part for part in (problem, reason and f"Why: {reason}", fix and f"Fix: {fix}") if part)
        )

    def short(self) -> str:
        """The problem in one line, for lists and tables."""
        line = self.problem.partition("\n")[0]
        return line if len(line) <= 200 else line[:200] + " …"


class UserError(_Explained):
    """A mistake in a config, a data set, a reward or a command line. The CLI prints it and exits with code 2."""


class RunStopped(_Explained):
    """A run that had to stop through no fault of its user's, with a checkpoint. The CLI exits with code 1."""


class OutOfMemory(UserError):
    """Something needs more memory than there is, with everything on that saves some.

    Args:
        together: all ranks raise it at once, so that they can still do something in common, as saving is.
    """

    def __init__(self, problem: str, *, reason: str = "", fix: str = "", together: bool = False) -> None:
        super().__init__(problem, reason=reason, fix=fix)
        self.together = together


# Allocators and libraries that do not raise torch's own error for it.
_NO_MEMORY = (
    "can't allocate memory",
    "_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the host had no memory left, directly or as the cause of `error`."""
    import torch

    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def short(value: object) -> str:
    """A value as it appears in a message: its repr, cut."""
    text = repr(value)
    return text if len(text) <= 120 else text[:100] + " …"


def cause(error: BaseException) -> str:
    """A library's error in a message of ours."""
    return f"{type(error).__name__}: {error}"
