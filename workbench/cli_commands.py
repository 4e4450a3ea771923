"""What each command of the command line does; modules are imported where they are used, so that ``methods`` is quick."""

from __future__ import annotations

from pathlib import Path

from engines.errors import InputError
from workbench.cli_shared import complain, emit, giga, home_of, mega, show_plan, spec_of, table
from workbench.remedies import clock


# -- what there is -----------------------------------------------------------------------------------------------------
def models(args) -> None:
    from workbench import catalog

    found = catalog.model(args.model) if args.model else catalog.models()
    if args.json:
        return emit(found)
    if args.model:
        sizes = ", ".join(f"{k} {mega(v)}" for k, v in found["bytes_by_dtype"].items())
        print(
            f"{found['id']}: {found['architecture']}, {found['task']}, {found['parameters']:,} parameters, "
            f"stored as {found['dtype']}\n"
            f"{found['layers']} layers, hidden {found['hidden']}, {found['heads']} heads, MLP {found['mlp']}, "
            f"vocabulary {found['vocab']:,}, "
            f"context {found['context']}\n{sizes}"
        )
        return None
    return table(
        [
            (r["id"], r["architecture"], r["task"], f"{r['parameters']:,}", r["dtype"], mega(r["size_bytes"]), r["title"])
            for r in found
        ],
        ("id", "architecture", "task", "parameters", "stored", "size", "title"),
    )


def data(args) -> None:
    from workbench import catalog

    if not args.data:
        found = catalog.data()
        if args.json:
            return emit(found)
        return table(
            [(r["id"], r["task"], r["train"], r["evaluation"], r["title"]) for r in found],
            ("id", "task", "train", "evaluation", "title"),
        )
    found = catalog.preview(args.data, rows=args.rows, task=args.task, text=args.text, label=args.label)
    if args.json:
        return emit(found)
    print(
        f"{args.data}: {found['task']}, {found['counts']['train']:,} training and "
            f"{found['counts']['evaluation']:,} evaluation rows"
    )
    print("columns: " + ", ".join(found["columns"]) + (f"; {len(found['labels'])} labels" if found["labels"] else ""))
    for row in found["rows"]:
        text = " ".join(str(row.get("text", "(image)")).split())
        print(f"  {str(row.get('label', '')):<12} {text[:90]}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    return None


def methods(args) -> None:
    from engines.method import FAMILIES, SWITCH
    from workbench import catalog

    if args.method:
        found = catalog.method(args.method)
        if args.json:
            return emit(found)
        print(
            f"{found['name']} ({found['id']}, {found['family']}): {found['summary']}\nPaper: {found['title']}"
            + (f", {found['year']}" if found["year"] else "")
        )
        for title, key in (("needs", "needs"), ("cannot", "cannot")):
            print(f"{title}: " + "; ".join(found[key]) if found[key] else f"{title}: nothing")
        return table(
            [
                (
                    h["name"],
                    h["default"],
                    f"{h['low']} to {h['high']}"
                    if h["low"] is not None or h["high"] is not None
                    else ", ".join(map(str, h["choices"]))
                    if h["choices"]
                    else "",
                    h["lever"] or "",
                    h["help"],
                )
                for h in found["hyperparameters"]
            ],
            ("field", "default", "range", "lever", "help"),
        )
    if args.family and args.family not in (*FAMILIES, SWITCH):
        raise InputError("--family", args.family, "there is no such family", "Choose " + ", ".join((*FAMILIES, SWITCH)))
    found = [m for m in catalog.methods() + catalog.switches() if not args.family or m["family"] == args.family]
    if args.json:
        return emit(found)
    return table([(m["id"], m["family"], m["name"], m["summary"]) for m in found], ("id", "family", "name", "summary"))


# -- before and during a run -------------------------------------------------------------------------------------------
def plan(args) -> int:
    from workbench import planner

    if args.probe:
        from workbench.commands import probe

        return probe.act(args)
    spec = spec_of(args)
    found = planner.forecast(spec)
    if args.json:
        emit({**found, "spec": spec.to_dict()})
    else:
        show_plan(found)
    return 0


# -- runs --------------------------------------------------------------------------------------------------------------
def runs(args) -> None:
    from storage.runs import STATES

    if args.status and args.status not in STATES:
        raise InputError("--status", args.status, "not a state of a run", "Choose " + ", ".join(STATES))
    rows = home_of().store.runs(status=args.status, search=args.search, tag=args.tag, limit=args.limit)
    if args.json:
        return emit(rows)
    return table(
        [
            (
                r["id"],
                r["name"],
                r["status"],
                r["metric"] or "",
                f"{r['base_value']:.4f}" if r["base_value"] is not None else "",
                f"{r['value']:.4f}" if r["value"] is not None else "",
                clock(r["seconds"]) if r["seconds"] else "",
                giga(r["peak_bytes"]) if r["peak_bytes"] else "",
                mega(r["size_bytes"]) if r["size_bytes"] else "",
            )
            for r in rows
        ],
        ("run", "name", "status", "metric", "before", "after", "time", "memory", "size"),
    )


def show(args) -> None:
    from workbench import runs as running
    from workbench.cli_run import show_result

    found = running.results(args.run, home=home_of())
    emit(found) if args.json else show_result(found)


def points(args) -> None:
    store = home_of().store
    run_id = store.run_id(args.run)
    known = {s["name"]: s for s in store.series(run_id)}
    if args.series is None:
        rows = list(known.values())
        return (
            emit(rows)
            if args.json
            else table(
                [(s["name"], s["count"], s["last_step"], s["last_value"]) for s in rows], ("series", "points", "step", "value")
            )
        )
    if args.series not in known:
        from engines.registry import suggestion

        raise InputError("series", args.series, "the run has no such series", suggestion(args.series, known))
    if args.buckets is not None and args.buckets < 1:
        raise InputError("--buckets", args.buckets, "not above zero", "Give for example 500")
    found = store.points(run_id, args.series, since=args.since, buckets=args.buckets)
    if args.json:
        return emit({"run": run_id, "series": args.series, **found})
    for step, value, t in zip(found["step"], found["value"], found["t"]):
        print(f"{step}\t{value:.6g}\t{t:.3f}")
    return None


def compare(args) -> None:
    from workbench import compare as comparing
    from workbench import runs as running
    from workbench.paired import paired

    home = home_of()
    readings = []
    if args.at:
        from workbench import cli_equal

        readings = cli_equal.read(args.at, args.run, args.y, home)
        if not args.json:
            for i, reading in enumerate(readings):
                print(end="\n" if i else "")
                cli_equal.show(reading)
            return None
    found = [running.results(r, home=home) for r in args.run]
    rows = [
        {
            "run": f["run"],
            "name": f["name"],
            "status": f["status"],
            "pipeline": [s["method"] for s in f["stages"]],
            "seconds": f["seconds"],
            "evaluation": f["evaluation"]["after"],
            "before": f["evaluation"]["before"],
            "peak_bytes": f["footprint"].get("peak_bytes"),
            "size_bytes": f["footprint"].get("size_bytes"),
            "trainable": f["footprint"].get("trainable"),
        }
        for f in found
    ]
    pairs = []
    for other in found[1:]:
        try:
            pairs.append(paired(found[0]["run"], other["run"], home=home))
        except InputError as e:  # runs on other data can be shown side by side, but not tested item by item
            pairs.append({"a": found[0]["run"], "b": other["run"], "text": str(e)})
    differences = comparing.diff([f["run"] for f in found], home=home) if len(found) > 1 else None
    if args.json:
        return emit({"runs": rows, "paired": pairs, "settings": differences, **({"equal": readings} if readings else {})})
    table(
        [
            (
                r["run"],
                r["name"],
                " -> ".join(r["pipeline"]),
                f"{r['evaluation']['value']:.4f} [{r['evaluation']['interval'][0]:.4f}, "
                f"{r['evaluation']['interval'][1]:.4f}] {r['evaluation']['metric']}"
                if r["evaluation"]
                else "",
                clock(r["seconds"] or 0),
                giga(r["peak_bytes"]),
                mega(r["size_bytes"]),
            )
            for r in rows
        ],
        ("run", "name", "pipeline", "result", "time", "memory", "size"),
    )
    for p in pairs:
        print(p.get("text", ""))
    return None


def control(args) -> int:
    """stop, pause, resume."""
    from workbench import runs as running

    home = home_of()
    row = getattr(running, args.command)(args.run, home=home)
    if args.command == "resume":
        from workbench import dispatcher
        from workbench.cli_run import begun

        feeder = dispatcher.Dispatcher(home, keep_warm=False).start()
        try:
            row = begun(home, row["id"])
        finally:
            feeder.stop()
    found = {"run": row["id"], "name": row["name"], "status": row["status"], "wish": row["wish"]}
    emit(found) if args.json else print(
        f"{row['name']} (run {row['id']}): {row['status']}" + (f", {row['wish']} asked for" if row["wish"] else "")
    )
    return 0


# -- with results ------------------------------------------------------------------------------------------------------
def tryout(args) -> int:
    from workbench import tryout as trying

    home = home_of()
    tasks = [trying.resolve(home, v)["task"] for v in args.variant]
    if len(set(tasks)) > 1:
        raise InputError("try", ", ".join(args.variant), "they perform different tasks: " + ", ".join(sorted(set(tasks))),
                         "Name variants of one task")
    images = tasks[0] == "image-classification"
    if not images and not args.prompt:
        raise InputError("try.prompt", None, "there is nothing to continue or to classify", 'Add --prompt "..."')
    if images:
        where = {"image": Path(args.image)} if args.image else {"data": args.data or "digits", "item": args.item}
        request = trying.classify(home, args.variant, **where)
    elif tasks[0] == "text-classification":
        request = trying.classify(home, args.variant, text=args.prompt)
    else:
        request = trying.generate(home, args.variant, args.prompt, seed=args.seed, temperature=args.temperature, top_p=args.top_p,
                                  new_tokens=args.new_tokens)
    rows = trying.collect(home, request["id"])
    found = [{"variant": v["name"], **row} for v, row in zip(request["variants"], rows)]
    if args.json:
        emit(found)
    else:
        for row in found:
            print(f"-- {row['variant']}")
            print(row.get("error") or row.get("text") or row.get("p") or row)
    failed = [row for row in found if row.get("error")]
    return complain(failed[0]["error"], 1) if failed else 0


def export(args) -> None:
    from workbench import export as exporting

    home = home_of()
    found = exporting.export(home.store.run_id(args.run), args.folder, format=args.format, home=home)
    emit(found) if args.json else print(f"written to {args.folder}")


def report(args) -> None:
    from workbench import report as reporting

    if len(args.run) < 2:
        raise InputError("report", " ".join(args.run), "a run and a file are needed", "Write for example: report 12 13 page.html")
    home = home_of()
    *wanted, file = args.run
    if file.isdigit() or not file.lower().endswith((".html", ".htm")):
        raise InputError("report", file, "the last argument is not an HTML file", "Name a file that ends in .html")
    found = reporting.report([home.store.run_id(r) for r in wanted], Path(file), home=home)
    emit(found) if args.json else print(f"written to {file}")


# -- doctor ------------------------------------------------------------------------------------------------------------
def doctor(args) -> int:
    from workbench.checkup import checks

    rows = checks(args.measure)
    if args.json:
        emit({"ok": all(r["ok"] for r in rows if r["needed"]), "checks": rows})
    else:
        for r in rows:
            print(
                f"{'ok  ' if r['ok'] else 'FAIL' if r['needed'] else 'note'}  {r['name']}: {r['text']}"
                + (f" {r['remedy']}" if r["remedy"] else "")
            )
    return 0 if all(r["ok"] for r in rows if r["needed"]) else 1
