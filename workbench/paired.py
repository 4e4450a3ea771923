"""Which of two runs is better, and which runs cannot be told apart: paired tests over the same items. Torch is not needed."""

from __future__ import annotations

from engines.errors import InputError
from workbench import stats
from workbench.rows import brief, chosen, main_evaluation, store_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _scores(store, row: dict) -> tuple[dict, object, object]:
    evaluation = main_evaluation(store, row["id"])
    if evaluation is None:
        raise InputError("runs", row["name"], "this run has no evaluation", "Choose runs that have been evaluated")
    return evaluation, *store.scores(evaluation["id"])


def paired(a: int | str, b: int | str, *, level: float = 0.05, home=None) -> dict:
    """Compare the main evaluations of two runs item by item.

    For bits/byte the difference of the weighted ratios (nats over ln 2 times bytes) is resampled over items; for accuracy p is
    McNemar's exact one. See ``workbench.stats.difference``.

    Returns:
        ``a``, ``b`` (ids), ``metric``, ``values`` [a, b], ``difference`` = b - a, ``low``, ``high`` (95 %), ``p``, ``test``, ``n``,
        ``needed`` (items that would decide it), ``better`` (id or None), ``text`` (one or two sentences).

    Raises:
        InputError: a run has no evaluation, or the two were not measured in the same metric on the same items.
    """
    store = store_of(home)
    first, second = chosen([a, b], store, at_least=2)
    (ea, sa, wa), (eb, sb, wb) = _scores(store, first), _scores(store, second)
    if ea["metric"] != eb["metric"]:
        raise InputError("runs", [first["name"], second["name"]], f"one is measured in {ea['metric']}, the other in {eb['metric']}",
                         "Choose runs of the same task")
    if ea["items_hash"] != eb["items_hash"] or len(sa) != len(sb):
        raise InputError("runs", [first["name"], second["name"]], f"they were scored on different items ({len(sa)} and {len(sb)})",
                         "Evaluate both on the same data with the same training.items")
    metric = ea["metric"]
    found = stats.difference(sa, sb, wa, unit=stats.scale(metric))
    better = None
    if found["p"] < level and found["difference"]:
        better = (second if (found["difference"] < 0) == stats.lower_is_better(metric) else first)["id"]
    values = [stats.value(sa, wa, stats.scale(metric)), stats.value(sb, wb, stats.scale(metric))]
    return {"a": first["id"], "b": second["id"], "metric": metric, "values": values, **found, "better": better,
            "text": _text(first, second, metric, values, found, better)}


def _text(first: dict, second: dict, metric: str, values: list, found: dict, better: int | None) -> str:
    percent = metric == "accuracy"
    close = f"{100 * values[0]:.1f}" == f"{100 * values[1]:.1f}" if percent else f"{values[0]:.3f}" == f"{values[1]:.3f}"
    show = (lambda v: f"{100 * v:.{1 + close}f} %") if percent else (lambda v: f"{v:.{3 + 2 * close}f}")
    figures = [100 * found[k] if percent else found[k] for k in ("difference", "low", "high")]
    places = next((d for d in range(1 if percent else 4, 7) if not any(v and not float(f"{v:.{d}f}") for v in figures)), 6)
    gap = lambda v: f"{100 * v if percent else v:+.{places}f}" if v else "0"  # noqa: E731
    p = f"p = {found['p']:.2g}" if found["p"] >= 0.001 else "p < 0.001"
    tail = f"{gap(found['low'])} to {gap(found['high'])} {'points' if percent else metric} (95 %), {p}, n = {found['n']:,}".replace("-", "−")
    if better is None:
        more = ""
        if found["needed"] and found["needed"] > found["n"]:
            digits = max(0, len(str(found["needed"])) - 2)
            more = f" About {round(found['needed'], -digits):,} items would decide it."
        return f"{first['name']} and {second['name']} cannot be told apart: {second['name']} differs by " \
               f"{gap(found['difference']).replace('-', '−')}, {tail}.{more}"
    won, lost = (second, first) if better == second["id"] else (first, second)
    shown = [show(v) for v in values]
    return f"{won['name']} is better than {lost['name']}: {shown[won is second]} against {shown[lost is second]}" \
           f"{'' if percent else ' ' + metric}; {second['name']} differs by {tail}."


def doubt(ids, *, draws: int = 2000, home=None) -> dict[tuple[int, int], float]:
    """p of the difference for each pair of runs that were scored on the same items, ``{(id, id): p}`` in both orders.

    All pairs share one set of resamples, so that hundreds of runs are quick; pairs that cannot be compared are absent.
    """
    import numpy as np
    store, kinds, out = store_of(home), {}, {}
    for run_id in ids:
        evaluation = main_evaluation(store, run_id)
        if evaluation is not None:
            kinds.setdefault((evaluation["metric"], evaluation["items_hash"], evaluation["n"]), []).append((run_id, evaluation["id"]))
    for (metric, _, _), members in kinds.items():
        if len(members) < 2:
            continue
        scores = [store.scores(e) for _, e in members]
        rows, weights, unit = np.stack([s for s, _ in scores]), scores[0][1], stats.scale(metric)
        drawn, seen = stats.resample(rows, weights, unit=unit, draws=draws), [stats.value(s, weights, unit) for s in rows]
        for i, (a, _) in enumerate(members):
            for j, (b, _) in enumerate(members[:i]):
                out[a, b] = out[b, a] = stats.shifted(drawn[:, i] - drawn[:, j], seen[i] - seen[j])
    return out


def tiers(ids, *, level: float = 0.05, home=None) -> dict:
    """Runs in tiers: who cannot be told apart from the best of a tier (paired tests, Holm-corrected) belongs to it.

    Returns:
        ``rows`` [{``brief``, value, tier (letter)}] best first, ``metric``, ``n`` (items), ``left_out`` [{id, reason}], ``text``.

    Raises:
        InputError: fewer than two runs share a metric and items.
    """
    import numpy as np
    store = store_of(home)
    rows, left_out, kinds = chosen(ids, store, at_least=2), [], {}
    for row in rows:
        evaluation = main_evaluation(store, row["id"])
        if evaluation is None:
            left_out.append({"id": row["id"], "reason": "no evaluation"})
        else:
            kinds.setdefault((evaluation["metric"], evaluation["items_hash"], evaluation["n"]), []).append((row, evaluation))
    kind = max(kinds, key=lambda k: len(kinds[k])) if kinds else None
    if kind is None or len(kinds[kind]) < 2:
        raise InputError("runs", [r["name"] for r in rows], "fewer than two were scored on the same items", "Choose runs on the same data")
    for other, members in kinds.items():
        if other != kind:
            left_out += [{"id": row["id"], "reason": "scored on other items" if other[0] == kind[0] else f"measured in {other[0]}"}
                         for row, _ in members]
    metric, members = kind[0], kinds[kind]
    scores = [store.scores(e["id"]) for _, e in members]
    found = stats.tiers(np.stack([s for s, _ in scores]), scores[0][1], unit=stats.scale(metric), lower=stats.lower_is_better(metric), level=level)
    out = [brief(members[i][0]) | {"value": found["values"][i], "tier": LETTERS[min(found["tier"][i], 25)]} for i in found["order"]]
    test = "McNemar's exact test" if metric == "accuracy" else "a paired bootstrap"
    return {"rows": out, "metric": metric, "n": kind[2], "left_out": left_out,
            "text": f"Runs in one tier cannot be told apart from its best: {test} over the same {kind[2]:,} items, Holm-corrected, "
                    f"{100 * level:g} %."}
