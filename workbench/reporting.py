"""The reporter of a real run: what the engines say goes to the database, without making the training thread wait.

Everything goes through ``storage.Writer``, which commits twice per half second. The person's wish (stop, pause) and a passed
memory limit come back through ``wants``.
"""

from __future__ import annotations

import math
import statistics
import sys
import threading
import time
from collections import deque
from typing import Any

from engines.shortage import give_back
from workbench import telemetry
from workbench.reaper import HEARD

BELIEVED = 0.85
"""A refusal of memory is believed when this share of the limit was resident before."""
RATES = ("tokens_per_second", "samples_per_second")


class StoreReporter:
    """``engines.reporter.Reporter`` on a ``storage.Store``.

    Args:
        base: seconds that the run has already used in earlier processes.
        stages: method and settings of each stage, in order.
    """

    def __init__(self, store, run_id: int, *, base: float = 0.0, stages: list[dict] = (), period: float = 0.5):
        from storage import Writer
        self.store, self.run_id = store, run_id
        self.writer = Writer(store, run_id, period=period)
        self.base, self.began = base, time.monotonic()
        self.stages = [dict(s) for s in stages]
        self.device = "cpu"
        self.step = 0
        self.want: str | None = None
        self.heard: float | None = None
        """When the loop first took notice of a wish (monotonic)."""
        self.share, self.left, self.stage = 0.0, None, None
        self.rate: float | None = None
        self.rates: deque[float] = deque(maxlen=4096)
        self.joules_base, self.joules = 0.0, None
        self.joules_limit: float | None = None
        self.over: int | None = None
        self.limit: float | None = None
        self.cap: telemetry.DataCap | None = None
        """Set by the worker of a run with a memory limit on the processor."""
        self.knobs: list[dict] = []
        """What was lowered when memory ran out: knob, before, after, phase."""
        self.phases: dict[str, dict] = {}
        self.current: str | None = None
        self.evaluations: list[tuple[str, int, Any]] = []
        self.trouble: str | None = None
        self._phase_began = self.began
        self._lock = threading.Lock()
        self._units: set[str] = set()
        telemetry.reset_peak()

    # -- the engines' side -------------------------------------------------------------------------------------
    def clock(self) -> float:
        """Seconds since the run started, without the time between its processes."""
        return self.base + time.monotonic() - self.began

    def points(self, step: int, values: dict[str, float]) -> None:
        self.step = step
        self.writer.points(step, values, self.clock())
        for name in RATES:
            if name in values:
                self.rate = float(values[name])
                self.rates.append(self.rate)

    def event(self, kind: str, text: str, **data: Any) -> None:
        data.setdefault("step", self.step)
        if kind == "memory" and "knob" in data:
            self.knobs.append(dict(knob=data["knob"], before=data.get("before"), after=data.get("after"), phase=self.current))
        self.writer.event(kind, text, **data)
        self.log(f"{kind}: {text}")
        if kind == "stage":
            self.flush()  # the pipeline now writes where a resume begins: what came before must be on record

    def log(self, line: str) -> None:
        try:
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
        except OSError:
            pass  # the disk of the log is full; the database says so too

    def phase(self, name: str) -> None:
        with self._lock:
            self._close_phase()
            self.current, self._phase_began = name, time.monotonic()
            self._hold(name)
            head = name.split(" ", 1)[0]
            if head.isdigit() and 0 < int(head) <= max(len(self.stages), 1):
                self._enter_stage(int(head) - 1)
        self.writer.update(phase=name, stage=self.stage)

    def progress(self, share: float, left: float | None) -> None:
        self.share, self.left = float(share), left

    def layers(self, step: int, figures: dict[str, list]) -> None:
        if figures:
            self.writer.layers(step, figures)

    def evaluation(self, name: str, stage: int, result: Any) -> None:
        self.evaluations.append((name, stage, result))
        self.writer.call("put_evaluation", name, stage, self.step, self.clock(), result.metric, result.value, result.low,
                         result.high, result.n, result.scores, result.weights, result.items_hash,
                         dict(result.extra, seconds=result.seconds))
        fields = dict(metric=result.metric, value=result.value, value_low=result.low, value_high=result.high, n=result.n)
        if stage < 0:
            fields["base_value"] = result.value
        self.writer.update(**fields)

    def wants(self) -> str | None:
        """``stop`` or ``pause``; ``memory`` once each time the budget's memory limit was passed, for the loop to lower a knob."""
        self._look()
        if self.over is not None and self.want is None:
            self.over = None
            self._peak()
            give_back()
            telemetry.reset_peak()
            return "memory"
        if self.want is not None and self.heard is None:
            self.heard = time.monotonic()
        return self.want

    def flush(self) -> None:
        """Wait until every point and event so far is in the database; the loop calls it before a checkpoint counts."""
        try:
            self.writer.flush()
        except Exception as e:
            self.note(e)

    # -- the worker's side -------------------------------------------------------------------------------------
    def ask(self, what: str) -> None:
        """Pass a wish on to the loop: ``stop`` or ``pause``; a stop is not taken back by a pause."""
        if self.want != "stop":
            self.want = what

    def sample(self, values: dict[str, float]) -> None:
        """One set of telemetry; its step is the clock in milliseconds, so that waiting phases have figures too."""
        if "energy/joules" in values:
            self.joules = values["energy/joules"] = values["energy/joules"] + self.joules_base
            if self.joules_limit and self.joules > self.joules_limit and self.want is None:
                self.event("budget", f"The energy budget of {self.joules_limit:g} J is used up", joules=self.joules)
                self.ask("stop")
        self.writer.samples(self.clock(), values)
        for name in values.keys() - self._units:
            self._units.add(name)
            if name in telemetry.UNITS:
                self.writer.call("set_unit", name, telemetry.UNITS[name])

    def over_memory(self, rss: int) -> None:
        """More than the limit was seen; the loop hears of it at its next step, an evaluation after its next batch."""
        self.over = rss
        self.event("memory", f"Main memory is at {rss / 1e9:.2f} GB, over the budget of {self.limit / 1e9:.2f} GB",
                   bytes=rss, limit=int(self.limit))

    def _hold(self, phase: str) -> None:
        """The kernel keeps the limit while the run evaluates, calibrates and trains. Not while it loads, where libraries end the
        process instead of saying so, and not while the finished result is saved: that must not be lost for some megabytes.
        """
        if self.cap is None:
            return
        if phase in ("load", "save", "speed"):
            self.cap.lift()
        elif self.cap.soft is None:
            self.cap.renew()

    def relax(self) -> bool:
        """After a refusal: True when it came of memory taken but not used, and there is room now; then nothing need be lowered."""
        if self.cap is None or self.cap.soft is None:
            return False
        believed = self._peak() > BELIEVED * self.cap.limit
        give_back()
        telemetry.reset_peak()
        return self.cap.renew() and not believed

    def _peak(self) -> int:
        """The high-water mark since it was last reset, kept as the present phase's."""
        peak = telemetry.peak_rss() or 0
        with self._lock:
            if self.current is not None and self.device == "cpu":
                found = self.phases.setdefault(self.current, dict(seconds=0.0, peak_bytes=0))
                found["peak_bytes"] = max(found["peak_bytes"], peak)
        return peak

    def _look(self) -> None:
        """The kernel's high-water mark since the last look: a peak between two samples counts as well."""
        if not self.limit or self.device != "cpu" or self.over is not None:
            return
        if (peak := telemetry.peak_rss() or 0) > self.limit and self.current is not None:
            self._peak()
            self.over_memory(peak)

    def beat(self) -> None:
        """Once a second: the run lives, and how far it is."""
        if self.heard is not None and self.want == "stop":
            self.writer.update(message=HEARD)
        self.writer.update(heartbeat=time.time(), progress=min(1.0, self.share), left_seconds=_finite(self.left),
                           seconds=round(self.clock(), 3), tokens_per_second=_finite(self.rate))

    def note(self, error: BaseException) -> None:
        """Remember trouble with the database; the run goes on and says it in its log."""
        text = f"{type(error).__name__}: {error}"
        if text != self.trouble:
            self.trouble = text
            self.log(f"warning: {text}")

    def usual_rate(self) -> float | None:
        """Median of the steps' tokens (or examples) per second."""
        return _finite(statistics.median(self.rates)) if self.rates else None

    def peaks(self) -> list[dict]:
        """Seconds and peak bytes of each phase so far, in order of their first appearance."""
        with self._lock:
            self._close_phase()
            self._phase_began = time.monotonic()
            return [dict(phase=name, **{k: (round(v, 3) if k == "seconds" else v) for k, v in found.items()})
                    for name, found in self.phases.items()]

    def end_stages(self, status: str, summaries: list[dict] = ()) -> None:
        """Close the open stage and add what the pipeline says about each."""
        with self._lock:
            if self.stage is not None:
                self._leave_stage(status)
        for i, summary in enumerate(summaries[:len(self.stages)]):
            self._put_stage(i, summary=summary)

    def close(self) -> None:
        """Write everything; called once at the end."""
        try:
            self.writer.close(timeout=60.0)
        except Exception as e:
            self.note(e)

    # -- inside ----------------------------------------------------------------------------------------------------
    def _enter_stage(self, index: int) -> None:
        if index == self.stage:
            return
        if self.stage is not None and index > self.stage:
            self._leave_stage("finished")
        self.stage = index
        self._put_stage(index, status="running", started=time.time())

    def _leave_stage(self, status: str) -> None:
        index = self.stage
        own = [found["seconds"] for name, found in self.phases.items() if name.split(" ", 1)[0] == str(index + 1)]
        spent = self.stages[index].get("spent", 0.0) if index < len(self.stages) else 0.0
        self._put_stage(index, status=status, ended=time.time(), seconds=round(spent + sum(own), 3))

    def _put_stage(self, index: int, **fields) -> None:
        if index >= len(self.stages):
            return
        known = self.stages[index]
        self.writer.call("put_stage", index, known["method"], known["settings"], **fields)

    def _close_phase(self) -> None:
        now = time.monotonic()
        if self.current is None:
            self.current = "start"
        found = self.phases.setdefault(self.current, dict(seconds=0.0, peak_bytes=0))
        found["seconds"] += now - self._phase_began
        rss = telemetry.peak_rss() or 0
        telemetry.reset_peak()
        torch = sys.modules.get("torch")
        if self.device.startswith("cuda") and torch is not None and torch.cuda.is_initialized():
            for key, value in (("rss_bytes", rss), ("peak_bytes", torch.cuda.max_memory_allocated()),
                               ("reserved_bytes", torch.cuda.max_memory_reserved())):
                found[key] = max(found.get(key, 0), value)
            torch.cuda.reset_peak_memory_stats()
        else:
            found["peak_bytes"] = max(found["peak_bytes"], rss)


def _finite(value) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
