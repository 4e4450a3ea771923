"""Forecast and measurement of the runs in the database, and the correction that the planner takes from them. No torch.

For every finished run the raw forecast is computed again from its frozen settings with the formulas as they are now, so that
history keeps its worth when a formula changes; where the model has gone, the figures stored with the run are taken if they come
from the same formulas. Corrections are factors of what is estimated (activations, logits, work space) and an offset of the
process: weights, gradients, optimizer, trainable parameters and sizes follow from shapes and are never corrected.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

from engines.errors import InputError
from storage import StorageError
from workbench import machine, staging
from workbench.scene import Cost, Scene
from workbench.shrinkage import Effects, fit, median, quantile
from workbench.sources import DataFacts

ROOT = Path(__file__).resolve().parent.parent
FORMULAS = ("engines/*.py", "engines/adaptation/*.py", "engines/pruning/*.py", "engines/quantization/*.py", "engines/allocation/*.py",
            "engines/distillation/*.py", "engines/kv_cache/*.py", "workbench/forecast.py", "workbench/resident.py", "workbench/scene.py",
            "workbench/crew.py", "workbench/sources.py", "workbench/staging.py")
"""Source files on which a raw forecast depends."""
RUNS = 400
"""Latest finished runs that are looked at."""
SETTING = "calibration"
MACHINE, METHODS, MODEL, SAME = 12.0, 10.0, 10.0, 3.0
"""Pulls of the levels: runs that weigh as much as no effect at all (``workbench.shrinkage``)."""
PULLS = (MACHINE, METHODS, MODEL, SAME)
PROCESS = 2.0
"""The same for the bytes of the process."""
LENGTHS = 64
QUICK = 5_000_000
"""Bytes of a data file that is read again rather than remembered."""


@functools.cache
def formula() -> str:
    """Twelve hex digits that change with the source of the formulas."""
    seen = hashlib.sha256()
    for pattern in FORMULAS:
        for path in sorted(ROOT.glob(pattern)):
            seen.update(path.name.encode() + path.read_bytes())
    return seen.hexdigest()[:12]


# -- what is kept with a run -------------------------------------------------------------------------------------------
def raw(found: Cost, scene: Scene) -> dict:
    """The uncorrected figures of a forecast, for its document: by phase bytes, exact bytes and seconds; steps' seconds; facts of the data."""
    phases = []
    for p in found.phases:
        (total, seconds), exact = p.raw or (p.total, p.seconds), p.exact if p.raw_exact is None else p.raw_exact
        phases.append(dict(phase=p.name, total=int(total), exact=int(exact), seconds=round(seconds, 3)))
    facts = dict(vars(scene.facts))     # not asdict, which would copy thousands of lengths one by one
    lengths, _ = facts.pop("lengths"), facts.pop("order")
    facts["lengths"] = [lengths[int((i + 0.5) * len(lengths) / LENGTHS)] for i in range(LENGTHS)] if len(lengths) > LENGTHS else list(lengths)
    facts["warnings"] = []
    return dict(formula=formula(), machine=machine.fingerprint(), phases=phases, peak_bytes=max(p["total"] for p in phases),
                seconds=round(sum(p["seconds"] for p in phases), 3), each=[s.each for s in found.stages], times=_times(found), facts=facts)


def _times(found: Cost) -> int:
    return next((p.times for p in found.phases if p.name == "evaluate"), 1)


def _again(run: dict, home) -> dict | None:
    """The raw forecast of a finished run by the present formulas; None where the model or the data is gone."""
    from workbench.levers import Chooser
    from workbench.spec import RunSpec

    said = run["forecast"]
    known = (said.get("raw") or {}).get("facts")
    try:
        spec = RunSpec.from_dict(said.get("resolved") or run["spec"])
        facts = None
        if known and not _at_hand(spec.data.source):
            facts = DataFacts(**{**known, "lengths": tuple(known["lengths"]), "warnings": ()})
        scene = staging.plain_scene(spec, home, facts)
        # Knobs that came later than the run were not frozen with it: the chooser knows what they were then.
        return raw(Chooser(spec, scene).run()[1], scene)
    except (InputError, TypeError, KeyError, ValueError):
        return None


def _at_hand(source: str) -> bool:
    """Whether data can be counted again in no time; what was counted then lacks the length of each example."""
    from engines import data

    try:
        return source in data.BUNDLED or 0 < Path(source).expanduser().stat().st_size < QUICK
    except OSError:
        return False


# -- forecast beside measurement ---------------------------------------------------------------------------------------
def observe(run: dict, store, home=None) -> dict | str:
    """One finished run as a row of forecast and measurement, or the reason why it says nothing.

    Args:
        run: its whole row, with ``forecast`` and ``footprint``.
    """
    said, print_ = run["forecast"] or {}, run["footprint"] or {}
    if not said.get("memory") or not print_.get("peak_bytes"):
        return "no forecast or no measurement was stored"
    if store.events(run["id"], kind="resume", limit=1) or len(store.events(run["id"], kind="start", limit=2)) > 1:
        return "resumed or begun again"
    if any((e["data"] or {}).get("knob") for e in store.events(run["id"], kind="memory", limit=20)):
        return "a knob was lowered on the way"
    stored = said.get("raw") or {}
    here = machine.hardware(stored["machine"]) if stored.get("machine") else machine.hardware() if run["host"] in (None, _host()) else "unknown"
    found = _again(run, home) if here == machine.hardware() else None
    if found is None:
        if stored.get("formula") != formula():
            return "its model is gone" if here == machine.hardware() else "another machine, other formulas"
        found = stored
    measured = {p["phase"]: p for p in print_.get("phases") or ()}
    steps = {s["index"]: (s["summary"] or {}).get("steps") for s in store.stages(run["id"])}
    evaluations = len(store.evaluations(run["id"]))
    phases = []
    for part in found["phases"]:
        seen = measured.get(part["phase"])
        if seen is None:
            continue
        seconds, head = part["seconds"], part["phase"].split(" ")[0]
        if head.isdigit() and steps.get(int(head) - 1):
            seconds = found["each"][int(head) - 1] * steps[int(head) - 1]
        elif part["phase"] == "evaluate" and evaluations:
            seconds *= evaluations / max(1, found["times"])
        kind = part["phase"].split(" ", 1)[-1]
        phases.append([kind, part["total"], part["exact"], seen.get("peak_bytes") or 0, seconds, seen.get("seconds") or 0.0])
    trainable = (said.get("trainable") or {}).get("count")
    return dict(
        run=run["id"], name=run["name"], slot=run["slot"], model=run["spec"]["model"], methods=_methods(run["spec"]), machine=here,
        ended=run["ended"], formula=found["formula"], phases=phases, peak=print_["peak_bytes"], seconds=run["seconds"],
        shown=[said["memory"].get("peak_bytes"), (said.get("seconds") or {}).get("total")],
        trainable=[trainable, print_.get("trainable")], size=[(said.get("size") or {}).get("bytes"), print_.get("size_bytes")],
        joules=print_.get("joules"), device=said["memory"].get("device"))


@functools.cache
def _host() -> str:
    import socket

    return socket.gethostname()


def _methods(spec: dict) -> list[str]:
    return [s if isinstance(s, str) else s["method"] for s in spec.get("pipeline") or ()]


_ROWS: dict[str, tuple[tuple, list[dict], dict[str, int]]] = {}


def observations(store, home=None) -> tuple[list[dict], dict[str, int]]:
    """Rows of ``observe`` for the latest finished runs, newest first, and how many were left out for which reason.

    What was computed is kept in the database until the formulas change; a call without new runs costs two small queries.
    """
    stamp = _stamp(store)
    known = _ROWS.get(str(store.path))
    if known and known[0] == stamp:
        return known[1], known[2]
    kept = store.get_setting(SETTING, None) or {}
    rows: dict[str, dict | str] = kept["rows"] if kept.get("formula") == formula() else {}
    wanted = store.runs(status="finished", limit=RUNS, archived=None, order="-ended")
    present = {str(r["id"]) for r in wanted}
    fresh = [r for r in wanted if str(r["id"]) not in rows or _other(rows[str(r["id"])], r)]
    for row in fresh:
        rows[str(row["id"])] = observe(store.run(row["id"]), store, home)
    if fresh or not present >= rows.keys():
        rows = {k: v for k, v in rows.items() if k in present}
        with contextlib.suppress(StorageError):  # a home that cannot be written is no obstacle
            store.set_setting(SETTING, {"formula": formula(), "rows": rows})
    found = [rows[str(r["id"])] for r in wanted if isinstance(rows[str(r["id"])], dict)]
    left: dict[str, int] = {}
    for value in rows.values():
        if isinstance(value, str):
            left[value] = left.get(value, 0) + 1
    _ROWS[str(store.path)] = (stamp, found, left)
    return found, left


def _other(known: dict | str, row: dict) -> bool:
    """Whether a kept row was made of another run of this number (a database put in place of the old one)."""
    return isinstance(known, dict) and (known["ended"] != row["ended"] or known["peak"] != row["peak_bytes"])


def _stamp(store) -> tuple:
    latest = store.runs(status="finished", limit=1, order="-ended", archived=None)
    return (formula(), store.count_runs(status="finished", archived=None), latest[0]["id"] if latest else 0, latest[0]["ended"] if latest else 0)


# -- the correction ----------------------------------------------------------------------------------------------------
@functools.cache
def group(kind: str) -> str:
    """Phases that err alike: load, evaluate, save, speed, stages that train, and stages that do not."""
    from engines import registry

    if kind in ("load", "evaluate", "save", "speed"):
        return kind
    method = registry.methods().get(kind)
    return "train" if method is not None and method.card.trains else "apply"


def keys(model: str, methods: tuple[str, ...], kind: str) -> tuple:
    """The group of a phase at each level: all runs of the machine, its methods, its model, and runs that are alike in both."""
    among = group(kind)
    return (among, (among, methods), (among, model), (model, methods, kind))


@dataclass
class Correction:
    """Factors of the estimated bytes and of the seconds of a phase, fitted to the runs of one machine."""

    runs: int = 0
    memory: Effects = field(default_factory=Effects)
    offset: float = 0.0
    """Bytes that the process and its libraries take beyond what was measured on an empty one."""
    time: Effects = field(default_factory=Effects)
    power: Effects | None = None
    error: tuple[float, float] | None = None
    """Median and 90 % quantile of the relative error of the peak for runs that were left out of the fit; None below five runs."""
    alike: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)
    _known: dict = field(default_factory=dict, repr=False)

    def factors(self, spec, kind: str) -> tuple[float, float, float]:
        """(factor of estimated bytes, bytes beside them, factor of seconds) of the phases of ``kind`` of a ``RunSpec``."""
        if not self.runs:
            return 1.0, 0.0, 1.0
        at = (spec.model, tuple(m.card.id for m in spec.pipeline), kind)
        if at not in self._known:
            groups = keys(*at)
            self._known[at] = (self.memory.factor(groups), self.offset, self.time.factor(groups))
        return self._known[at]

    def joules(self, spec, seconds: float) -> tuple[float | None, str]:
        """Energy of a run of ``seconds``, and how it is known; (None, "") before a run with a meter has ended here."""
        if self.power is None:
            return None, ""
        methods = tuple(m.card.id for m in spec.pipeline)
        watts = self.power.factor(("", methods, spec.model, (spec.model, methods)))
        return watts * seconds, f"{watts:.1f} W, as metered in earlier runs on this machine, for {seconds:.1f} s"

    def told(self, spec, found: Cost) -> dict:
        """For a forecast's document: factor (corrected over raw peak), seconds_factor, runs, alike, error, text."""
        raw = [p.raw or (p.total, p.seconds) for p in found.phases]
        before, seconds = max(r[0] for r in raw), sum(r[1] for r in raw)
        methods = tuple(m.card.id for m in spec.pipeline)
        alike = self.alike.get((spec.model, methods), 0)
        out = dict(runs=self.runs, alike=alike, factor=round(found.peak.total / max(1, before), 4), left_out=sum(self.left_out.values()),
                   seconds_factor=round(found.seconds / seconds, 4) if seconds else 1.0, error=self.error)
        if not self.runs:
            return out | dict(text="not corrected: no run has finished on this machine yet")
        some = f"{self.runs} run{'s' if self.runs != 1 else ''} on this machine"
        text = f"memory corrected by × {out['factor']:.2f} from {some}" + (f", {alike} of this model by these methods" if alike else "")
        if self.error:
            text += f"; for a run left out of it the error was {100 * self.error[0]:.0f} % in the middle, {100 * self.error[1]:.0f} % at most in nine of ten"
        return out | dict(text=text)


def fitted(rows: list[dict]) -> Correction:
    """A correction from rows of one machine."""
    memory, seconds, power, process = [], [], [], []
    for row in rows:
        # Before anything is computed the process itself is nearly all there is.
        process += [peak - total for kind, total, _, peak, _, _ in row["phases"] if kind == "load" and peak and row["device"] != "cuda"]
    offset = len(process) / (len(process) + PROCESS) * median(process) if process else 0.0
    for row in rows:
        methods, whole = tuple(row["methods"]), sum(p[5] for p in row["phases"]) or 1.0
        for kind, total, exact, peak, said, took in row["phases"]:
            groups, estimated = keys(row["model"], methods, kind), total - exact
            if estimated > 0 and peak > 0:
                # Less than a tenth of the estimate left means that the exact parts did not all live at once.
                left = max(peak - exact - offset, 0.1 * estimated)
                # Where the estimate is a small part of the whole, what is left over says little of it.
                memory.append((row["run"], groups, math.log(left / estimated), min(1.0, 2 * estimated / total)))
            if said > 0 and took > 0.01:
                seconds.append((row["run"], groups, math.log(took / said), max(0.02, took / whole)))
        if row.get("joules") and row["seconds"]:
            groups = ("", methods, row["model"], (row["model"], methods))
            power.append((row["run"], groups, math.log(row["joules"] / row["seconds"]), 1.0))
    alike: dict = {}
    for row in rows:
        at = (row["model"], tuple(row["methods"]))
        alike[at] = alike.get(at, 0) + 1
    watts = fit(power, PULLS, center=True) if power else None
    return Correction(len(rows), fit(memory, PULLS), offset, fit(seconds, PULLS), watts, None, alike)


def corrected(row: dict, by: Correction) -> tuple[float, float]:
    """(peak bytes, seconds) of a row's raw forecast under a correction."""
    methods, peaks, seconds = tuple(row["methods"]), [0.0], 0.0
    offset = by.offset if row["device"] != "cuda" else 0.0
    for kind, total, exact, _, said, _ in row["phases"]:
        groups = keys(row["model"], methods, kind)
        peaks.append(exact + offset + (total - exact) * by.memory.factor(groups))
        seconds += said * by.time.factor(groups)
    return max(peaks), seconds


def left_out(rows: list[dict], folds: int | None = None) -> dict[int, tuple[float, float]]:
    """(peak, seconds) of each run as corrected by the others alone: each on its own (``folds`` None), or in so many parts."""
    parts = min(len(rows), folds or len(rows))
    out = {}
    for part in range(parts):
        held = rows[part::parts]
        by = fitted([r for i, r in enumerate(rows) if i % parts != part])
        out.update({row["run"]: corrected(row, by) for row in held})
    return out


_FITTED: dict[str, tuple[tuple, Correction]] = {}


def correction(store, home=None) -> Correction:
    """The correction for this machine; fitted again only after another run has finished."""
    if store is None:
        return Correction()
    rows, left = observations(store, home)
    stamp, here = _ROWS[str(store.path)][0], machine.hardware()
    known = _FITTED.get(str(store.path))
    if known and known[0] == stamp:
        return known[1]
    mine = [r for r in rows if r["machine"] == here]
    found = fitted(mine)
    found.left_out = left
    if len(mine) >= 5:
        held = left_out(mine, 5)
        errors = [abs(held[r["run"]][0] / r["peak"] - 1) for r in mine]
        found.error = (round(median(errors), 4), round(quantile(errors, 0.9), 4))
    _FITTED[str(store.path)] = (stamp, found)
    return found
