"""The Plotly charts of the page of results: learning curves, ablations and speed."""

import json
import math
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from reporting.curves import average_curves
from reporting.kept_runs import pick_evenly
from reporting.runs import Group
from reporting.table import mean_and_std

POINTS = 150  # of a curve on the page, at most
# Colours that are legible on white and on black; dashes distinguish further lines.
COLOURS = ["#3b82c4", "#d9730d", "#2a9d74", "#c2559d", "#a68a00", "#8b6fd1", "#d1495b", "#5c8a8a"]
DASHES = ["solid", "dash", "dot", "dashdot"]
# The options that an ablation changes, and the names of groups.
ABLATED = ("model.has_vc_term", "model.has_skip_term", "model.rescale", "ablations.", "choices.")
ABLATIONS = ["", "no_vc", "no_highway", "no_scaling"]
# The model of a contender in a speed benchmark, by the start of its name.
CONTENDERS = {"SRU++": "srupp", "SRU": "sru", "LSTM": "lstm", "GRU": "gru", "QRNN": "qrnn", "Conv": "cnn"}
Bar = tuple[str, float, float | None, int]  # cluster, mean, deviation, number of runs


@dataclass
class Chart:
    """A figure with its caption. Each trace's `meta` holds its task and model, and a curve's steps, for the filters."""

    title: str
    subtitle: str
    figure: go.Figure

    def specification(self) -> dict[str, Any]:
        figure = self.figure.to_plotly_json()
        figure["layout"].pop("template", None)  # the page sets the colours
        return figure


def wrap(text: str, width: int = 36, lines: int = 99) -> str:
    """Text in at most this many lines, with escapes for the HTML tags that Plotly reads."""
    wrapped = textwrap.wrap(text, width, max_lines=lines, placeholder=" …")
    return "<br>".join(escape(line, quote=False) for line in wrapped)


def lay_out(figure: go.Figure, x: str, y: str, *, plot: int, has_legend: bool = True, **options: Any) -> None:
    """Set the titles of both axes, and a height of `plot` pixels for the plot, above the legend."""
    lines = min(14, sum(1 + trace.name.count("<br>") for trace in figure.data)) if has_legend else 0
    axes = {
        key: {"title": {"text": wrap(title, 48)}, "automargin": True} for key, title in (("xaxis", x), ("yaxis", y))
    }
    figure.update_layout(
        axes,
        height=plot + 80 + 20 * lines,
        margin={"l": 48, "r": 12, "t": 24, "b": 56 + 20 * lines},
        showlegend=has_legend,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0}
        | {"entrywidth": 1, "entrywidthmode": "fraction", "font": {"size": 11}},
        hovermode="closest",
        uirevision="kept",  # a zoom stays when a filter changes
        **options,
    )


def select_style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def add_bars(figure: go.Figure, name: str, task: str, model: str, **options: Any) -> None:
    """Add bars that the page's filters know by task and model."""
    i = len(figure.data)
    options = {"uid": f"bars{i}", "marker": {"color": select_style(i)[0]}} | options
    figure.add_bar(name=wrap(name), meta={"task": task, "model": model}, textposition="none", **options)


def draw_curves(groups: list[Group]) -> list[Chart]:
    """A chart per data set, a line per group, over time; `meta` has the steps for the page's switch."""
    panels, messages = average_curves(groups)
    for message in messages:
        print(message, file=sys.stderr)
    labels = list(dict.fromkeys(group.label for lines in panels.values() for group, _ in lines))
    charts = []
    for (data, task, monitor), lines in panels.items():
        figure = go.Figure()
        for i, (group, mean) in enumerate(lines):
            # A model looks the same in all panels, as long as there are enough styles.
            has_styles = len(labels) <= len(COLOURS) * len(DASHES)
            colour, dash = select_style(labels.index(group.label) if has_styles else i)
            points = mean[pick_evenly(len(mean), POINTS)]
            runs = f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"
            figure.add_scatter(
                x=points[:, 1].tolist(),
                y=points[:, 2].tolist(),
                mode="lines+markers" if len(points) < 30 else "lines",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 5},
                name=wrap(f"{group.label} ({runs})"),
                uid=f"line{i}",
                meta={"task": task, "model": group.runs[0].names["model"], "steps": points[:, 0].tolist()},
                hovertemplate="%{fullData.name}: %{y:.5g} at %{x:.4g}<extra></extra>",
            )
        lay_out(figure, "training time (s)", monitor, plot=280, meta={"steps": "steps of the optimiser"})
        charts.append(Chart(data, f"{task}: {monitor}, mean over runs", figure))
    return charts


def draw_ablations(groups: list[Group]) -> list[Chart]:
    """Figure 5: for each data set, the whole model and without parts, in clusters by depth and other options."""
    panels: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Group]]] = {}
    for group in groups:
        first = group.runs[0]
        options = {key: value for key, value in first.options.items() if not key.startswith(ABLATED)}
        names = tuple(first.names[key] for key in ("task", "data", "model", "metric"))
        key = (first.names["depth"], json.dumps(options, sort_keys=True))
        panels.setdefault(names, {}).setdefault(key, []).append(group)
    charts = []
    for (task, data, model, metric), clusters in panels.items():
        bars: dict[str, list[Bar]] = {}
        count = Counter[int]()
        for (depth, _), members in clusters.items():
            if len({group.runs[0].names["ablation"] for group in members}) == 1:
                continue
            count[depth] += 1
            cluster = f"{depth} layers" + (f" ({count[depth]})" if count[depth] > 1 else "")
            for group in members:
                mean, std = mean_and_std([run.value for run in group.runs])
                bars.setdefault(group.runs[0].names["ablation"], []).append((cluster, mean, std, len(group.runs)))
        if bars:
            order = sorted(bars, key=lambda name: ABLATIONS.index(name) if name in ABLATIONS else len(ABLATIONS))
            figure = draw_clusters({name: bars[name] for name in order}, task, model, metric)
            charts.append(Chart(data, f"{task}: {model}, {metric}, ± one standard deviation", figure))
    return charts


def draw_clusters(bars: dict[str, list[Bar]], task: str, model: str, metric: str) -> go.Figure:
    """The bars of each ablation, on an axis that starts below the smallest value."""
    figure = go.Figure()
    for ablation, cluster in bars.items():
        names, means, deviations, _ = zip(*cluster, strict=True)
        add_bars(
            figure,
            ablation or "full",
            task,
            model,
            x=names,
            y=means,
            error_y={"type": "data", "array": [std or 0.0 for std in deviations]},
            text=[format_value(mean, std, count) for _, mean, std, count in cluster],
            hovertemplate="%{x}, %{fullData.name}: %{text}<extra></extra>",
        )
    ends = [m + sign * (s or 0.0) for cluster in bars.values() for _, m, s, _ in cluster for sign in (-1, 1)]
    ends = [end for end in ends if math.isfinite(end)] or [0.0, 1.0]
    low, span = min(ends), (max(ends) - min(ends)) or abs(max(ends)) or 1.0
    start = low - 0.35 * span
    lay_out(figure, "", f"{metric} (the axis starts at {start:.3g})", plot=260)
    figure.update_yaxes(range=[start, max(ends) + 0.1 * span])
    return figure


def format_value(mean: float, std: float | None, count: int) -> str:
    return f"{mean:.4g}" + (f" ± {std:.2g}" if std is not None and math.isfinite(std) else "") + f", n={count}"


def draw_benchmarks(files: list[Path]) -> list[Chart]:
    """Figure 1: one layer's passes, from the files that scripts/benchmark.py --device writes."""
    charts = []
    for file in files:
        try:
            results = json.loads(file.read_bytes())
            device = str(results["machines"][0]["device"])
            charts += [draw_layer(row, device) for row in results["levels"].get("layer", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            print(f"skipped: {file}: {error!r}; it was not written by scripts/benchmark.py", file=sys.stderr)
    return charts


def draw_layer(row: dict[str, Any], device: str) -> Chart:
    """Bars of the forward pass, and of forward and backward, for each contender at one shape."""
    (steps, batch, size), figure = row["shape"], go.Figure()
    for name, passes in row["cells"].items():
        cells = {label: passes.get(kind, {}) for kind, label in (("infer", "forward"), ("train", "and backward"))}
        times = {
            label: cell.get("device", cell["eager"])["median"] * 1e3 for label, cell in cells.items() if "eager" in cell
        }
        if times:
            model = next((known for start, known in CONTENDERS.items() if name.startswith(start)), "other")
            hover = "%{fullData.name}, %{x}: %{y:.3g} ms<extra></extra>"
            add_bars(figure, name, "", model, x=[*times], y=[*times.values()], hovertemplate=hover)
    lay_out(figure, "", "ms", plot=260)
    title = f"One layer: {steps} steps, {batch} sequences, {size} features, {row['mode']}"
    return Chart(title, f"{device}; forward alone, and with backward; lower is faster", figure)


def draw_logged_speed(groups: list[Group]) -> list[Chart]:
    """The speed that whole runs logged: a chart per data set, a bar per group."""
    panels: dict[tuple[str, str, str], list[tuple[Group, list[float]]]] = {}
    for group in groups:
        first = group.runs[0]
        unit = next((name for name in first.record if name.endswith("_per_second")), "")
        speeds = [run.record[unit] for run in group.runs if isinstance(run.record.get(unit), int | float)]
        if speeds:
            panel = (first.names["data"], first.names["task"], unit.removesuffix("_per_second"))
            panels.setdefault(panel, []).append((group, speeds))
    charts = []
    for (data, task, unit), bars in sorted(panels.items(), key=lambda panel: panel[0]):
        figure = go.Figure()
        for i, (group, speeds) in enumerate(bars):
            mean, std = mean_and_std(speeds)
            machines = ", ".join(sorted({str(run.origin.get("machine", "?")) for run in group.runs}))
            add_bars(
                figure,
                group.label,
                task,
                group.runs[0].names["model"],
                x=[mean],
                y=[str(i)],
                orientation="h",
                error_x={"type": "data", "array": [std or 0.0]},
                marker={"color": COLOURS[0]},
                text=[wrap(f"{mean:,.4g} {unit}/s, n={len(speeds)}, on {machines}")],
                hovertemplate="%{fullData.name}: %{text}<extra></extra>",
            )
        lay_out(figure, f"{unit}/s", "", plot=40 + 44 * len(bars), has_legend=False)
        labels = [wrap(group.label, 24, lines=3) for group, _ in bars]
        ticks = {"tickvals": [str(i) for i in range(len(bars))], "ticktext": labels, "tickfont": {"size": 11}}
        figure.update_yaxes(autorange="reversed", type="category", title=None, **ticks)
        charts.append(Chart(data, f"{task}: {unit} per second of training; higher is faster", figure))
    return charts
