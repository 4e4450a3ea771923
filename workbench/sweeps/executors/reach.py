"""Finding a Ray cluster: in a child process, because Ray waits for more than a minute for an address where nobody listens."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

from engines.errors import InputError

CONNECT, ANSWER = 3.0, 12.0
"""Seconds that a listener, and then the cluster, may take to answer."""
ROOT = Path(__file__).resolve().parents[3]
PORTS = {"ray": 10001, "gcs": 6379}


def parse(address: str) -> tuple[str, str, int]:
    """``ray://HOST:PORT`` or ``HOST:PORT`` as scheme (ray, gcs), host and port.

    Raises:
        InputError: neither of them.
    """
    text = str(address).strip()
    scheme, rest = ("ray", text[6:]) if text.startswith("ray://") else ("gcs", text)
    host, found, port = rest.rstrip("/").rpartition(":")
    if not found:
        host, port = rest.rstrip("/"), str(PORTS[scheme])
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError("--on", address, "not an address", "Write ray://HOST:PORT or HOST:PORT, for example ray://10.0.0.5:6379")
    return scheme, host.strip("[]"), int(port)


def reach(address: str) -> dict:
    """What answers at an address: ``{"address" (for ray.init), "nodes", "lanes"}``.

    Raises:
        InputError: Ray is not installed, nobody listens, or what listens is not a Ray cluster.
    """
    scheme, host, port = parse(address)
    if importlib.util.find_spec("ray") is None:
        raise InputError("--on", address, "Ray is not installed here", "Run `pip install -r requirements-ray.txt`")
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError as e:
        why = "the name is unknown" if isinstance(e, socket.gaierror) else "nobody answers"
        raise InputError("--on", address, f"{why} at {host}:{port} ({e.strerror or e})",
                         f"Start a cluster there with `ray start --head --port={port}`, or correct the address") from None
    ways = [f"{host}:{port}"]
    if scheme == "ray" and importlib.util.find_spec("grpc") is not None:
        # The client's port is another one than the cluster's own; both are written with ray:// by people.
        ways.insert(0, f"ray://{host}:{port}")
    said = ""
    for way in ways:
        found = _try(way, ANSWER / len(ways))
        if "nodes" in found:
            return found
        said = found["error"]
    remedy = "Give the port of `ray start --head` (6379 unless set)"
    if scheme == "ray" and len(ways) == 1:
        remedy += ", or run `pip install 'ray[client]'` to use the client's port"
    if "raylet" in said or "node" in said:
        remedy = f"Let this machine join with `ray start --address={host}:{port} --num-cpus=0`"
    raise InputError("--on", address, f"something listens there, but no Ray cluster answers ({said})", remedy)


def _try(address: str, seconds: float) -> dict:
    command = [sys.executable, "-m", "workbench.sweeps.executors.reach", address]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    last = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": last[-1].strip()[:160] if last else f"exit code {done.returncode}"}


def connect(address: str):
    """``ray``, connected; the import and the connection take a second or two."""
    import logging
    import os
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    return ray


def lanes(node: dict) -> int:
    """How many trials a node (row of ``ray.nodes()``) takes at once: one for each GPU, else one; none without a processor."""
    resources = node.get("Resources") or {}
    if not node.get("Alive") or resources.get("CPU", 0) < 1:
        return 0
    return max(1, int(resources.get("GPU", 0)))


if __name__ == "__main__":
    try:
        nodes = connect(sys.argv[1]).nodes()
        alive = sum(bool(n["Alive"]) for n in nodes)
        print(json.dumps(dict(address=sys.argv[1], nodes=alive, lanes=sum(map(lanes, nodes)))), flush=True)
    except BaseException as e:  # SystemExit too: Ray ends the process when the address does not answer as it should
        print(json.dumps({"error": (str(e).strip().splitlines() or [type(e).__name__])[0][:160]}), flush=True)
