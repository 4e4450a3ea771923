"""How figures are written on every page: a unit on every number, a no-break space before it, three figures."""

from __future__ import annotations

import datetime
import math
from decimal import ROUND_HALF_UP, Decimal

NB = "\u00a0"
"""No-break space, between a figure and its unit."""

MISSING = "no figure"


def figure(value: float | None, digits: int = 3) -> str:
    """``value`` with three significant figures; whole numbers that were counted stay exact (315,392).

    Numbers outside 1e-4 .. 1e7 are written as 1.2e-5.
    """
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e7:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    # halves go up, as in the browser
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP):,f}"


def unit(value: float | None, name: str, digits: int = 3) -> str:
    """``unit(1.067, "GB")`` is ``1.07 GB`` with a no-break space."""
    return MISSING if value is None else f"{figure(value, digits)}{NB}{name}"


def size(count: float | None, digits: int = 3) -> str:
    """Bytes in decimal units, as disks and budgets count: ``size(8_570_000)`` is ``8.57 MB``."""
    if count is None:
        return MISSING
    for step, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= step * 0.9995:
            return unit(count / step, name, digits)
    return f"{int(count)}{NB}B"


def gigabytes(count: float | None) -> str:
    """Bytes as GB with two places, the form of the memory pages."""
    return MISSING if count is None else f"{count / 1e9:.2f}{NB}GB"


def count(value: float | None, digits: int = 3) -> str:
    """Large counts in short: ``count(482_000)`` is ``482 k``, ``count(7_475_456)`` is ``7.48 M``."""
    if value is None:
        return MISSING
    for step, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= step * 0.9995:
            return unit(value / step, name, digits)
    return figure(float(value), digits) if value != int(value) else f"{int(value)}"


def clock(seconds: float | None) -> str:
    """``m:ss``, or ``h:mm:ss`` from one hour on."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = max(0, math.floor(seconds + 0.5))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float | None, digits: int = 3) -> str:
    """``percent(0.0481)`` is ``4.81 %``."""
    return MISSING if share is None else unit(100.0 * share, "%", digits)


def interval(value: float | None, low: float | None, high: float | None, name: str = "") -> str:
    """``1.369 ± 0.014 bits/byte``; the interval is left out where there is none."""
    if value is None:
        return MISSING
    text = f"{value:.3f}"
    if low is not None and high is not None:
        text += f" ± {(high - low) / 2:.3f}"
    return f"{text}{NB}{name}" if name else text


def moment(t: float | None) -> str:
    """Time of day of unix seconds: ``14:02:11``, with the date in front when it is not today."""
    if t is None:
        return MISSING
    when = datetime.datetime.fromtimestamp(t)
    plain = when.strftime("%H:%M:%S")
    return plain if when.date() == datetime.date.today() else when.strftime("%Y-%m-%d ") + plain
