"""``merge RUN RUN ...``: add the adapters of several runs to their common model."""

from __future__ import annotations


def register(add) -> None:
    p = add("merge", "add the adapters of several runs to their common model, and score the sum on each run's data", act)
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs on one base model, each with an adapter (lora, orthogonal-adaptation ...)")
    p.add_argument("--weights", metavar="W", help="weight of each adapter with commas between, or one for all; default 1")
    p.add_argument("--out", metavar="NAME", help="name of the merged run")
    p.add_argument("--detach", action="store_true", help="do not wait for it")


def act(args):
    from engines.errors import InputError
    from workbench import cli_run, merging
    from workbench.cli_shared import home_of, table
    home = home_of()
    try:
        weights = [float(w) for w in args.weights.split(",")] if args.weights else None
    except ValueError:
        raise InputError("weights", args.weights, "not numbers with commas between", "Give for example 0.6 or 1,0.5") from None
    made = merging.spec(args.runs, weights, args.out, home=home)

    def tell(run_id: int) -> None:
        found = merging.figures(run_id, home)
        rows = [(r["data"], f"{r['weight']:g}", f"{r['alone']:.4f}", f"{r['merged']:.4f}", r["metric"]) for r in found.get("parents") or ()]
        if rows:
            table(rows, ("data", "weight", "alone", "merged", "metric"))
        for key, what in (("overlap", "overlap of the input factors"), ("crosstalk", "loudness of the others on own inputs")):
            values = [v for v in (found.get(key) or {}).values() if v is not None]
            if values:
                print(f"{what}: {sum(values) / len(values):.3f} on average, {max(values):.3f} at most")

    return cli_run.launch(made, args, parent=home.store.run_id(args.runs[0]), more=lambda run_id: {"merge": merging.figures(run_id, home)}, tell=tell)
