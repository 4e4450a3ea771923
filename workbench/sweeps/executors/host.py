"""Feeds a lane's queue on a node: ``python -m workbench.sweeps.executors.host HOME``.

It ends, with what runs there, when its Ray node is gone or nobody has asked for news for a minute; the folder goes with it. Until
then a conductor that begins anew finds its runs again.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

LEASH = 60.0
"""Seconds without a question after which nobody will come."""


def main(arguments: list[str] | None = None) -> int:
    from workbench import runs
    from workbench.dispatcher import Dispatcher
    from workbench.home import Home
    from workbench.sweeps.executors.node import ALIVE
    given = sys.argv[1:] if arguments is None else arguments
    home = Home.open(given[0])
    owner = f"host:{os.getpid()}"
    patience = time.monotonic() + 7.0  # a host that was killed still holds the lease for some seconds
    while not home.store.lease("host", owner, 5.0):
        if time.monotonic() > patience:
            return 0
        time.sleep(0.2)
    dispatcher = Dispatcher(home).start()
    lost = False
    while home.path.is_dir() and not lost:
        try:
            if not home.store.lease("host", owner, 5.0):
                break
            seen = home.store.get_setting(ALIVE, None) or {"t": time.time(), "node": None}
        except Exception as e:
            if not home.db.exists():
                break
            print(f"host: {type(e).__name__}: {e}", flush=True)
            time.sleep(1.0)
            continue
        gone = seen["node"] is not None and not exists(seen["node"])
        lost = gone or time.time() - seen["t"] > LEASH
        time.sleep(0.5)
    dispatcher.stop()
    if lost:
        for row in home.store.runs(status=runs.LIVE, limit=None):
            runs.kill(row["id"], home=home)
        home.store.close()
        remove(home.path)
    return 0


def remove(folder, patience: float = 10.0) -> None:
    """Delete the folder; again when a process that is just ending has written into it meanwhile."""
    end = time.monotonic() + patience
    gone = 0
    while gone < 3 and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        gone = 0 if folder.exists() else gone + 1
        time.sleep(0.3)


def exists(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    import psutil
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


if __name__ == "__main__":
    sys.exit(main())
