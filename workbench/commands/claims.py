"""``claims METHOD``: what its paper says beside what this machine measures."""

from __future__ import annotations

import sys


def register(add) -> None:
    p = add("claims", "check what a method's paper says by its smallest experiment", act)
    p.add_argument("method", nargs="?", help="method id; without it all methods are listed with their verdicts")
    p.add_argument("claim", nargs="?", help="only this claim")
    p.add_argument("--list", action="store_true", help="show what is known and run nothing")
    p.add_argument("--seeds", type=int, default=3, help="trainings of each side, at least 3")


def act(args) -> None:
    from engines import registry
    from workbench import claims
    from workbench.cli_shared import emit, home_of, table
    home = home_of()
    if args.method and not args.list:
        tell = None if args.json else lambda line: print(line, file=sys.stderr, flush=True)
        rows = claims.check(args.method, args.claim, home=home, seeds=args.seeds, tell=tell)
    else:
        names = [args.method] if args.method else [m for m, cls in {**registry.methods(), **registry.switches()}.items() if cls.claims]
        rows = [row for name in names for row in claims.listed(name, home)]
    if args.json:
        return emit(rows)
    if args.method:
        for row in rows:
            print(f"{row['key']}: {row['says']}\n  {claims.sentence(row)}")
        return None
    return table([(r["method"], r["key"], r["measure"], r["verdict"] or "not checked") for r in rows], ("method", "claim", "measure", "verdict"))
