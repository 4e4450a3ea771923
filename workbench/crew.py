"""One run in several processes: whether that can be, how they are started, and what those do that do not lead.

The process that was started for the run becomes torchrun, which starts ``training.processes`` workers. Rank 0 is the run's worker as
ever (it claims the run, beats, samples and writes); the others only compute. When one ends with an error torchrun ends them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

from engines.errors import InputError, StopRequested
from engines.training import distributed
from workbench import machine, process, telemetry

ROOT = Path(__file__).resolve().parent.parent
NEVER_MET = 75
"""Exit code of a leader that ended before the others found it, so that torchrun does not leave them waiting."""
LINK = 20e9
"""Bytes per second between two devices, and between CPU processes through main memory, as a forecast assumes them."""
LINK_CPU = 1e9


def processes(spec: dict) -> int:
    """How many processes the dict form of a spec asks for."""
    try:
        return max(1, int((spec.get("training") or {}).get("processes") or 1))
    except (TypeError, ValueError, AttributeError):
        return 1


def check(spec, device: str, devices: int, cores: int) -> None:
    """Refuse what this machine cannot do; ``spec`` is a ``RunSpec``.

    Raises:
        InputError: more processes than GPUs or cores, or a system that cannot start them.
    """
    wanted = spec.training.processes
    if wanted == 1:
        return
    if machine.zero_gpu():
        raise InputError("training.processes", wanted, "this Space lends one GPU for one process", "Set training.processes to 1")
    if not any(m.card.trains for m in spec.pipeline):
        raise InputError("training.processes", wanted, "no stage of this pipeline trains, and only training is divided",
                         "Set training.processes to 1")
    able, kind = (devices, "GPU") if device == "cuda" else (cores, "core")
    if wanted > able:
        raise InputError("training.processes", wanted, f"this machine has {able} {kind}{'s' if able != 1 else ''}",
                         f"Give at most {able}")


def exchange_seconds(gradient_bytes: float, count: int, device: str) -> float:
    """Seconds in which ``count`` processes add their gradients: each sends and receives 2 (n - 1) / n of them (ring all-reduce)."""
    if count == 1:
        return 0.0
    return 2 * (count - 1) / count * gradient_bytes / (LINK if device == "cuda" else LINK_CPU) + 2e-4


# -- starting ----------------------------------------------------------------------------------------------------------
def begin(run_id: int, threads: int | None, alone) -> int:
    """What a worker process does: ``alone(run_id, threads)``, or its part of a run in several processes; the exit code."""
    if distributed.crew() > 1:
        if distributed.rank() > 0:
            return follow(run_id, threads)
        code = alone(run_id, threads)
        return code or (0 if distributed.met() else NEVER_MET)
    from workbench.home import Home
    wanted = processes(settings(Home.open().store, run_id))
    return launch(run_id, threads, wanted) if wanted > 1 else alone(run_id, threads)


def settings(store, run_id: int) -> dict:
    """The frozen settings of a run."""
    return (store.forecast(run_id) or {}).get("resolved") or store.run(run_id)["spec"]


def launch(run_id: int, threads: int | None, wanted: int) -> int:
    """Become torchrun with ``wanted`` workers; does not return where a process can be replaced."""
    each = max(1, (threads or telemetry.threads()) // wanted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(wanted),
               "--max-restarts", "0", "--module", "workbench.worker", str(run_id), "--threads", str(each)]
    environment = os.environ | {distributed.CREW: str(wanted), "OMP_NUM_THREADS": str(each)}
    print(f"starting {wanted} processes with {each} thread{'s' if each > 1 else ''} each", flush=True)
    if os.name == "nt":
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    os.chdir(ROOT)
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


# -- a process that does not lead --------------------------------------------------------------------------------------
def follow(run_id: int, threads: int | None) -> int:
    """Compute what rank 0 says, without a word to the database."""
    import torch

    from workbench.home import Home
    from workbench.spec import RunSpec
    home = Home.open()
    resolved = settings(home.store, run_id)
    home.store.close()
    torch.set_num_threads(threads or 1)
    device = "cuda" if torch.cuda.is_available() and os.environ.get("WORKBENCH_DEVICE") != "cpu" else "cpu"
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK") or 0)
        torch.cuda.set_device(index)
        gigabytes = (resolved.get("budget") or {}).get("memory_gb")
        if gigabytes:
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), index)
    process.die_first()
    try:
        process.pipeline()(RunSpec.from_dict(resolved), reporter=distributed.Silent(), folder=home.folder(run_id), device=device)
    except StopRequested:
        return 0
    except BaseException as e:
        if not isinstance(e, SystemExit):
            print(f"process {distributed.rank() + 1}: {''.join(traceback.format_exception(e))}", flush=True)
        return 1
    return 0
