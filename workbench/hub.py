"""Search of the hub by words: what a person may mean by half an id. Torch-free; one request, a short timeout."""

from __future__ import annotations

import time

from engines.errors import InputError

TIMEOUT = 4.0
ROWS = 8
KINDS = {"model": "models", "data": "datasets"}
_SEEN: dict[tuple[str, str], tuple[float, list[dict]]] = {}
FRESH = 300.0
"""Seconds for which an answer is given again without asking."""


def search(kind: str, text: str) -> list[dict]:
    """The most downloaded models or data sets whose id holds ``text``: id, task, downloads, gated.

    Args:
        kind: ``model`` (only those with safetensors weights are listed) or ``data``.

    Raises:
        InputError: the hub does not answer; the remedy names what works without it.
    """
    words = " ".join(text.split())
    if kind not in KINDS:
        raise InputError("kind", kind, "neither models nor data", "Choose model or data")
    if len(words) < 2:
        return []
    when, known = _SEEN.get((kind, words.lower()), (0.0, []))
    if time.monotonic() - when < FRESH and when:
        return known
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # One plain request: the client's listing retries for half a minute, which nobody who types wants to wait for.
    asked: dict = {"search": words, "limit": ROWS, "sort": "downloads", "direction": -1}
    if kind == "model":
        asked["filter"] = "safetensors"
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/{KINDS[kind]}", params=asked, headers=build_hf_headers(), timeout=TIMEOUT)
        hf_raise_for_status(answer)
        found = answer.json()
    except Exception as e:
        raise InputError(kind, words, f"the hub cannot be searched ({type(e).__name__})",
                         "Give the exact id, or use what is bundled or a local path") from None
    rows = [{"id": r["id"], "task": r.get("pipeline_tag") or "", "downloads": int(r.get("downloads") or 0), "gated": bool(r.get("gated"))}
            for r in found if isinstance(r, dict) and isinstance(r.get("id"), str)]
    if len(_SEEN) > 200:
        _SEEN.clear()
    _SEEN[kind, words.lower()] = (time.monotonic(), rows)
    return rows
