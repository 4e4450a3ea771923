"""What the machine does while a run is on: memory, processor, device, energy. Cheap enough for ten samples a second.

Everything that may be missing (driver, permission, counter) is asked for once; what does not answer is left out
from then on and named with the reason, never shown as zero.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from workbench import machine

SLOW = 1.0
"""Seconds between the costlier questions: process tree, per-process device memory."""
RAPL = Path("/sys/class/powercap")
UNITS = {"mem/rss": "bytes", "mem/allocated": "bytes", "mem/reserved": "bytes", "mem/process": "bytes", "mem/device": "bytes",
         "cpu/percent": "%", "gpu/util": "%", "gpu/power": "W", "gpu/temperature": "°C", "gpu/clock": "MHz",
         "energy/joules": "J"}
QUESTIONS = {
    "mem/allocated": "What do the run's tensors need? (PyTorch allocator)",
    "mem/reserved": "What has PyTorch taken from the device, caches included?",
    "mem/process": "What does the run's process hold on the device, CUDA context included? (NVML)",
    "mem/device": "How full is the device, other programs included? (NVML)",
    "mem/rss": "What does the run's process hold in main memory?",
}


def threads() -> int:
    """Threads that compute best here: one per physical core that this process may use."""
    import psutil
    usable, logical = machine.cores(), psutil.cpu_count() or 1
    return max(1, min(usable, round(usable * (psutil.cpu_count(logical=False) or logical) / logical)))


class Nvml:
    """One device through NVML; ``reason`` says why there is none."""

    _lock = threading.Lock()

    def __init__(self, index: int | None = None):
        self.reason, self.handle, self._no, self._api = "", None, set(), None
        try:
            import pynvml
        except ImportError:
            self.reason = "The package nvidia-ml-py is not installed"
            return
        try:
            with self._lock:
                pynvml.nvmlInit()
            self._api, self.count = pynvml, pynvml.nvmlDeviceGetCount()
            if not self.count:
                self.reason = "The NVIDIA driver answers, but it shows no GPU"
                return
            self.index = visible_device() if index is None else index
            if not 0 <= self.index < self.count:
                self.reason = "CUDA_VISIBLE_DEVICES hides every GPU"
                return
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
        except pynvml.NVMLError as e:
            said = str(e).lower()
            short = ("library not found" if "library not found" in said or "shared library" in said
                     else "no permission" if "permission" in said else str(e))
            self.reason = f"No NVIDIA driver answered ({short})"

    def ask(self, name: str, *args):
        """``nvmlDeviceGet<name>``'s answer, or None; a question that fails once is not asked again."""
        if self.handle is None or name in self._no:
            return None
        try:
            return getattr(self._api, f"nvmlDeviceGet{name}")(self.handle, *args)
        except (self._api.NVMLError, AttributeError, TypeError):
            self._no.add(name)  # MIG slices and containers refuse some counters for good
            return None

    def name(self) -> str:
        found = self.ask("Name") or "NVIDIA GPU"
        return found.decode() if isinstance(found, bytes) else found

    def memory(self) -> tuple[int, int] | None:
        """Bytes used and total on the device."""
        found = self.ask("MemoryInfo")
        return (int(found.used), int(found.total)) if found else None

    def process_bytes(self, pids: set[int]) -> int | None:
        """Bytes held by these processes; None where the driver does not tell (other pid namespace, no permission)."""
        total, seen = 0, False
        for kind in ("ComputeRunningProcesses", "GraphicsRunningProcesses"):
            for process in self.ask(kind) or ():
                if process.pid in pids and process.usedGpuMemory is not None:
                    total, seen = total + int(process.usedGpuMemory), True
        return total if seen else None

    def figures(self) -> dict[str, float]:
        """Utilisation, power, temperature, SM clock; what the device does not tell is absent."""
        out = {}
        if (rates := self.ask("UtilizationRates")) is not None:
            out["gpu/util"] = float(rates.gpu)
        if (milliwatts := self.ask("PowerUsage")) is not None:
            out["gpu/power"] = milliwatts / 1000
        if (degrees := self.ask("Temperature", 0)) is not None:
            out["gpu/temperature"] = float(degrees)
        if (clock := self.ask("ClockInfo", 1)) is not None:
            out["gpu/clock"] = float(clock)
        return out

    def joules(self) -> float | None:
        """Reading of the device's energy counter."""
        milli = self.ask("TotalEnergyConsumption")
        return None if milli is None else milli / 1000


def visible_device() -> int:
    """NVML's index of the first device that CUDA may use; -1 when all are hidden."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return 0
    first = shown.split(",")[0].strip()
    if first.isdigit():
        return int(first)
    return -1 if first in ("", "-1", "NoDevFiles") else 0


class Energy:
    """Joules since construction: the GPU's counter, else its power integrated, else the processor's RAPL counters."""

    def __init__(self, nvml: Nvml | None):
        self.nvml, self.kind, self.reason, self.total = nvml, None, "", 0.0
        self._last, self._when = None, time.monotonic()
        if nvml is not None and nvml.handle is not None:
            if (start := nvml.joules()) is not None:
                self.kind, self._last = "NVML energy counter", start
            elif nvml.ask("PowerUsage") is not None:
                self.kind = "NVML power, integrated"
        if self.kind is None:
            self._zones = [z for z in _rapl_zones() if _integer(z / "energy_uj") is not None]
            if self._zones:
                self.kind, self._last = "RAPL", [_integer(z / "energy_uj") for z in self._zones]
                self._wrap = [_integer(z / "max_energy_range_uj") or 0 for z in self._zones]
            else:
                self.reason = "no energy counter here"

    def read(self, watts: float | None = None) -> float | None:
        """Joules up to now; None where there is no counter."""
        now = time.monotonic()
        if self.kind == "NVML energy counter":
            if (reading := self.nvml.joules()) is not None:
                self.total, self._last = self.total + max(0.0, reading - self._last), reading
        elif self.kind == "NVML power, integrated":
            self.total += (watts or 0.0) * (now - self._when)
        elif self.kind == "RAPL":
            for i, zone in enumerate(self._zones):
                reading = _integer(zone / "energy_uj")
                if reading is not None:
                    moved = reading - self._last[i]
                    self.total += (moved if moved >= 0 else moved + self._wrap[i]) / 1e6
                    self._last[i] = reading
        self._when = now
        return self.total if self.kind else None


def _rapl_zones() -> list[Path]:
    """Whole packages only; their parts would be counted twice."""
    return sorted(z for z in RAPL.glob("intel-rapl:*") if z.name.count(":") == 1) if RAPL.is_dir() else []


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def torch_memory() -> tuple[int, int] | None:
    """Bytes allocated and reserved by PyTorch on the current GPU; None while no GPU is in use. Never imports torch."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    except (AttributeError, RuntimeError):
        return None


class Sampler(threading.Thread):
    """Samples one process tree and hands ``{series: value}`` to ``sink`` every ``period`` seconds.

    Args:
        sink: called with the figures of one sample; must be cheap and must not raise.
        pid: root of the process tree; default: this process.
        period: seconds from one sample to the next, 0.1 to 1 s are sensible.
        memory_limit: bytes of resident set above which ``over`` is called with the bytes found.
    """

    def __init__(self, sink, pid: int | None = None, period: float = 0.5, memory_limit: float | None = None, over=None):
        super().__init__(name="telemetry", daemon=True)
        self.sink, self.period, self.memory_limit, self.over = sink, period, memory_limit, over
        self.pid = pid or os.getpid()
        self.cost = 0.0
        """Seconds of processor time that this thread has used."""
        self._end = threading.Event()
        self.peak_rss, self._strikes, self._slow_at, self._tree, self._pids = 0, 0, 0.0, [], set()
        self._cpu: tuple[float, float] | None = None
        self._device: float | None = None
        self.nvml: Nvml | None = None
        self.energy: Energy | None = None

    def run(self) -> None:
        import psutil
        try:
            self._root = psutil.Process(self.pid)
        except psutil.Error:
            return
        self.nvml = Nvml()
        self.energy = Energy(self.nvml)
        following = time.monotonic()
        while not self._end.is_set():
            try:
                self.sink(self.sample())
            except psutil.NoSuchProcess:
                return
            except Exception as e:  # telemetry must never end a run
                print(f"telemetry: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
            self.cost = time.thread_time()
            following = max(following + self.period, time.monotonic())
            self._end.wait(max(0.0, following - time.monotonic()))

    def sample(self) -> dict[str, float]:
        """One set of figures now."""
        import psutil
        now, out = time.monotonic(), {}
        slow = now - self._slow_at >= SLOW
        if slow:
            self._slow_at = now
            self._tree = _descendants(self._root)
            self._pids = {self.pid, *(p.pid for p in self._tree)}
        rss, busy = 0, 0.0
        for process in (self._root, *self._tree):
            try:
                with process.oneshot():
                    rss += process.memory_info().rss
                    times = process.cpu_times()
                    busy += times.user + times.system
            except psutil.Error:
                if process is self._root:
                    raise
        out["mem/rss"] = float(rss)
        self.peak_rss = max(self.peak_rss, rss)
        if self._cpu is not None and now - self._cpu[0] >= 0.05:
            out["cpu/percent"] = max(0.0, 100 * (busy - self._cpu[1]) / (now - self._cpu[0]))
        self._cpu = (now, busy)
        if (held := torch_memory()) is not None:
            out["mem/allocated"], out["mem/reserved"] = map(float, held)
        watts = None
        if self.nvml is not None and self.nvml.handle is not None:
            out |= self.nvml.figures()
            watts = out.get("gpu/power")
            if (memory := self.nvml.memory()) is not None:
                out["mem/device"] = float(memory[0])
            if slow:
                self._device = self.nvml.process_bytes(self._pids)
            if self._device is not None:
                out["mem/process"] = float(self._device)
        if self.energy is not None and (joules := self.energy.read(watts)) is not None:
            out["energy/joules"] = joules
        self._watch(rss)
        return out

    def _watch(self, rss: int) -> None:
        if self.memory_limit is None or self.over is None:
            return
        # Two samples in a row: a single one may fall on a copy that is freed at once.
        self._strikes = self._strikes + 1 if rss > self.memory_limit else 0
        if self._strikes % 40 == 2:  # told again while it lasts, in case lowering one knob was not enough
            self.over(rss)

    def stop(self) -> None:
        """End the thread; waits for the sample under way."""
        self._end.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=2)


def _descendants(root) -> list:
    """Processes below ``root``. The kernel's own list costs microseconds; psutil's walks every process of the machine."""
    import psutil
    if not os.path.exists(f"/proc/{root.pid}/task/{root.pid}/children"):
        return root.children(recursive=True)
    found, ask = [], [root.pid]
    while ask:
        pid = ask.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as f:
                    ask += [int(child) for child in f.read().split()]
            if pid != root.pid:
                found.append(psutil.Process(pid))
        except (OSError, psutil.Error):
            continue  # it ended meanwhile
    return found


# -- for the app bar: no torch, a few milliseconds ------------------------------------------------------
_BAR: dict = {}


def device_summary() -> dict:
    """What this machine has and does now, JSON-able.

    ``kind`` (cuda | cpu), ``text`` (one line), ``reason`` (why there is no GPU figure, or ""), ``cpu`` (name, cores, percent),
    ``memory`` (total, available, used), ``gpus`` (index, name, used, total, util, power, temperature, clock), ``energy``
    (which counter, or "no energy counter here").
    """
    import psutil
    if _BAR.get("pid") != os.getpid():
        _BAR.clear()
        _BAR.update(pid=os.getpid(), nvml=[Nvml(0)], cpu=machine.cpu()["name"], cores=machine.cores())
        first = _BAR["nvml"][0]
        if first.handle is not None:
            _BAR["nvml"] += [Nvml(i) for i in range(1, first.count)]
        _BAR["energy"] = (lambda e: e.kind or e.reason)(Energy(first))
        psutil.cpu_percent(None)  # the first answer has nothing to compare with
    gpus = []
    for device in _BAR["nvml"]:
        if device.handle is None:
            continue
        used, total = device.memory() or (None, None)
        figures = device.figures()
        gpus.append(dict(index=device.index, name=device.name(), used=used, total=total, util=figures.get("gpu/util"),
                         power=figures.get("gpu/power"), temperature=figures.get("gpu/temperature"),
                         clock=figures.get("gpu/clock")))
    memory = machine.memory()
    text = (f"{gpus[0]['name']}" + (f" and {len(gpus) - 1} more" if len(gpus) > 1 else "") if gpus
            else f"{_BAR['cpu']}, {_BAR['cores']} core{'s' if _BAR['cores'] != 1 else ''}")
    return dict(kind="cuda" if gpus else "cpu", text=text, reason="" if gpus else _BAR["nvml"][0].reason,
                cpu=dict(name=_BAR["cpu"], cores=_BAR["cores"], percent=psutil.cpu_percent(None)),
                memory=dict(memory, used=memory["total"] - memory["available"]),
                gpus=gpus, energy=_BAR["energy"])


# -- peak resident set, exact -----------------------------------------------------------------------------
def reset_peak() -> bool:
    """Start a new high-water mark of this process's resident set; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_rss() -> int | None:
    """High-water mark of this process's resident set in bytes since ``reset_peak``; None where it is unknown."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class DataCap:
    """Lets the kernel refuse memory that would take this process's resident set above ``limit`` bytes (Linux).

    What is limited is the size of private writable memory (RLIMIT_DATA), which resident memory never exceeds; memory that was
    taken but never touched counts too, so ``renew`` measures again before a refusal is believed.
    """

    def __init__(self, limit: float):
        self.limit, self.soft, self.untouched = int(limit), None, 0

    def renew(self) -> bool:
        """Set the limit from what is resident now; True when that leaves notably more room than before."""
        try:
            import resource
            found = {}
            with open("/proc/self/status") as f:
                for line in f:
                    key, _, value = line.partition(":")
                    if key in ("VmData", "VmRSS"):
                        found[key] = int(value.split()[0]) * 1024
            gap = max(0, found["VmData"] - found["VmRSS"])
            if self.soft is None:
                self.untouched = gap
            # Memory that the C library holds free is partly used again, partly too scattered for what is asked: half of it counts.
            soft = max(found["VmData"], self.limit + self.untouched + max(0, gap - self.untouched) // 2)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        except (ImportError, OSError, ValueError, KeyError):
            return False
        before, self.soft = self.soft, soft
        return before is None or soft > before + 0.02 * self.limit

    def lift(self) -> None:
        """Take the limit away."""
        if self.soft is not None:
            import resource
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
            self.soft = None


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory here so far; None where it does not tell."""
    for path, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
                      ("/proc/vmstat", "oom_kill")):
        try:
            for line in Path(path).read_text().splitlines():
                if line.split()[:1] == [key]:
                    return int(line.split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return None
