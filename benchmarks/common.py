"""What the benchmark scripts share: quiet settings, a table, a JSON file with the machine's facts."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict:
    """Processor, cores and versions, for the record beside each figure."""
    model = platform.processor()
    try:
        model = next(line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    import importlib.metadata as metadata
    versions = {}
    for name in ("torch", "transformers", "peft", "gradio"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return dict(processor=model, cores=os.cpu_count(), python=platform.python_version(), **versions)


def table(title: str, rows: list[dict]) -> None:
    """Print rows of one shape as an aligned table."""
    print(f"\n{title}")
    if not rows:
        return
    cells = [[*rows[0]]] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))))


def write(name: str, figures: dict) -> Path:
    """Keep the figures as JSON with date and machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(dict(name=name, date=time.strftime("%Y-%m-%d"), machine=machine(), **figures), indent=1) + "\n")
    print(f"\n  written to {path.relative_to(RESULTS.parent.parent)}")
    return path


def shared_data(name: str) -> Path | None:
    """A file of the data folder named by FETTLE_DATA (or ``../shared/data`` beside the checkout), None when absent."""
    folder = Path(os.environ.get("FETTLE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    return folder / name if (folder / name).is_file() else None
