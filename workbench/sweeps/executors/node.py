"""What runs on a node of the cluster: a lane with a home of its own, in which the ordinary dispatcher and worker do the work.

The lane is a Ray actor that only reads and writes that home; the queue is fed by ``workbench.sweeps.executors.host``, a process
beside it. Everything that crosses the network is JSON text or bytes of files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALIVE = "lane"
"""Setting: when the lane was last asked for news, and the process id of its Ray node."""
KEPT = ("model", "spec.yaml", "resolved.yaml")
"""What is brought home of a run's folder."""


def scratch(key: str) -> Path:
    """The folder of a lane: ``WORKBENCH_SCRATCH`` or the system's temporary folder, readable by its user alone.

    Raises:
        OSError: it belongs to somebody else.
    """
    base = Path(os.environ.get("WORKBENCH_SCRATCH") or tempfile.gettempdir()) / f"fettle-ray-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.stat().st_uid != os.getuid() or base.stat().st_mode & 0o077:
        raise OSError(f"{base} belongs to somebody else")
    return base / key


def manifest(path: Path) -> list[list]:
    """``[relative path, size, digest of both ends]`` of each file: enough to tell whether a node has the same."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    out = []
    for file in files:
        size, seen = file.stat().st_size, hashlib.sha256()
        with open(file, "rb") as f:
            seen.update(f.read(1 << 20))
            if size > 2 << 20:
                f.seek(-(1 << 20), 2)
                seen.update(f.read())
        out.append([file.name if path.is_file() else str(file.relative_to(path)), size, seen.hexdigest()[:16]])
    return out


class Lane:
    """One run at a time on one node."""

    def __init__(self, key: str, threads: int):
        from workbench.home import Home
        self.home = Home.open(scratch(key))
        self.store = self.home.store
        self.threads = threads
        self.node = os.getppid()  # once: an actor that outlives its node for a moment belongs to another process, which lives on
        self.beat()
        self.host()

    def host(self) -> None:
        """Start the process that feeds this home's queue; harmless when there is one."""
        from workbench import warm
        environment = warm.quiet_environment() | {"WORKBENCH_HOME": str(self.home.path), "OMP_NUM_THREADS": str(self.threads)}
        # Through a process that leaves at once: Ray ends an actor's children with it, and the host must outlive it to tidy up.
        code = ("import subprocess, sys\nsubprocess.Popen([sys.executable, '-m', 'workbench.sweeps.executors.host', sys.argv[1]],"
                " start_new_session=True)")
        with open(self.home.path / "host.log", "ab") as log:
            subprocess.run([sys.executable, "-c", code, str(self.home.path)], cwd=warm.ROOT, env=environment, check=True,
                           timeout=30, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def beat(self) -> None:
        self.store.set_setting(ALIVE, {"t": time.time(), "node": self.node})

    def about(self) -> str:
        from workbench import machine
        return json.dumps(dict(host=socket.gethostname(), cores=machine.cores(), path=str(self.home.path), pid=os.getpid()))

    # -- runs ------------------------------------------------------------------------------------------------
    def begin(self, text: str) -> int:
        """Queue a run: ``{"of", "name", "spec", "forecast"}``; the same ``of`` twice is one run. Returns its number here."""
        given = json.loads(text)
        found = self.find(given["of"])
        if found is not None:
            return found
        self.beat()
        run_id = self.store.create_run(given["spec"], name=given["name"], forecast=given["forecast"], tags=(f"of-{given['of']}",))
        self.store.update_run(run_id, folder=str(self.home.folder(run_id)), log_path=str(self.home.log(run_id)))
        return run_id

    def find(self, of: int) -> int | None:
        """The run here that is run ``of`` there."""
        found = self.store.runs(tag=f"of-{of}", limit=1)
        return found[0]["id"] if found else None

    def news(self, text: str) -> str:
        """What is new of a run since the cursors that are given: points, events, stages, evaluations, layers, log, row."""
        from workbench import runs
        asked = json.loads(text)
        self.beat()
        run_id = asked["run"]
        with self.store.read():
            row = self.store.light(run_id)
            ended = row["status"] in runs.ENDED
            new = self.store.since(run_id, asked["cursor"], epoch=asked["epoch"])
            series = {s["name"]: s for s in self.store.series(run_id)}
            points = {n: dict(part, clock=series[n]["clock"], unit=series[n]["unit"]) for n, part in new["series"].items()}
            out = dict(row=row, cursor=new["cursor"], epoch=new["epoch"], series=points,
                       events=self.store.events(run_id, asked["events"]), stages=self.store.stages(run_id),
                       layers=self.store.layers(run_id, asked["layers"]))
            out["evaluations"] = [self.evaluation(e) for e in self.store.evaluations(run_id) if e["id"] > asked["evaluations"]]
            if ended:
                out["footprint"] = self.store.footprint(run_id)
                out["files"] = self.files(run_id)
        out["log"], out["log_offset"] = runs.tail(self.home, run_id, asked["log"], limit=1 << 20)
        return json.dumps(out)

    def evaluation(self, row: dict) -> dict:
        scores, weights = self.store.scores(row["id"])
        return row | dict(scores=base64.b64encode(scores.tobytes()).decode(),
                          weights=None if weights is None else base64.b64encode(weights.tobytes()).decode())

    def wish(self, run_id: int, what: str) -> None:
        from workbench import runs
        from workbench.home import InputError
        try:
            runs.kill(run_id, home=self.home) if what == "kill" else runs.stop(run_id, home=self.home)
        except InputError:
            pass  # it has ended meanwhile

    def forget(self, run_id: int) -> None:
        """Its record is elsewhere now."""
        from workbench import runs
        runs.delete(run_id, home=self.home)

    # -- files -------------------------------------------------------------------------------------------------
    def files(self, run_id: int) -> list[list]:
        """``[path, size]`` of what a run leaves, without checkpoints."""
        folder = self.home.runs_dir / str(run_id)
        found = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        return [[str(p.relative_to(folder)), p.stat().st_size] for p in found if p.relative_to(folder).parts[0] in KEPT]

    def read(self, run_id: int, name: str, offset: int, size: int) -> bytes:
        path = (self.home.runs_dir / str(run_id) / name).resolve()
        if not path.is_relative_to((self.home.runs_dir / str(run_id)).resolve()):
            raise ValueError("outside the run's folder")
        with open(path, "rb") as f:
            f.seek(offset)
            return f.read(size)

    def has(self, source: str, text: str) -> str | None:
        """Where this node has these files: at the same path, or as sent before; None: they must be sent."""
        wanted, path = json.loads(text), Path(source)
        if path.exists() and manifest(path) == wanted:
            return source
        sent = self.place(source, text)
        return str(sent) if sent.exists() and manifest(sent) == wanted else None

    def place(self, source: str, text: str) -> Path:
        return self.home.path / "inputs" / hashlib.sha256(text.encode()).hexdigest()[:16] / Path(source).name

    def put(self, source: str, text: str, name: str, offset: int, data: bytes) -> str:
        """Write a part of an input's file; returns where the input is."""
        top = self.place(source, text)
        single = [row[0] for row in json.loads(text)] == [top.name]
        path = top if single else top / name
        if not path.resolve().is_relative_to(self.home.path.resolve()):
            raise ValueError("outside the lane's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if offset else "wb") as f:
            f.seek(offset)
            f.write(data)
        return str(top)

    def close(self) -> None:
        """Nobody will ask again: the host ends what runs here, and removes the folder."""
        self.store.set_setting(ALIVE, {"t": 0.0, "node": self.node})
        self.store.close()
