"""Where the trials of a sweep run: this machine's queue, or the nodes of a Ray cluster."""

from __future__ import annotations

from typing import Protocol


class Executor(Protocol):
    """What the conductor asks of a place to run trials."""

    def open(self) -> None:
        """Connect; ``InputError`` when that is not possible."""

    def slots(self) -> int:
        """How many trials may run at once now."""

    def begin(self, spec, resolved, forecast: dict, parent: int | None) -> tuple[int, str | None]:
        """Start a run; its id and the node that has it (None: this machine)."""

    def adopt(self, run_id: int, node: str | None) -> None:
        """A run that an earlier conductor began goes on under this one."""

    def poll(self) -> None:
        """Bring what is new of the runs into the database; quick."""

    def again(self, run_id: int) -> bool:
        """Whether a lost run can go on as itself (it is then queued again); False: it needs a new run."""

    def close(self) -> None:
        """Let go; runs on this machine go on."""


def executor(home, sweep: int, on: str | None) -> Executor:
    """The executor of a plan's ``on``."""
    if on is None:
        from workbench.sweeps.executors.local import Local
        return Local(home)
    from workbench.sweeps.executors.ray import RayCluster
    return RayCluster(home, sweep, on)
