"""Learning curves of finished runs: their means, and a PNG of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from reporting.kept_runs import replace_file
from reporting.runs import DamagedError, Group, Run

Panel = tuple[str, str, str]  # data, task, metric


def read_curve(run: Run, metric: str) -> dict[int, tuple[float, float]]:
    """{step: (seconds of training so far, metric)}; raises DamagedError."""
    with run.place.reading("metrics.csv"):
        points = {
            int(row["step"]): (float(row["seconds"]), float(row[metric]))
            for row in run.place.read("metrics.csv")
            if row.get("seconds") not in (None, "") and row[metric] not in (None, "")
        }
        if not points:
            raise ValueError(f"no row has both seconds and {metric}")
        return points


def average_curves(
    groups: list[Group], metric: str | None = None
) -> tuple[dict[Panel, list[tuple[Group, Any]]], list[str]]:
    """The curves of each panel, as arrays of (step, seconds, metric), and messages about unreadable ones.

    The default metric is the one that chose the best epoch.

    A curve is the mean of seconds and metric over a group's runs, at the steps after which all of them have validated,
    so that every point is a mean over the same runs.
    """
    messages: list[str] = []
    panels: dict[Panel, list[tuple[Group, Any]]] = {}
    for group in groups:
        first, curves = group.runs[0], []
        for run in group.runs:
            try:
                curves.append(read_curve(run, metric or run.monitor))
            except DamagedError as error:
                messages.append(f"no curve: {error}")
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if steps:
            mean = np.mean([[(step, *curve[step]) for step in steps] for curve in curves], axis=0)
            panels.setdefault((first.names["data"], first.names["task"], metric or first.monitor), []).append(
                (group, mean)
            )
    return dict(sorted(panels.items())), messages


def draw(groups: list[Group], path: Path, metric: str | None = None) -> list[str]:
    """Draw the validation metric over training time, as Figure 3 of SRU (2018): a panel a data set, a line a group.

    With `metric`, train/loss for example, draw that over steps, as Figure 2. Returns messages about the file and about
    curves that cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, messages = average_curves(groups, metric)
    if not panels:
        return [*messages, f"{path} was not drawn: no run has a learning curve"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(group.label for lines in panels.values() for group, _ in lines))
    across, unit = (0, "steps") if metric else (1, "training time (s)")
    for place, ((data, _, shown), lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for group, mean in lines:
            # A model looks the same in all panels; after ten colours come other dashes.
            number = labels.index(group.label)
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            name = (
                group.label.removesuffix(", †") if metric else group.label
            )  # the mark belongs to the value, not to the curve
            color = f"C{number % 10}"
            axes.plot(mean.T[across], mean.T[2], style, label=name, color=color, marker=".", markersize=5)
        axes.set(title=data, xlabel=unit, ylabel=shown)
        axes.grid(alpha=0.3)
        # Below the axes, where a long legend hides no curves.
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    replace_file(path, drawn.getvalue())
    return [*messages, f"{path} was drawn"]
