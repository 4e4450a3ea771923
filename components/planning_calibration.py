"""Calibration: forecast beside measurement of every finished run, and what the planner makes of it."""

from __future__ import annotations

from components.layout import component

LISTED = 300
"""Newest runs that are drawn and listed."""


def server_functions(home) -> list:
    """What the section asks for; each takes one JSON object and returns one."""

    def compared(given: dict) -> dict:
        """Every comparable run, and their errors by model, method and machine."""
        from workbench import calibration_report

        found = calibration_report.report(home.store, home)
        return {**found, "points": found["points"][:LISTED], "said": calibration_report.say(found["left_out"])}

    return [compared]


def build(home) -> None:
    """The section of ``/plan``."""
    component("planning_calibration", template='<div class="ft ft-page"></div>', scripts=("form",), server_functions=server_functions(home))
