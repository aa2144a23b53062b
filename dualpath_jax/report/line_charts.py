"""Computes line charts as numbers (ticks, SVG paths, read-out values), which page.html draws.

Positions are in units of the SVG's viewBox, WIDTH x HEIGHT, from its upper left corner.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker

from dualpath_jax.report.statistics import CalibrationBins

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 60, 374, 10, 186  # edges of the plot area
MAX_POINTS = 1000  # per line; a longer one is thinned out


@dataclasses.dataclass(frozen=True)
class Series:
    """Holds one line of a chart.

    Attributes:
      name: label for the legend and the read-out.
      color: index into the page's colors.
      points: (step, value) pairs of finite numbers; steps do not decrease.
      dots: True draws only the points, without a line through them.
    """

    name: str
    color: int
    points: list[tuple[float, float]]
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Holds a chart that is ready to draw.

    Attributes:
      title: heading of the chart.
      summary: text for screen readers.
      x_ticks, y_ticks: (position, label) pairs.
      lines: one dict per series: name, color, path (SVG path data, or "") and dots (list of
        (x, y) positions).
      readout: data for page.js (JSON): the scale, and the steps and values of each series.
    """

    title: str
    summary: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    readout: dict[str, Any]


def format_percent(value: float, digits: int = 1) -> str:
    """Format a fraction as a percentage: 0.125 -> "12.5%"."""
    return f"{100 * value:.{digits}f}%"


def format_number(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    formatter: Callable[[float], str],
    unit_scale: bool = False,
) -> Chart | None:
    """Return a chart of values against steps; the vertical scale includes zero.

    Args:
      title: heading of the chart.
      series: the lines; those without points are left out.
      formatter: `format_percent` or `format_number`, for labels.
      unit_scale: True fixes the vertical scale to 0..1.

    Returns:
      The chart, or None if no line has a point.
    """
    series = [line for line in series if line.points]
    if not series:
        return None
    steps, values = np.array([point for line in series for point in line.points]).T
    x = _make_scale(0.0, steps.max(), LEFT, RIGHT)
    low, high = (0.0, 1.0) if unit_scale else (min(0.0, values.min()), values.max())
    y_ticks = _choose_ticks(low, high)
    y = _make_scale(y_ticks[0], max(y_ticks[-1], high), BOTTOM, TOP)
    lines, readout = [], []
    for line in series:
        thin = _thin_points(line.points)
        positions = [(round(x(step), 1), round(y(value), 1)) for step, value in thin]
        dots = positions if line.dots or len(positions) == 1 else []
        path = "" if dots else "M" + "L".join(f"{px:g} {py:g}" for px, py in positions)
        lines.append({"name": line.name, "color": line.color, "path": path, "dots": dots})
        readout.append(
            {
                "name": line.name,
                "steps": [step for step, _ in thin],
                "values": [value for _, value in thin],
            }
        )
    x_values = [tick for tick in _choose_ticks(0, steps.max()) if tick <= steps.max()]
    return Chart(
        title=title,
        summary=f"{title}: " + "; ".join(_describe_line(line, formatter) for line in series),
        x_ticks=[(x(tick), f"{tick:,.0f}") for tick in x_values],
        y_ticks=[(y(tick), _format_tick(tick, formatter)) for tick in y_ticks],
        lines=lines,
        readout={
            "first": [0.0, LEFT],
            "last": [float(steps.max()), RIGHT],
            "percent": formatter is format_percent,
            "series": readout,
        },
    )


def _format_tick(value: float, formatter: Callable[[float], str]) -> str:
    """Format a tick; percentages have no more digits than they need."""
    return f"{100 * value:g}%" if formatter is format_percent else formatter(value)


def _describe_line(line: Series, formatter: Callable[[float], str]) -> str:
    """Return the first and last value of a line as text."""
    (first_step, first), (last_step, last) = line.points[0], line.points[-1]
    return (
        f"{line.name} from {formatter(first)} at step {first_step:,.0f} "
        f"to {formatter(last)} at step {last_step:,.0f}"
    )


def _choose_ticks(low: float, high: float) -> list[float]:
    """Return round values that cover low..high."""
    if not high > low:
        high = low + 1.0
    values = ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in values]


def _make_scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    """Return the linear function that maps low..high to begin..end."""
    span = high - low if high > low else 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def _thin_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MAX_POINTS` points: the lowest and the highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = (pick(stretch, key=lambda point: point[1]) for pick in (min, max))
        kept += sorted({low, high})
    return kept


def calibration_chart(bins: CalibrationBins) -> dict[str, Any]:
    """Return a bar chart of accuracy by confidence.

    Returns:
      A dict with x_ticks and y_ticks ((position, label) pairs), diagonal (x1, y1, x2, y2), and
      bars, one dict per bin with videos. A bar's rectangle is x, y, width and height; (middle,
      expected) is the position of its mean confidence on the diagonal; low, high, count, accuracy
      and confidence are the numbers of the bin.
    """
    x, y = _make_scale(0, 1, LEFT, RIGHT), _make_scale(0, 1, BOTTOM, TOP)
    bars = []
    for low, high, count, accuracy, confidence in zip(
        bins.edges[:-1], bins.edges[1:], bins.count, bins.accuracy, bins.confidence, strict=True
    ):
        if count:
            bars.append(
                {
                    "x": round(x(low) + 1, 1),
                    "y": round(y(accuracy), 1),
                    "width": round(x(high) - x(low) - 2, 1),
                    "height": round(BOTTOM - y(accuracy), 1),
                    "middle": round(x(confidence), 1),
                    "expected": round(y(confidence), 1),
                    "low": float(low),
                    "high": float(high),
                    "count": int(count),
                    "accuracy": float(accuracy),
                    "confidence": float(confidence),
                }
            )
    quarters = [0, 0.25, 0.5, 0.75, 1]
    return {
        "bars": bars,
        "x_ticks": [(x(tick), format_percent(tick, 0)) for tick in quarters],
        "y_ticks": [(y(tick), format_percent(tick, 0)) for tick in quarters],
        "diagonal": (x(0), y(0), x(1), y(1)),
    }
