"""The Optuna side: which trial comes next, which one is hopeless, which parameters matter.

The trials table is the only truth: studies live in memory and are rebuilt from it; nothing is pickled, nothing can disagree.
Samplers: "Algorithms for Hyper-Parameter Optimization" (TPE), "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".
Pruners: "Google Vizier" (median rule), "Hyperband", "Massively Parallel Hyperparameter Tuning" (successive halving).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from typing import Any

from workbench.sweeps.plan import SweepPlan
from workbench.sweeps.space import Parameter, label, untried

BINS = 20
"""A curve is compared at shares of the budget in twentieths: trials with other batch sizes or lengths meet there."""
STARTUP = 4
"""Complete trials before the median rule may stop one; also random trials before TPE learns."""
POPULATION = 8


def _optuna():
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def distribution(parameter: Parameter):
    """The Optuna distribution of a parameter; choices by their labels, because a choice may be a whole pipeline."""
    d = _optuna().distributions
    if parameter.choices:
        return d.CategoricalDistribution([label(c) for c in parameter.choices])
    if parameter.whole:
        return d.IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step or 1)
    return d.FloatDistribution(float(parameter.low), float(parameter.high), log=parameter.log, step=parameter.step)


def _inner(parameter: Parameter, value) -> Any:
    return label(value) if parameter.choices else value


def _outer(parameter: Parameter, value) -> Any:
    if parameter.choices:
        return next(c for c in parameter.choices if label(c) == value)
    # Eight digits are more than a run can tell apart, and read well.
    return int(value) if parameter.whole else float(f"{value:.8g}")


def _sampler(plan: SweepPlan, number: int):
    """A sampler whose draws depend on the sweep's seed, the trial's number and the trials so far alone, whoever asks."""
    samplers = _optuna().samplers
    seed = int.from_bytes(hashlib.sha256(f"{plan.seed}:{number}".encode()).digest()[:4], "little")
    if plan.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if plan.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=min(POPULATION, max(4, plan.trials // 4)), seed=seed)
    return samplers.TPESampler(n_startup_trials=max(STARTUP, min(10, plan.trials // 3)), seed=seed, constant_liar=True)


def study(plan: SweepPlan, trials: list[dict], number: int = 0):
    """An in-memory study of these trials (rows of the table)."""
    optuna = _optuna()
    state = optuna.trial.TrialState
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = _sampler(plan, number)
        made = optuna.create_study(directions=[o.direction or "minimize" for o in plan.objectives], sampler=sampler)
    parameters = {p.path: p for p in plan.parameters}
    known = {path: distribution(p) for path, p in parameters.items()}
    complete = 0
    for row in trials:
        params = {p: _inner(parameters[p], v) for p, v in (row["params"] or {}).items() if p in parameters}
        given: dict[str, Any] = dict(params=params, distributions={p: known[p] for p in params})
        if row["state"] == "complete" and usable(row["values"], plan):
            given |= dict(state=state.COMPLETE, values=row["values"])
            if plan.sampler == "nsga2":
                given["system_attrs"] = {sampler._get_generation_key(): complete // sampler.population_size}
            complete += 1
        elif row["state"] == "pruned":
            if len(plan.objectives) > 1:
                # A study of several objectives has no curves: the trial counts as worse than all that ran to their ends.
                given |= dict(state=state.PRUNED, constraints={"pruned": 1.0})
            else:
                at = (row["values"] or [None])[0]
                given |= dict(state=state.PRUNED, intermediate_values={} if at is None else {1: at})
        elif row["state"] == "infeasible":
            given |= dict(state=state.PRUNED, constraints={"budget": 1.0})
        elif row["state"] == "running":
            given |= dict(state=state.RUNNING)
        else:
            given |= dict(state=state.FAIL)
        made.add_trial(optuna.trial.create_trial(**given))
    return made


def usable(values, plan: SweepPlan) -> bool:
    """Whether a trial has a finite figure for every objective."""
    return bool(values) and len(values) == len(plan.objectives) and all(v is not None for v in values)


def ask(plan: SweepPlan, trials: list[dict]) -> dict[str, Any] | None:
    """The parameters of the next trial, or None: the plan has no more.

    A combination that was tried already is drawn again a few times; then one that is left over is taken, if there is one.
    """
    number = max((t["number"] for t in trials), default=-1) + 1
    if number >= plan.trials:
        return None
    if plan.sampler == "grid":
        points = plan.points()
        return points[number] if number < len(points) else None
    tried = {json.dumps(t["params"], sort_keys=True) for t in trials}
    known = {p.path: distribution(p) for p in plan.parameters}
    parameters = {p.path: p for p in plan.parameters}
    for again in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = study(plan, trials, number * 8 + again).ask(known).params
        found = plan.space.used({p: _outer(parameters[p], v) for p, v in drawn.items()})
        if json.dumps(found, sort_keys=True) not in tried:
            return found
    if plan.distinct() is not None:
        return untried(plan.space, tried, plan.seed + number)
    # A genetic algorithm may repeat itself for long; a run of the same settings with the same seed would tell nothing.
    drawn = study(dataclasses.replace(plan, sampler="random"), trials, number).ask(known).params
    return plan.space.used({p: _outer(parameters[p], v) for p, v in drawn.items()})


class Curves:
    """The pruner with the curves that it compares: a study of its own, in which every curve is one to be minimized.

    Kept in memory by the conductor and replayed from the database when that begins anew.
    """

    def __init__(self, plan: SweepPlan, sweep: int):
        optuna = _optuna()
        self.plan, self.trials, self.bins = plan, {}, {}
        first = max(1, BINS // max(plan.base.training.evaluations, 1))
        pruners = optuna.pruners
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pruner = {
                "none": lambda: pruners.NopPruner(),
                "median": lambda: pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=first, n_min_trials=2),
                "hyperband": lambda: pruners.HyperbandPruner(min_resource=first, max_resource=BINS, reduction_factor=2),
                "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=2),
            }[plan.pruner]()
            self.study = optuna.create_study(study_name=f"sweep-{sweep}", direction="minimize", pruner=self.pruner,
                                             sampler=optuna.samplers.RandomSampler(seed=plan.seed))

    def report(self, number: int, curve: list[tuple[float, float]]) -> str | None:
        """Tell the points ``(share of the budget, loss)`` of a trial so far; the reason to stop it, or None."""
        trial = self.trials.get(number)
        if trial is None:
            trial = self.trials[number] = self.study.ask()
        known = self.bins.setdefault(number, {})
        reason = None
        for share, value in curve:
            at = min(BINS, round(share * BINS))
            if at < 1 or at in known or at < max(known, default=0):
                continue
            # Others may have been evaluated between: until a new evaluation the last one holds.
            for between in range(max(known, default=at) + 1, at):
                known[between] = known[max(known)]
                trial.report(known[between], between)
            known[at] = value
            trial.report(value, at)
            if trial.should_prune() and at < BINS:
                reason = self.reason(at, value)
        return reason

    def reason(self, at: int, value: float) -> str:
        others = sorted(bins[at] for bins in self.bins.values() if at in bins)
        place = sum(o < value for o in others) + 1
        return (f"Stopped by the pruner ({self.plan.pruner}) at {at / BINS:.0%} of its budget: held-out loss {value:.4g}, "
                f"place {place} of {len(others)} trials there")

    def close(self, number: int, pruned: bool) -> None:
        """The trial has ended; from now on others are compared with it."""
        states = _optuna().trial.TrialState
        trial, known = self.trials.pop(number, None), self.bins.get(number) or {}
        if trial is None:
            return
        if not known:
            self.study.tell(trial, state=states.FAIL)
        elif pruned:
            self.study.tell(trial, state=states.PRUNED)
        else:
            last = known[max(known)]
            for at in range(max(known) + 1, BINS + 1):
                known[at] = last
                trial.report(last, at)
            self.study.tell(trial, last)


def importance(plan: SweepPlan, trials: list[dict]) -> list[dict[str, float]]:
    """For each objective ``{path: share}`` of its variation that a parameter explains; empty where too few trials are complete.

    Source: "An Efficient Approach for Assessing Hyperparameter Importance" (functional ANOVA).
    """
    done = [t for t in trials if t["state"] == "complete" and usable(t["values"], plan)]
    if len(done) < max(6, len(plan.parameters) + 2) or len(plan.parameters) < 2:
        return []
    optuna = _optuna()
    made = study(plan, done)
    found = []
    for i in range(len(plan.objectives)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
                shares = optuna.importance.get_param_importances(made, evaluator=evaluator, target=lambda t, i=i: t.values[i])
            found.append({path: round(float(share), 4) for path, share in shares.items()})
        except (RuntimeError, ValueError, ImportError):
            found.append({})
    return found


def front(plan: SweepPlan, trials: list[dict]) -> list[int]:
    """Numbers of the complete trials that no other one beats in every objective."""
    done = [(t["number"], [v if o.direction == "minimize" else -v for v, o in zip(t["values"], plan.objectives)])
            for t in trials if t["state"] == "complete" and usable(t["values"], plan)]
    return [n for n, a in done if not any(all(y <= x for x, y in zip(a, b)) and b != a for _, b in done)]
