"""Memory that ran out: how it is recognised, the one knob of an evaluation that is lowered once, and what is given back."""

from __future__ import annotations

import ctypes
import re

from engines.errors import RunFailed

WIDTH = 8192
"""Padded tokens of an evaluation batch as long as memory has not run out; 256 images go with them."""
_SAID = re.compile(r"DefaultCPUAllocator: (can't|not enough) ?(allocate )?memory|out of memory|std::bad_alloc|could not (?:create|execute) a primitive|CUBLAS_STATUS_ALLOC_FAILED",
                   re.IGNORECASE)


def short(error: BaseException) -> str:
    """What an error says of memory that ran out, in one line; "" when it is another error.

    torch raises ``OutOfMemoryError`` on a GPU and a plain ``RuntimeError`` when the processor's allocator fails.
    """
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return first[:200] or "out of memory"
    found = _SAID.search(str(error)) if isinstance(error, RuntimeError) and not isinstance(error, RunFailed) else None
    return first[found.start():][:200] if found and found.start() < len(first) else (found[0] if found else "")


def give_back() -> None:
    """Let the C library return freed memory to the system; without this the resident set hardly ever falls."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):   # another C library
        pass


class Width:
    """Tokens of an evaluation batch: halved once for the whole run when memory runs out, and that is recorded."""

    def __init__(self, reporter, tokens: int = WIDTH, lowered: bool = False):
        self.reporter, self.tokens, self.lowered = reporter, tokens, lowered

    def lower(self, why: str, passed: bool = False) -> None:
        """Halve it, unless the reporter finds room after all; ``passed``: a limit was passed, nothing was refused.

        Raises:
            RunFailed: it has been halved before.
        """
        relax = getattr(self.reporter, "relax", None)
        if not passed and relax is not None and relax():
            return
        if self.lowered:
            raise RunFailed(f"out of memory in an evaluation ({why}), also with batches of {self.tokens:,} tokens",
                            "Lower training.length, choose a smaller model, or raise budget.memory_gb")
        self.lowered, before = True, self.tokens
        self.tokens //= 2
        self.reporter.event("memory", f"Out of memory ({why}): evaluation batch lowered from {before:,} to {self.tokens:,} tokens, "
                            "batch repeated", knob="evaluation_tokens", before=before, after=self.tokens)

    def watch(self) -> None:
        """Between two batches: a memory limit that was passed meanwhile is this evaluation's to answer."""
        if self.reporter.wants() == "memory":
            self.lower("the memory limit was passed", passed=True)
