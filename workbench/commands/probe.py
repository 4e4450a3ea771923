"""``python -m workbench probe SPEC``: two real training steps and an evaluation batch in place of the forecast's figures."""

from __future__ import annotations

import sys


def register(add) -> None:
    add("probe", "measure a minute of a run instead of forecasting it", act, spec=True)


def act(args) -> int:
    from workbench import probe_job
    from workbench.cli_shared import emit, home_of, spec_of

    spec, home = spec_of(args), home_of()

    def progress(state: dict) -> None:
        print(f"{state['seconds']:5.1f} s  {state['text']}", file=sys.stderr, flush=True)

    state = probe_job.run(spec, home, None if args.json else progress)
    found = forecast(spec, home)
    if args.json:
        emit({**found, "spec": spec.to_dict(), "probed": state["seconds"]})
    else:
        show(found)
    return 1 if found["probe"] and found["probe"]["failed"] else 0


def forecast(spec, home) -> dict:
    """The forecast with what the probe has just measured."""
    from workbench import planner

    return planner.forecast(spec, home)


def show(found: dict) -> None:
    from workbench.cli_shared import show_plan

    probed = found["probe"] or {}
    if probed.get("failed"):
        print(probed["text"])
        return
    if probed.get("measured"):
        print(f"Probed in {probed['seconds']:.0f} s: {probed['measured']}")
    for what in probed.get("missing") or ():
        print(f"not measured: {what}")
    show_plan(found)
