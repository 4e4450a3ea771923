"""What the commands share: how a spec is read from flags, how a result is printed, how a refusal is told."""

from __future__ import annotations

import argparse
import json
import sys

from engines.errors import InputError
from workbench.remedies import clock

LIMIT_FLAGS = ("minutes", "steps", "tokens", "memory-gb", "trainable", "size-mb", "joules", "quality")


def spec_flags(p: argparse.ArgumentParser) -> None:
    """SPEC as a file, a preset's name, or flags; flags win over the file."""
    p.add_argument("spec", nargs="?", metavar="SPEC", help="YAML file or preset name")
    p.add_argument("--model")
    p.add_argument("--data", metavar="SOURCE")
    p.add_argument("--method", action="append", metavar="ID[:field=value,...]", help="a stage; repeat for a pipeline")
    p.add_argument("--switch", action="append", metavar="ID[:field=value,...]", help="switched on in the training, such as grades; repeat for several")
    for name in LIMIT_FLAGS:
        p.add_argument(f"--{name}", metavar="N", help=f"limit: {name}")
    p.add_argument("--seed", metavar="N")
    p.add_argument("--name")
    p.add_argument("--task")
    p.add_argument(
        "--set", action="append", metavar="KEY=VALUE", default=[], help="any field, dotted: training.batch=8, pipeline.0.rank=4"
    )


def value(text: str):
    """A flag's value as YAML reads it: numbers, true, null, or text."""
    from workbench.spec import read_yaml

    try:
        return read_yaml(text)
    except ValueError:
        return text


def stage(text: str, flag: str = "--method") -> dict:
    """``lora:rank=8,targets=all`` as a stage.

    Raises:
        InputError: a field without ``=``.
    """
    id, _, rest = text.partition(":")
    made = {"method": id.strip()}
    for pair in filter(None, (p.strip() for p in rest.split(","))):
        name, found, given = pair.partition("=")
        if not found:
            raise InputError(flag, text, f"{pair!r} is not of the form field=value", "Write for example lora:rank=8")
        made[name.strip()] = value(given)
    return made


def spec_of(args):
    """The ``RunSpec`` that the arguments describe.

    Raises:
        InputError: nothing names a model, or a field is refused.
    """
    from workbench import spec as specs

    if args.spec:
        base = specs.load(args.spec).to_dict()
    elif args.model and args.data:
        base = {"model": args.model, "data": args.data, "pipeline": []}
    else:
        names = sorted(p.stem for p in specs.PRESETS.glob("*.yaml"))
        raise InputError(
            "spec",
            args.spec,
            "neither a spec nor both --model and --data are given",
            "Name a YAML file, one of the presets (" + ", ".join(names) + "), or give --model and --data",
        )
    for name in ("model", "data", "name", "task"):
        if getattr(args, name) is not None:
            base[name] = getattr(args, name)
    if args.method:
        base["pipeline"] = [stage(m) for m in args.method]
    if args.switch:
        base["training"] = {**(base.get("training") or {}), "switches": [stage(s, "--switch") for s in args.switch]}
    budget = dict(base.get("budget") or {})
    for name in LIMIT_FLAGS:
        key = name.replace("-", "_")
        given = getattr(args, key)
        if given is not None:
            given = value(given)
            if given in (None, "none", "no"):
                budget.pop(key, None)
                continue
            budget[key] = given
            if key in ("steps", "tokens"):  # two names for one limit: the flag replaces the other of the file
                budget.pop("tokens" if key == "steps" else "steps", None)
    base["budget"] = budget
    if args.seed is not None:
        base["seed"] = value(args.seed)
    built = specs.RunSpec.from_dict(base)
    for pair in args.set:
        path, found, given = pair.partition("=")
        if not found:
            raise InputError("--set", pair, "it is not of the form key=value", "Write for example --set training.batch=8")
        built = built.setting(path.strip(), value(given))
    return built


def complain(what, code: int) -> int:
    """One sentence on stderr."""
    text = " ".join(str(what).split()).replace("?.", "?")
    print(text if text.endswith((".", "?", "!")) else text + ".", file=sys.stderr)
    return code


def emit(found) -> None:
    """One JSON object or list on stdout."""
    print(
        json.dumps(found, ensure_ascii=False, default=str, allow_nan=False)
        if not _has_nan(found)
        else json.dumps(_finite(found), default=str)
    )


def _has_nan(found) -> bool:
    try:
        json.dumps(found, default=str, allow_nan=False)
    except ValueError:
        return True
    return False


def _finite(found):
    """JSON has no NaN: such values become null."""
    if isinstance(found, dict):
        return {k: _finite(v) for k, v in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(v) for v in found]
    if isinstance(found, float) and (found != found or found in (float("inf"), float("-inf"))):
        return None
    return found


def table(rows: list[tuple], heads: tuple[str, ...]) -> None:
    """Columns with two spaces between; numbers to the right, text to the left."""
    cells = [[str(c) for c in heads]] + [["" if c is None else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    right = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) and bool(rows) for i in range(len(heads))]
    for row in cells:
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip())


def mega(count) -> str:
    return f"{(count or 0) / 1e6:.2f} MB"


def giga(count) -> str:
    return f"{(count or 0) / 1e9:.2f} GB"


def home_of():
    from workbench.home import Home

    return Home.open()


def show_plan(found: dict) -> None:
    """The forecast in lines for people."""
    print(found["text"])
    memory = {p["phase"]: p["total"] for p in found["memory"]["phases"]}
    table(
        [(p["phase"], clock(p["seconds"]), giga(memory.get(p["phase"], 0))) for p in found["seconds"]["phases"]],
        ("phase", "time", "memory"),
    )
    size, t = found["size"], found["trainable"]
    print(
        f"total {clock(found['seconds']['total'])}, peak {giga(found['memory']['peak_bytes'])} "
            f"in {found['memory']['peak_phase']}; "
        f"{found['steps']:,} steps, {found['tokens']:,} {found['units']}"
    )
    print(
        f"{t['count']:,} trainable ({t['share']:.2%}); {mega(size['before_bytes'])} to {mega(size['bytes'])} on disk, "
        f"{size['bits_per_weight']:.2f} bits per weight, {size['sparsity']:.0%} zeros"
    )
    for choice in found["chosen"]:
        print(f"  {choice['what']} = {choice['value']}: {choice['why']}")
    for change in found["changes"]:
        print(f"  would fit: {change['text']}")
