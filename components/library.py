"""Library: the models, data and methods that there are, each with its card."""

from __future__ import annotations

from components.layout import component

PARTS = ("form", "setting", "method_cards", "library_cards", "library_claims")
"""The first three are shared with New run: form helpers, how a field's range is written, search and family chips."""


def server_functions(home) -> list:
    """What the page asks for; each takes one JSON object and returns one."""
    from workbench import catalog

    def shelves(given: dict) -> dict:
        return {"models": catalog.models(), "data": catalog.data(), "methods": catalog.methods() + catalog.switches()}

    def model(given: dict) -> dict:
        return catalog.model(given["source"])

    def data_card(given: dict) -> dict:
        return catalog.data_card(given["id"])

    def claims(given: dict) -> dict:
        from workbench import claims as papers
        rows = papers.listed(given["method"], home)
        return {"rows": [row | {"sentence": papers.sentence(row)} for row in rows]}

    return [shelves, model, data_card, claims]


def build(home) -> None:
    """The page at ``/library``."""
    component("library", scripts=PARTS, server_functions=server_functions(home))
