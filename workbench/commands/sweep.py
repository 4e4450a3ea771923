"""``sweep``: many runs of one spec over a space of its fields."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from engines.errors import InputError
from workbench import cli_shared


def register(add) -> None:
    p = add("sweep", "search over any field of a spec, several objectives", act, spec=True)
    p.add_argument("--over", action="append", default=[], metavar="PATH=VALUES",
                   help="a field: training.lr=1e-4..1e-2:log, pipeline.0.rank=2,4,8, pipeline.0.sparsity=0.3..0.7:step=0.1")
    p.add_argument("--trials", metavar="N", help="how many runs (20; a grid: all)")
    p.add_argument("--minutes-total", metavar="N", help="minutes of the whole sweep")
    p.add_argument("--objective", action="append", metavar="NAME",
                   help="quality, seconds, memory, size, trainable or joules; repeat")
    p.add_argument("--sampler", help="tpe, random, grid or nsga2")
    p.add_argument("--pruner", help="none, median, hyperband or halving: stop hopeless trials early")
    p.add_argument("--sweep-seed", metavar="N", help="seed of the sampler")
    p.add_argument("--on", metavar="ADDRESS", help="run the trials on a Ray cluster: ray://HOST:PORT or HOST:PORT")
    p.add_argument("--detach", action="store_true", help="return as soon as it is started")
    p.add_argument("--list", action="store_true", dest="listing", help="list the sweeps")
    for name, help in (("show", "everything about a sweep"), ("stop", "end a sweep"), ("resume", "go on with a sweep")):
        p.add_argument(f"--{name}", metavar="SWEEP", help=help)


def act(args) -> int | None:
    from workbench.cli_shared import home_of
    from workbench.sweeps import service, view

    home = home_of()
    if args.listing:
        found = view.listing(home)
        return cli_shared.emit(found) if args.json else _list(found)
    if args.show:
        found = view.status(args.show, home=home)
        return cli_shared.emit(found) if args.json else _show(found)
    if args.stop:
        row = service.stop(args.stop, home=home)
        return _said(args, row, f"{row['name']} (sweep {row['id']}) stops; its running trials are evaluated and kept")
    if args.resume:
        row = service.resume(args.resume, home=home, trials=_number(args.trials), minutes=_number(args.minutes_total))
    else:
        spec, section = plan_of(args)
        row = service.start(spec, section, name=args.name, home=home)
        if not args.json:
            print(f"{row['name']} (sweep {row['id']}). {row['forecast']['text']}", file=sys.stderr)
    if args.detach:
        return _said(args, row, f"{row['name']} (sweep {row['id']}) is running; `python -m workbench sweep --show {row['id']}`")
    try:
        found = follow(home, row["id"], args.json)
    except KeyboardInterrupt:
        return cli_shared.complain(f"{row['name']} goes on without this terminal; "
                            f"`python -m workbench sweep --stop {row['id']}` ends it", 1)
    cli_shared.emit(found) if args.json else _show(found)
    return cli_shared.complain(found["message"] or "the sweep failed", 1) if found["status"] == "failed" else 0


def _said(args, row: dict, text: str) -> None:
    cli_shared.emit({"sweep": row["id"], "name": row["name"], "status": row["status"]}) if args.json else print(text)


def _number(text: str | None):
    return None if text is None else cli_shared.value(text)


# -- what is asked for -------------------------------------------------------------------------------------------------
def plan_of(args) -> tuple[dict, dict]:
    """The base spec and the ``sweep:`` section that the file and the flags describe; flags win.

    Raises:
        InputError: a flag or the file cannot be read.
    """
    section: dict = {}
    path = Path(args.spec).expanduser() if args.spec else None
    if path is not None and path.is_file():
        import yaml

        from workbench.spec import read_yaml
        try:
            tree = read_yaml(path.read_text())
        except ValueError as e:
            raise InputError("spec", args.spec, str(e), "Check indentation, colons and brackets there") from None
        if isinstance(tree, dict) and "sweep" in tree:
            section = tree.pop("sweep") or {}
            with tempfile.TemporaryDirectory() as folder:
                args.spec = str(Path(folder) / path.name)
                Path(args.spec).write_text(yaml.safe_dump(tree, sort_keys=False))
                spec = cli_shared.spec_of(args)
        else:
            spec = cli_shared.spec_of(args)
    else:
        spec = cli_shared.spec_of(args)
    if not isinstance(section, dict):
        raise InputError("sweep", section, "not a mapping of fields", "Write sweep: followed by over:, trials: and objectives:")
    section = dict(section)
    if args.over:
        section["over"] = dict(section.get("over") or {}) | dict(over(text) for text in args.over)
    if args.objective:
        section["objectives"] = [o.strip() for given in args.objective for o in given.split(",")]
    for key, given in (("trials", args.trials), ("minutes", args.minutes_total), ("seed", args.sweep_seed)):
        if given is not None:
            section[key] = cli_shared.value(given)
    for key in ("sampler", "pruner", "on"):
        if getattr(args, key) is not None:
            section[key] = getattr(args, key)
    return spec.to_dict(), section


RANGE = re.compile(r"^([-+.\deE_]+)\.\.([-+.\deE_]+)((?::(?:log|step=[-+.\deE_]+))*)$")


def over(text: str) -> tuple[str, list | dict]:
    """``training.lr=1e-4..1e-2:log`` or ``pipeline.0.rank=2,4,8`` as path and values.

    Raises:
        InputError: not of one of these forms.
    """
    path, found, given = text.partition("=")
    if not found or not given.strip():
        raise InputError("--over", text, "not of the form PATH=VALUES", "Write for example --over training.lr=1e-4..1e-2:log")
    given = given.strip()
    match = RANGE.match(given)
    if match:
        out = {"low": cli_shared.value(match[1]), "high": cli_shared.value(match[2])}
        for extra in filter(None, match[3].split(":")):
            out |= {"log": True} if extra == "log" else {"step": cli_shared.value(extra.removeprefix("step="))}
        return path.strip(), out
    if ".." in given and not given.startswith("["):
        raise InputError("--over", text, "not a range", "Write LOW..HIGH, LOW..HIGH:log or LOW..HIGH:step=S")
    values = cli_shared.value(f"[{given}]") if not given.startswith("[[") else cli_shared.value(given)
    if not isinstance(values, list):
        raise InputError("--over", text, "not a list of values", "Write for example --over pipeline.0.rank=2,4,8")
    return path.strip(), values


# -- what is said -------------------------------------------------------------------------------------------------------
def follow(home, sweep_id: int, quiet: bool) -> dict:
    """Wait for a sweep to end; a line for each trial that ends."""
    from workbench.sweeps import service, view
    told: set[int] = set()
    while True:
        row = home.store.sweep(sweep_id)
        if service.silent(row):
            service.revive(home)
        if not quiet:
            names = list(row["plan"]["objectives"])
            for trial in home.store.trials(sweep_id):
                if trial["state"] != "running" and trial["number"] not in told:
                    told.add(trial["number"])
                    print(line(trial, names, row["plan"]["trials"]), file=sys.stderr)
        if row["status"] != "running":
            return view.status(sweep_id, home=home)
        time.sleep(0.25)


def line(trial: dict, names: list[str], count: int) -> str:
    from workbench.sweeps.space import label
    params = ", ".join(f"{path}={label(v)}" for path, v in (trial["params"] or {}).items())
    values = ", ".join(f"{n} {figure(n, v)}" for n, v in zip(names, trial["values"] or ()))
    return f"{trial['number'] + 1}/{count} {trial['state']}: {params}" + (f" -> {values}" if values else "") + (
        f" ({trial['message']})" if trial["message"] else "")


def figure(name: str, value) -> str:
    if value is None:
        return "none"
    if name == "memory":
        return f"{value / 1e9:.2f} GB"
    if name == "size":
        return f"{value / 1e6:.2f} MB"
    if name == "trainable":
        return f"{value:,.0f}"
    unit = {"seconds": " s", "joules": " J"}.get(name, "")
    return f"{value:.4g}{unit}"


def _list(found: list[dict]) -> None:
    from workbench.cli_shared import table
    if not found:
        return print("no sweeps yet")
    table([(row["id"], row["name"], row["status"], f"{sum(row['counts'].values())}/{row['trials']}", ", ".join(row["objectives"]),
            ", ".join(row["over"]) or "a list of specs") for row in found],
          ("sweep", "name", "status", "trials", "objectives", "over"))


def _show(found: dict) -> None:
    from workbench.cli_shared import table
    counts = ", ".join(f"{n} {state}" for state, n in found["counts"].items())
    print(f"{found['name']} (sweep {found['id']}): {found['status']}; {counts or 'no trials'}"
          + (f". {found['message']}" if found["message"] else ""))
    names = [o["name"] for o in found["objectives"]]
    chosen = [t for t in found["trials"] if t["number"] in found["front"]]
    if not chosen:
        return
    chosen.sort(key=lambda t: t["values"][0], reverse=found["objectives"][0]["direction"] == "maximize")
    print("Best trial:" if len(names) == 1 else "Pareto front (no trial is better in every objective):")
    from workbench.sweeps.space import label
    table([(t["number"] + 1, t["name"], *(figure(n, v) for n, v in zip(names, t["values"])),
            t["label"] or ", ".join(f"{path}={label(v)}" for path, v in t["params"].items())) for t in chosen],
          ("trial", "run", *names, "settings"))
    for objective, shares in zip(found["objectives"], found["importance"]):
        if shares:
            print(f"What moves {objective['name']}: " + ", ".join(f"{p} {share:.0%}" for p, share in shares.items()))
