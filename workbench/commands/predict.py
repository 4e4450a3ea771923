"""``predict``: ask a planning law, fitted to this database's runs, to a table of points, or with published constants."""

from __future__ import annotations

OPTIONS = (
    ("compute", "compute budget, FLOP"),
    ("minutes", "budget in minutes"),
    ("seconds", "training time in seconds"),
    ("parameters", "parameters of the model"),
    ("tokens", "training tokens"),
    ("ratio", "tokens for each parameter"),
    ("steps", "optimizer steps"),
    ("schedule", "cosine, linear, constant, wsd or best"),
    ("peak", "highest learning rate"),
    ("warmup", "share of the steps"),
    ("final", "last learning rate as a share of the peak"),
    ("decay", "share of the steps in which WSD falls"),
    ("lambda", "forgetting of the annealing momentum"),
    ("layers", "blocks"),
    ("hidden", "width"),
    ("mlp", "width of the MLP"),
    ("batch", "rows of a step"),
    ("length", "tokens of a row"),
    ("vocab", "vocabulary"),
    ("bits", "bits of a weight"),
    ("memory", "limit of the weights, MB"),
    ("sparsity", "sparsity at the end, 0 to 1"),
    ("begin", "share of the compute at which pruning begins"),
    ("end", "share at which it ends"),
    ("shape", "cubic, linear or at once"),
    ("tau", "gain below which more training is not worth it"),
    ("series", "loss, loss_eval or metric"),
    ("unit", "whose minutes: reference or here"),
    ("here", "seconds of the reference step on this machine"),
    ("reference", "seconds of the reference step on the reference system"),
    ("reliability", "lower end of Kendall's tau that is wanted"),
    ("difference", "difference between two runs that must be seen"),
)
"""Every option of every law; a test holds the list to the cards."""


def register(add) -> None:
    p = add("predict", "ask a planning law: size, tokens, time, schedule, bits, when to stop, how many items", predict)
    p.add_argument("law", nargs="?", help="planner; without one they are listed")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--runs", metavar="QUERY", help="fit to these runs (numbers, or a query such as data:python-docs); all unless given")
    where.add_argument("--points", metavar="FILE", help="fit to a CSV or JSON table; `predict LAW --card` names its columns")
    where.add_argument("--published", action="store_true", help="use the paper's constants")
    where.add_argument("--example", action="store_true", help="use labelled synthetic data, to see what the law does")
    p.add_argument("--card", action="store_true", help="what the law needs, claims and can be asked")
    for name, help in OPTIONS:
        p.add_argument(f"--{name}", metavar="X", dest=f"law_{name}", help=help)


def predict(args):
    from engines.errors import InputError
    from workbench import laws
    from workbench.cli_shared import emit

    if not args.law:
        rows = laws.cards()
        if args.json:
            return emit(rows)
        return show_list(rows)
    law = laws.get(args.law)
    if args.card:
        card = next(c for c in laws.cards() if c["id"] == law.card.id)
        return emit(card) if args.json else show_card(card)
    options = {name: getattr(args, f"law_{name}") for name, _ in OPTIONS if getattr(args, f"law_{name}") is not None}
    source, text = "runs", None
    if args.points is not None:
        from workbench.laws.points import load

        source, text = "points", load(args.points)
    elif args.published or args.example:
        source = "published" if args.published else "example"
    try:
        found = laws.predict(args.law, source, query=args.runs or "", text=text, options=options)
    except InputError as e:
        if e.field in dict(OPTIONS):  # as it was typed
            raise InputError(f"--{e.field}", e.value, e.problem, e.remedy) from None
        raise
    return emit(found) if args.json else show(found)


def show_list(rows: list[dict]) -> None:
    from workbench.laws import SHORT

    names = {full: name for name, full in SHORT.items() if name != "worth"}
    for row in rows:
        print(f"{names.get(row['id'], row['id']):<18} {row['question']}")
    print("\nAsk one with `python -m workbench predict NAME`; --card tells what it needs and can be asked.")


def show_card(card: dict) -> None:
    print(f"{card['name']}: {card['question']}\n{card['form']}\nSource: {card['title']}")
    for title, rows in (("Needs", card["needs"]), ("Claims", card["claims"]), ("Differs", card["differs"])):
        print(f"\n{title}")
        for row in rows:
            print(f"  {row}")
    if card["columns"]:
        print("\nColumns of --points")
        for c in card["columns"]:
            print(f"  {c['name']:<20} {c['help']}{'' if c['required'] else ' (optional)'}")
    if card["options"]:
        print("\nOptions")
        for o in card["options"]:
            unit = f", {o['unit']}" if o["unit"] else ""
            default = "" if o["default"] is None else f" (default {o['default']:g})" if isinstance(o["default"], float) else f" (default {o['default']})"
            print(f"  --{o['name']:<18} {o['help']}{unit}{default}")


def show(found: dict) -> None:
    from workbench.laws.base import percent, short

    fitted = found["fitted"]
    print(found["text"])
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    origin = {"runs": "this database's runs", "points": "given points", "published": "published constants", "example": "synthetic example"}
    fit = f", {fitted['n']} points, median error {percent(fitted['error'])}" if fitted["error"] is not None else ""
    print(f"\n{found['name']} ({origin[found['source']]}{fit})")
    for c in fitted["constants"]:
        ends = f"  ({short(c['low'], 4)} to {short(c['high'], 4)})" if c["low"] is not None else ""
        print(f"  {c['name']:<12} {short(c['value'], 4):>10}{ends:<28} {c['help']}".rstrip())
    for key in ("ranked", "best", "scan", "windows", "rows"):
        rows = found["figures"].get(key)
        if rows:
            from workbench.cli_shared import table

            print()
            heads = [h for h in rows[0] if h != "words"]
            table([tuple("" if r[h] is None else r[h] if isinstance(r[h], (int, str)) else float(f"{r[h]:.4g}") for h in heads) for r in rows],
                  tuple(h.replace("_", " ") for h in heads))
    if fitted["draws"]:
        print(f"\nIntervals: 95 % of {fitted['draws']} refits to resampled points.")
