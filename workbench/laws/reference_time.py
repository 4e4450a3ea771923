"""Budgets in the time of a reference system, so that runs on different machines get the same work.

Source: "No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based Language Models".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.errors import InputError
from workbench.laws.base import Card, Constant, Fitted, Option, Planner, duration, short

REFERENCE_SECONDS = 0.25
"""Seconds of the reference training step (``workbench.machine.REFERENCE``) on the reference system, unless another one is named. The value
is a convention: it fixes the unit, as a metre does."""
SETTING = "reference_system"


@dataclass(frozen=True)
class ReferenceTime:
    """Converts between seconds here and seconds of the reference system.

    Args:
        here: seconds of the reference step on this machine.
        reference: seconds of it on the reference system.
    """

    here: float
    reference: float = REFERENCE_SECONDS

    def __post_init__(self):
        for name in ("here", "reference"):
            if not getattr(self, name) > 0:
                raise InputError(name, getattr(self, name), "not above zero", "Give the seconds of the reference step")

    @property
    def factor(self) -> float:
        """Seconds here for each reference second."""
        return self.here / self.reference

    def to_reference(self, seconds: float) -> float:
        return seconds / self.factor

    def to_local(self, seconds: float) -> float:
        return seconds * self.factor


class ReferenceClock:
    """Progress of a budget in reference seconds; every schedule that it drives completes exactly at the budget.

    Args:
        budget: reference seconds.
        rates: the conversion.
        clock: gives local seconds; replaceable in tests.
    """

    def __init__(self, budget: float, rates: ReferenceTime, clock: Callable[[], float] = time.perf_counter):
        if not budget > 0:
            raise InputError("budget", budget, "not above zero", "Give reference seconds")
        self.budget, self.rates, self.clock = budget, rates, clock
        self.began = clock()

    @property
    def used(self) -> float:
        """Reference seconds since the beginning."""
        return self.rates.to_reference(self.clock() - self.began)

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.used / self.budget)

    def rate(self, **schedule) -> float:
        """Learning-rate factor now; ``schedule`` as of ``engines.schedules.rate.rate``. It is 0 at the budget, whatever a step takes."""
        from engines.schedules.rate import rate

        return rate(self.progress, **schedule)


def measured(home, precision: str = "float32") -> float | None:
    """Seconds of the reference step on this machine, as its calibration keeps them; None before it was calibrated."""
    from workbench import machine

    found = machine.measured(home.store) or {}
    return (found.get("reference") or {}).get(precision)


def rates(home, reference: float | None = None, here: float | None = None) -> ReferenceTime:
    """The conversion of this machine.

    Raises:
        InputError: this machine was never measured.
    """
    here = here or measured(home)
    if not here:
        raise InputError(
            "here",
            None,
            "this machine has not been measured yet",
            "Run python -m workbench doctor --measure, which takes about ten seconds",
        )
    return ReferenceTime(here, reference or home.store.get_setting(SETTING, None) or REFERENCE_SECONDS)


class NoTrainNoGain(Planner):
    """Minutes here and minutes of the reference system."""

    card = Card(
        id="no-train-no-gain",
        name="Reference time",
        title="No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based Language Models",
        question="How many minutes here are the same budget as so many minutes on another machine?",
        form="minutes here = reference minutes x (reference step here / reference step there);  learning rate 0 at the budget",
        needs=("the seconds of the reference training step on this machine, which the calibration keeps",),
        claims=(
            "under equal reference time and a fully decayed learning rate, the gains of layer stacking, layer dropping, selective backprop, RHO "
            "loss, Lion and Sophia vanish on BERT and T5",
        ),
        differs=(
            "The paper times every operation of a method once on the reference machine; here one training step of a small model stands for all, so a "
            "machine that is fast at other things is converted only roughly.",
            "The default reference system does that step in 0.25 s, by convention.",
        ),
        data="machine",
        options=(
            Option("minutes", "the budget", 5.0, "min", 1e-4, 1e7),
            Option("unit", "whose minutes these are", "reference", choices=("reference", "here")),
            Option("here", "seconds of the reference step here, if not the measured ones", None, "s", 1e-6, 1e4),
            Option("reference", "seconds of the reference step on the reference system", None, "s", 1e-6, 1e4),
        ),
    )

    def from_history(self, home, query, options):
        return rates(home, options.get("reference"), options.get("here"))

    def example(self):
        return ReferenceTime(0.5)

    def fit(self, data, options=None, source="runs"):
        options = options or {}
        data = ReferenceTime(options.get("here") or data.here, options.get("reference") or data.reference)
        return Fitted(
            self.card.id,
            source,
            [
                Constant("here", data.here, help="seconds of the reference step on this machine"),
                Constant("reference", data.reference, help="seconds of it on the reference system"),
                Constant("factor", data.factor, help="minutes here for each reference minute"),
            ],
            1,
            warnings=["The example's machine is made up: half as fast as the reference system."] if source == "example" else [],
        )

    def answer(self, fitted, options, data=None):
        time_ = ReferenceTime(options["here"] or fitted["here"], options["reference"] or fitted["reference"])
        seconds = 60 * options["minutes"]
        local, there = (
            (time_.to_local(seconds), seconds) if options["unit"] == "reference" else (seconds, time_.to_reference(seconds))
        )
        faster = time_.factor < 1
        text = (
            f"{duration(there)} of the reference system are {duration(local)} here: this machine is "
            f"{short(1 / time_.factor if faster else time_.factor, 3)} times as {'fast' if faster else 'slow'}. Set budget.minutes to {local / 60:.4g}; "
            "the schedule completes at that limit, and the learning rate is 0 there."
        )
        xs = [there / 60 * i / 10 for i in range(11)]
        return {
            "text": text,
            "warnings": [],
            "figures": {
                "minutes_here": local / 60,
                "minutes_reference": there / 60,
                "factor": time_.factor,
                "budget": {"minutes": round(local / 60, 6)},
            },
            "plot": {
                "x": {"title": "Reference time", "unit": "min"},
                "y": {"title": "Time here", "unit": "min"},
                "series": [
                    dict(name="conversion", kind="line", x=xs, y=[x * time_.factor for x in xs]),
                    dict(name="this budget", kind="mark", x=[there / 60], y=[local / 60], low=[None], high=[None]),
                ],
            },
        }
