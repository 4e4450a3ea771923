"""What papers say beside what was measured here: each claim's smallest honest experiment, its interval and its verdict."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from engines import registry
from engines.claim import EXPECTATIONS, MEASURES, SCORED, Claim, steps_taken
from engines.errors import InputError, RunFailed
from workbench import shipped

VERDICTS = ("reproduced", "within noise", "not reproduced", "not comparable")
SEEDS = 3
DRAWS = 4000
SHAPES = {"hidden_size": "width {}", "intermediate_size": "inner width {}", "num_hidden_layers": "{} blocks", "num_attention_heads": "{} heads",
          "vocab_size": "vocabulary of {}"}
"""What is told of a claim's own shape; the rest follows from it or decides little."""
TIMEOUT = 1800.0


def listed(method: str, home=None) -> list[dict]:
    """The claims of a method with what this database knows of them, else what comes with Fettle (``date`` and ``machine`` are set then):
    key, says, setting, verdict, ours, against, low, high ...

    Raises:
        InputError: there is no such method.
    """
    known = {row["key"]: row for row in home.store.claims(method)} if home is not None else {}
    rows = []
    for claim in registry.described(method).claims:
        row = {"method": method, "key": claim.key, "says": claim.says, "measure": claim.measure, "expect": claim.expect,
               "setting": setting(claim), "differs": claim.differs, "verdict": "not comparable" if claim.not_comparable else None,
               "reason": claim.not_comparable}
        found = known.pop(claim.key, None)
        # A figure that was measured under other settings is not this claim's.
        if found and found.get("mark") == mark(claim):
            row |= {k: v for k, v in found.items() if k not in ("id", "mark")}
        elif not claim.not_comparable:
            row |= shipped.known(method, claim.key, mark(claim))
        rows.append(row)
    return rows


def setting(claim: Claim) -> str:
    """One line: what is compared with what, on what."""
    if claim.not_comparable:
        return ""
    def side(stage):
        rest = ", ".join(f"{k} {v}" for k, v in stage.items() if k not in ("method", "training"))
        rest = ", ".join([rest] * bool(rest) + [f"with {s if isinstance(s, str) else s['method']}" for s in stage.get("training", {}).get("switches", ())])
        return f"{stage['method']} ({rest})" if rest else stage["method"]
    before = "".join(f"{side(s)}, then " for s in claim.before)
    shape = ", ".join(SHAPES[k].format(v) for k, v in claim.shape.items() if k in SHAPES)
    model = claim.model + (f" with random weights ({shape})" if claim.shape else "")
    return (f"{before}{side(claim.ours)} against {side(claim.against)}; {model} on {claim.data}, {steps_taken(claim.measure, claim.steps)} steps of {claim.batch} rows "
            f"of {claim.length}; {f'{claim.elsewhere}: ' if claim.elsewhere else ''}{MEASURES[claim.measure]}; expected: {EXPECTATIONS[claim.expect]}"
            + (f", {claim.factor:g}" if claim.expect == "at most" else ""))


def mark(claim: Claim) -> str:
    """What an experiment depends on, as text; a change of it makes earlier figures void. Fields at their defaults are left out, so
    that a new field of ``Claim`` voids nothing."""
    words = ("says", "differs", "not_comparable")
    tree = {f.name: getattr(claim, f.name) for f in dataclasses.fields(claim) if f.name not in words}
    usual = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(claim)}
    return json.dumps({k: v for k, v in tree.items() if v != usual[k]}, sort_keys=True)


def check(method: str, key: str | None = None, *, home=None, seeds: int = SEEDS, threads: int | None = None, tell=None) -> list[dict]:
    """Carry out the experiments of a method's claims (or of one), keep and return what was found.

    Args:
        seeds: at least 3 for a verdict on quality.
        tell: called with a line of text before each experiment.

    Raises:
        InputError: no such method or claim, or too few seeds.
        RunFailed: an experiment broke off.
    """
    claims = [c for c in registry.described(method).claims if key in (None, c.key)]
    if not claims:
        names = [c.key for c in registry.described(method).claims]
        raise InputError("claim", key, f"{method} has no such claim" if key else f"{method} states no claim that can be checked",
                         "Choose " + ", ".join(names) if names else "Choose another method")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 3 <= seeds <= 50:
        raise InputError("seeds", seeds, "not a whole number from 3 to 50", "Give 3 or more")
    out = []
    for claim in claims:
        if claim.not_comparable:
            found = {"verdict": "not comparable", "reason": claim.not_comparable}
        else:
            if tell:
                tell(f"{method} {claim.key}: {setting(claim)}")
            found = experiment(claim, seeds, threads, None if home is None else str(home.path / "trainings"))
        found |= {"mark": mark(claim), "says": claim.says, "setting": setting(claim), "differs": claim.differs, "measure": claim.measure}
        if home is not None:
            home.store.put_claim(method, claim.key, **found)
        out.append({"method": method, "key": claim.key, **found})
    return out


def experiment(claim: Claim, seeds: int, threads: int | None = None, trainings: str | None = None) -> dict:
    """Run one claim's experiment; verdict, both figures, interval of the difference or ratio, seeds, seconds, reason.

    ``trainings``: a folder in which trainings are kept for claims that share a side.
    """
    began = time.perf_counter()
    if claim.measure == "memory":
        rows = {side: [_child("peak", claim, seeds, threads, side=side) for _ in range(seeds)] for side in ("ours", "against")}
        found = of_ratio(claim, [r["peak"] for r in rows["ours"]], [r["peak"] for r in rows["against"]])
        found["parts"] = {side: {k: found_rows[0][k] for k in ("gradients", "optimizer", "trainable")} for side, found_rows in rows.items()}
    elif claim.measure in SCORED:
        rows = _child(claim.measure, claim, seeds, threads, trainings=trainings)
        found = of_quality(claim, rows["ours"], rows["against"])
    else:
        rows = _child("figures", claim, seeds, threads)
        found = of_ratio(claim, rows["ours"][claim.measure], rows["against"][claim.measure])
    return found | {"seeds": seeds, "took": round(time.perf_counter() - began, 1)}


def of_quality(claim: Claim, ours: dict, against: dict) -> dict:
    """Verdict from per-item scores of several seeds: seeds and items are resampled together."""
    import numpy as np
    a, b = np.asarray(ours["scores"], float), np.asarray(against["scores"], float)
    weights = None if ours["weights"] is None else np.asarray(ours["weights"], float)
    lower = ours["metric"] == "bits/byte"
    whole = weights if weights is not None else np.ones(a.shape[1])
    value = lambda s: float(s.mean(axis=0).sum() / whole.sum())  # noqa: E731
    rng, (seeds, n) = np.random.default_rng(0), a.shape
    drawn = np.empty(DRAWS)
    for i in range(DRAWS):
        items, mine, other = rng.integers(n, size=n), rng.integers(seeds, size=seeds), rng.integers(seeds, size=seeds)
        # Seeds of the two sides are different trainings, so each side's are drawn by themselves; the items are the same.
        drawn[i] = (a[mine][:, items].mean(axis=0).sum() - b[other][:, items].mean(axis=0).sum()) / whole[items].sum()
    low, high = (float(v) for v in np.quantile(drawn, (0.025, 0.975)))
    gain = (-high, -low) if lower else (low, high)          # positive: ours is better
    if claim.expect == "better":
        verdict = "reproduced" if gain[0] > 0 else "not reproduced" if gain[1] < 0 else "within noise"
    else:
        margin = claim.margin * abs(value(b))
        verdict = "reproduced" if gain[0] > -margin else "not reproduced" if gain[1] < -margin else "within noise"
    return {"verdict": verdict, "metric": ours["metric"], "ours": value(a), "against": value(b), "difference": value(a) - value(b), "low": low, "high": high,
            "n": n, "rates": [ours["rate"], against["rate"]], "searched": [ours["searched"], against["searched"]],
            "trainable": [ours["trainable"], against["trainable"]], "reused": against.get("reused", 0),
            **{k: [ours[k], against[k]] for k in ("seconds", "learned") if k in ours and k in against},
            "by_seed": [[float(s.sum() / whole.sum()) for s in side] for side in (a, b)], "reason": ""}


def of_ratio(claim: Claim, ours: list, against: list) -> dict:
    """Verdict from repeated figures of both sides: the ratio of medians, and the range of all ratios of single figures."""
    import statistics
    mine, other = statistics.median(ours), statistics.median(against)
    ratios = sorted(a / b for a in ours for b in against if b)
    if not ratios:
        return {"verdict": "not comparable", "reason": "the other side has nothing to be compared with (zero)", "ours": mine, "against": other}
    low, high = ratios[0], ratios[-1]
    factor = claim.factor if claim.expect == "at most" else 1.0 + (claim.margin if claim.expect == "not worse" else 0.0)
    verdict = "reproduced" if high <= factor else "not reproduced" if low > factor else "within noise"
    return {"verdict": verdict, "ours": mine, "against": other, "difference": mine / other, "low": low, "high": high, "n": len(ours), "reason": ""}


def _child(what: str, claim: Claim, seeds: int, threads: int | None, **more) -> dict:
    from workbench import telemetry
    asked = {"what": what, "claim": dataclasses.asdict(claim), "seeds": seeds, "threads": threads or telemetry.threads(), **more}
    try:
        done = subprocess.run([sys.executable, "-m", "workbench.claiming"], input=json.dumps(asked), capture_output=True, text=True,
                              timeout=TIMEOUT, cwd=Path(__file__).resolve().parent.parent)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"the experiment of {claim.key} took longer than {TIMEOUT / 60:.0f} minutes", "Try again on a quiet machine") from None
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RunFailed(f"the experiment of {claim.key} broke off ({last[:200]})", "Report this as a defect") from None


def sentence(row: dict) -> str:
    """What was found, for people."""
    if row.get("verdict") is None:
        return "Not checked here yet."
    if row["verdict"] == "not comparable":
        return f"Not comparable: {row['reason']}."
    if row["measure"] in SCORED:
        unit, k = ("points", 100) if row["metric"] == "accuracy" else (row["metric"], 1)
        return (f"{row['verdict'].capitalize()}: {k * row['ours']:.4g} against {k * row['against']:.4g}, difference {k * row['difference']:+.3g} {unit}, "
                f"{k * row['low']:+.3g} to {k * row['high']:+.3g} (95 %), {row['seeds']} seeds, n = {row['n']}.{_learned(row)}{_edge(row)}")
    told = [_amount(row["measure"], row[side]) for side in ("ours", "against")]
    return (f"{row['verdict'].capitalize()}: {row['difference']:.3g} times the other side ({row['low']:.3g} to {row['high']:.3g}), "
            f"{told[0]} against {told[1]}.")


def _learned(row: dict) -> str:
    """Who learns less forgets less: what both sides came to on the data that they were trained on."""
    if not row.get("learned"):
        return ""
    k, unit = (100, " %") if row["metric"] == "accuracy" else (1, " " + row["metric"])
    return f" On the data trained on: {k * row['learned'][0]:.4g} against {k * row['learned'][1]:.4g}{unit}."


def _edge(row: dict) -> str:
    """Says where the best learning rate was the last one that was tried: a better one may lie beyond."""
    at = [name for name, rate, tried in zip(("this method", "the other side"), row.get("rates") or (), row.get("searched") or ())
          if len(tried) > 1 and rate in (min(tried), max(tried))]
    return f" The best learning rate of {' and of '.join(at)} lay at the end of the search." if at else ""


def _amount(measure: str, value: float) -> str:
    """A figure of this measure with its unit."""
    if measure in ("memory", "optimizer"):
        return f"{value / 1e6:,.3g} MB" if value < 1e9 else f"{value / 1e9:,.3g} GB"
    if measure == "trainable":
        return f"{value:,.0f} parameters"
    if measure in ("seconds", "duration"):
        return f"{value:.3g} s"
    return f"{value:.1%}" if measure == "repetition" else f"{value:.3g} bits"
