"""Plan: what fits a budget, what scaling laws say, and how well the forecasts have held. One section each, shown by ``?view=``."""

from __future__ import annotations

import importlib

import gradio as gr

from components.layout import component

SECTIONS = (("recommend", "Recommend"), ("laws", "Predict"), ("calibration", "Calibration"))
"""Id and title; ``components.planning_<id>`` has ``build(home)``."""


def build(home) -> None:
    """The page at ``/plan``."""
    links = "".join(f'<a class="ft-chip" data-view="{name}" href="/plan?view={name}">{title}</a>' for name, title in SECTIONS)
    component("planning", template=f'<div class="ft"><nav class="ft-views" aria-label="Views of Plan">{links}</nav></div>')
    for number, (name, _) in enumerate(SECTIONS):
        with gr.Column(elem_id=f"view-{name}", elem_classes="ft-view" if number else "ft-view on"):
            importlib.import_module(f"components.planning_{name}").build(home)
