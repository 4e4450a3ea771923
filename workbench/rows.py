"""What the pages that show several runs need of each of them. Torch is not needed."""

from __future__ import annotations

import json

from engines.errors import InputError

APART = ("name", "tags", "note")
"""Fields of a spec that do not change what is computed."""
ENDS = (("result", "final"), ("stage", "base"))
"""Names of the evaluations that speak for a run, the best first; the others were made on the way."""


def store_of(home=None):
    """The store of ``home``, or of the home in use."""
    if home is None:
        from workbench.home import Home
        home = Home.open()
    return home.store


def chosen(ids, store, at_least: int = 1) -> list[dict]:
    """Rows of the runs given by id or name, in this order and each once.

    Raises:
        InputError: fewer than ``at_least``. NotFound: there is no such run.
    """
    ids = list(dict.fromkeys(store.run_id(i) for i in ([ids] if isinstance(ids, (int, str)) else ids)))
    if len(ids) < at_least:
        raise InputError("runs", ids, f"at least {at_least} are needed" if at_least > 1 else "no run is chosen", "Choose runs in the table")
    return [store.light(i) for i in ids]


def same_settings(spec: dict) -> str:
    """A text that is equal for two runs that differ in seed, name, tags and note only."""
    return json.dumps({k: v for k, v in spec.items() if k not in ("seed", *APART)}, sort_keys=True)


def brief(row: dict) -> dict:
    """What every page shows of a run: id, name, slot, status, model, data, methods."""
    spec = row["spec"]
    data = spec.get("data")
    methods = [s if isinstance(s, str) else s.get("method", "?") for s in spec.get("pipeline") or ()]
    return {"id": row["id"], "name": row["name"], "slot": row["slot"], "status": row["status"], "model": spec.get("model"),
            "data": data.get("source") if isinstance(data, dict) else data, "methods": methods, "seed": spec.get("seed", 0),
            "pipeline": " → ".join(methods) or "evaluate only"}


def main_evaluation(store, run_id: int) -> dict | None:
    """The evaluation that speaks for a run: of the finished model, else the latest after a stage, else the latest of all."""
    found = store.evaluations(run_id)
    for names in ENDS:
        ended = [e for e in found if e["name"] in names]
        if ended:
            return ended[-1]
    return found[-1] if found else None
