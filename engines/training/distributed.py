"""Several processes on one run: who they are, what they tell one another, and what happens when one of them ends.

``torchrun`` starts the processes and accelerate's ``PartialState`` joins them (NCCL between GPUs, gloo between CPU processes).
Every process goes through the same pipeline on the same settings and holds the whole model; rank 0 decides whatever depends on a
clock or on the person, writes the files and talks to the database. Alone, every function here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import shutil
import time
from pathlib import Path

from engines.errors import FettleError, InputError, RunFailed, StopRequested
from engines.lazy import torch

CREW = "WORKBENCH_CREW"
"""Set in the environment of processes that were started for one run: their number."""
PATIENCE = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""
BUCKET = 25_000_000
"""Bytes of gradients that travel at a time."""
_GROUP: Group | None = None
_HELD: Group | None = None
"""The group of this process once it has been joined; it is left when the process ends."""


class Group:
    """The processes of one run. ``rank`` counts from 0, ``size`` is their number."""

    def __init__(self, device: str):
        from accelerate import PartialState
        dist = torch.distributed
        if device == "cpu" and not (dist.is_available() and dist.is_gloo_available()):
            raise InputError("training.processes", crew(), "this build of PyTorch has no gloo, through which CPU processes talk",
                             "Set training.processes to 1")
        threads = torch.get_num_threads()
        self.state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        torch.set_num_threads(threads)  # accelerate sets its own
        self.rank, self.size = self.state.process_index, self.state.num_processes
        # What the processes say to one another is small and lies in main memory, also where gradients travel between GPUs.
        self.control = None if self.state.backend == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)

    # -- small things --------------------------------------------------------------------------------------
    def same(self, value):
        """Rank 0's value of something that JSON can hold; the others' is not looked at."""
        dist = torch.distributed
        body = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(body)])
        dist.broadcast(size, 0, group=self.control)
        held = torch.frombuffer(bytearray(body or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(held, 0, group=self.control)
        return json.loads(bytes(held.numpy()))

    def figures(self, values) -> list[float]:
        """Rank 0's figures (float64)."""
        held = torch.tensor(list(values), dtype=torch.float64)
        torch.distributed.broadcast(held, 0, group=self.control)
        return held.tolist()

    def most(self, value: float) -> float:
        """The largest of all processes' values."""
        held = torch.tensor([float(value)], dtype=torch.float64)
        torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX, group=self.control)
        return float(held)

    def total(self, array):
        """Sum over the processes of a numpy array, made in place."""
        held = torch.from_numpy(array)
        torch.distributed.all_reduce(held, group=self.control)
        return array

    def meet(self) -> None:
        """Wait until every process is here."""
        torch.distributed.barrier(group=self.control)

    # -- tensors -------------------------------------------------------------------------------------------
    def add(self, tensors) -> None:
        """Replace each tensor by its sum over the processes; like types travel together, about 25 MB at a time."""
        kinds: dict = {}
        for t in tensors:
            kinds.setdefault((t.dtype, t.device), []).append(t)
        for members in kinds.values():
            part, held = [], 0
            for i, t in enumerate(members):
                part.append(t)
                held += t.numel() * t.element_size()
                if held >= BUCKET or i + 1 == len(members):
                    self._add(part)
                    part, held = [], 0

    @staticmethod
    def _add(part) -> None:
        if len(part) == 1 and part[0].is_contiguous():
            torch.distributed.all_reduce(part[0])
            return
        flat = torch.cat([t.reshape(-1) for t in part])
        torch.distributed.all_reduce(flat)
        for t, piece in zip(part, flat.split([t.numel() for t in part])):
            t.copy_(piece.view_as(t))

    def align(self, model, masks: dict) -> None:
        """Give every process rank 0's parameters, buffers and masks."""
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers(), *(masks[k] for k in sorted(masks))):
                if t.numel():
                    plain = t.data.contiguous()
                    # As bytes, whatever its type: gloo does not know them all.
                    torch.distributed.broadcast(plain.reshape(-1).view(torch.uint8), 0)
                    if plain.data_ptr() != t.data.data_ptr():
                        t.data.copy_(plain)

    def drifted(self, parameters) -> bool:
        """True when the processes no longer hold the same weights: something was decided on one process's own figures."""
        seen = torch.stack([p.detach().double().sum() for p in parameters]).cpu()
        first = seen.clone()
        torch.distributed.broadcast(first, 0, group=self.control)
        return self.most(0.0 if torch.equal(seen, first) else 1.0) > 0


class Silent:
    """The reporter of a process that is not rank 0."""

    def points(self, step, values):
        pass

    def event(self, kind, text, **data):
        pass

    def log(self, line):
        pass

    def phase(self, name):
        pass

    def progress(self, share, left):
        pass

    def layers(self, step, figures):
        pass

    def evaluation(self, name, stage, result):
        pass

    def wants(self):
        return None


# -- the group of this process -----------------------------------------------------------------------------------------
def crew() -> int:
    """How many processes were started for this run; 1: this one alone."""
    return int(os.environ.get(CREW) or 1)


def rank() -> int:
    """This process's place among them."""
    return int(os.environ.get("RANK") or 0) if crew() > 1 else 0


def current() -> Group | None:
    """The group while the pipeline runs in several processes, else None."""
    return _GROUP


def met() -> bool:
    """True once the processes of this run have found one another."""
    return _HELD is not None


def leads() -> bool:
    """True in the process that writes: rank 0, or the only one."""
    return _GROUP is None or _GROUP.rank == 0


def own(folder: Path) -> Path:
    """Where this process may write what only it reads again: the run's folder for rank 0, a folder inside it for each other."""
    return folder if leads() else folder / f"process-{_GROUP.rank}"


def by_lead(act):
    """``act()``'s JSON-able result, computed by rank 0 and handed to all, who wait for it."""
    if _GROUP is None:
        return act()
    return _GROUP.same(act() if _GROUP.rank == 0 else None)


WISHES = (None, "stop", "pause", "memory", "kill")


def wish(reporter) -> str | None:
    """What the person or the memory limit asks of the run, as rank 0 hears it, in all processes at the same step."""
    if _GROUP is None:
        return reporter.wants()
    want = reporter.wants() if _GROUP.rank == 0 else None
    return WISHES[int(_GROUP.figures([WISHES.index(want)])[0])]


def align(model, masks: dict) -> None:
    """Give every process rank 0's weights and masks."""
    if _GROUP is not None:
        _GROUP.align(model, masks)


@contextlib.contextmanager
def joined(processes: int, device: str, folder: Path):
    """Inside, this process belongs to the run's group (None when it is alone).

    Raises:
        InputError: ``processes`` are asked for, and another number was started.
        RunFailed: another process of the run has ended; its cause, where it left one.
    """
    global _GROUP, _HELD
    if processes != crew():
        raise InputError("training.processes", processes,
                         f"{crew()} process{'es were' if crew() > 1 else ' was'} started for this run",
                         "Start it from the workbench, or with torchrun and as many processes")
    if processes == 1:
        yield None
        return
    note = folder / f"process-{rank()}.json"
    try:
        if _HELD is None:
            _HELD = Group(device)
            atexit.register(_part)
        group = _GROUP = _HELD
        if group.rank == 0:
            for old in folder.glob("process-*.json"):
                old.unlink(missing_ok=True)
        group.meet()
        yield group
    except StopRequested:
        raise
    except BaseException as e:
        if rank() > 0:
            _leave(note, e)
        elif _broken(e):
            raise _blame(folder, processes) from e
        raise
    finally:
        _GROUP = None
        if rank() > 0:
            shutil.rmtree(folder / f"process-{rank()}", ignore_errors=True)


def _part() -> None:
    if torch.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _leave(note: Path, e: BaseException) -> None:
    """Rank 0 tells the person; this process only says why it ended."""
    if _broken(e):
        return
    known = isinstance(e, FettleError)
    cause = getattr(e, "cause", str(e)) if known else f"{type(e).__name__}: {e}"
    remedy = getattr(e, "remedy", "") if known else ""
    with contextlib.suppress(OSError):
        note.write_text(json.dumps(dict(cause=cause[:500], remedy=remedy)))


def _broken(e: BaseException) -> bool:
    """True for an error that means that another process is gone."""
    if isinstance(e, FettleError):
        return False
    text = str(e)
    return type(e).__name__.startswith("Dist") or isinstance(e, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "onnection closed by peer", "onnection reset by peer", "Broken pipe"))


def _blame(folder: Path, processes: int) -> RunFailed:
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for number in range(1, processes):
            try:
                told = json.loads((folder / f"process-{number}.json").read_text())
            except (OSError, ValueError):
                continue
            return RunFailed(f"process {number + 1} of {processes} ended: {told['cause']}",
                             told["remedy"] or "See its lines in the log")
        time.sleep(0.05)
    return RunFailed(f"another of the run's {processes} processes ended without a word",
                     "Memory may have run out: lower training.batch or training.processes, then resume")
