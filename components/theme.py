"""Gradio's theme, dressed in the tokens of assets/css/fettle.css so that there is one source of colours."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import gradio as gr
from gradio.themes import sizes

CSS = Path(__file__).resolve().parent.parent / "assets" / "css"
FONT = ["-apple-system", "BlinkMacSystemFont", "Segoe UI", "Inter", "Roboto", "Helvetica Neue", "Liberation Sans", "Arial",
        "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Consolas", "Liberation Mono", "DejaVu Sans Mono", "monospace"]

_TOKEN = re.compile(r"--ft-([a-z0-9-]+):\s*light-dark\((#[0-9A-Fa-f]{3,8}),\s*(#[0-9A-Fa-f]{3,8})\)")


def tokens() -> dict[str, tuple[str, str]]:
    """Colour tokens of the stylesheet: name without ``--ft-`` to (light, dark)."""
    return {name: (light, dark) for name, light, dark in _TOKEN.findall((CSS / "fettle.css").read_text())}


# Gradio variable -> colour token; the dark twin is filled in from the same token
_COLOURS = {
    "body_background_fill": "page", "body_text_color": "ink", "body_text_color_subdued": "ink-3",
    "background_fill_primary": "panel", "background_fill_secondary": "sunken", "border_color_primary": "line",
    "border_color_accent": "accent", "color_accent": "accent", "color_accent_soft": "accent-soft",
    "link_text_color": "accent", "link_text_color_hover": "accent-strong", "link_text_color_active": "accent-strong",
    "link_text_color_visited": "accent", "loader_color": "accent", "slider_color": "accent",
    "block_background_fill": "panel", "block_border_color": "line", "block_title_text_color": "ink-2",
    "block_label_text_color": "ink-2", "block_label_background_fill": "panel", "block_info_text_color": "ink-3",
    "input_background_fill": "panel", "input_border_color": "control", "input_border_color_focus": "accent",
    "input_placeholder_color": "ink-3", "input_background_fill_focus": "panel", "input_background_fill_hover": "panel",
    "button_primary_background_fill": "accent", "button_primary_background_fill_hover": "accent-strong",
    "button_primary_border_color": "accent", "button_primary_border_color_hover": "accent-strong",
    "button_primary_text_color": "on-accent", "button_primary_text_color_hover": "on-accent",
    "button_secondary_background_fill": "panel", "button_secondary_background_fill_hover": "hover",
    "button_secondary_border_color": "line-strong", "button_secondary_border_color_hover": "line-strong",
    "button_secondary_text_color": "ink", "button_secondary_text_color_hover": "ink",
    "checkbox_background_color": "panel", "checkbox_background_color_selected": "accent", "checkbox_border_color": "control",
    "checkbox_border_color_selected": "accent", "checkbox_border_color_focus": "accent",
    "table_border_color": "line", "table_odd_background_fill": "panel", "table_even_background_fill": "panel",
    "table_row_focus": "accent-soft", "table_text_color": "ink",
    "error_background_fill": "bad-soft", "error_border_color": "bad", "error_text_color": "bad", "error_icon_color": "bad",
    "stat_background_fill": "accent", "code_background_fill": "sunken",
}


def theme() -> gr.themes.Base:
    """The theme given to ``launch``; every colour has its dark twin."""
    colours = tokens()
    settings: dict[str, str] = {}
    for variable, token in _COLOURS.items():
        settings[variable], settings[variable + "_dark"] = colours[token]
    light, dark = colours["focus"]
    settings.update(
        body_text_size="13px", block_border_width="1px", block_radius="5px", block_padding="10px 12px", block_shadow="none",
        block_title_text_size="12px", block_title_text_weight="500", layout_gap="10px", form_gap_width="0px",
        input_radius="3px", input_padding="4px 8px", input_text_size="13px", input_shadow="none",
        input_shadow_focus=f"0 0 0 2px {light}", input_shadow_focus_dark=f"0 0 0 2px {dark}",
        button_border_width="1px", button_medium_padding="4px 10px", button_medium_radius="3px", button_medium_text_size="13px",
        button_medium_text_weight="500", button_small_padding="2px 8px", button_small_radius="3px", button_small_text_size="12px",
        checkbox_border_radius="2px", checkbox_label_background_fill="transparent", checkbox_label_border_width="0px",
        shadow_drop="none", shadow_inset="none", shadow_drop_lg="none")
    base = gr.themes.Base(font=FONT, font_mono=MONO, spacing_size=sizes.spacing_sm, radius_size=sizes.radius_sm,
                          text_size=sizes.text_sm)
    known = set(_set_parameters(base))
    return base.set(**{k: v for k, v in settings.items() if k in known})


def _set_parameters(base: gr.themes.Base):
    return inspect.signature(base.set).parameters


def stylesheets() -> list[Path]:
    """fettle.css first, then what the pages add, in name order; the report's sheet is for documents of its own."""
    first = CSS / "fettle.css"
    return [first, *sorted(p for p in CSS.glob("*.css") if p != first and p.stem != "report")]
