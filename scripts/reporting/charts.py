"""Charts as SVG text: lines with axes, and bars with whiskers. Classes of the page's style sheet colour them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 270, 56, 42, 12
COLOURS, DASHES = 6, 4


@dataclass(frozen=True)
class Mark:
    """What a line or a bar is called and belongs to; `style` counts colours, then dashes."""

    label: str
    task: str
    model: str
    style: int
    key: str = ""

    @property
    def attributes(self) -> str:
        kind = f"c{self.style % COLOURS} d{self.style // COLOURS % DASHES}"
        names = f'data-task="{escape(self.task)}" data-model="{escape(self.model)}" data-line="{escape(self.key)}"'
        return f'class="mark {kind}" {names}'


@dataclass(frozen=True)
class Bar:
    mark: Mark
    value: float
    std: float | None
    text: str  # the value as a person reads it
    about: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def padded(first: float, last: float, low: float = 0.04) -> tuple[float, float]:
    """The ends of an axis, a little beyond those of the data; never of no length."""
    span = (last - first) or abs(last) or 1.0
    return first - low * span, last + 0.04 * span


def number(value: float) -> str:
    if value and abs(value) >= 10_000:
        big = abs(value) >= 1e6
        return f"{value / (1e6 if big else 1e3):.4g}{'M' if big else 'k'}"
    return f"{value:.6g}"


def opened(width: float, height: float, title: str, kind: str) -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'


def line_chart(
    title: str, x_label: str, y_label: str, lines: Sequence[tuple[Mark, Sequence[tuple[float, float]]]], kind: str
) -> str:
    """A line for each mark through its (x, y); points that are no numbers are left out."""
    finite = [(mark, [p for p in points if all(map(math.isfinite, p))]) for mark, points in lines]
    xs, ys = ([p[i] for _, points in finite for p in points] or [0.0] for i in (0, 1))
    (x_low, x_high), (y_low, y_high) = padded(min(0.0, *xs), max(xs), low=0.0), padded(min(ys), max(ys))
    x_ticks, y_ticks = (
        [t for t in ticks(*ends) if ends[0] <= t <= ends[1]] for ends in ((x_low, x_high), (y_low, y_high))
    )
    right, base = WIDTH - 14, HEIGHT - BOTTOM

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)

    def at_y(y: float) -> float:
        return base - (y - y_low) / (y_high - y_low) * (base - TOP)

    svg = [opened(WIDTH, HEIGHT, title, kind)]
    for x in x_ticks:
        svg.append(f'<line class="grid" x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{TOP}" y2="{base}"/>')
        svg.append(f'<text x="{at_x(x):.1f}" y="{base + 15}" text-anchor="middle">{number(x)}</text>')
    for y in y_ticks:
        svg.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        svg.append(f'<text x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    svg.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{right}"/>')
    svg.append(
        f'<text class="name" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + base) / 2
    turned = f'transform="rotate(-90 13 {middle})" text-anchor="middle"'
    svg.append(f'<text class="name" x="13" y="{middle}" {turned}>{escape(y_label)}</text>')
    for mark, points in finite:
        if not points:
            continue
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in points)
        x, y = points[-1]
        said = f"{mark.label}: {y:.4g} {y_label} at {number(x)} {x_label}"
        svg.append(f'<g {mark.attributes}><title>{escape(said)}</title><path class="line" d="M{path}"/>')
        svg.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5"/></g>')
    return "".join([*svg, "</svg>"])


def bar_chart(title: str, unit: str, clusters: Sequence[tuple[str, Sequence[Bar]]], *, from_zero: bool) -> str:
    """Bars to the right, in clusters with a heading, whiskers of one standard deviation.

    Not from zero, the axis starts a little below the smallest value, and says so.
    """
    bars = [bar for _, cluster in clusters for bar in cluster if math.isfinite(bar.value)]
    ends = [(bar.value - (bar.std or 0.0), bar.value + (bar.std or 0.0)) for bar in bars] or [(0.0, 1.0)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    scale = ticks(0.0 if from_zero else low - 0.35 * ((high - low) or abs(high) or 1.0), high)
    longest = max([len(bar.mark.label) for bar in bars] or [0])
    left, right = min(24 + 6.3 * longest, 190.0), WIDTH - 74

    def at(x: float) -> float:
        return left + (x - scale[0]) / (scale[-1] - scale[0]) * (right - left)

    rows, y = [], 6.0
    for heading, cluster in clusters:
        if heading:
            rows.append(f'<text class="name" x="0" y="{y + 13:g}">{escape(heading)}</text>')
            y += 19
        for bar in cluster:
            label = bar.mark.label if len(bar.mark.label) < 28 else bar.mark.label[:26] + "…"
            said = f"{heading + ', ' if heading else ''}{bar.mark.label}: {bar.text} {unit}{bar.about}"
            rows.append(f"<g {bar.mark.attributes}><title>{escape(said)}</title>")
            rows.append(f'<text x="{left - 6:.1f}" y="{y + 12:g}" text-anchor="end">{escape(label)}</text>')
            if math.isfinite(bar.value):
                end = at(bar.value)
                rows.append(
                    f'<rect x="{left:.1f}" y="{y + 1:g}" width="{max(end - left, 0.5):.1f}" height="14" rx="2"/>'
                )
                if bar.std:
                    first, last, middle = at(bar.value - bar.std), at(bar.value + bar.std), y + 8
                    whisker = (
                        f"M{first:.1f} {middle:g}H{last:.1f}M{first:.1f} {middle - 4:g}v8M{last:.1f} {middle - 4:g}v8"
                    )
                    rows.append(f'<path class="whisker" d="{whisker}"/>')
                    end = last
                rows.append(f'<text class="value" x="{end + 5:.1f}" y="{y + 12:g}">{escape(bar.text)}</text>')
            rows.append("</g>")
            y += 19
        y += 5
    svg = [opened(WIDTH, y + 40, title, "bars")]
    for x in scale:
        svg.append(f'<line class="grid" x1="{at(x):.1f}" x2="{at(x):.1f}" y1="4" y2="{y:g}"/>')
        svg.append(f'<text x="{at(x):.1f}" y="{y + 15:g}" text-anchor="middle">{number(x)}</text>')
    start = "" if from_zero or scale[0] == 0 else f" (the axis starts at {number(scale[0])})"
    below = f'x="{(left + right) / 2:.1f}" y="{y + 33:g}" text-anchor="middle"'
    svg.append(f'<text class="name" {below}>{escape(unit + start)}</text>')
    return "".join([*svg, *rows, f'<path class="axis" d="M{left:.1f} 4V{y:g}"/></svg>'])
