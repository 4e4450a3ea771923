"""Library: the models, data and methods that there are, each with its card."""

from __future__ import annotations

from components.layout import component

PARTS = ("form", "setting", "method_cards", "interval", "pareto", "sweeps_front", "library_cards", "library_claims", "leaderboard_chart",
         "leaderboard_table", "leaderboard")
"""The first three are shared with New run (form helpers, how a field's range is written, search and family chips), the next three with
Compare and Sweeps (a figure with its interval, quality against cost, an axis of decades)."""


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

    def leaderboard(given: dict) -> dict:
        from workbench import leaderboard as board
        return {"arenas": board.arenas()}

    return [shelves, model, data_card, claims, leaderboard]


def build(home) -> None:
    """The page at ``/library``."""
    component("library", scripts=PARTS, server_functions=server_functions(home))
