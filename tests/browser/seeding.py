"""Runs in every state with plausible series, written through the store as a worker would; figures are made up."""

from __future__ import annotations

import math
import random
import time

import numpy as np

SPEC = {"model": "stdlib-lm", "data": "python-docs", "pipeline": [{"method": "magnitude", "sparsity": 0.5}, {"method": "adalora"}, {"method": "int8"}],
        "budget": {"minutes": 2, "memory_gb": 2}, "seed": 0}
FORECAST = {
    "fits": True, "memory": {"peak_bytes": 1_070_000_000, "peak_phase": "2 adalora", "phases": []},
    "seconds": {"total": 111.0, "phases": [{"phase": "load", "seconds": 2.6}, {"phase": "1 magnitude", "seconds": 2.8}, {"phase": "evaluate", "seconds": 1.8},
                                           {"phase": "2 adalora", "seconds": 97.4}, {"phase": "evaluate", "seconds": 1.6}, {"phase": "3 int8", "seconds": 1.0},
                                           {"phase": "save", "seconds": 3.8}]},
    "steps": 560, "tokens": 1_150_000, "trainable": {"count": 315_840, "share": 0.0422}, "parameters": 7_475_456,
    "size": {"bytes": 8_570_000, "before_bytes": 14_950_912, "exact": True}, "training": {"batch": 4, "length": 512},
    "stages": [{"method": "magnitude", "steps": 0}, {"method": "adalora", "steps": 560, "units_per_second": 11_200.0}, {"method": "int8", "steps": 0}]}
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
TRAIN = 7.2
"""Second at which the training stage begins."""


def loss_at(t: float, draw: random.Random, spike: bool = True) -> float:
    p = t - TRAIN
    value = 1.352 + 0.389 * (0.62 * math.exp(-p / 7) + 0.38 * math.exp(-p / 34)) + draw.gauss(0, 0.021)
    return value + (0.16 if spike and 41.1 < t < 41.5 else 0.0)


def map_at(share: float) -> dict:
    rank, sparsity = [], []
    for layer in range(8):
        for i, role in enumerate(ROLES):
            rank.append([layer, role, max(2, min(12, round(5 + layer * 0.6 + (i - 2) * share)))])
            sparsity.append([layer, role, 0.5 + 0.02 * (3.5 - layer) + 0.01 * ((layer * 7 + i * 3) % 5 - 2)])
    return {"rank": rank, "sparsity": sparsity}


class Story:
    """One run told step by step; ``until(seconds)`` writes what happens up to there."""

    def __init__(self, home, name: str, *, spec: dict = SPEC, forecast: dict | None = FORECAST, started: float | None = None, rate: float = 8.0,
                 gpu: bool = False):
        self.home, self.store, self.rate, self.gpu = home, home.store, rate, gpu
        self.id = self.store.create_run({**spec, "name": name}, name=name, forecast=forecast)
        self.started = started if started is not None else time.time()
        self.t, self.step, self.draw, self.evaluated = 0.0, 0, random.Random(7), []
        self.methods = [(s["method"], s) for s in spec["pipeline"]]

    def begin(self) -> Story:
        self.store.update_run(self.id, status="running", started=self.started, heartbeat=time.time(), phase="load", parameters=7_475_456)
        self.store.event(self.id, "start", "Started on the CPU, 2 cores", t=self.started)
        for i, (method, settings) in enumerate(self.methods):
            self.store.put_stage(self.id, i, method, settings)
        self.home.log(self.id).parent.mkdir(parents=True, exist_ok=True)
        return self

    def log(self, line: str) -> None:
        with open(self.home.log(self.id), "a") as f:
            f.write(time.strftime("%H:%M:%S", time.localtime(self.started + self.t)) + "  " + line + "\n")

    def evaluate(self, t: float, name: str, stage: int, value: float, half: float = 0.015) -> None:
        scores = np.ones(64, np.float32)
        self.store.put_evaluation(self.id, name, stage, self.step, t, "bits/byte", value, value - half, value + half, 256, scores, scores, "h",
                                  {"loss": value, "seconds": 0.9, "step": self.step})
        self.store.append(self.id, [("loss_eval", self.step, value, t), ("metric", self.step, value, t)])
        self.store.update_run(self.id, metric="bits/byte", value=value, value_low=value - half, value_high=value + half, n=256,
                              **({"base_value": value} if stage < 0 else {}))
        self.log(f"evaluate {name}: {value:.4f} bits/byte, n = 256")

    def at(self, t: float, name: str) -> bool:
        """True once, when the story passes ``t``."""
        if self.t >= t and name not in self.evaluated:
            self.evaluated.append(name)
            return True
        return False

    def until(self, end: float, live: bool = True) -> Story:
        rows, samples = [], []
        while self.t < end:
            self.t = round(self.t + 1 / self.rate, 6)
            t = self.t
            training = t > TRAIN and t < 104.6
            resting = any(k - 0.9 < t < k for k in (22, 37.4, 52.6, 68, 84, 100))
            rss = 0.45 + 0.19 * min(1, t / 2) + (0.4 + 0.02 * math.sin(t * 7) if training and not resting else 0.1)
            samples += [("mem/rss", round(t * 1000), rss * 1e9, t), ("cpu/percent", round(t * 1000), 190 + 8 * math.sin(t), t)]
            if self.gpu:
                a = 1.0 + 0.03 * math.sin(t * 7.3) if training and not resting else 0.4
                for key, value in (("mem/allocated", a), ("mem/reserved", 1.18), ("mem/process", 1.70), ("mem/device", 1.84)):
                    samples.append((key, round(t * 1000), value * 1e9, t))
                samples += [("gpu/util", round(t * 1000), 91 + 2 * math.sin(t), t), ("gpu/power", round(t * 1000), 388 + 9 * math.sin(t), t),
                            ("gpu/temperature", round(t * 1000), 31 + 16 * (1 - math.exp(-t / 22)), t), ("gpu/clock", round(t * 1000), 1980, t),
                            ("energy/joules", round(t * 1000), 349 * t, t)]
            if training and not resting:
                self.step += 1
                p = (t - TRAIN) / 97.4
                lr = 2e-3 * p / 0.03 if p < 0.03 else 1e-3 * (1 + math.cos(math.pi * (p - 0.03) / 0.97))
                norm = math.exp(math.log(0.55) + 0.25 * self.draw.gauss(0, 1)) + (9 if 41.1 < t < 41.5 else 0)
                for key, value in (("loss", loss_at(t, self.draw)), ("lr", lr), ("grad_norm", norm), ("tokens", self.step * 2048),
                                   ("tokens_per_second", 11_600 + 150 * self.draw.gauss(0, 1)), ("time/data", 0.0004), ("time/forward", 0.051),
                                   ("time/backward", 0.092), ("time/step", 0.024), ("trainable", 473_760 - int(158_000 * min(1, p * 2)))):
                    rows.append((key, self.step, float(value), t))
            self.facts()
        if rows:
            self.store.append(self.id, rows)
        if samples:
            self.store.append(self.id, samples, clock=True)
        if live:
            share = min(1.0, self.t / 111)
            self.store.update_run(self.id, heartbeat=time.time(), seconds=self.t, progress=share, left_seconds=max(0.0, 104.6 - self.t),
                                  tokens_per_second=11_600.0, trainable=315_840)
        return self

    def facts(self) -> None:
        """Events, stages, evaluations and maps that belong to the moment."""
        stage = lambda i, **f: self.store.put_stage(self.id, i, *self.methods[i], **f)  # noqa: E731
        if self.at(2.0, "base"):
            self.evaluate(2.0, "before", -1, 1.262)
        if self.at(2.6, "s1"):
            stage(0, status="running", started=self.started + 2.6)
            self.store.event(self.id, "stage", "Stage 1, Magnitude pruning, began", t=self.started + 2.6, step=self.step)
            self.store.update_run(self.id, phase="1 magnitude", stage=0)
        if self.at(5.4, "s1 end"):
            stage(0, status="finished", started=self.started + 2.6, ended=self.started + 5.4, seconds=2.8)
            self.log("magnitude 50.0 % zero")
        if self.at(7.0, "after 1"):
            self.evaluate(7.0, "stage", 0, 1.741, 0.019)
        if self.at(TRAIN, "s2"):
            stage(1, status="running", started=self.started + TRAIN)
            self.store.event(self.id, "stage", "Stage 2, AdaLoRA, began", t=self.started + TRAIN, step=self.step)
            self.store.update_run(self.id, phase="2 adalora", stage=1)
        for t, value in ((22, 1.487), (37.4, 1.428), (52.6, 1.392), (68, 1.369), (84, 1.356), (100, 1.349)):
            if self.at(t, f"e{t}"):
                self.evaluate(t, "during", 1, value, 0.014)
        if self.at(41.3, "spike"):
            self.store.event(self.id, "warning", "Gradient norm 9.8, clipped to 1.0", t=self.started + 41.3, step=self.step)
            self.log("warning: gradient norm 9.8 clipped to 1.0")
        for t in (30, 60, 90):
            if self.at(t, f"c{t}"):
                self.store.event(self.id, "checkpoint", f"Checkpoint at step {self.step:,}: 31.2 MB in 0.11 s", t=self.started + t, step=self.step)
        if self.t > TRAIN and int(self.t) % 5 == 0 and self.at(self.t, f"m{int(self.t)}"):
            self.store.put_layers(self.id, self.step, map_at(min(1, (self.t - TRAIN) / 60)))
            self.log(f"step {self.step:,} loss {1.36:.3f}")

    def finish(self, status: str = "finished", **fields) -> Story:
        if status == "finished":
            self.until(104.6)
            self.store.put_stage(self.id, 1, *self.methods[1], status="finished", started=self.started + TRAIN, ended=self.started + 104.6, seconds=97.4)
            self.store.put_stage(self.id, 2, *self.methods[2], status="finished", started=self.started + 106.2, ended=self.started + 107.2, seconds=1.0)
            self.until(110.2)
            self.evaluate(109.8, "result", 2, 1.353, 0.014)
            fields = {"size_bytes": 8_570_000, "seconds": 110.4, "peak_bytes": 1_092_000_000, "progress": 1.0, "left_seconds": 0.0, **fields}
        self.store.transition(self.id, ("running", "starting", "queued"), status, ended=self.started + self.t, phase=None, **fields)
        return self


FAILED = {"kind": "memory budget", "cause": "The first training step needed 4.61 GB and the limit is 2.00 GB.",
          "remedy": "Lower training.batch to 8 (1.41 GB), or set training.checkpointing: true.", "log": ["step 1", "OverMemory: 4.61 GB"],
          "exception": "OverMemory", "trace": ""}


def all_states(home, *, now: float | None = None) -> dict[str, Story]:
    """One run in each state; ``running`` is 74 s into its course."""
    now = now or time.time()
    found = {
        "finished": Story(home, "quiet-lathe-07", started=now - 4000).begin().finish(),
        "failed": Story(home, "hasty-file-44", started=now - 3000).begin().until(9).finish("failed", error=FAILED, seconds=9.0),
        "stopped": Story(home, "grey-ingot-08", started=now - 2600).begin().until(62).finish("stopped", seconds=62.0, message="Stopped at 1:02."),
        "lost": Story(home, "late-ladle-09", started=now - 2000).begin().until(72).finish("lost", seconds=72.0, error={
            "kind": "killed", "cause": "The worker ended without saying why.", "remedy": "Resume it from its last checkpoint.", "log": []}),
        "running": Story(home, "keen-anvil-31", started=now - 74.2).begin().until(74.2),
        "paused": Story(home, "slow-rasp-12", started=now - 900).begin().until(48),
        "queued": Story(home, "bright-tongs-13"), "starting": Story(home, "plain-hammer-14"),
    }
    home.store.update_run(found["paused"].id, status="paused", phase=None)
    home.store.update_run(found["starting"].id, status="starting", heartbeat=now)
    return found
