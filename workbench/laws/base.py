"""What every planner has: a card in plain words, a fit, and an answer with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engines.errors import InputError
from engines.registry import suggestion

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that every interval here is made of."""


@dataclass(frozen=True)
class Column:
    """A column of the table that a law is fitted to."""

    name: str
    help: str
    required: bool = True


@dataclass(frozen=True)
class Option:
    """What a person may ask of a law."""

    name: str
    help: str
    default: Any = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Card:
    """A planner in plain words."""

    id: str
    name: str
    title: str
    """Title of the paper."""
    question: str
    """What it answers, as a person would ask."""
    form: str
    """The equation."""
    needs: tuple[str, ...]
    claims: tuple[str, ...]
    differs: tuple[str, ...]
    """Where this differs from the paper, or what could not be checked against it."""
    data: str
    """What it is fitted to: points, curves, scores or machine."""
    columns: tuple[Column, ...] = ()
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Constant:
    """A fitted constant with its 95 % interval; None where there is none."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    help: str = ""


@dataclass
class Fitted:
    """A law with its constants, as far as the points determine them."""

    law: str
    source: str
    """runs, points, published or example: where the constants come from."""
    constants: list[Constant]
    n: int = 0
    residuals: list[float] = field(default_factory=list)
    """Relative errors (fitted / measured - 1), in the order of the points."""
    warnings: list[str] = field(default_factory=list)
    region: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Range of each quantity among the points; outside of it a prediction is an extrapolation."""
    draws: Any = None
    """float64 array [draws, constants] of the bootstrap in the order of ``constants``; None without intervals."""
    extra: dict = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return next(c.value for c in self.constants if c.name == name)

    def columns(self):
        """The constants of each bootstrap draw, ``{name: float64 array [draws]}``; the single values without a bootstrap."""
        import numpy as np

        if self.draws is None:
            return {c.name: np.array([c.value]) for c in self.constants}
        return {c.name: self.draws[:, i] for i, c in enumerate(self.constants)}

    @property
    def error(self) -> float | None:
        """Median of the relative errors on the points themselves."""
        if not self.residuals:
            return None
        ordered = sorted(abs(r) for r in self.residuals)
        return ordered[len(ordered) // 2]

    def plain(self) -> dict:
        """JSON-able form."""
        return {
            "law": self.law,
            "source": self.source,
            "n": self.n,
            "error": self.error,
            "warnings": list(self.warnings),
            "constants": [dict(name=c.name, value=c.value, low=c.low, high=c.high, help=c.help) for c in self.constants],
            "draws": 0 if self.draws is None else len(self.draws),
            "residuals": [float(r) for r in self.residuals],
            "region": {k: list(v) for k, v in self.region.items()},
        }


class Planner:
    """A law that plans. Subclasses are stateless; ``workbench.laws.get`` makes one."""

    card: ClassVar[Card]

    # -- where the data come from ----------------------------------------------------------------------------
    def from_history(self, home, query: str, options: dict):
        """Data from this database's runs."""
        raise NotImplementedError

    def from_table(self, table, options: dict):
        """Data from a table given by the person (``points.Points``)."""
        return table

    def example(self):
        """Synthetic data that show what the law does; labelled as synthetic wherever they are used."""
        raise NotImplementedError

    def published(self) -> Fitted | None:
        """The law with the paper's constants, or None where there are none to use."""
        return None

    # -- the law ---------------------------------------------------------------------------------------------
    def fit(self, data, options: dict | None = None, source: str = "points") -> Fitted:
        """Constants from data.

        Raises:
            InputError: too few points for the constants.
        """
        raise NotImplementedError

    def answer(self, fitted: Fitted, options: dict, data=None) -> dict:
        """``{"text", "figures", "plot", "warnings"}``: one sentence, its numbers, what to draw, what to doubt."""
        raise NotImplementedError

    # -- shared ----------------------------------------------------------------------------------------------
    def check(self, given: dict) -> dict:
        """The options with defaults, read and checked.

        Raises:
            InputError: an unknown option, or a value out of its range.
        """
        known = {o.name: o for o in self.card.options}
        for name in given:
            if name not in known:
                raise InputError(name, given[name], f"{self.card.name} has no such option", suggestion(name, list(known)))
        return {name: read(o, given.get(name)) for name, o in known.items()}

    def few(self, n: int, least: int, what: str = "points") -> None:
        """Refuses fewer than ``least`` points."""
        if n < least:
            remedy = "Give more" + (", or use the published constants" if self.published() else "")
            raise InputError("points", n, f"{self.card.name} needs at least {least} {what}", remedy)


def read(option: Option, value):
    """One option's value from text or number; None means its default.

    Raises:
        InputError: not a number, not a choice, out of range.
    """
    if value is None or value == "":
        return option.default
    if option.choices:
        if str(value) not in option.choices:
            raise InputError(option.name, value, "not one of the choices", "Choose " + ", ".join(option.choices))
        return str(value)
    number = quantity(value)
    if number is None:
        raise InputError(option.name, value, "not a number", "Give for example 1e15, 5.3M or 200k")
    if option.low is not None and number < option.low or option.high is not None and number > option.high:
        ends = (
            f"from {short(option.low)} to {short(option.high)}"
            if option.low is not None and option.high is not None
            else f"at least {short(option.low)}"
            if option.low is not None
            else f"at most {short(option.high)}"
        )
        raise InputError(option.name, value, f"not {ends}", "Choose a number in that range")
    return round(number) if option.whole else number


def quantity(value) -> float | None:
    """A number such as ``1e15``, ``5.3M``, ``200k`` or ``25%``; None when it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    text = str(value).strip().replace("\u00a0", "").replace(",", "").replace("_", "").replace(" ", "")
    scale = 1.0
    if text and text[-1] in "kKMGBT%":
        scale = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "%": 0.01}[text[-1]]
        text = text[:-1]
    try:
        number = float(text) * scale
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def short(value: float | None, digits: int = 3) -> str:
    """A number for a sentence: 5.30 M, 0.0123, 2.1e+15."""
    if value is None or not math.isfinite(value):
        return "no figure"
    size = abs(value)
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if scale <= size < scale * 1e3:
            return f"{_digits(value / scale, digits)} {unit}"
    return _digits(value, digits) if 1e-3 <= size < 1e3 or value == 0 else f"{value:.{digits - 1}e}"


def _digits(value: float, digits: int) -> str:
    places = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:.{places}f}"


def span(low, high, digits: int = 4) -> str:
    """``(1.38 to 1.44)`` for a sentence, empty without an interval."""
    return "" if low is None or high is None else f" ({short(low, digits)} to {short(high, digits)})"


def percent(share: float, digits: int = 2) -> str:
    return f"{_digits(100 * share, digits)} %" if share else "0 %"


def beyond(fitted: Fitted, **values: float) -> list[str]:
    """A warning for each value outside of the range of the points."""
    found = []
    for name, value in values.items():
        low, high = fitted.region.get(name, (None, None))
        if low is None or value is None:
            continue
        words = name.replace("_", " ")
        if value > high * 1.001:
            found.append(
                f"Extrapolation: {words} {short(value)} is {short(value / high, 2)} times the largest of the points ({short(high)})."
            )
        elif value < low / 1.001:
            found.append(
                f"Extrapolation: {words} {short(value)} is {short(low / value, 2)} times below the smallest of the points "
                f"({short(low)})."
            )
    return found


def interval(draws, digits=INTERVAL) -> tuple[float | None, float | None]:
    """95 % interval of bootstrap draws; (None, None) of fewer than 20 finite ones."""
    import numpy as np

    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if len(draws) < 20:
        return None, None
    low, high = np.percentile(draws, digits)
    return float(low), float(high)


def duration(seconds: float) -> str:
    """Time for a sentence: 45 s, 12 min, 3.4 h, 21 days."""
    for scale, unit in ((86400 * 2, "days"), (7200, "h"), (120, "min")):
        if seconds >= scale:
            return f"{short(seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit])} {unit}"
    return f"{short(seconds)} s"


def once(notes) -> list[str]:
    """Each note once, in order."""
    return list(dict.fromkeys(notes))
