"""``allocate``: levels of sparsity, bits or rank for each matrix under one budget."""

from __future__ import annotations

import sys


def register(add) -> None:
    p = add("allocate", "share sparsity, bits or ranks out over the matrices of a model under one budget", allocate)
    p.add_argument("model", help="bundled id, folder or hub id")
    p.add_argument("--data", required=True, metavar="SOURCE", help="calibration data: bundled id, file, folder or hub id")
    p.add_argument("--what", required=True, help="sparsity, bits or rank")
    p.add_argument("--budget", required=True, metavar="X", help="the uniform setting to start from: 0.6 of zeros, 5 bits (or 4.6mb), rank 8")
    p.add_argument("--by", default="rd", help="rd (least error at this total), lgreco (least size at this error), evolution (search)")
    p.add_argument("--method", default="magnitude", help="what prunes: magnitude, wanda or random")
    p.add_argument("--search-tokens", type=int, default=1024, metavar="N", help="calibration tokens of one measurement")
    p.add_argument("--generations", type=int, default=30, help="evolution: generations")
    p.add_argument("--offspring", type=int, default=8, help="evolution: candidates in a generation")
    p.add_argument("--seed", type=int, default=0)


def allocate(args):
    from workbench import allocate as allocator
    from workbench.cli_shared import emit
    watch = None if args.json or not sys.stderr.isatty() else lambda line: print(line, file=sys.stderr)
    found = allocator.allocate(args.model, args.data, args.what, args.budget, args.by, method=args.method, tokens=args.search_tokens,
                               generations=args.generations, offspring=args.offspring, seed=args.seed, watch=watch)
    if args.json:
        emit(found)
        return
    print(text(found))


def text(found: dict) -> str:
    """The allocation as a table for people."""
    shown = (lambda v: f"{100 * v:.1f} %") if found["what"] == "sparsity" else (lambda v: f"{v:g}")
    rows = [("matrix", found["what"], "uniform", f"size, {found['unit']}", "uniform", "error", "uniform")]
    for row in found["layers"]:
        rows.append((row["name"], shown(row["value"]), shown(row["uniform"]), f"{row['size']:,}", f"{row['uniform_size']:,}",
                     f"{row['error']:.4g}", f"{row['uniform_error']:.4g}"))
    total = found["total"]
    rows.append(("total", "", "", f"{total['size']:,}", f"{total['uniform_size']:,}", f"{total['error']:.4g}", f"{total['uniform_error']:.4g}"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    lines.append("")
    lines.append(f"Error: {found['error_is']}.")
    if total["kl"] is not None:
        lines.append(f"Divergence from the dense model on other calibration data: {total['kl']:.4f} nats per position, uniform {total['uniform_kl']:.4f}.")
        if total["kl"] > total["uniform_kl"]:
            lines.append("Equal levels diverge less here: keep them.")
    lines.append(f"Found in {found['seconds']['total']:.1f} s.")
    if found["stage"]:
        stage = dict(found["stage"])
        method = stage.pop("method")
        lines.append(f"As a stage: --method {method}:" + ",".join(f"{k}={v}" for k, v in stage.items()))
    return "\n".join(lines)
