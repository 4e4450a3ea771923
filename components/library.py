"""Library: the models, data and methods that there are, each with its card."""

from __future__ import annotations

from components.layout import component

PARTS = ("form", "setting", "method_cards", "library_cards")
"""The first three are shared with New run: form helpers, how a field's range is written, search and family chips."""


def server_functions(home) -> list:
    """What the page asks for; each takes one JSON object and returns one."""
    from workbench import catalog

    def shelves(given: dict) -> dict:
        return {"models": catalog.models(), "data": catalog.data(), "methods": catalog.methods()}

    def model(given: dict) -> dict:
        return catalog.model(given["source"])

    def data_card(given: dict) -> dict:
        return catalog.data_card(given["id"])

    return [shelves, model, data_card]


def build(home) -> None:
    """The page at ``/library``."""
    component("library", scripts=PARTS, server_functions=server_functions(home))
