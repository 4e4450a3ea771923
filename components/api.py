"""Named endpoints for gradio_client and MCP clients: the workbench as a person drives it."""

from __future__ import annotations

import gradio as gr

from components.layout import user_error


def endpoints(home) -> None:
    """Registers plan, probe, recommend, start_run, run_status, stop_run, list_runs, compare_runs, start_sweep and sweep_status."""

    def said(fn):
        """The function with user errors turned into the client's error message."""
        try:
            return fn()
        except Exception as error:
            found = user_error(error)
            if found is None:
                raise
            raise gr.Error(found["text"], print_exception=False) from None

    def plan(spec: dict) -> dict:
        """Forecast of a spec: does it fit its budget, memory by phase, seconds, trainable parameters, size."""
        from workbench import planner
        return said(lambda: planner.forecast(spec, home))

    def start_run(spec: dict) -> dict:
        """Queue a run of this spec; it starts as soon as the device is free. Answers the run with its id and name."""
        from workbench import runs
        return said(lambda: runs.start(spec, home=home))

    def run_status(run: int) -> dict:
        """State, progress, figures and error of a run."""
        from workbench import runs
        return said(lambda: runs.results(run, home=home))

    def stop_run(run: int) -> dict:
        """Ask a run to stop at its next step; it is evaluated and kept."""
        from workbench import runs
        return said(lambda: runs.stop(run, home=home))

    def list_runs(status: str = "", limit: int = 50) -> list:
        """Newest runs first, optionally only those in one state."""
        return said(lambda: home.store.runs(status=(status,) if status else None, limit=limit))

    def compare_runs(ids: list) -> dict:
        """Curves, settings that differ and figures of several runs."""
        from workbench import compare
        return said(lambda: compare.compare([int(i) for i in ids], home=home))

    def recommend(spec: dict) -> dict:
        """Pipelines that fit the spec's model, data and budget, ranked by expected quality; the spec's own pipeline is not looked at."""
        from workbench import recommend as search
        return said(lambda: search.recommend(spec, home))

    def probe(spec: dict) -> dict:
        """Measure a minute of this spec at the most: two training steps and an evaluation batch; answers the forecast with its figures."""
        from workbench import planner, probe_job

        def act():
            probe_job.run(spec, home)
            return planner.forecast(spec, home)
        return said(act)

    def start_sweep(spec: dict, sweep: dict) -> dict:
        """Run a spec many times: sweep has over ({path: list or {low, high, log}}), objectives, sampler, pruner, trials, minutes, on."""
        from workbench.sweeps import service
        return said(lambda: service.start(spec, sweep, home=home))

    def sweep_status(sweep: int) -> dict:
        """State of a sweep, its trials with parameters and values, the numbers of those on the Pareto front."""
        from workbench.sweeps import view
        return said(lambda: view.status(sweep, home=home))

    for fn in (plan, probe, recommend, start_run, run_status, stop_run, list_runs, compare_runs, start_sweep, sweep_status):
        gr.api(fn, api_name=fn.__name__, concurrency_limit=None)
