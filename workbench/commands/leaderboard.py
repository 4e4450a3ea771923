"""``leaderboard ARENA``: the adaptation methods, tuned alike and measured in the same arena."""

from __future__ import annotations


def register(add) -> None:
    p = add("leaderboard", "adaptation methods side by side: quality, its tier, step time, memory", act)
    p.add_argument("arena", nargs="?", help="its id; without it all arenas are shown")
    p.add_argument("--at", choices=("steps", "seconds"), default="steps", help="after equal steps, or after the seconds that LoRA needs for them")


def act(args) -> None:
    from workbench import leaderboard
    from workbench.cli_shared import emit
    found = [leaderboard.arena(args.arena)] if args.arena else leaderboard.arenas()
    found = [a | {"at": args.at, "rows": leaderboard.ordered(a["rows"], args.at)} for a in found]
    if args.json:
        return emit(found[0] if args.arena else found)
    if not found:
        print("This copy comes without a leaderboard; python -m benchmarks.adaptation measures one.")
    for i, arena in enumerate(found):
        if i:
            print()
        show(arena, args.at)
    return None


def show(arena: dict, side: str) -> None:
    """The table of one arena, and what to make of it."""
    from workbench.cli_shared import mega, table
    print(f"{arena['title']} ({arena['id']}), {arena['metric']} at equal {side}\n{arena['setting']}.")
    rows = []
    for row in arena["rows"]:
        read, put = row[side] or {}, lambda form, value: "" if value is None else format(value, form)
        rows.append((read.get("rank"), read.get("tier", ""), f"{row['name']} {row['form']}".strip(), put("#.4g", read.get("value")),
                     f"{read['low']:#.4g} to {read['high']:#.4g}" if read.get("low") is not None else "", put("9,", row["trainable"]), put(".2f", row["pace"]),
                     mega(row["peak"]).rjust(9) if row["peak"] else "", mega(row["optimizer"]).rjust(9) if row["optimizer"] else "", put(".2g", row["rate"])))
    table(rows, ("", "tier", "method", arena["metric"], "seeds", "trained", "s/step (LoRA = 1)", "peak", "optimizer", "rate"))
    for failed in arena["failed"]:
        print(f"{failed['name']} failed: {failed['reason']}")
    print("Same letter: cannot be told apart from the best of that letter.")
    print(f"Measured by the makers of Fettle on {arena['date']}, {arena['machine']}, {arena['seeds']} seeds: a small model, trained briefly. "
          f"Again with: {arena['command']}")
