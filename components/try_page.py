"""Try: the same prompt or example through up to four variants, side by side, with a blind vote."""

from __future__ import annotations

import functools

from components.layout import component

PROMPTS = (("a function", "def read_lines(path):\n    \"\"\""), ("a class", "class Stack:\n"), ("an import", "import os\nimport "),
           ("prose", "A generator function"))
"""Beginnings for the bundled model, which knows Python's source and its reference."""
COMMAND = "python -m workbench try"


def build(home) -> None:
    """The whole page is one component: its parts share the chosen variants and what came back."""
    from workbench import tryout, votes

    def open_page(given: dict) -> dict:
        """Everything that can be tried, the votes so far."""
        return {"variants": tryout.variants(home), "votes": votes.votes(home), "prompts": PROMPTS, "command": COMMAND}

    def variant(given: dict) -> dict:
        """One variant by its reference: a run too old for the list, a folder or a hub id."""
        return tryout.resolve(home, given["ref"])

    def warm(given: dict) -> dict:
        """Start the process while the prompt is being written."""
        tryout.ensure_host(home)
        return {"warm": True}

    def start(given: dict) -> dict:
        """Send a request; returns its id."""
        if given["mode"] == "generate":
            return tryout.generate(home, given["refs"], given["prompt"], **given["settings"])
        image = tryout.keep_upload(home, given["image"]) if given.get("image") else None
        return tryout.classify(home, given["refs"], text=given.get("text"), data=given.get("data"), item=given.get("item"), image=image)

    def since(given: dict) -> dict:
        return tryout.since(home, given["id"], given["cursor"])

    def cancel(given: dict) -> dict:
        tryout.cancel(home, given["id"])
        return {"cancelled": True}

    def vote(given: dict) -> dict:
        votes.vote(home, prompt=given["prompt"], refs=given["refs"], winner=given["winner"], seed=given["settings"]["seed"],
                    texts=given["texts"], blind=given["blind"], settings=given["settings"])
        return votes.votes(home)

    def every_vote(given: dict) -> dict:
        """For the export: all kept comparisons."""
        return votes.votes(home, limit=100_000)

    def item(given: dict) -> dict:
        """An evaluation item: its text or image, its label."""
        return _item(given["data"], given["index"], given.get("task"))

    @functools.lru_cache(maxsize=256)
    def _item(data: str, index: int, task: str | None) -> dict:
        return tryout.item(data, index, task)

    component("try", server_functions=[open_page, variant, warm, start, since, cancel, vote, every_vote, item], elem_id="try",
              scripts=("try_cards", "try_input", "try_vote", "try_side"))
