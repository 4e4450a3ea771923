"""``calibration``: forecast and measurement of every run, before and after the planner's correction."""

from __future__ import annotations


def register(add) -> None:
    parser = add("calibration", "how well forecasts have held, and how the planner corrects itself", act)
    parser.add_argument("--by", choices=("model", "method", "machine"), default="method", help="rows of the table (default: method)")


def act(args) -> int:
    from workbench import calibration_report
    from workbench.cli_shared import emit, home_of, table

    home = home_of()
    found = calibration_report.report(home.store, home)
    if args.json:
        emit({**found, "by": found["by"][args.by], "grouped": args.by})
        return 0
    if not found["runs"]:
        print("No finished run to compare with yet. " + calibration_report.say(found["left_out"]))
        return 0
    rows = [*found["by"][args.by], dict(key="all", **found["overall"])]
    table([cells(row) for row in rows],
          (args.by, "n", "memory ratio", "error", "in 20 %", "corrected", "error", "in 20 %", "seconds ratio", "corrected"))
    whole = found["overall"]
    print(f"trainable parameters exact in {whole['trainable_exact'][0]} of {whole['trainable_exact'][1]} runs, "
          f"size in {whole['size_exact'][0]} of {whole['size_exact'][1]}")
    print(f"Ratios are forecast / measured, errors medians; corrected: each run by the others alone. {calibration_report.say(found['left_out'])}".rstrip())
    return 0


def cells(row: dict) -> tuple:
    """One line of the table."""
    def three(found):
        return (f"{found['ratio']:.2f}", f"{100 * found['error']:.0f} %", f"{100 * found['within20']:.0f} %") if found else ("", "", "")

    def ratio(found):
        return f"{found['ratio']:.2f}" if found else ""
    return (row["key"], row["n"], *three(row["memory"]["before"]), *three(row["memory"]["after"]), ratio(row["seconds"]["before"]),
            ratio(row["seconds"]["after"]))
