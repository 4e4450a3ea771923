"""Small charts as SVG text: no script and no library, so that a report is one file for ever.

Colours come from CSS variables (``--ft-run-N``) of the page that holds the chart.
"""

from __future__ import annotations

import html
import math

DASHES = ("", "6 2", "2 2", "8 2 2 2", "4 3")
WIDTH, HEIGHT = 560, 220
FEW = 24
"""Curves of at most so many points show each of them."""
LEFT, RIGHT, TOP, BOTTOM = 52, 110, 8, 34


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most about ``most`` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float, step: float) -> str:
    """A tick's figure with as many places as the distance of ticks needs."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.{0 if step >= 1e6 else 1}f} M"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    text = f"{value:,.{max(0, min(6, -math.floor(math.log10(step)) + (1 if str(step).rstrip('0').endswith('25') else 0)))}f}" if step > 0 else f"{value:g}"
    return text.replace("-", "−")


class Frame:
    """Axes of one chart and the way from data to pixels."""

    def __init__(self, xs: list[float], ys: list[float], *, zero: bool = False, width: int = WIDTH, height: int = HEIGHT, right: int = RIGHT):
        self.width, self.height, self.right = width, height, right
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = (min(0.0, *ys) if zero else min(ys)), max(ys)
        if self.x0 == self.x1:
            self.x0, self.x1 = self.x0 - 0.5, self.x1 + 0.5
        if self.y0 == self.y1:
            self.y0, self.y1 = (0.0, 1.0) if not self.y0 else (self.y0 - abs(self.y0) * 0.05, self.y1 + abs(self.y1) * 0.05)
        pad = 0.04 * (self.y1 - self.y0)
        self.y0, self.y1 = (self.y0 if zero and self.y0 == 0 else self.y0 - pad), self.y1 + pad

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (self.height - TOP - BOTTOM)

    def axes(self, x_name: str) -> list[str]:
        out, base, end = [], self.height - BOTTOM, self.width - self.right
        found = ticks(self.y0, self.y1)
        step = found[1] - found[0] if len(found) > 1 else 1.0
        for v in found:
            out.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
                       f'<text x="{LEFT - 6}" y="{self.y(v) + 4:.1f}" text-anchor="end">{label(v, step)}</text>')
        found = ticks(self.x0, self.x1, 6)
        step = found[1] - found[0] if len(found) > 1 else 1.0
        out.append(f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{base}" y2="{base}"/>')
        for v in found:
            out.append(f'<line class="axis" x1="{self.x(v):.1f}" x2="{self.x(v):.1f}" y1="{base}" y2="{base + 4}"/>'
                       f'<text x="{self.x(v):.1f}" y="{base + 16}" text-anchor="middle">{label(v, step)}</text>')
        out.append(f'<text x="{end}" y="{base + 29}" text-anchor="end">{html.escape(x_name)}</text>')
        return out


def _path(frame: Frame, xs: list, ys: list) -> str:
    """Path data; a None is a gap."""
    parts, pen = [], False
    for x, y in zip(xs, ys):
        if x is None or y is None:
            pen = False
            continue
        parts.append(f"{'L' if pen else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = True
    return "".join(parts)


def _numbers(values) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def lines(curves: list[dict], *, name: str, x_name: str = "step", limits=(), zero: bool = False) -> str:
    """A chart of curves.

    Args:
        curves: ``{x, y, label, slot, points (marks instead of a line), low, high (whiskers), faint}``; None in y is a gap.
        name: what the chart shows, for readers who cannot see it.
        limits: ``(value, label)`` of horizontal limit lines.

    Returns:
        the SVG element, or an empty text where there is nothing to draw.
    """
    curves = [c for c in curves if _numbers(c["y"])]
    if not curves:
        return ""
    ys = [v for c in curves for key in ("y", "low", "high") for v in _numbers(c.get(key) or ())] + [v for v, _ in limits]
    frame = Frame([v for c in curves for v in _numbers(c["x"])], ys, zero=zero)
    out, ends = frame.axes(x_name), []
    for value, text in limits:
        at = frame.y(value)
        out.append(f'<line class="limit" x1="{LEFT}" x2="{frame.width - frame.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        ends.append([at, text])
    for c in curves:
        colour = f"var(--ft-run-{c.get('slot', 0) % 10 + 1})"
        if c.get("points"):
            for i, (x, y) in enumerate(zip(c["x"], c["y"])):
                if y is None:
                    continue
                if c.get("low"):
                    out.append(f'<line stroke="{colour}" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" y1="{frame.y(c["low"][i]):.1f}" '
                               f'y2="{frame.y(c["high"][i]):.1f}"/>')
                out.append(f'<circle fill="{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>')
        else:
            dash = c.get("dash", DASHES[c.get("slot", 0) % 5])
            out.append(f'<path class="line{" faint" if c.get("faint") else ""}" stroke="{colour}"'
                       f'{f" stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash and not c.get("faint") else ""} d="{_path(frame, c["x"], c["y"])}"/>')
            if len(_numbers(c["y"])) <= FEW:
                out += [f'<circle fill="{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in zip(c["x"], c["y"]) if y is not None]
        if c.get("label"):
            last = next(y for y in reversed(c["y"]) if y is not None)
            ends.append([frame.y(last), c["label"]])
    return _wrap(out + _ends(ends, frame), name, frame)


def _ends(ends: list, frame: Frame) -> list[str]:
    """Labels at the right ends of lines, pushed apart so that they can be read."""
    ends.sort(key=lambda e: e[0])
    for i in range(1, len(ends)):
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + 13)
    over = ends[-1][0] - (frame.height - BOTTOM) if ends else 0
    shift = max(0.0, over)
    return [f'<text class="end" x="{frame.width - frame.right + 6}" y="{at - shift + 4:.1f}">{html.escape(_short(text))}</text>' for at, text in ends]


def _short(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def scatter(points: list[dict], *, name: str, x_name: str, front: list = (), limits=()) -> str:
    """A two-axis plot: ``{x, y, low, high, label, slot, open}``, the front as a dotted stair, ``limits`` vertical on x."""
    if not points:
        return ""
    frame = Frame([p["x"] for p in points] + list(limits), [v for p in points for v in _numbers((p["y"], p.get("low"), p.get("high")))], right=24,
                  width=760, height=300)
    span = 0.06 * (frame.x1 - frame.x0)
    frame.x0, frame.x1 = frame.x0 - span, frame.x1 + 3 * span
    out, taken = frame.axes(x_name), []
    for value in limits:
        out.append(f'<line class="limit" x1="{frame.x(value):.1f}" x2="{frame.x(value):.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}"/>')
    if len(front) > 1:
        stairs = f"M{frame.x(front[0]['x']):.1f} {frame.y(front[0]['y']):.1f}"
        stairs += "".join(f"H{frame.x(p['x']):.1f}V{frame.y(p['y']):.1f}" for p in front[1:])
        out.append(f'<path class="front" d="{stairs}"/>')
    for p in points:
        colour, at, up = f"var(--ft-run-{p.get('slot', 0) % 10 + 1})", frame.x(p["x"]), frame.y(p["y"])
        if p.get("low") is not None and p.get("high") is not None:
            out.append(f'<line stroke="{colour}" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y(p["low"]):.1f}" y2="{frame.y(p["high"]):.1f}"/>')
        fill, text = "var(--ft-panel)" if p.get("open") else colour, _short(p["label"], 24)
        row = up + 4
        while any(abs(row - other) < 12 and x0 < at + 8 + 6.2 * len(text) and at + 8 < x1 for other, x0, x1 in taken):
            row -= 12
        taken.append((row, at + 8, at + 8 + 6.2 * len(text)))
        out.append(f'<circle fill="{fill}" stroke="{colour}" stroke-width="2" cx="{at:.1f}" cy="{up:.1f}" r="4"/>'
                   f'<text class="end" x="{at + 8:.1f}" y="{row:.1f}">{html.escape(text)}</text>')
    return _wrap(out, name, frame)


def _wrap(parts: list[str], name: str, frame: Frame) -> str:
    return (f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{html.escape(name, quote=True)}">' + "".join(parts) + "</svg>")
