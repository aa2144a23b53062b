"""Line charts as numbers: ticks, paths, and the values of the read-out. page.html draws them.

Public: `Series`, `Chart`, `line_chart`, `calibration_chart`.

Places are in units of the SVG's viewBox, WIDTH x HEIGHT, from its upper left corner.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker

from dualpath_jax.report.statistics import CalibrationBins

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 374, 10, 186  # of the plot
MOST_POINTS = 1000  # of a line; more are thinned out


@dataclasses.dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
      name: for legend and read-out.
      colour: its number among the page's colours.
      points: (step, value), finite, steps not falling.
      dots: draw the points alone, not a line through them.
    """

    name: str
    colour: int
    points: list[tuple[float, float]]
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart to draw.

    Attributes:
      title, summary: the second for those who do not see it.
      x_ticks, y_ticks: (place, label).
      lines: for each series name, colour, path (SVG) or dots, places (x, y).
      readout: JSON for page.js: the scale, and steps and values of each series.
    """

    title: str
    summary: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    readout: dict[str, Any]


def format_percent(value: float, digits: int = 1) -> str:
    """0.125 -> "12.5%"."""
    return f"{100 * value:.{digits}f}%"


def format_number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def line_chart(
    title: str, series: Sequence[Series], form: Callable[[float], str], whole: bool = False
) -> Chart | None:
    """Values against steps, from zero up.

    Args:
      title: of the chart.
      series: lines; those without points are left out.
      form: `format_percent` or `format_number`, for labels.
      whole: the scale is 0..1.

    Returns:
      None where there is no point.
    """
    series = [line for line in series if line.points]
    if not series:
        return None
    steps, values = np.array([point for line in series for point in line.points]).T
    x = _scale(0.0, steps.max(), LEFT, RIGHT)
    low, high = (0.0, 1.0) if whole else (min(0.0, values.min()), values.max())
    y_ticks = _ticks(low, high)
    y = _scale(y_ticks[0], max(y_ticks[-1], high), BOTTOM, TOP)
    lines, readout = [], []
    for line in series:
        thin = _thinned(line.points)
        places = [(round(x(step), 1), round(y(value), 1)) for step, value in thin]
        dots = places if line.dots or len(places) == 1 else []
        path = "" if dots else "M" + "L".join(f"{px:g} {py:g}" for px, py in places)
        lines.append({"name": line.name, "colour": line.colour, "path": path, "dots": dots})
        readout.append(
            {
                "name": line.name,
                "steps": [step for step, _ in thin],
                "values": [value for _, value in thin],
            }
        )
    x_values = [tick for tick in _ticks(0, steps.max()) if tick <= steps.max()]
    return Chart(
        title=title,
        summary=f"{title}: " + "; ".join(_told(line, form) for line in series),
        x_ticks=[(x(tick), f"{tick:,.0f}") for tick in x_values],
        y_ticks=[(y(tick), _label(tick, form)) for tick in y_ticks],
        lines=lines,
        readout={
            "first": [0.0, LEFT],
            "last": [float(steps.max()), RIGHT],
            "percent": form is format_percent,
            "series": readout,
        },
    )


def _label(value: float, form: Callable[[float], str]) -> str:
    return f"{100 * value:g}%" if form is format_percent else form(value)


def _told(line: Series, form: Callable[[float], str]) -> str:
    (first, begin), (last, end) = line.points[0], line.points[-1]
    return f"{line.name} from {form(begin)} at step {first:,.0f} to {form(end)} at step {last:,.0f}"


def _ticks(low: float, high: float) -> list[float]:
    """Round values that cover low..high."""
    if not high > low:
        high = low + 1.0
    found = ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(value) for value in found]


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = high - low if high > low else 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: of each stretch its lowest and its highest point."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = (pick(stretch, key=lambda point: point[1]) for pick in (min, max))
        kept += sorted({low, high})
    return kept


def calibration_chart(bins: CalibrationBins) -> dict[str, Any]:
    """Bars of accuracy by confidence: places, with the numbers of each bin for its title.

    Returns:
      bars (x, y, width, height, low, high, count, accuracy, confidence and its place), x_ticks,
      y_ticks, diagonal.
    """
    x, y = _scale(0, 1, LEFT, RIGHT), _scale(0, 1, BOTTOM, TOP)
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
