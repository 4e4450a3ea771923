"""The queue and the dispatcher as they are: a trial is a queued run."""

from __future__ import annotations

from workbench import dispatcher, runs


class Local:
    """Runs on this machine; feeds the queue itself while no server does."""

    def __init__(self, home):
        self.home, self.feeder = home, dispatcher.Dispatcher(home)

    def open(self) -> None:
        self.feeder.start()

    def slots(self) -> int:
        return self.feeder.devices() * max(1, int(self.home.store.get_setting(dispatcher.PER_DEVICE, 1)))

    def begin(self, spec, resolved, forecast: dict, parent: int | None) -> tuple[int, str | None]:
        return runs.record(spec, resolved, forecast, queue=True, parent=parent, home=self.home)["id"], None

    def adopt(self, run_id: int, node: str | None) -> None:
        pass

    def poll(self) -> None:
        pass

    def again(self, run_id: int) -> bool:
        runs.resume(run_id, home=self.home)
        return True

    def close(self) -> None:
        self.feeder.stop()
