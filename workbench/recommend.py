"""Which pipelines to try for a model, data and budget: all that fit, by expected quality with its uncertainty. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass

from engines import registry
from engines.budget import LIMITS
from engines.errors import InputError
from workbench import expected, pipelines, planner, probe
from workbench.levers import Chooser
from workbench.points import METRIC, Point, of_cost
from workbench.remedies import changes, clock, figure, gigabytes, limits, missed, quality, verdict
from workbench.scene import Cost, Scene
from workbench.spec import RunSpec
from workbench.staging import store_of

SURE = 1.2816
"""Of two pipelines one counts as better when it is so with 90 %: this many standard deviations of the difference."""
SIMPLER = 0.002
"""Expected gain that a further stage must bring before it is put first."""
CAUTION = 0.5
"""Standard deviations by which a gain is discounted in the order: of two equal expectations the better known one comes first."""
PATIENCE = 3.5
"""Seconds after which no more combinations are forecast."""
NEAREST = 5
FROM = {"history": "runs like this", "transfer": "runs partly like this, and priors", "prior": "priors alone"}


@dataclass
class Candidate:
    """One pipeline with its cost and what is expected of it."""

    spec: RunSpec
    resolved: RunSpec
    cost: Cost
    reasons: list[dict]
    states: dict
    point: Point
    estimate: dict | None = None
    place: int = 0

    @property
    def over(self) -> list[str]:
        """Limits that it misses; a floor that even a mere prior expects to be missed counts here."""
        return missed(self.states, strict=True)


def recommend(spec: RunSpec | dict, home=None, *, count: int = 40, families=()) -> dict:
    """Rank the pipelines that fit a budget.

    Args:
        spec: model, data and budget, optionally training, task and seed; its pipeline is not looked at.
        home: whose database holds the runs to learn from; None opens the default one.
        count: rows at most.
        families: only pipelines with a method of one of these families; empty: all.

    Returns:
        JSON-able: ``rows`` (rank, tier, text, pipeline, methods, families, spec, expected, seconds, peak_bytes, size_bytes, trainable,
        steps, units, limits, verdict, why), ``nearest`` (the same for those that do not fit, with ``over`` and ``change``),
        ``refused`` (method, reason), ``contradictions`` (field, limit, least, text: limits that nothing can keep), ``notes``, ``base``,
        ``metric``, ``basis`` (one sentence), ``calibration``, ``considered``, ``milliseconds``.

    Raises:
        InputError: a field is refused, or the model or the data cannot be used.
    """
    began = time.perf_counter()
    if isinstance(spec, dict):
        spec = RunSpec.from_dict({**{k: v for k, v in spec.items() if k != "pipeline"}, "pipeline": []})
    spec = spec.replace(pipeline=(), name=None)
    if families:
        known = {c.card.family for c in registry.methods().values()}
        for family in families:
            if family not in known:
                raise InputError("family", family, "no method is of this family", registry.suggestion(family, known))
    search = Search(spec, home)
    search.all()
    fitting = search.ranked([c for c in search.found if not c.over and search.shown(c, families)])
    outside = [c for c in search.found if c.over and search.shown(c, families)]
    rows = _rows(fitting[:count], search)
    contradictions = [] if any(not c.over for c in search.found) else search.contradictions()
    return {
        "rows": rows, "nearest": search.nearest(outside), "refused": search.refused, "contradictions": contradictions,
        "notes": search.notes(), "base": search.base, "metric": METRIC[search.scene.task], "task": search.scene.task,
        "model": spec.model, "data": spec.data.plain(), "budget": spec.budget.limits(), "basis": search.basis(fitting),
        "calibration": search.calibration, "considered": len(search.found), "fitting": len(fitting),
        "milliseconds": round((time.perf_counter() - began) * 1e3, 1)}


def refuse(found: dict) -> None:
    """Raise for limits that no pipeline can keep.

    Raises:
        InputError: the first contradiction, with its remedy.
    """
    for row in found["contradictions"][:1]:
        raise InputError(row["field"], row["limit"], row["problem"], row["remedy"])


class Search:
    """The forecasts of one recommendation; the scene is made once."""

    def __init__(self, spec: RunSpec, home):
        self.spec, self.began = spec, time.perf_counter()
        self.scene: Scene = planner.scene_of(spec, home)
        self.store = store_of(home)
        self.speeds = _speeds(self.store)
        self.found: list[Candidate] = []
        self.refused: list[dict] = []
        self.seen: set[str] = set()
        self.base, self.calibration, self.joint = None, {}, None

    # -- forecasts ---------------------------------------------------------------------------------------
    def scene_for(self, spec: RunSpec) -> Scene:
        return dataclasses.replace(self.scene, speed=self.speeds.get(planner.signature(spec.to_dict()), {}))

    def cost(self, spec: RunSpec) -> tuple[RunSpec, Cost]:
        return self.energy(*Chooser(spec, self.scene_for(spec)).run())

    def energy(self, resolved: RunSpec, cost: Cost) -> tuple[RunSpec, Cost]:
        """With the joules that earlier runs let expect."""
        cost.joules, cost.joules_how = self.scene.correction.joules(resolved, cost.seconds)
        return resolved, cost

    def add(self, stages: tuple[dict, ...]) -> Candidate | None:
        key = json.dumps(stages, sort_keys=True)
        if key in self.seen:
            return None
        self.seen.add(key)
        try:
            spec = self.spec.replace(pipeline=tuple(registry.build(s, f"pipeline[{i}]") for i, s in enumerate(stages)))
            chooser = Chooser(spec, self.scene_for(spec))
            resolved, cost = chooser.run()
            cost, _ = probe.apply(resolved, chooser.scene, cost, self.store)
            resolved, cost = self.energy(resolved, cost)
        except InputError as e:
            if len(stages) == 1:
                self.refused.append({"method": stages[0]["method"], "reason": f"{e.problem}. {e.remedy}".rstrip("."), "field": e.field})
            return None
        made = Candidate(spec, resolved, cost, chooser.reasons, limits(resolved, cost, planner.meter()), of_cost(resolved, cost, self.scene))
        same = (made.resolved.pipeline, made.resolved.training)
        if any((c.resolved.pipeline, c.resolved.training) == same for c in self.found if len(c.resolved.pipeline) == len(stages)):
            return None  # levers chose what another variant already is
        self.found.append(made)
        return made

    def all(self) -> None:
        """Every method alone, then combinations of the best of each role."""
        every = len(registry.methods())
        for i, stages in enumerate(pipelines.singles(self.spec.budget)):
            if i >= every and time.perf_counter() - self.began > PATIENCE / 2:
                break  # the methods come before their variants, the combinations before the last variants
            self.add(stages)
        self.judge()
        for stages in pipelines.combinations(self.best()):
            if time.perf_counter() - self.began > PATIENCE:
                break
            self.add(stages)
        if self.spec.budget.size_mb and all(c.over for c in self.found):
            for stages in pipelines.smallest(self.scene.model):  # the ends of the levers, which nobody wants unless nothing else is left
                self.add(stages)
        self.judge()

    def judge(self) -> None:
        """Expected quality of all candidates at once, so that their errors are known together."""
        found, self.joint = expected.estimate([c.point for c in self.found], self.store, labels=self.scene.fresh_labels, joint=True)
        for i, (c, estimate) in enumerate(zip(self.found, found)):
            c.estimate, c.place = estimate, i
            c.states["quality"] = quality(self.spec.budget, estimate)
            self.base, self.calibration = estimate["base"], estimate["calibration"]

    def best(self) -> dict[str, list[dict]]:
        """Stages by role, the most promising first: by gain, and for packing those that keep the limits before those that do not."""
        out: dict[str, list[dict]] = {"adapt": [], "prune": [], "shrink": [], "pack": []}
        hard = lambda c: sum(k not in ("quality", "size_mb") for k in c.over)  # noqa: E731
        order = sorted(self.found, key=lambda c: (hard(c), "size_mb" in c.over and c.resolved.pipeline[0].card.packs, -c.estimate["gain"]))
        named: dict[str, list[str]] = {k: [] for k in out}
        for c in order:
            method = c.resolved.pipeline[0]
            role = pipelines.role(type(method))
            for name, is_so in (("adapt", role.adapts), ("prune", role.prunes and not role.packs), ("shrink", role.shrinks), ("pack", role.packs)):
                if is_so and method.card.id not in named[name]:  # the best variant of each method
                    named[name].append(method.card.id)
                    out[name].append(pipelines.compact(c.spec.pipeline[0]))
        # Refused alone under a limit on size, they may still keep it together.
        for refused in self.refused:
            cls = registry.get(refused["method"])
            if refused["field"] == "budget.size_mb":
                stage, role = pipelines.variants(cls, self.spec.budget)[0], pipelines.role(cls)
                if role.packs or role.shrinks:
                    out["pack" if role.packs else "shrink"].append(stage)
        return out

    def shown(self, c: Candidate, families) -> bool:
        return not families or any(m.card.family in families for m in c.spec.pipeline)

    # -- order -------------------------------------------------------------------------------------------
    def ranked(self, rows: list[Candidate]) -> list[Candidate]:
        """By expected gain less a part of its doubt; where two are as good the one of fewer stages, then the quicker one."""
        def worth(c: Candidate) -> float:
            doubt = (c.estimate["gain_high"] - c.estimate["gain_low"]) / 2 / expected.NORMAL
            return c.estimate["gain"] - CAUTION * doubt - SIMPLER * len(c.spec.pipeline)
        return sorted(rows, key=lambda c: (-worth(c), c.cost.seconds))

    def apart(self, a: Candidate, b: Candidate) -> bool:
        """Is ``a`` better than ``b`` with 90 %?"""
        j = self.joint
        variance = j[a.place][a.place] + j[b.place][b.place] - 2 * j[a.place][b.place] + 2e-6
        return a.estimate["gain"] - b.estimate["gain"] > SURE * math.sqrt(max(0.0, float(variance)))

    # -- what does not fit -------------------------------------------------------------------------------
    def nearest(self, rows: list[Candidate]) -> list[dict]:
        """The most promising of those that miss a limit by little, each with the smallest change that makes it fit."""
        def miss(c: Candidate) -> float:
            return sum(math.log(max(1.0, 1.0 - min(0.0, c.states[k]["spare"] or 0.0))) for k in c.over)
        best, seen = [], set()
        for c in sorted(rows, key=lambda c: miss(c) - 2 * c.estimate["gain"]):
            methods = tuple(m.card.id for m in c.spec.pipeline)
            if methods not in seen:
                seen.add(methods)
                best.append(c)
        out, judge = [], expected.judge(self.scene, self.store)
        for row, c in zip(_rows(best[:NEAREST], self, tiers=False), best):
            row["over"] = c.over
            row["change"] = next(iter(changes(c.spec, c.resolved, c.cost, c.states, self.cost, count=1, judge=judge, strict=True)), None)
            out.append(row)
            if time.perf_counter() - self.began > 1.5 * PATIENCE:
                break
        return out

    def contradictions(self) -> list[dict]:
        """Limits that no method can keep on this model, each with what is the least possible."""
        budget, rows = self.spec.budget, []
        free = self.spec.replace(budget=dataclasses.replace(budget, size_mb=None, memory_gb=None, trainable=None, quality=None))
        costs = [c.cost for c in self.found]
        for stages in pipelines.smallest(self.scene.model):
            try:
                spec = free.replace(pipeline=tuple(registry.build(s) for s in stages))
                costs.append(Chooser(spec, self.scene).run()[1])
            except InputError:
                continue
        least = {
            "minutes": lambda c: c.least_seconds / 60, "memory_gb": lambda c: c.peak.total / 1e9, "size_mb": lambda c: c.size / 1e6}
        units = {"minutes": ("minutes", 2), "memory_gb": ("GB", 2), "size_mb": ("MB", 2)}
        what = {"minutes": "the quickest pipeline, with loading and evaluation, needs", "memory_gb": "the leanest pipeline here peaks at",
                "size_mb": "the smallest result that any method makes here takes"}
        for name, of in least.items():
            limit = getattr(budget, name)
            best = min(costs, key=of, default=None)
            if limit is None or best is None or of(best) <= limit:
                continue
            unit, places = units[name]
            need = math.ceil(of(best) * 10**places) / 10**places
            by = " → ".join(pipelines.short(s.method) for s in best.stages)
            if name == "memory_gb" and best.peak.name == "load":
                by = "while it loads the model"
            rows.append(_contradiction(f"budget.{name}", limit, need, f"{what[name]} {need:g} {unit} ({by})",
                                       f"Give at least {need:g} {unit}, or a smaller model"))
        missed = [c for c in self.found if c.over == ["quality"]]
        if not rows and missed:
            best = max(missed, key=lambda c: c.estimate["gain"])
            metric, value = best.estimate["metric"], best.estimate["value"]
            rows.append(_contradiction("budget.quality", budget.quality, value, f"the best that is expected inside the other limits is "
                                       f"{figure(value, metric)}", "Accept that, or allow more time, memory or size"))
        if not rows and budget.limits():
            names = ", ".join(k for k in budget.limits() if k in LIMITS)
            rows.append(_contradiction("budget", budget.limits(), None, f"no pipeline keeps all of {names} together",
                                       "Raise one of them: the nearest pipelines and their smallest changes are listed"))
        return rows

    def notes(self) -> list[str]:
        """What is worth knowing of the limits although nothing is refused."""
        budget, parameters, out = self.spec.budget, self.scene.model.parameters, []
        blocked = [r for r in self.refused if r["field"] == "budget.trainable"]
        trains = [c for c in self.found if c.cost.trainable]
        if budget.trainable is not None and blocked and not trains:
            out.append(f"Nothing can be trained under this limit: {blocked[0]['method']}: {blocked[0]['reason']}.")
        if budget.trainable is not None and (budget.trainable_count(parameters) or 0) >= parameters:
            out.append(f"The limit on trainable parameters is no limit: the model has {parameters:,}.")
        if budget.joules is not None:
            row = self.found[0].states["joules"] if self.found else {"value": None, "reason": planner.meter()}
            if row["value"] is None:
                out.append(f"The energy limit cannot be planned for: {row['reason']}.")
        return out

    def basis(self, rows: list[Candidate]) -> str:
        """On what the order rests, in one sentence."""
        sources = {c.estimate["source"] for c in rows}
        if not rows:
            return "No pipeline fits."
        if sources == {"prior"}:
            text = "No run here is like any of these: the order rests on published figures and rules of thumb alone."
        else:
            like = sum(c.estimate["source"] == "history" for c in rows)
            text = f"{like} of {len(rows)} pipelines have runs like them in this database; {self.calibration.get('text', '')}."
        if self.base is None:
            text += f" The quality of {self.spec.model} on this data is not known yet, so gains are relative to it."
        return text


def _contradiction(field: str, limit, least, problem: str, remedy: str) -> dict:
    return {"field": field, "limit": limit, "least": least, "problem": problem, "remedy": remedy,
            "text": f"{field} = {limit}: {problem}. {remedy}."}


def _speeds(store) -> dict[str, dict]:
    """Measured training units per second by what decides them, as ``planner.history`` tells them for one spec."""
    if store is None:
        return {}
    seen: dict[str, list[float]] = {}
    for row in store.runs(status="finished", limit=200):
        if row.get("tokens_per_second"):
            seen.setdefault(planner.signature(row["spec"]), []).append(row["tokens_per_second"])
    out = {}
    for key, speeds in seen.items():
        speeds = sorted(speeds[:9])
        runs = "1 earlier run" if len(speeds) == 1 else f"{len(speeds)} earlier runs"
        out[key] = {"units_per_second": speeds[len(speeds) // 2], "how": f"the speed of {runs} like this one"}
    return out


# -- rows --------------------------------------------------------------------------------------------------------------
def _rows(found: list[Candidate], search: Search, tiers: bool = True) -> list[dict]:
    rows, leader, tier = [], None, -1
    for i, c in enumerate(found):
        if leader is None or search.apart(leader, c):
            leader, tier = c, tier + 1
        rows.append(_row(c, search, i + 1 if tiers else None, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[min(tier, 25)] if tiers else None))
    return rows


def _row(c: Candidate, search: Search, rank, tier) -> dict:
    plain = search.spec.replace(pipeline=c.spec.pipeline).to_dict()
    plain["pipeline"] = [pipelines.compact(m) for m in c.spec.pipeline]
    cost, parameters = c.cost, search.scene.model.parameters
    expected_here = {k: v for k, v in c.estimate.items() if k != "calibration"}
    return {
        "rank": rank, "tier": tier, "text": " → ".join(pipelines.short(m) for m in c.resolved.pipeline),
        "methods": [m.card.id for m in c.spec.pipeline], "families": list(dict.fromkeys(m.card.family for m in c.spec.pipeline)),
        "pipeline": [pipelines.compact(m) for m in c.resolved.pipeline], "spec": plain, "expected": expected_here,
        "seconds": round(cost.seconds, 2), "least_seconds": round(cost.least_seconds, 2), "peak_bytes": int(cost.peak.total),
        "size_bytes": int(cost.size), "trainable": {"count": int(cost.trainable), "share": cost.trainable / max(1, parameters)},
        "steps": int(cost.steps), "units": int(cost.units), "verdict": verdict(c.states),
        "limits": {k: {n: r.get(n) for n in ("limit", "value", "spare", "state")} for k, r in c.states.items()},
        "reasons": [r for r in c.reasons], "why": _why(c, search)}


def _why(c: Candidate, search: Search) -> str:
    """One line: what training sees, which lever moved, and where the expectation comes from."""
    parts, cost = [], c.cost
    if cost.steps:
        unit = "tokens" if search.scene.task == "causal-lm" else "examples"
        seconds = sum(s.seconds for s in cost.stages if s.steps)
        seen = f"{cost.units / 1e6:.1f} M" if cost.units >= 1e6 else f"{cost.units / 1e3:.0f} k" if cost.units >= 1e4 else f"{cost.units:,}"
        parts.append(f"sees {seen} {unit} in {clock(seconds)}")
    else:
        parts.append("no training")
    if cost.sparsity > 0.01 and cost.size > 0.98 * cost.before_bytes:
        parts.append(f"{100 * cost.sparsity:.0f} % zeros, not smaller on disk")
    for method, reasons in zip(c.resolved.pipeline, c.reasons):
        for name, why in reasons.items():
            if ("limit" in why or "stay under" in why) and "no limit" not in why:
                parts.append(f"{name} {why}" if why.startswith(str(getattr(method, name, None))) else f"{name}: {why}")
    parts.append(c.estimate["reason"].removeprefix("from priors only: ") if c.estimate["base"] is not None else f"from {FROM[c.estimate['source']]}")
    if c.over:
        parts.append("misses " + ", ".join(f"{k} ({_amount(k, c.states[k])})" for k in c.over))
    return "; ".join(parts)


def _amount(name: str, row: dict) -> str:
    if name == "quality":
        return f"{figure(row['value'], row['metric'])} expected"
    if name == "memory_gb":
        return gigabytes(row["value"] * 1e9)
    if name == "size_mb":
        return f"{row['value']:.2f} MB"
    return clock(60 * row["value"]) if name == "minutes" else f"{row['value']:,.0f}"
