"""The Probe button of New run: begin one, follow it, end it."""

from __future__ import annotations


def functions(home) -> list:
    """Server functions ``probe``, ``probe_state`` and ``probe_cancel``; each answers the state of the probe."""

    def probe(given: dict) -> dict:
        from workbench import probe_job
        spec = given["spec"]
        return probe_job.begin({**spec, "budget": {k: v for k, v in (spec.get("budget") or {}).items() if v is not None}}, home).state()

    def probe_state(given: dict) -> dict:
        from workbench import probe_job
        return probe_job.state(home)

    def probe_cancel(given: dict) -> dict:
        from workbench import probe_job
        return probe_job.cancel(home)

    return [probe, probe_state, probe_cancel]
