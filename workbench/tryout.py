"""Try: one prompt or example through up to four variants, side by side.

The server never imports torch. A request is a JSON file in ``$WORKBENCH_HOME/try``; one detached process
(`workbench.tryout_host`) takes requests one after another, keeps the variants that it loaded for as long as it is used,
and appends what it produces to a results file that the page polls with a byte cursor, as it polls a run's series.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path

from engines.errors import InputError

try:
    import fcntl
except ImportError:     # Windows: the page opens, but nothing can be tried
    fcntl = None

MOST = 4
"""Variants in one comparison."""
IDLE_SECONDS = 120.0
"""How long the process waits for another request before it gives its memory back."""
CONFIG_TASKS = (("ForCausalLM", "causal-lm"), ("LMHeadModel", "causal-lm"), ("ForSequenceClassification", "text-classification"),
                ("ForImageClassification", "image-classification"))


def folder(home) -> Path:
    """The folder of requests and results, made if need be."""
    path = Path(home.path) / "try"
    for part in ("requests", "results", "uploads"):
        (path / part).mkdir(parents=True, exist_ok=True)
    return path


# -- variants --------------------------------------------------------------------------------------------------------------
def variants(home, task: str | None = None, limit: int = 200) -> list[dict]:
    """Everything that can be tried: base models first, then runs that left a model, newest first.

    Returns:
        rows of ref, kind ("model" or "run"), name, text (what was done to it), task, slot (0..9 or None), size_bytes.
    """
    from workbench import catalog
    rows = []
    for model in catalog.models():
        rows.append({"ref": f"model:{model['id']}", "kind": "model", "name": model["id"], "text": _base_text(model), "model": model["id"],
                     "task": model.get("task"), "slot": None, "size_bytes": model.get("size_bytes"), "source": model["id"]})
    for run in home.store.runs(status=("finished", "stopped"), limit=limit):
        row = _run_variant(home, run)
        if row:
            rows.append(row)
    return [r for r in rows if task is None or r["task"] == task]


def resolve(home, ref: str | int) -> dict:
    """The variant that ``ref`` names: ``run:<id or name>``, ``model:<id, folder or hub id>``, or either without the prefix.

    Raises:
        InputError: no such run or model, or the run left no model.
    """
    from storage import StorageError
    kind, _, rest = str(ref).partition(":")
    if kind not in ("run", "model"):
        kind, rest = None, str(ref)
    if kind != "model":
        try:
            run = home.store.run(int(rest) if rest.isdigit() else rest)
        except StorageError:
            if kind == "run":
                raise InputError("variant", rest, "there is no run of this name", "List the runs with `python -m workbench runs`") from None
        else:
            row = _run_variant(home, run)
            if row is None:
                raise InputError("variant", run["name"], f"this run is {run['status']} and left no model",
                                 "Choose a finished run, or resume this one")
            return row
    from workbench import catalog
    model = catalog.model(rest)
    return {"ref": f"model:{rest}", "kind": "model", "name": model.get("id") or rest, "text": _base_text(model), "model": rest,
            "task": model.get("task"), "slot": None, "size_bytes": model.get("size_bytes"), "source": rest}


def _run_variant(home, run: dict) -> dict | None:
    where = Path(run["folder"]) if run.get("folder") else Path(home.runs_dir) / str(run["id"])
    source = where / "model"
    if not (source / "config.json").is_file():
        return None
    spec = run.get("spec") or {}
    return {"ref": f"run:{run['id']}", "kind": "run", "run": run["id"], "name": run["name"], "text": pipeline_text(spec),
            "model": spec.get("model"), "data": _data_source(spec), "task": task_of(source), "slot": run.get("slot"),
            "size_bytes": run.get("size_bytes") or _stored(source), "source": str(source), "metric": run.get("metric"),
            "value": run.get("value"), "base_value": run.get("base_value")}


def task_of(source: str | Path) -> str | None:
    """The task of a saved folder, from the architecture named in its config.json."""
    try:
        names = json.loads((Path(source) / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError):
        return None
    return next((task for name in names for end, task in CONFIG_TASKS if name.endswith(end)), None)


def pipeline_text(spec: dict) -> str:
    """A pipeline in words: "Wanda 50 %, LoRA r 8, int8"."""
    from workbench import catalog
    names = {m["id"]: m["name"] for m in catalog.methods()}
    parts = []
    for stage in spec.get("pipeline") or []:
        stage = {"method": stage} if isinstance(stage, str) else stage
        text = names.get(stage.get("method"), stage.get("method") or "?")
        if isinstance(stage.get("sparsity"), (int, float)):
            text += f" {100 * stage['sparsity']:.0f}\u00a0%"
        if isinstance(stage.get("rank"), int):
            text += f" r\u00a0{stage['rank']}"
        parts.append(text)
    return ", ".join(parts) or "evaluation only"


def _base_text(model: dict) -> str:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return ", ".join(x for x in ("base", short.get(model.get("dtype"), model.get("dtype"))) if x)


def _data_source(spec: dict) -> str | None:
    data = spec.get("data")
    return data.get("source") if isinstance(data, dict) else data


def _stored(source: Path) -> int:
    return sum(f.stat().st_size for f in source.glob("*.safetensors"))


# -- requests --------------------------------------------------------------------------------------------------------------
def generate(home, refs: list, prompt: str, *, seed: int = 0, temperature: float = 0.7, top_p: float = 0.95,
             new_tokens: int = 64) -> dict:
    """Start one generation through every variant; the same seed draws the same random numbers for each.

    Returns:
        id (for ``since`` and ``cancel``) and variants (resolved, in the order given).

    Raises:
        InputError: no prompt, no or too many variants, one that cannot generate, a number out of range.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("prompt", prompt, "nothing to continue", "Write at least one word")
    _number("temperature", temperature, 0, 5)
    _number("top_p", top_p, 0.01, 1)
    _number("new_tokens", new_tokens, 1, 4096, whole=True)
    chosen = _choose(home, refs, seed, ("causal-lm",), "generates text")
    return _post(home, {"kind": "generate", "variants": chosen, "prompt": prompt, "seed": int(seed), "temperature": float(temperature),
                        "top_p": float(top_p), "new_tokens": int(new_tokens)})


def classify(home, refs: list, *, text: str | None = None, data: str | None = None, item: int | None = None,
             image: str | Path | None = None) -> dict:
    """Start one classification through every variant: of a text, an evaluation item of ``data``, or an image file.

    Returns:
        as ``generate``.

    Raises:
        InputError: nothing or more than one thing to classify, or a variant that cannot do it.
    """
    if sum(x is not None for x in (text, item, image)) != 1:
        raise InputError("input", None, "not exactly one thing to classify", "Give a text, an evaluation item or an image")
    if text is not None and not text.strip():
        raise InputError("text", text, "nothing to classify", "Write at least one word")
    if item is not None and data is None:
        raise InputError("data", None, "no data to take the item from", "Name the data set")
    if image is not None and not Path(image).is_file():
        raise InputError("image", str(image), "there is no such file", "Choose a PNG or JPEG file")
    tasks = ("text-classification",) if text is not None else ("image-classification",) if image is not None else (
        "text-classification", "image-classification")
    chosen = _choose(home, refs, 0, tasks, "classifies this kind of input")
    return _post(home, {"kind": "classify", "variants": chosen, "text": text, "data": data, "item": item,
                        "image": str(image) if image is not None else None})


def raw_item(data: str, task: str | None, index: int) -> dict:
    """Evaluation item ``index`` (modulo their number): text or image (uint8 [height, width, channels]), label name, count.

    Raises:
        InputError: there is no such data.
    """
    from engines.data import load
    table = load(data, task=task or "auto")
    rows = table.evaluation
    index = int(index) % len(rows)
    return {"index": index, "count": len(rows), "text": rows.texts[index] if rows.texts is not None else None,
            "image": rows.images[index] if rows.images is not None else None,
            "label": table.labels[rows.labels[index]] if rows.labels is not None else None}


def item(data: str, index: int, task: str | None = None) -> dict:
    """``raw_item`` for a page: the image as a PNG data address."""
    found = raw_item(data, task, index)
    if found["image"] is not None:
        found["image"] = _png(found["image"])
    return found


def read_image(path: str | Path):
    """A PNG or JPEG file as uint8 [height, width, 3].

    Raises:
        InputError: it is no image.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as e:
        raise InputError("image", Path(path).name, f"not an image that can be read ({type(e).__name__})",
                         "Choose a PNG or JPEG file") from None


def keep_upload(home, address: str) -> str:
    """Keep an image sent as a data address (``data:image/png;base64,...``); returns the file's path.

    Raises:
        InputError: not an image, or over 20 MB.
    """
    head, _, body = str(address).partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or len(body) > 28_000_000:
        raise InputError("image", head[:40], "not an image of at most 20 MB", "Choose a PNG or JPEG file")
    path = folder(home) / "uploads" / f"{uuid.uuid4().hex}.image"
    try:
        path.write_bytes(base64.b64decode(body, validate=True))
    except binascii.Error:
        raise InputError("image", head[:40], "not an image", "Choose a PNG or JPEG file") from None
    try:
        read_image(path)
    except InputError:
        path.unlink()
        raise
    return str(path)


def _png(pixels) -> str:
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(field: str, value, low, high, whole=False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or (whole and value != int(value)):
        raise InputError(field, value, f"not a {'whole ' if whole else ''}number from {low} to {high}", "Choose one inside that range")


def _choose(home, refs, seed, tasks, does) -> list[dict]:
    _number("seed", seed, 0, 2**31 - 1, whole=True)
    refs = list(refs or ())
    if not 1 <= len(refs) <= MOST:
        raise InputError("variants", refs, f"{len(refs)} variants", f"Choose one to {MOST}")
    chosen = [resolve(home, ref) for ref in refs]
    for variant in chosen:
        if variant["task"] not in tasks:
            raise InputError("variants", variant["name"], f"this is a {variant['task'] or 'model of unknown task'}",
                             f"Choose one that {does}")
    return chosen


def _post(home, request: dict) -> dict:
    request.update(id=f"{time.time_ns():x}-{uuid.uuid4().hex[:6]}", at=time.time())
    if fcntl is None:
        raise InputError("try", request["kind"], "it needs the file locks of Linux or macOS", "Export the run and use it with transformers")
    path = folder(home) / "requests" / f"{request['id']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(request))
    part.rename(path)
    ensure_host(home)
    return {"id": request["id"], "variants": request["variants"]}


def since(home, request_id: str, cursor: int = 0) -> dict:
    """What a request produced after ``cursor``.

    Returns:
        cursor (bytes read), state ("waiting", "working", "done"), events: v (index of the variant) with one of
        ``s`` (loading, ready, done, error), ``t`` (tokens: [id, text, nats, milliseconds]) or ``p`` (probabilities), and figures.
    """
    base = folder(home)
    name = _safe(request_id)
    request, result = base / "requests" / f"{name}.json", base / "results" / f"{name}.jsonl"
    events, state = [], "waiting"
    if result.is_file():
        state = "working"
        with open(result, "rb") as f:
            f.seek(cursor)
            chunk = f.read()
        whole = chunk[:chunk.rfind(b"\n") + 1]
        cursor += len(whole)
        events = [json.loads(line) for line in whole.splitlines()]
        if any(e.get("s") == "end" for e in events):
            state = "done"
    elif not request.is_file():
        raise InputError("request", request_id, "there is no such request", "Generate again")
    if state != "done" and not host_alive(home):
        if state == "waiting":
            ensure_host(home)          # it went idle between our look and its last one
        elif not events and time.time() - result.stat().st_mtime > 1.0:
            return {"cursor": cursor, "state": "done", "events": [
                {"s": "end", "error": "The process that ran the models ended without saying why, perhaps for want of memory. "
                                      "Choose fewer variants and generate again."}]}
    return {"cursor": cursor, "state": state, "events": events}


def cancel(home, request_id: str) -> None:
    """Ask the process to leave the request at its next token."""
    (folder(home) / "requests" / f"{_safe(request_id)}.cancel").touch()


def _safe(request_id: str) -> str:
    if not request_id or not all(c in "0123456789abcdef-" for c in request_id):
        raise InputError("request", request_id, "not an id of a request", "Generate again")
    return request_id


def collect(home, request_id: str, timeout: float = 600.0, on_event=None) -> list[dict]:
    """Wait for a request and gather its events per variant (the command line's way in).

    Returns:
        one dict per variant: text, tokens (ids), nats, figures of the last event; or error.
    """
    cursor, out, end = 0, {}, time.monotonic() + timeout
    while True:
        news = since(home, request_id, cursor)
        cursor = news["cursor"]
        for event in news["events"]:
            if on_event:
                on_event(event)
            if event.get("s") == "end":
                if event.get("error") and not out:
                    out[0] = {"error": event["error"]}
                continue
            row = out.setdefault(event["v"], {"text": "", "tokens": [], "surprise": []})
            for token, piece, nats, _ in event.get("t", ()):
                row["tokens"].append(token)
                row["text"] += piece
                row["surprise"].append(nats)
            row.update({k: v for k, v in event.items() if k not in ("v", "t", "s")})
        if news["state"] == "done":
            return [out[v] for v in sorted(out)]
        if time.monotonic() > end:
            cancel(home, request_id)
            raise InputError("try", request_id, f"no answer within {timeout:.0f} s", "Choose a smaller model or fewer new tokens")
        time.sleep(0.03)


# -- the process -----------------------------------------------------------------------------------------------------------
def host_alive(home) -> bool:
    """Whether a process holds the lock of this home; it is released by the system however the process ends."""
    if fcntl is None:
        return False
    with closing(open(folder(home) / "host.lock", "a")) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(f, fcntl.LOCK_UN)
        return False


def ensure_host(home) -> None:
    """Start the process unless one is there; two that start together settle it by the lock."""
    if fcntl is None or host_alive(home):
        return
    base = folder(home)
    stamp = base / "host.started"
    # An import of torch takes seconds: do not start a second process while the first is not yet at its lock.
    if stamp.exists() and time.time() - stamp.stat().st_mtime < 2.0:
        return
    stamp.touch()
    # The worker's process template is warm (torch and transformers imported) where the dispatcher runs.
    with open(base / "host.log", "ab") as log:
        subprocess.Popen([sys.executable, "-m", "workbench.tryout_host", str(home.path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                         start_new_session=True, cwd=Path(__file__).resolve().parent.parent,
                         env={**os.environ, "WORKBENCH_HOME": str(home.path), "GOMP_SPINCOUNT": "20000"})
