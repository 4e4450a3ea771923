"""``make bench``: every benchmark that this machine can run, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ORDER = ("startup", "forecast", "memory", "int8", "structured", "allocation", "sparselora", "grades", "logging", "encoder", "browser", "sweep", "gpu_smoke")


def main() -> None:
    failed = []
    for name in ORDER:
        if not (Path(__file__).parent / f"{name}.py").is_file():
            continue
        print(f"\n=== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
