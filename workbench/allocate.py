"""The allocator of per-layer levels outside a run: how much sparsity, how many bits, which rank each matrix gets under one budget.

Measuring needs torch, so it happens in a process of its own (`engines.allocation.study`); here are the checks before and the
result as plain data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engines.errors import FettleError, InputError, RunFailed

WHAT = ("sparsity", "bits", "rank")
BY = ("rd", "lgreco", "evolution")
PRUNERS = ("magnitude", "wanda", "random")
UNITS = {"sparsity": "weights kept", "bits": "bytes", "rank": "trainable parameters"}
ROOT = Path(__file__).resolve().parent.parent


def allocate(model: str, data: str, what: str, budget, by: str = "rd", *, method: str = "magnitude", tokens: int = 1024,
             generations: int = 30, offspring: int = 8, seed: int = 0, threads: int | None = None, watch=None) -> dict:
    """Choose a level for each matrix of ``model``.

    Args:
        what: sparsity (share of zeros), bits (average of a weight) or rank (of low-rank updates).
        budget: the uniform setting whose total is kept (rd, evolution) or whose error is (lgreco): 0.6, 5 or 8; for bits also a
            size of the whole file such as ``4.6mb``.
        by: rd (least summed error at the total), lgreco (least size at the summed error), evolution (search by divergence).
        method: what sparsity is made with: magnitude, wanda or random.
        watch: called with each line that says how far it is.

    Returns:
        layers (name, layer, role, value, uniform, size, uniform_size, error, uniform_error), total (the same in sum, and the
        divergence from the dense model ``kl`` and ``uniform_kl`` in nats per token on other data, None for ranks), figures for a
        layer map, seconds, unit of size, and ``stage``: what to put in a pipeline.

    Raises:
        InputError: a value out of range, an unknown model or data set.
        RunFailed: the measurement broke off.
    """
    _one_of("what", what, WHAT)
    _one_of("by", by, BY)
    _one_of("method", method, PRUNERS)
    for name, number, low in (("tokens", tokens, 16), ("generations", generations, 1), ("offspring", offspring, 2), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < low:
            raise InputError(name, number, f"not a whole number from {low} on", f"Give at least {low}")
    if what == "rank" and by == "evolution":
        raise InputError("by", by, "what a rank is worth shows only after training, so there is no loss to search by", "Choose rd or lgreco")
    budget, stage = _stage(model, what, budget, by, method)
    request = dict(model=model, data=data, what=what, budget=budget, by=by, tokens=tokens, generations=generations, offspring=offspring,
                   seed=seed, stage=stage)
    found = _child(request, threads, watch)
    keeps = {"sparsity": ("distribution", by), "bits": ("by", by), "rank": ("ranks", "gradient")}[what]
    # The methods keep the total, so L-GreCo's other direction has no stage of its own among the pruners.
    usable = what != "sparsity" or by != "lgreco"
    return dict(found, unit=UNITS[what], stage={**stage, keeps[0]: keeps[1]} if usable else None)


def _one_of(field: str, value, known) -> None:
    if value not in known:
        raise InputError(field, value, "not one of the choices", "Choose " + ", ".join(known))


def _stage(model: str, what: str, budget, by: str, method: str) -> tuple[float, dict]:
    """(the budget as a number, the stage of a pipeline with this uniform setting)."""
    from engines import registry
    from engines.budget import Budget
    from workbench import sources
    profile = sources.profile(model)
    text = str(budget).strip().lower()
    sized = what == "bits" and text.endswith("mb")
    try:
        number = float(text.removesuffix("mb") if sized else text)
    except ValueError:
        example = {"sparsity": "0.6", "bits": "5 or 4.6mb", "rank": "8"}[what]
        raise InputError("budget", budget, "not a number", f"Give for example {example}") from None
    if what == "sparsity":
        if not 0 < number < 1:
            raise InputError("budget", budget, "not a share of zeros between 0 and 1", "Give for example 0.6")
        made = registry.build({"method": method, "sparsity": number})
        made.check(profile)
        return number, {"method": method, "sparsity": number}
    if what == "bits":
        made = registry.build({"method": "mixed", **({} if sized else {"bits": number})})
        made, _ = made.fit(profile, Budget(size_mb=number) if sized else Budget())
        return made.bits, {"method": "mixed", "bits": made.bits, "group": made.group, "embedding": made.embedding}
    if number != int(number) or not 1 <= number <= 1024:
        raise InputError("budget", budget, "not a rank, a whole number from 1 to 1024", "Give for example 8")
    made = registry.build({"method": "lora", "rank": int(number)})
    made.check(profile)
    return int(number), {"method": "lora", "rank": int(number)}


def _child(request: dict, threads: int | None, watch) -> dict:
    from workbench import telemetry
    env = {**os.environ, "OMP_NUM_THREADS": str(threads or telemetry.threads()), "PYTHONPATH": str(ROOT)}
    env.setdefault("GOMP_SPINCOUNT", "20000")
    last = ""
    # The answer goes to a file: a pipe that nobody reads while the progress is shown would fill up.
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "engines.allocation.study"], stdin=subprocess.PIPE, stdout=out,
                                   stderr=subprocess.PIPE, text=True, env=env)
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stderr:
                last = line.strip() or last
                if watch is not None:
                    watch(line.rstrip())
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        said = out.read().strip().splitlines()
    try:
        answer = json.loads(said[-1])
    except (IndexError, ValueError):
        raise RunFailed(f"the measurement broke off ({last[:200] or 'it said nothing'})",
                        "Try fewer tokens; if it ends the same way, report this as a defect") from None
    if "error" in answer:
        error = answer["error"]
        raise _Refused(error) if error["field"] else FettleError(error["text"])
    return answer


class _Refused(InputError):
    """An input error that the child found, in its own words."""

    def __init__(self, error: dict):
        Exception.__init__(self, error["text"])
        self.field, self.value = error["field"], error["value"]
