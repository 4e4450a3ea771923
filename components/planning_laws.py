"""Predict: the planning laws, fitted to runs, to given points, or with published constants."""

from __future__ import annotations

from components.layout import component

CURVES = ("finished", "stopped", "running", "paused")
RUNS = 40
"""Runs that are offered where a law follows single curves."""


def server_functions(home) -> list:
    """What the section asks for; each takes one JSON object and returns one."""

    def cards(given: dict) -> dict:
        """The planners in plain words, and the runs to choose from."""
        from workbench import laws

        rows = home.store.runs(status=CURVES, limit=RUNS, order="-id")
        return {"laws": laws.cards(), "runs": [{k: r[k] for k in ("id", "name", "status")} for r in rows]}

    def predict(given: dict) -> dict:
        """One law's answer with its constants and plot."""
        from workbench import laws

        found = laws.predict(given["law"], given.get("source") or "runs", query=given.get("query") or "", text=given.get("text"),
                             options={k: v for k, v in (given.get("options") or {}).items() if v not in (None, "")}, home=home)
        return _finite(found)

    def worth(given: dict) -> dict:
        """Whether going on is worth it for a run, also one that is still on."""
        from workbench.laws.learning_curve import worth as ask

        return _finite(ask(given["run"], home=home))

    return [cards, predict, worth]


def _finite(found):
    """JSON has no NaN: such numbers become null."""
    if isinstance(found, dict):
        return {k: _finite(v) for k, v in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(v) for v in found]
    if isinstance(found, float) and found - found != 0:
        return None
    return found


def build(home) -> None:
    """The section of ``/plan``."""
    component("planning_laws", scripts=("form", "law_plot"), server_functions=server_functions(home))
