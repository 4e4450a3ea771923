"""Trials on the nodes of a Ray cluster; their points come into this database every second, so that a dead node takes none along.

Each node has a lane (``executors.node``), an actor that keeps a home of its own and runs one trial at a time with the ordinary
worker. This side asks every lane what is new and writes it into the run's record here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import InputError
from workbench import runs
from workbench.sweeps.executors import node, reach

ASK, LOOK, READY = 0.5, 5.0, 60.0
"""Seconds between questions to a lane, looks at the cluster's nodes, and how long a lane may take to begin."""
CHUNK = 4 << 20
MIRRORED = ("progress", "left_seconds", "phase", "stage", "message", "metric", "base_value", "value", "value_low", "value_high",
            "n", "seconds", "tokens_per_second")
ENDING = ("ended", "error", "peak_bytes", "size_bytes", "trainable", "parameters")


@dataclass
class Mirror:
    """How far a run's record here has come."""

    run: int
    there: int
    cursor: int = 0
    epoch: int | None = None
    events: int = 0
    layers: int = 0
    evaluations: int = 0
    log: int = 0
    wished: str | None = None
    final: dict | None = None
    files: list = field(default_factory=list)
    """What is still to be fetched: (name, size)."""


@dataclass
class Lane:
    """This side of a lane."""

    key: str
    node: str
    name: str
    actor: Any
    ready: bool = False
    since: float = 0.0
    about: dict = field(default_factory=dict)
    mirror: Mirror | None = None
    asked: Any = None
    when: float = 0.0


class RayCluster:
    """The cluster at ``address`` as an executor of one sweep."""

    def __init__(self, home, sweep: int, address: str):
        self.home, self.store, self.sweep, self.address = home, home.store, sweep, address
        self.lanes: dict[str, Lane] = {}
        self.looked = 0.0
        self.failure = ""
        self.trouble: str | None = None
        """Why no trial can run now, or None."""
        self.inputs: dict[tuple[str, str], str] = {}

    def open(self) -> None:
        found = reach.reach(self.address)
        self.ray = reach.connect(found["address"])
        self.look()
        deadline = time.monotonic() + READY
        while not any(lane.ready for lane in self.lanes.values()) and time.monotonic() < deadline:
            self.poll()
            if self.failure and not self.lanes:
                break
            time.sleep(0.05)
        if not self.slots():
            why = self.failure or "none lends a processor"
            raise InputError("--on", self.address, f"no node of the cluster can run a trial ({why})",
                             "Install Fettle at the same path on each node, and start nodes with --num-cpus=1 or more")

    def close(self) -> None:
        """Let the lanes go: those with nothing to do remove their folders, the others wait a minute for the next conductor."""
        if not hasattr(self, "ray"):
            return
        for lane in self.lanes.values():
            if lane.ready and lane.mirror is None:
                try:
                    self.ray.get(lane.actor.close.remote(), timeout=5)
                except Exception:
                    pass  # the host on that node tidies up a minute later
        self.ray.shutdown()

    # -- lanes -------------------------------------------------------------------------------------------------
    def look(self) -> None:
        """Find nodes that have come; a lane that was lost is tried again on its node."""
        self.looked = time.monotonic()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        mine = hashlib.sha256(str(self.home.path).encode()).hexdigest()[:8]
        for row in self.ray.nodes():
            count = reach.lanes(row)
            for i in range(count):
                key = f"{mine}-{self.sweep}-{row['NodeID'][:12]}-{i}"
                if key in self.lanes:
                    continue
                gpus = 1 if row["Resources"].get("GPU", 0) >= 1 else 0
                threads = max(1, int(row["Resources"].get("CPU", 1)) // count)
                strategy = NodeAffinitySchedulingStrategy(node_id=row["NodeID"], soft=False)
                actor = self.ray.remote(node.Lane).options(
                    num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy, max_restarts=0).remote(key, threads)
                name = f"{row.get('NodeManagerHostname') or row.get('NodeManagerAddress')}/{row['NodeID'][:6]}"
                name += f"/{i}" if count > 1 else ""
                self.lanes[key] = Lane(key, row["NodeID"], name, actor, since=time.monotonic(), asked=actor.about.remote())

    def slots(self) -> int:
        return sum(lane.ready for lane in self.lanes.values())

    def poll(self) -> None:
        if time.monotonic() - self.looked > LOOK:
            self.look()
        for lane in list(self.lanes.values()):
            try:
                self.serve(lane)
            except Exception as e:
                self.drop(lane, e)
        waiting = [lane.name for lane in self.lanes.values() if not lane.ready]
        self.trouble = None if self.slots() else (
            f"Waiting for {', '.join(waiting)} to begin." if waiting else "No node of the cluster answers; waiting for one.")

    def serve(self, lane: Lane) -> None:
        """Take an answer if there is one, and ask again when it is time."""
        if lane.asked is not None:
            done, _ = self.ray.wait([lane.asked], timeout=0)
            if not done:
                if not lane.ready and time.monotonic() - lane.since > READY:
                    raise TimeoutError(f"the lane did not begin within {READY:.0f} s")
                return
            answer, lane.asked = self.ray.get(lane.asked), None
            if not lane.ready:
                lane.ready, lane.about = True, json.loads(answer)
            elif lane.mirror is not None:
                self.take(lane, json.loads(answer))
        mirror = lane.mirror
        if mirror is None or not lane.ready:
            return
        if mirror.final is not None:
            return self.finish(lane)
        wish = self.store.wished(mirror.run)
        if wish and wish != mirror.wished:
            mirror.wished = wish
            if wish == "pause":
                self.store.event(mirror.run, "warning", "A trial on another node cannot be paused; stop it instead")
                self.store.wish(mirror.run, None)
            else:
                lane.actor.wish.remote(mirror.there, wish)
        if time.monotonic() - lane.when >= ASK:
            lane.when = time.monotonic()
            lane.asked = lane.actor.news.remote(json.dumps(dict(
                run=mirror.there, cursor=mirror.cursor, epoch=mirror.epoch, events=mirror.events, layers=mirror.layers,
                evaluations=mirror.evaluations, log=mirror.log)))

    def drop(self, lane: Lane, error: Exception) -> None:
        """A lane is gone: its run is lost with what it had not yet told, at most a second."""
        self.lanes.pop(lane.key, None)
        try:
            self.ray.kill(lane.actor)
        except Exception:
            pass
        gone = "Actor" in type(error).__name__
        why = f"The node {lane.name} was lost" if gone else f"The lane on {lane.name} failed ({type(error).__name__}: {error})"
        print(f"sweep {self.sweep}: {why}", flush=True)
        if lane.mirror is None:
            self.looked, self.failure = time.monotonic(), str(error).strip().splitlines()[-1][:160]  # tried again after LOOK
            return
        series = self.store.series(lane.mirror.run)
        reached = max((s["last_step"] or 0 for s in series if not s["clock"]), default=0)
        text = f"{why} at step {reached:,}. What it had told is kept."
        problem = dict(kind="lost", cause=text, remedy="The sweep runs the trial again.", log=[])
        self.store.transition(lane.mirror.run, ("starting", "running"), "lost", error=problem, message=text, left_seconds=None,
                              wish=None)
        self.store.event(lane.mirror.run, "lost", text, node=lane.name)

    # -- runs --------------------------------------------------------------------------------------------------------
    def begin(self, spec, resolved, forecast: dict, parent: int | None) -> tuple[int, str | None]:
        lane = next(lane for lane in self.lanes.values() if lane.ready and lane.mirror is None)
        frozen = {**forecast, "resolved": resolved.to_dict()}
        name = runs._free_name(self.store, spec.name)
        # Its host is not this machine: the reaper here judges it by its heartbeat, and the queue here leaves it alone.
        run_id = self.store.create_run(spec.to_dict(), name=name, forecast=frozen, status="starting", parent=parent,
                                       tags=spec.tags, note=spec.note, host=f"ray:{lane.name}", heartbeat=time.time(),
                                       started=time.time())
        self.store.update_run(run_id, folder=str(self.home.folder(run_id)), log_path=str(self.home.log(run_id)))
        self.store.event(run_id, "node", f"Runs on {lane.name}", node=lane.name)
        lane.mirror = Mirror(run_id, 0)
        try:
            there = resolved.to_dict()
            self.send(lane, there)
            text = json.dumps(dict(of=run_id, name=name, spec=there, forecast=frozen | {"resolved": there}))
            lane.mirror.there = self.ray.get(lane.actor.begin.remote(text), timeout=30)
        except Exception as e:
            self.drop(lane, e)
        return run_id, lane.name

    def adopt(self, run_id: int, name: str | None) -> None:
        """Find the lane that still has the run; without one it is lost."""
        for lane in self.lanes.values():
            deadline = time.monotonic() + READY
            while lane.name == name and not lane.ready and time.monotonic() < deadline:
                self.serve(lane)
                time.sleep(0.05)
            if lane.name == name and lane.ready and lane.mirror is None:
                there = self.ray.get(lane.actor.find.remote(run_id), timeout=30)
                if there is not None:
                    told = [e["data"].get("there", 0) for e in self.store.events(run_id, limit=100_000)]
                    lane.mirror = Mirror(run_id, there, events=max(told, default=0))
                    self.store.transition(run_id, ("lost",), "running", error=None, message=None)
                    self.store.update_run(run_id, heartbeat=time.time())
                    return
        text = f"The node {name} no longer has it. What it had told is kept."
        self.store.transition(run_id, ("starting", "running", "queued", "paused"), "lost", message=text, left_seconds=None,
                              error=dict(kind="lost", cause=text, remedy="The sweep runs the trial again.", log=[]))

    def again(self, run_id: int) -> bool:
        return False

    def send(self, lane: Lane, spec: dict) -> None:
        """Files that this machine has and the node has not: model and data given by a path."""
        data = spec["data"]
        for source in (spec["model"], data if isinstance(data, str) else data["source"]):
            path = Path(source).expanduser()
            if not path.exists() or (os.sep not in source and not source.startswith(".")):
                continue
            path = path.absolute()
            text = json.dumps(node.manifest(path))
            where = self.inputs.get((lane.key, str(path)))
            if where is None:
                where = self.ray.get(lane.actor.has.remote(str(path), text), timeout=30)
            if where is None:
                for name, size, _ in json.loads(text):
                    file = path if path.is_file() else path / name
                    with open(file, "rb") as f:
                        for offset in range(0, max(size, 1), CHUNK):
                            where = self.ray.get(lane.actor.put.remote(str(path), text, name, offset, f.read(CHUNK)), timeout=120)
                            self.store.heartbeat(lane.mirror.run)
            self.inputs[lane.key, str(path)] = where
            if source == spec["model"]:
                spec["model"] = where
            elif isinstance(data, str):
                spec["data"] = where
            else:
                data["source"] = where

    def take(self, lane: Lane, news: dict) -> None:
        """Write one answer into the record: everything that the run told, its state last."""
        mirror, store, run_id = lane.mirror, self.store, lane.mirror.run
        with store.transaction():
            if mirror.epoch is not None and news["epoch"] != mirror.epoch:
                store.rewind(run_id, -1)  # it began again there; all of its points are in this answer
            for clock in (False, True):
                rows = [(name, *point) for name, part in news["series"].items() if part["clock"] == clock
                        for point in zip(part["step"], part["value"], part["t"])]
                if rows:
                    store.append(run_id, rows, clock=clock)
            for name, part in news["series"].items():
                if part["unit"]:
                    store.set_unit(run_id, name, part["unit"])
            for e in news["events"]:
                store.event(run_id, e["kind"], e["text"], e["t"], **(e["data"] | {"there": e["id"]}))
            for s in news["stages"]:
                store.put_stage(run_id, s["index"], s["method"], s["settings"], status=s["status"], started=s["started"],
                                ended=s["ended"], seconds=s["seconds"], reasons=s["reasons"], summary=s["summary"])
            for e in news["evaluations"]:
                scores, weights = base64.b64decode(e["scores"]), e["weights"] and base64.b64decode(e["weights"])
                store.put_evaluation(run_id, e["name"], e["stage"], e["step"], e["t"], e["metric"], e["value"], e["low"],
                                     e["high"], e["n"], scores, weights, e["items_hash"], e["extra"])
            if news["layers"]:
                store.put_layers(run_id, news["layers"]["step"], news["layers"]["figures"], news["layers"]["t"])
            row = news["row"]
            fields = {k: row[k] for k in MIRRORED if row[k] is not None}
            if row["status"] in ("running", "paused") or row["status"] in runs.ENDED:
                store.transition(run_id, ("starting", "lost"), "running", started=row["started"] or time.time(), error=None)
            store.update_run(run_id, heartbeat=time.time(), **fields)
        mirror.cursor, mirror.epoch, mirror.log = news["cursor"], news["epoch"], news["log_offset"]
        mirror.events = news["events"][-1]["id"] if news["events"] else mirror.events
        mirror.layers = news["layers"]["id"] if news["layers"] else mirror.layers
        mirror.evaluations = max([mirror.evaluations, *(e["id"] for e in news["evaluations"])])
        if news["log"]:
            with open(self.home.log(run_id), "a", encoding="utf-8") as log:
                log.write(news["log"])
        if news["row"]["status"] in runs.ENDED:
            mirror.final, mirror.files = news, [tuple(f) for f in news.get("files") or ()]

    def finish(self, lane: Lane) -> None:
        """Bring the result's files over, then say that the run has ended."""
        mirror = lane.mirror
        folder = self.home.folder(mirror.run)
        began = time.monotonic()
        while mirror.files:
            name, size = mirror.files[0]
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ValueError(f"{name} is outside the run's folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            have = part.stat().st_size if part.exists() else 0
            with open(part, "ab") as f:
                while have < size:
                    if time.monotonic() - began > 1.0:  # the other lanes wait
                        self.store.heartbeat(mirror.run)
                        return
                    data = self.ray.get(lane.actor.read.remote(mirror.there, name, have, CHUNK), timeout=60)
                    if not data:
                        raise OSError(f"{name} is shorter than it was")
                    f.write(data)
                    have += len(data)
            os.replace(part, path)
            mirror.files.pop(0)
        row = mirror.final["row"]
        fields = {k: row[k] for k in (*MIRRORED, *ENDING)}
        with self.store.transaction():
            if mirror.final.get("footprint"):
                self.store.put_footprint(mirror.run, mirror.final["footprint"])
            self.store.transition(mirror.run, ("starting", "running", "lost"), row["status"], wish=None, **fields)
        lane.actor.forget.remote(mirror.there)
        lane.mirror = None
