"""New run: model, data, pipeline and budget as one spec, with its forecast while it changes."""

from __future__ import annotations

import functools
import re
import shlex
import threading

from components.layout import component
from components.new_run_probe import functions as probe_functions

PARTS = ("form", "setting", "switches", "pipeline", "budget_memory", "budget_limit", "budget_work", "budget_probe", "budget_how", "budget", "hub_search",
         "model_picker", "data_picker", "method_cards", "new_run_form", "new_run_ends")
"""Files of assets/js that make the page, besides its entry new_run.js."""
OWN_PRESETS = "presets"
FALLBACK = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [], "budget": {"minutes": 2, "memory_gb": 2}, "seed": 0}
"""Shown where no bundled preset can be read."""


# What the page shows of the training loop's knobs; defaults come from the spec itself.
TRAINING = (
    dict(name="lr", label="Learning rate", type="float", low=1e-8, high=10.0, auto=True, help="Peak of the schedule"),
    dict(name="batch", label="Batch", type="int", low=1, high=4096, auto=True, lever="memory_gb",
         help="Rows of one optimizer step: packed rows of the length below, or examples"),
    dict(name="length", label="Length", type="int", low=8, high=131072, auto=True, help="Tokens of a packed row, or the longest example kept"),
    dict(name="accumulation", label="Accumulation", type="int", low=1, high=1024, auto=True, help="Micro-batches of one optimizer step"),
    dict(name="checkpointing", label="Checkpointing", choices=(True, False), auto=True, help="Recompute activations: less memory, more time"),
    dict(name="loss_chunk", label="Loss chunk", type="int", low=16, high=1048576, auto=True, unit="tokens", advanced=True,
         help="Tokens whose logits are held at a time (causal-lm)"),
    dict(name="precision", label="Precision", choices=("fp32", "bf16"), auto=True, help="Of the matrix products"),
    dict(name="head_lr", label="Rate of the head", type="float", low=0.0, high=10.0, auto=True, advanced=True,
         help="Peak for a classification head; 0 is that of everything else. A new head wants larger steps than an adapter"),
    dict(name="schedule", label="Schedule", choices=("cosine", "linear", "constant"), help="Of the learning rate over the budget", advanced=True),
    dict(name="warmup", label="Warm-up", type="float", low=0.0, high=0.9, help="Share of the stage's budget", advanced=True),
    dict(name="final", label="Final rate", type="float", low=0.0, high=1.0, help="At the end, as a share of the peak", advanced=True),
    dict(name="weight_decay", label="Weight decay", type="float", low=0.0, high=1.0, help="Decoupled, per step", advanced=True),
    dict(name="clip", label="Clip", type="float", low=0.0, high=1e6, help="Largest norm of the gradient; 0 leaves it as it is", advanced=True),
    dict(name="optimizer", label="Optimizer", choices=("adamw", "sgd"), help="Update rule", advanced=True),
    dict(name="evaluations", label="Evaluations", type="int", low=1, high=1000, help="During each training stage, its end included", advanced=True),
    dict(name="items", label="Items", type="int", low=0, high=10_000_000, help="Of each evaluation; 0 is all of them", advanced=True),
    dict(name="processes", label="Processes", type="int", low=1, high=64, advanced=True,
         help="Share the run among so many processes: one for each GPU, or for a part of the cores"),
    dict(name="checkpoint_seconds", label="Checkpoint every", type="float", low=1.0, high=86400.0, unit="s", help="Time between checkpoints",
         advanced=True),
)


def training_fields() -> list[dict]:
    """The knobs of ``workbench.spec.Training`` as hyperparameter rows: name, label, default, help, range or choices."""
    from workbench.spec import Training
    default = Training()
    return [{"low": None, "high": None, "choices": None, "lever": None, "unit": "", "type": "str", **f, "default": getattr(default, f["name"]),
             "whole": f.get("type") == "int"} for f in TRAINING]


def presets(home) -> list[dict]:
    """Bundled specs, then those saved here: id, title, own, spec."""
    from workbench import catalog
    rows = [{"id": p["id"], "title": p["title"] or p["id"], "own": False, "spec": p["spec"]} for p in catalog.presets()]
    own = home.store.get_setting(OWN_PRESETS, {})
    return rows + [{"id": name, "title": name, "own": True, "spec": spec} for name, spec in sorted(own.items())]


def command(spec: dict, known: list[dict], methods: list[dict]) -> str:
    """The shell command that runs exactly ``spec``: the nearest preset and what differs from it.

    Args:
        spec: as ``RunSpec.to_dict`` writes it.
        known: presets with id and spec, also in that form; the bundled ones.
        methods: rows of ``catalog.methods``, for the defaults that need not be said.
    """
    found = [f"python -m workbench run {p['id']}" + more for p in known if (more := _flags(p["spec"], spec, methods)) is not None]
    bare = {"model": spec["model"], "data": spec["data"], "pipeline": [], "budget": {}, "seed": 0}
    if isinstance(spec["data"], str):
        found.append(f"python -m workbench run --model {shlex.quote(spec['model'])} --data {shlex.quote(spec['data'])}"
                     + (_flags(bare, spec, methods) or ""))
    return min(found, key=len) if found else "python -m workbench run spec.yaml"


def _yaml(value) -> str:
    import yaml
    return yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip().removesuffix("...").strip()


def _flags(base: dict, spec: dict, methods: list[dict]) -> str | None:
    """Options that turn ``base`` into ``spec``; None where something would have to be taken away that has no option for it."""
    words: list[str] = []

    def option(name: str, value) -> None:
        words.append(f"--{name} {shlex.quote(str(value))}")

    if [s["method"] for s in base["pipeline"]] != [s["method"] for s in spec["pipeline"]]:
        stages = [_stage(s, methods) for s in spec["pipeline"]]
        if all(stages):
            words += stages
        else:
            option("set", f"pipeline={_yaml(spec['pipeline'])}")
    else:
        for i, (was, now) in enumerate(zip(base["pipeline"], spec["pipeline"])):
            for k, v in now.items():
                if was.get(k) != v:
                    option("set", f"pipeline.{i}.{k}={_yaml(v)}")
    was, now = base.get("budget") or {}, spec.get("budget") or {}
    for k in dict.fromkeys([*was, *now]):
        if was.get(k) != now.get(k):
            option(k.replace("_", "-"), "none" if now.get(k) is None else _yaml(now[k]))
    was, now = base.get("training") or {}, spec.get("training") or {}
    if set(was) - set(now):
        return None
    for k, v in now.items():
        if k == "switches" and was.get(k) != v:
            flags = [_stage(s, _switches(), "switch") for s in v]
            words += flags if all(flags) else [f"--set {shlex.quote(f'training.switches={_yaml(v)}')}"]
        elif was.get(k) != v:
            option("set", f"training.{k}={_yaml(v)}")
    for key in ("model", "data", "task", "tags", "note", "seed", "name"):
        was, now = base.get(key), spec.get(key)
        if was == now or key == "name" and not now:
            continue
        if now is None:
            return None
        if isinstance(now, str) and key in ("model", "data", "task", "name") or key == "seed":
            option(key, now)
        else:
            option("set", f"{key}={_yaml(now)}")
    return "".join(f" {w}" for w in words)


@functools.cache
def _switches() -> list[dict]:
    from workbench import catalog
    return catalog.switches()


def _stage(stage: dict, methods: list[dict], flag: str = "method") -> str:
    """``--method lora:rank=4``; empty where a value holds a comma, which that form cannot carry."""
    defaults = next(({h["name"]: h["default"] for h in m["hyperparameters"]} for m in methods if m["id"] == stage["method"]), {})
    pairs = [f"{k}={_yaml(v)}" for k, v in stage.items() if k != "method" and (k not in defaults or defaults[k] != v)]
    if any("," in p for p in pairs):
        return ""
    return f"--{flag} {shlex.quote(stage['method'] + (':' + ','.join(pairs) if pairs else ''))}"


def _plain(spec: dict) -> dict:
    """The spec as the workbench writes it; the form always holds every hyperparameter, limits only where they are set."""
    return {**spec, "budget": {k: v for k, v in (spec.get("budget") or {}).items() if v is not None}}


def server_functions(home) -> list:
    """What the page asks for; each takes one JSON object and returns one."""
    from workbench import catalog
    from workbench.spec import RunSpec

    @functools.cache
    def methods() -> list[dict]:
        return catalog.methods()

    def fresh() -> str:
        from workbench import names
        return names.name({row["name"] for row in home.store.runs(limit=10_000)})

    def boot(given: dict) -> dict:
        rows = presets(home)
        first = next((p for p in rows if p["id"] == "example"), rows[0] if rows else {"id": "", "spec": FALLBACK})
        from workbench import machine
        found = machine.describe(home.store)
        return {"models": catalog.models(), "data": catalog.data(counts=False), "methods": methods(), "training": training_fields(),
                "switches": catalog.switches(),
                "presets": rows, "preset": first["id"], "spec": first["spec"],
                "name": fresh(), "machine": {**found, "energy": bool((found.get("gpu") or {}).get("energy"))}}

    def plan(given: dict) -> dict:
        from workbench import planner
        spec = _plain(given["spec"])
        if not spec.get("pipeline"):    # nothing to forecast yet, but a bad model or limit is said at once
            RunSpec.from_dict(spec)
        return planner.forecast(spec, home, remedies=bool(given.get("remedies")))

    def profile(given: dict) -> dict:
        return catalog.model(given["source"])

    def preview(given: dict) -> dict:
        asked = dict(rows=int(given.get("rows") or 10), task=given.get("task"), text=given.get("text"), label=given.get("label"))
        try:
            return catalog.preview(given["source"], model=given.get("model"), **asked)
        except Exception as error:
            if getattr(error, "field", "") != "model":
                raise
        return catalog.preview(given["source"], **asked)     # the model is at fault, and is told so in its own panel

    def costs(given: dict) -> dict:
        """What each method alone would cost here: {id: stage of the forecast, or {error}}."""
        from workbench import planner
        found = {}
        for row in methods():
            spec = _plain({**{k: v for k, v in given.items() if v is not None}, "pipeline": [{"method": row["id"]}]})
            try:
                stage = planner.forecast(spec, home, remedies=False)["stages"][0]
                found[row["id"]] = {k: stage.get(k) for k in ("seconds", "peak_bytes", "before_bytes", "after_bytes", "trainable")}
            except Exception as error:
                if not hasattr(error, "problem"):
                    raise
                field = str(getattr(error, "field", ""))
                if field.split(".")[0] not in ("model", "data", "budget", "training", "task"):
                    found[row["id"]] = {"error": error.problem}
        return found

    def as_text(given: dict) -> dict:
        spec = RunSpec.from_dict(_plain(given["spec"]))
        return {"yaml": spec.to_yaml(), "command": command(spec.to_dict(), catalog.presets(), methods())}

    def preset(given: dict) -> dict:
        for row in presets(home):
            if row["id"] == given["name"]:
                return {"spec": row["spec"]}
        return _refusal(f"There is no preset called {given['name']}. Choose one from the list.")

    def save_preset(given: dict) -> dict:
        name = re.sub(r"[^\w.-]+", "-", str(given.get("name") or "").strip()).strip("-.").lower()[:60]
        if not name:
            return _refusal("The preset needs a name. Give one such as prune-half-then-int8.")
        if any(p["id"] == name and not p["own"] for p in presets(home)):
            return _refusal(f"{name} is a bundled preset. Give another name.")
        spec = RunSpec.from_dict(_plain(given["spec"])).to_dict()
        spec.pop("name", None)
        own = dict(home.store.get_setting(OWN_PRESETS, {}))
        own[name] = spec
        home.store.set_setting(OWN_PRESETS, own)
        return {"id": name, "presets": presets(home)}

    def start(given: dict) -> dict:
        from workbench import runs
        run = runs.start(RunSpec.from_dict(_plain(given["spec"])), queue=bool(given.get("queue")), force=bool(given.get("force")),
                         parent=given.get("parent"), home=home)
        waiting = home.store.count_runs(status=("queued",))
        return {"run": run["id"], "name": run["name"], "next_name": fresh(), "place": f"place {waiting}" if given.get("queue") else ""}

    def clone(given: dict) -> dict:
        from workbench import runs
        row = home.store.run(given["run"])
        return {"spec": runs.clone(row["id"], home=home), "name": row["name"], "run": row["id"]}

    def hub(given: dict) -> dict:
        from workbench import hub as hubs
        return {"rows": hubs.search(given["kind"], str(given.get("text") or ""))}

    def upload(given: dict) -> dict:
        from gradio.utils import get_upload_folder

        from workbench import uploads
        return {"path": uploads.keep(home, str(given["path"]), str(given["name"]), get_upload_folder())}

    return [boot, plan, profile, preview, costs, as_text, preset, save_preset, start, clone, hub, upload, *probe_functions(home)]


def _refusal(text: str) -> dict:
    return {"error": {"text": text}}


def build(home) -> None:
    """The page at ``/``."""
    functions = server_functions(home)
    component("new_run", scripts=PARTS, server_functions=functions)

    def warm() -> None:     # the first visitor must not wait for the first forecast's imports, nor the Library's for counting
        try:
            from workbench import catalog
            functions[1]({"spec": functions[0]({})["spec"]})
            catalog.data()
        except Exception:   # said on the page, with the remedy
            pass
    threading.Thread(target=warm, name="new-run-warm", daemon=True).start()
