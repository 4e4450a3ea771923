"""The warm worker: a small process with torch, transformers and peft already imported, which forks one child per run.

``python -m workbench.warm HOME`` listens on a Unix socket that only its user may open. It stays single-threaded and
never touches CUDA, so that its children start clean, in hundredths of a second instead of the seconds that the imports
take. Its socket carries a stamp of our source files and of the settings that count at import: after an upgrade a new one
is started and the old one, no longer called, ends by itself. Several servers on one home share it. Children are
processes of their own session; when one ends, its exit code, signal and peak memory are written beside its log.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from workbench.preload import EXTRAS, PRELOAD, preload

ROOT = Path(__file__).resolve().parent.parent
IDLE = 90.0
"""Seconds without a call and without children after which it ends."""
SOURCES = ("engines", "workbench", "storage")
AT_IMPORT = ("HF_", "TRANSFORMERS_", "CUDA_HOME", "OMP_", "KMP_", "GOMP_", "MKL_", "PYTORCH_", "TORCH_", "PYTHONPATH",
             "LD_LIBRARY_PATH")
"""Environment variables that are read when a library is imported; the others are handed to each child."""
PASSED = ("WORKBENCH_", "CUDA_VISIBLE_DEVICES", "FETTLE_", "HOME", "TMPDIR", "PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
          "http_proxy", "https_proxy", "no_proxy")


def supported() -> bool:
    """Forking from a prepared process works on Linux; elsewhere each run is a plain process."""
    return sys.platform.startswith("linux") and hasattr(os, "fork") and not os.environ.get("WORKBENCH_COLD")


def quiet_environment(environment: dict | None = None) -> dict[str, str]:
    """The environment for processes that compute: OpenMP threads that wait let the core go after some microseconds."""
    out = dict(os.environ if environment is None else environment)
    # Long enough for the next product to find its threads awake, short enough to leave the core to others at once:
    # sleeping threads (OMP_WAIT_POLICY=passive) cost a third of the training speed and half of the decoding speed.
    if "OMP_WAIT_POLICY" not in out:
        out.setdefault("GOMP_SPINCOUNT", "20000")
    out.setdefault("KMP_BLOCKTIME", "1")
    out.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a pool of threads before the fork
    out.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Otherwise torch.cuda.is_available() opens CUDA, which must not happen before a fork.
    out.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    out.setdefault("PYTHONUNBUFFERED", "1")
    out.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # pyarrow's allocator would start a thread before a fork
    return out


def stamp() -> str:
    """Twelve hex digits that change with our sources, the interpreter and the settings that count at import."""
    seen = hashlib.sha256(f"{sys.executable} {sys.version}".encode())
    for room in SOURCES:
        for path in sorted((ROOT / room).rglob("*.py")):
            try:
                at = path.stat()
            except OSError:
                continue
            seen.update(f"{path.relative_to(ROOT)} {at.st_mtime_ns} {at.st_size}\n".encode())
    for key, value in sorted(quiet_environment().items()):
        if key.startswith(AT_IMPORT):
            seen.update(f"{key}={value}\n".encode())
    return seen.hexdigest()[:12]


def socket_path(home: Path, mark: str) -> Path:
    """Where the server with stamp ``mark`` listens; in a private temporary folder where the home's path is too long."""
    path = home / f"warm-{mark}.sock"
    if len(os.fsencode(path)) <= 100:
        return path
    key = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fettle-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise OSError(f"{folder} belongs to somebody else")
    return folder / path.name


# -- the client's side --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spawned:
    """A started process: ``how`` is warm or plain, ``seconds`` what starting it took."""

    pid: int
    how: str
    seconds: float


def call(home: Path, request: dict, timeout: float = 5.0, mark: str | None = None) -> dict:
    """One request to the server and its answer.

    Raises:
        OSError: nobody listens, or no answer came in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout)
        link.connect(str(socket_path(home, mark or stamp())))
        link.sendall(json.dumps(request).encode() + b"\n")
        answer = _line(link)
    if not answer:
        raise ConnectionResetError("the warm worker hung up")
    return json.loads(answer)


def ensure(home: Path) -> str | None:
    """Start the server of this home unless it listens already; does not wait for its imports. Returns its stamp."""
    if not supported():
        return None
    mark = stamp()
    try:
        if socket_path(home, mark).exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(2)
                link.connect(str(socket_path(home, mark)))
                link.sendall(b'{"op": "ping"}\n')
            return mark
    except OSError:
        pass
    with open(home / "warm.log", "ab") as log:
        if log.tell() > 1_000_000:
            log.truncate(0)
        process = subprocess.Popen([sys.executable, "-m", "workbench.warm", str(home), mark], cwd=ROOT, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log, start_new_session=True, env=quiet_environment())
    _reap(process)
    return mark


def spawn(home: Path, run_id: int, folder: Path, log: Path, threads: int, environment: dict | None = None,
          wait: float = 20.0, probe: bool = False) -> Spawned:
    """Start the process of one run, from the warm server if it answers within ``wait`` seconds, else as a plain process.

    With ``probe`` it is the child of a probe that works in ``folder``, and ``run_id`` is not looked at.
    """
    began = time.monotonic()
    passed = {k: v for k, v in os.environ.items() if k.startswith(PASSED)} | {"WORKBENCH_HOME": str(home)} | (environment or {})
    request = dict(op="spawn", run=run_id, folder=str(folder), log=str(log), threads=threads, environment=passed,
                   expires=time.time() + wait, probe=probe)
    if supported():
        started_at = 0.0
        while (left := wait - (time.monotonic() - began)) > 0:
            try:
                answer = call(home, request, timeout=left)
                if answer.get("ok"):
                    return Spawned(answer["pid"], "warm", time.monotonic() - began)
                break
            except (ConnectionError, FileNotFoundError):
                if time.monotonic() - started_at > 5:  # none there, or it has just ended: its imports need not be waited for
                    started_at = time.monotonic()
                    ensure(home)
                time.sleep(0.02)
            except (OSError, ValueError):
                break
    return plain(home, run_id, folder, log, threads, passed, began, probe)


def plain(home: Path, run_id: int, folder: Path, log: Path, threads: int, environment: dict,
          began: float | None = None, probe: bool = False) -> Spawned:
    """Start the run as an ordinary detached process (seconds of imports)."""
    began = began or time.monotonic()
    env = quiet_environment(os.environ | environment) | {"OMP_NUM_THREADS": str(threads), "WORKBENCH_HOME": str(home)}
    options = (dict(creationflags=subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP) if os.name == "nt"
               else dict(start_new_session=True))
    with open(log, "ab") as out:
        what = ["workbench.probing", str(folder)] if probe else ["workbench.worker", str(run_id), "--threads", str(threads)]
        process = subprocess.Popen([sys.executable, "-m", *what], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
    _reap(process, folder)
    return Spawned(process.pid, "plain", time.monotonic() - began)


def _reap(process: subprocess.Popen, folder: Path | None = None) -> None:
    """Wait for a child in a thread of its own, so that it leaves no zombie; note how it ended."""
    def wait():
        code = process.wait()
        if folder is not None:
            note_exit(folder, process.pid, code, None)
    threading.Thread(target=wait, name=f"reap-{process.pid}", daemon=True).start()


def note_exit(folder: Path, pid: int, code: int, peak: int | None) -> None:
    """Write how a run's process ended: ``code`` below zero is minus the signal."""
    note = dict(pid=pid, code=max(code, 0), signal=-code if code < 0 else None, peak_bytes=peak, t=time.time())
    try:
        part = folder / f".exit-{pid}"
        part.write_text(json.dumps(note))
        os.replace(part, folder / "exit.json")
    except OSError:
        pass  # the folder was deleted with its run


def _line(link: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"\n") and len(got) < 1 << 20:
        part = link.recv(65536)
        if not part:
            break
        got += part
    return got


# -- the server's side ----------------------------------------------------------------------------------------
class Server:
    """Imports once, then forks. Everything happens in one thread, because a fork copies only the thread that calls it."""

    def __init__(self, home: Path, mark: str, idle: float = IDLE):
        self.home, self.mark, self.idle = home, mark, idle
        self.children: dict[int, Path] = {}
        self.forks, self.ready, self.last = 0, False, time.monotonic()
        self.waiting = list(EXTRAS)

    def listen(self) -> bool:
        """Take the socket; False when another process of the same stamp already has it."""
        import fcntl
        self.lock = os.open(self.home / f"warm-{self.mark}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self.path = socket_path(self.home, self.mark)
        self.path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.bind(str(self.path))
        finally:
            os.umask(old)
        self.socket.listen(64)
        return True

    def serve(self) -> None:
        """Answer until nobody has called for ``idle`` seconds and every child has ended."""
        import gc
        for name in PRELOAD:
            preload(name)
        gc.collect()
        gc.freeze()  # pages of what is loaded stay shared with the children
        self.ready, self.last = True, time.monotonic()
        print(f"warm worker {os.getpid()} is ready", flush=True)
        while True:
            self.socket.settimeout(0.001 if self.waiting else 0.25)
            try:
                link, _ = self.socket.accept()
            except TimeoutError:
                if self.waiting:
                    preload(self.waiting.pop(0))
                    if not self.waiting:
                        gc.collect()
                        gc.freeze()
            else:
                with link:
                    self.answer(link)
            self.collect()
            if not self.children and time.monotonic() - self.last > self.idle:
                return
            if not self.home.is_dir():
                return

    def answer(self, link: socket.socket) -> None:
        try:
            link.settimeout(2)
            if not same_user(link):
                return
            request = json.loads(_line(link) or b"{}")
            self.last = time.monotonic()
            if request.get("op") == "spawn":
                if request.get("expires", 0) < time.time():  # who asked has given up and started it otherwise
                    return
                out = self.fork(request, link)
            elif request.get("op") == "end":
                self.idle, out = 0.0, dict(ok=True)
            else:
                out = dict(ok=True, pid=os.getpid(), ready=self.ready, children=len(self.children), forks=self.forks,
                           loading=len(self.waiting), threads=len(os.listdir("/proc/self/task")))
            link.sendall(json.dumps(out).encode() + b"\n")
        except BrokenPipeError:
            pass  # who only wants to keep this process alive does not wait for the answer
        except (OSError, ValueError, KeyError) as e:
            print(f"request refused: {type(e).__name__}: {e}", flush=True)

    def fork(self, request: dict, link: socket.socket) -> dict:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            self.children[pid] = Path(request["folder"])
            self.forks += 1
            return dict(ok=True, pid=pid)
        code = 70
        try:
            link.close()
            self.socket.close()
            os.close(self.lock)
            code = child(request)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    pass
            os._exit(code)

    def collect(self) -> None:
        """Take the exit codes of children that have ended."""
        while self.children:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                self.children.clear()
                return
            if pid == 0:
                return
            folder = self.children.pop(pid, None)
            self.last = time.monotonic()
            if folder is not None:
                note_exit(folder, pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        self.socket.close()
        (self.home / f"warm-{self.mark}.lock").unlink(missing_ok=True)
        os.close(self.lock)


def child(request: dict) -> int:
    """What the forked process does: a session, log, environment and signals of its own, then the run."""
    os.setsid()
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for fd in (out, nothing):
        if fd > 2:
            os.close(fd)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    for key in [k for k in os.environ if k.startswith(PASSED)]:
        del os.environ[key]
    os.environ.update(request["environment"])
    if request.get("probe"):
        from workbench import probing
        return probing.main([request["folder"]])
    from workbench import worker
    return worker.main([str(request["run"]), "--threads", str(request["threads"])])


def same_user(link: socket.socket) -> bool:
    """The kernel's word on who is at the other end."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid == os.getuid()


def main(arguments: list[str] | None = None) -> int:
    """``python -m workbench.warm HOME STAMP``; started by ``ensure``."""
    given = sys.argv[1:] if arguments is None else arguments
    server = Server(Path(given[0]), given[1] if len(given) > 1 else stamp(), float(os.environ.get("WORKBENCH_WARM_IDLE") or IDLE))
    if not server.listen():
        return 0
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.serve()
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    # The module that children import must be this one, not a second copy under the name __main__.
    from workbench import warm
    sys.exit(warm.main())
