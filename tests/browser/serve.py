"""The app on a given home and port, for browser tests. ``python serve.py PORT [dispatch]``; WORKBENCH_HOME as usual.

Without ``dispatch`` nothing feeds the queue and nothing reaps, so that a test can play the worker.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import app  # noqa: E402
from workbench import dispatcher  # noqa: E402

if __name__ == "__main__":
    os.environ["PORT"] = sys.argv[1]
    if "dispatch" not in sys.argv[2:]:
        dispatcher.Dispatcher.start = lambda self: self
    app.main()
