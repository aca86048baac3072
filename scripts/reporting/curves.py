"""Learning curves of finished runs: their means, and a PNG of them."""

import io
import textwrap
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

    The default metric is the one that chose the best epoch. A curve is a mean over the runs of a group, at the steps
    after which all of them were validated, so that every point is a mean over the same runs.
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
            panel = (first.names["data"], first.names["task"], metric or first.monitor)
            panels.setdefault(panel, []).append((group, mean))
    return dict(sorted(panels.items())), messages


def shorten_labels(groups: list[Group]) -> list[str]:
    """A label for each group, with only those of its differing options that the labels need to be distinct."""
    has_vectors = len({group.runs[0].names["vectors"] for group in groups}) > 1
    labels = [group.name(has_vectors=has_vectors) for group in groups]
    options = [{text.partition("=")[0]: text for text in group.differs.split(", ") if text} for group in groups]
    keys = dict.fromkeys(key for texts in options for key in texts)
    for key in sorted(keys, key=lambda key: key.startswith(("callbacks.", "choices.", "trainer."))):
        pairs = zip(labels, options, strict=True)
        longer = [f"{label}, {texts[key]}" if key in texts else label for label, texts in pairs]
        if len(set(longer)) > len(set(labels)):
            labels = longer
    return labels


def draw(groups: list[Group], path: Path, metric: str | None = None) -> list[str]:
    """Draw the validation metric over training time, as Figure 3 of SRU (2018): a panel per data set, a line per group.

    With `metric`, train/loss for example, draw it over steps, as Figure 2. Returns messages about the file and about
    curves that cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, messages = average_curves(groups, metric)
    if not panels:
        return [*messages, f"{path} was not drawn: no run has a learning curve"]
    legends = {}
    for panel, lines in panels.items():
        labels = shorten_labels([group for group, _ in lines])
        # The mark † is for test values, which training curves do not show.
        marks = ["" if metric or group.runs[0].tested else " †" for group, _ in lines]
        legends[panel] = [textwrap.fill(label + mark, 64) for label, mark in zip(labels, marks, strict=True)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    longest = max(sum(1 + name.count("\n") for name in names) for names in legends.values())
    figure = Figure(figsize=(6.0 * columns, (4.0 + 0.2 * longest) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    styles = list(dict.fromkeys(group.label for lines in panels.values() for group, _ in lines))
    across, unit = (0, "steps") if metric else (1, "training time (s)")
    for place, (panel, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for (group, mean), name in zip(lines, legends[panel], strict=True):
            # A model looks the same in all panels; dashes distinguish lines beyond the ten colours.
            number = styles.index(group.label)
            dashes = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(mean.T[across], mean.T[2], dashes, label=name, color=f"C{number % 10}", marker=".", markersize=5)
        axes.set(title=panel[0], xlabel=unit, ylabel=panel[2])
        axes.grid(alpha=0.3)
        # Below the axes, where it hides no curve.
        axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    replace_file(path, drawn.getvalue())
    return [*messages, f"{path} was drawn"]
