"""The failure doctor: an exception, an exit and the log's tail become a cause, a remedy and a kind.

A table of rules, tried in order; the first that applies speaks. What no rule knows is called unknown, with the last
lines of the log, instead of a guess.
"""

from __future__ import annotations

import errno
import re
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.errors import FettleError, InputError, RunFailed

TAIL = 12
"""Log lines kept with a diagnosis."""


@dataclass(frozen=True)
class Facts:
    """What is known of a failure. ``text`` is the exception's message, or the log's tail when there is no exception."""

    exception: BaseException | None = None
    text: str = ""
    names: tuple[str, ...] = ()
    """Class names of the exception and of those that caused it, or the last one named in the log."""
    exit_signal: int | None = None
    exit_code: int | None = None
    oom_kills: int = 0
    """Processes that the kernel killed for memory while the run was on."""
    peak_bytes: int | None = None
    total_bytes: int | None = None
    device: str = "cpu"

    @property
    def near_full(self) -> bool:
        return bool(self.peak_bytes and self.total_bytes and self.peak_bytes > 0.8 * self.total_bytes)


@dataclass(frozen=True)
class Rule:
    """``kind`` applies when a class is among ``names`` or the text has ``pattern`` (``both``: and), and ``when`` holds.

    ``cause`` and ``remedy`` may use the named groups of the pattern.
    """

    kind: str
    cause: str
    remedy: str
    names: tuple[str, ...] = ()
    """Exception classes by name, of the whole chain and their bases."""
    pattern: str = ""
    both: bool = False
    when: Callable[[Facts], bool] | None = None

    def applies(self, facts: Facts) -> dict | None:
        """The groups found, or None."""
        named = bool(set(self.names) & set(facts.names))
        found = re.search(self.pattern, facts.text, re.I | re.S) if self.pattern else None
        if self.names or self.pattern:
            said = named and found is not None if self.both else named or found is not None
            if not said:
                return None
        if self.when is not None and not self.when(facts):
            return None
        return {k: v for k, v in found.groupdict().items() if v} if found else {}


def _errno(*codes) -> Callable[[Facts], bool]:
    def test(facts):
        seen = facts.exception
        while seen is not None:
            if isinstance(seen, OSError) and seen.errno in codes:
                return True
            seen = seen.__cause__ or seen.__context__
        return False
    return test


SMALLER = "Lower training.batch or training.length, set training.checkpointing: true, or choose a smaller model"
DISK = "Free some space or set WORKBENCH_HOME to a bigger disk, then resume the run"
SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, getattr(signal, "SIGBUS", signal.SIGSEGV))
KILLED = getattr(signal, "SIGKILL", signal.SIGTERM)
RULES: tuple[Rule, ...] = (
    Rule("gpu memory", "The GPU ran out of memory", SMALLER + "; close other programs on the GPU", names=("OutOfMemoryError",),
         pattern=r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory"),
    Rule("memory", "The machine ran out of memory: the kernel ended the run's process", SMALLER,
         when=lambda f: f.exit_signal == KILLED and (f.oom_kills > 0 or f.near_full)),
    Rule("memory", "The machine ran out of memory", SMALLER, names=("MemoryError", "ArrayMemoryError"),
         pattern=r"DefaultCPUAllocator: (can't|not enough) ?(allocate )?memory|std::bad_alloc|Cannot allocate memory"),
    Rule("memory", "The machine ran out of memory", SMALLER, when=_errno(errno.ENOMEM)),
    Rule("killed", "Something outside ended the run's process (SIGKILL)", "Resume it from its last checkpoint",
         when=lambda f: f.exit_signal == KILLED),
    Rule("disk full", "The disk is full", DISK, when=_errno(errno.ENOSPC, errno.EDQUOT)),
    Rule("disk full", "The disk is full", DISK,
         pattern=r"No space left on device|(database or )?disk is full|disk .{0,200}is full|Disk quota exceeded|os error 28"),
    Rule("database busy", "The database stayed locked by another program",
         "Close other programs that hold fettle.db open, then resume the run", pattern=r"database .{0,200}\blocked\b"),
    Rule("database", "The database could not be written", "Check that WORKBENCH_HOME is on a local, writable disk",
         pattern=r"readonly database|disk I/O error|unable to open database file|database .{0,200}(malformed|damaged)"),
    Rule("not finite", "The loss stopped being a finite number",
         "Lower training.lr, keep training.clip at 1, or set training.precision: fp32", names=("NonFinite", "NonFiniteLoss"),
         pattern=r"\b(loss|gradient|value|weight|output)s?\b[^.\n]{0,60}\b(nan|inf|infinite|non-?finite|not (a )?finite)\b"
                 r"|\b(loss|gradient) stopped being a finite|\b(nan|non-?finite)\b[^.\n]{0,40}\b(loss|gradient|value|weight)s?\b"
                 r"|returned nan values in its"),
    Rule("not positive definite", "A calibration matrix could not be inverted: the inputs of a layer hardly vary",
         "Raise the method's damping, or use more and more varied calibration rows",
         pattern=r"linalg\.cholesky|not positive[- ]definite|(matrix|input) is singular"),
    Rule("remote code", "The model wants to run code of its own, which stays switched off",
         "Choose an architecture that transformers has built in", pattern=r"trust_remote_code"),
    Rule("hub access", "The model hub refuses access to this id",
         "Accept its terms on the hub and set HF_TOKEN, or choose an open model",
         names=("GatedRepoError",), pattern=r"\b(401|403) Client Error|gated repo|access to model .* is restricted"),
    Rule("unknown id", "The hub has nothing of this name", "Check the spelling of the id, or give a folder that exists",
         names=("RepositoryNotFoundError", "DatasetNotFoundError", "HFValidationError"),
         pattern=r"is not a local folder and is not a valid model identifier|Repository Not Found|404 Client Error"),
    Rule("hub unreachable", "The model hub could not be reached", "Check the network, or use a bundled id or a local folder",
         names=("ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectError", "ProxyError", "LocalEntryNotFoundError",
                "OfflineModeIsEnabled", "MaxRetryError", "gaierror", "NameResolutionError"),
         pattern=r"couldn'?t connect to|Failed to resolve|Temporary failure in name resolution|Connection (refused|timed out)|"
                 r"outgoing traffic has been disabled|offline mode is enabled|We have no connection"),
    Rule("label mismatch", "The data has a label that the model's head does not have ({target})",
         "Choose a model whose labels are those of the data, or give data.label the right column",
         pattern=r"Target (?P<target>-?\d+) is out of bounds"),
    Rule("label mismatch", "The data has a label that the model's head does not have",
         "Choose a model whose labels are those of the data, or give data.label the right column",
         pattern=r"Assertion `t >= 0 && t < n_classes|cur_target >= 0 && cur_target < n_classes"),
    Rule("label mismatch", "The model's head has another number of labels than the data",
         "Let the head be made anew for this data, or choose data with the model's labels",
         pattern=r"size mismatch for (classifier|score|classification_head)[\w.]*"),
    Rule("token out of range", "A token or position lies outside the model's tables",
         "Use the model's own tokenizer, and keep training.length within the model's context",
         pattern=r"index out of range in self|indexSelectLargeIndex|srcIndex < srcSelectDimSize|Sequence length .* longer than"),
    Rule("wrong architecture", "The weights do not fit the architecture in config.json",
         "Use a folder in which config.json and the weights belong together",
         pattern=r"size mismatch for (?P<tensor>[\w.]+)|Error\(s\) in loading state_dict|copying a param with shape"),
    Rule("wrong architecture", "This version of transformers does not know the architecture",
         "Choose another model, or install a newer transformers",
         pattern=r"does not recognize this architecture|Unrecognized (model|configuration)|architecture .* (is )?not supported"),
    Rule("broken weights", "A weights file is cut off or damaged", "Copy or download the model again", names=("SafetensorError",),
         pattern=r"HeaderTooLarge|HeaderTooSmall|MetadataIncompleteBuffer|InvalidHeader|incomplete metadata"),
    Rule("bad data column", "The data has no column {column}", "Set data.text and data.label to columns that the preview shows",
         names=("KeyError",), pattern=r"^'?(?P<column>[\w .-]+)'?$", both=True,
         when=lambda f: bool(re.search(r"engines/data|/datasets/|column", _trace(f.exception)))),
    Rule("bad data column", "The data has no such column", "Set data.text and data.label to columns that the preview shows",
         names=("ColumnNotFoundError",),
         pattern=r"column.{0,60}(not (found|exist|in)|does ?n.t exist|missing)|(no|missing|unknown) column"),
    Rule("bad data", "The data holds text that is not UTF-8", "Save the file as UTF-8", names=("UnicodeDecodeError",)),
    Rule("bad data", "The data file cannot be parsed", "Open it with the preview on the page, which names the line at fault",
         names=("JSONDecodeError", "ArrowInvalid", "ParserError", "DatasetGenerationError")),
    Rule("empty data", "No usable row was left in the data", "Check the text column and the limit on rows",
         pattern=r"\b(data ?set|data|table|file|split)\b.{0,30}\bis empty\b|num_samples=0|no (usable )?(rows?|examples?|items?) "
                 r"(are |were )?(left|found)"),
    Rule("missing file", "A file is missing: {file}", "Put it back or correct the path, then resume the run",
         names=("FileNotFoundError",), pattern=r"No such file or directory: '?(?P<file>[^'\n]+)'?", both=True),
    Rule("missing file", "A file is missing", "Put it back or correct the path, then resume the run",
         names=("FileNotFoundError",)),
    Rule("no permission", "A file or folder may not be read or written", "Correct its permissions, then resume the run",
         names=("PermissionError",)),
    Rule("missing package", "The Python package {package} is not installed",
         "Install it with pip install {package}, then resume the run",
         names=("ModuleNotFoundError",), pattern=r"No module named '?(?P<package>[\w.]+)", both=True),
    Rule("gpu", "The GPU or its driver gave up",
         "Look at the log, restart the machine's driver if it names it, then resume the run",
         pattern=r"CUDA error:|CUDA driver|device-side assert|cuDNN error|NVMLError|no kernel image is available"
                 r"|illegal memory access"),
    Rule("shapes", "Two tensors do not fit together: a defect of the method with this model",
         "Choose another method, and report the log",
         pattern=r"mat1 and mat2 shapes cannot be multiplied|The size of tensor a|shape '.*' is invalid for input"
                 r"|must match the size of tensor"),
    Rule("crash", "The run's process crashed inside native code ({signal})",
         "Resume it from its last checkpoint; the log shows the place",
         when=lambda f: f.exit_signal in SIGNALS),
    Rule("ended", "The run's process was asked to end from outside ({signal})", "Resume it from its last checkpoint",
         when=lambda f: f.exit_signal is not None),
)


def diagnose(exception: BaseException | None = None, log: str | Path | None = None, *, exit_signal: int | None = None,
             exit_code: int | None = None, oom_kills: int = 0, peak_bytes: int | None = None, total_bytes: int | None = None,
             device: str = "cpu") -> dict:
    """What went wrong, as a dict for the run's ``error``.

    Args:
        exception: what escaped from the run, if it was caught.
        log: the log file, or its text.
        exit_signal, exit_code: how the process ended, when it could not say anything itself.

    Returns:
        ``kind``, ``cause`` and ``remedy`` (one sentence each), ``log`` (last lines), ``exception`` (class and message,
        "" if none), ``trace`` (the traceback, "" if none).
    """
    tail = _tail(log)
    out = dict(log=tail, exception="", trace="")
    if exception is not None:
        out |= dict(exception=f"{type(exception).__name__}: {exception}"[:2000], trace=_trace(exception)[-8000:])
    for link in _chain(exception):
        if isinstance(link, InputError):
            value = f"{link.field} = {link.value!r}: {link.problem.rstrip('.')}."
            return dict(kind="input", cause=value, remedy=_sentence(link.remedy), **out)
    facts = Facts(exception=exception, exit_signal=exit_signal, exit_code=exit_code, oom_kills=oom_kills, peak_bytes=peak_bytes,
                  total_bytes=total_bytes, device=device, text="\n".join(str(e) for e in _chain(exception)) or _last_error(tail),
                  names=tuple(dict.fromkeys(c.__name__ for e in _chain(exception) for c in type(e).__mro__)) or _named(tail))
    for link in _chain(exception):
        if isinstance(link, RunFailed):
            kind = next((r.kind for r in RULES if r.applies(facts) is not None), "run failed")
            return dict(kind=kind, cause=_sentence(link.cause), remedy=_sentence(link.remedy), **out)
    if isinstance(exception, FettleError):
        return dict(kind="run failed", cause=_sentence(str(exception)), remedy="Correct it and start again.", **out)
    known = {"signal": _signal(exit_signal)} if exit_signal else {}
    for rule in RULES:
        if (found := rule.applies(facts)) is not None:
            found = known | found
            cause, remedy = _sentence(_fill(rule.cause, found)), _sentence(_fill(rule.remedy, found))
            return dict(kind=rule.kind, cause=cause, remedy=remedy, **out)
    if exception is not None:
        first = (str(exception).strip().splitlines() or ["no message"])[0][:200]
        cause = f"No known cause: {type(exception).__name__}, {first}"
    elif exit_code:
        cause = f"The run's process ended with exit code {exit_code} and gave no known cause"
    else:
        cause = "The run's process is gone and left no word of the cause"
    return dict(kind="unknown", cause=_sentence(cause),
                remedy="Read the last lines of the log; resume the run if there is a checkpoint.", **out)


def _chain(exception: BaseException | None) -> list[BaseException]:
    found = []
    while exception is not None and exception not in found:
        found.append(exception)
        exception = exception.__cause__ or (None if exception.__suppress_context__ else exception.__context__)
    return found


def _trace(exception: BaseException | None) -> str:
    return "".join(traceback.format_exception(exception)) if exception is not None else ""


def _tail(log: str | Path | None, lines: int = TAIL) -> list[str]:
    if log is None:
        return []
    if isinstance(log, Path):
        try:
            with open(log, "rb") as f:
                f.seek(max(0, f.seek(0, 2) - 16384))
                log = f.read().decode("utf-8", "replace")
        except OSError:
            return []
    return [line.rstrip()[:400] for line in log.splitlines() if line.strip()][-lines:]


_ERROR_LINE = re.compile(r"^(?:\w+\.)*(?P<name>[A-Z]\w*(?:Error|Exception|Failed|Interrupt)|gaierror)\b:? ?(?P<text>.*)$")


def _last_error(tail: list[str]) -> str:
    """The message of the last exception printed in the log; without one only lines that name native failures count."""
    for line in reversed(tail):
        if found := _ERROR_LINE.match(line):
            return found["text"]
    native = r"terminate called|what\(\)|^Fatal|std::|CUDA error:|No space left on device"
    return "\n".join(line for line in tail if re.search(native, line))


def _named(tail: list[str]) -> tuple[str, ...]:
    for line in reversed(tail):
        if found := _ERROR_LINE.match(line):
            return (found["name"],)
    return ()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _fill(text: str, groups: dict) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: str(groups.get(m[1], "that was asked for")).strip(), text)


def _sentence(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return (text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text) + "."
