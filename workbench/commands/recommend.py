"""``recommend``: which pipelines to try under a budget."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def register(add) -> None:
    p = add("recommend", "the pipelines that fit a budget, by expected quality", act, spec=True)
    p.add_argument("--family", action="append", default=[], help="only pipelines with a method of this family; repeat for several")
    p.add_argument("--count", type=int, default=12, help="rows at most")
    p.add_argument("--save", metavar="FILE", help="write the rows into a YAML file that `sweep` runs")


def act(args) -> int:
    """Rank, print, and say how to run the first row or all of them.

    Raises:
        InputError: a field is refused, or no pipeline can keep the limits.
    """
    from engines.errors import InputError
    from workbench import recommend
    from workbench.cli_shared import emit, spec_of

    if args.count < 1:
        raise InputError("--count", args.count, "no row would be left", "Give for example 12")
    found = recommend.recommend(spec_of(args), count=args.count, families=tuple(args.family))
    if not found["fitting"]:
        recommend.refuse(found)
    if args.save:
        save(found, Path(args.save).expanduser())
    if args.json:
        emit(found)
    else:
        show(found, args.save)
    return 0


def show(found: dict, saved: str | None = None) -> None:
    """A table for people."""
    from workbench.cli_shared import giga, mega, table
    from workbench.remedies import clock

    def row(r: dict) -> tuple:
        return (r["tier"] or "", r["text"], outcome(r["expected"]), {"history": "runs", "transfer": "part", "prior": "prior"}[r["expected"]["source"]],
                clock(r["seconds"]), giga(r["peak_bytes"]), mega(r["size_bytes"]), f"{r['trainable']['count']:,}", r["why"])

    heads = ("tier", "pipeline", "expected", "from", "time", "memory", "size", "trainable", "why")
    base = "" if found["base"] is None else f", {number(found['base'], found['metric'])} {unit(found['metric'])} as it is"
    print(f"{found['model']} on {found['data']}{base}: {found['fitting']} of {found['considered']} pipelines fit.")
    print(found["basis"])
    for note in found["notes"]:
        print(note)
    if found["rows"]:
        print()
        table([row(r) for r in found["rows"]], heads)
    if found["nearest"]:
        print("\nNearest of those that do not fit, with the smallest change:")
        for r in found["nearest"]:
            print(f"  {r['text']}: {r['change']['text'] if r['change'] else 'no single change is enough'}")
    if found["rows"]:
        print(f"\nRun the first:  python -m workbench run {flags(found['rows'][0]['spec'])}")
        file = shlex.quote(saved or "sweep.yaml")
        print(f"Sweep over all: {'' if saved else f'add --save {file} here, then '}python -m workbench sweep {file}")


def save(found: dict, path: Path) -> None:
    """The rows as a sweep over a list of specs.

    Raises:
        InputError: the file cannot be written.
    """
    import yaml

    from engines.errors import InputError
    # Parts that are shared would become YAML's aliases.
    base, *specs = json.loads(json.dumps([r["spec"] for r in found["rows"][:1] + found["rows"]])) or [{}]
    try:
        path.write_text(yaml.safe_dump({**base, "sweep": {"specs": [json.loads(json.dumps(s)) for s in specs]}}, sort_keys=False, width=110))
    except OSError as e:
        raise InputError("--save", str(path), f"it cannot be written ({e.strerror})", "Give a file in a folder of yours") from None


def unit(metric: str) -> str:
    return "%" if metric == "accuracy" else metric


def number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric == "accuracy" else f"{value:.3f}"


def outcome(e: dict) -> str:
    """``1.271 (1.243 to 1.299)``, or relative to the base where that is unknown."""
    if e["value"] is not None:
        low, high = number(e["low"], e["metric"]), number(e["high"], e["metric"])
        return f"{number(e['value'], e['metric'])} ({low} to {high}) {unit(e['metric'])}"
    if e["metric"] == "accuracy":
        return f"{e['gain']:+.2f} ({e['gain_low']:+.2f} to {e['gain_high']:+.2f}) log-odds"
    from math import exp
    change = [f"{100 * (exp(-g) - 1):+.1f}" for g in (e["gain"], e["gain_high"], e["gain_low"])]
    return f"{change[0]} % ({change[1]} to {change[2]}) bits"


def flags(spec: dict) -> str:
    """The options of ``run`` for a spec."""
    import yaml
    words = []
    data = spec["data"]
    words += [f"--model {shlex.quote(spec['model'])}", f"--data {shlex.quote(data if isinstance(data, str) else data['source'])}"]
    plain = lambda v: yaml.safe_dump(v, default_flow_style=True).strip().removesuffix("...").strip()  # noqa: E731
    for stage in spec["pipeline"]:
        pairs = ",".join(f"{k}={plain(v)}" for k, v in stage.items() if k != "method")
        words.append("--method " + shlex.quote(stage["method"] + (":" + pairs if pairs else "")))
    words += [f"--{k.replace('_', '-')} {v:g}" if isinstance(v, float) else f"--{k.replace('_', '-')} {v}" for k, v in spec["budget"].items()]
    words += [f"--set {shlex.quote(f'training.{k}={plain(v)}')}" for k, v in (spec.get("training") or {}).items()]
    if not isinstance(data, str):
        words += [f"--set {shlex.quote(f'data.{k}={plain(v)}')}" for k, v in data.items() if k != "source"]
    return " ".join(words)
