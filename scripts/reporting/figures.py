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
from reporting.runs import Group
from reporting.table import mean_and_std

POINTS = 150  # of a curve on the page
# Colours that can be read on white and on black; then come other dashes.
COLOURS = ["#3b82c4", "#d9730d", "#2a9d74", "#c2559d", "#a68a00", "#8b6fd1", "#d1495b", "#5c8a8a"]
DASHES = ["solid", "dash", "dot", "dashdot"]
# The options that an ablation changes, and the names of groups.
ABLATED = ("model.has_vc_term", "model.has_skip_term", "model.rescale", "ablations.", "choices.")
ABLATIONS = ["", "no_vc", "no_highway", "no_scaling"]
# The model of a contender in a speed benchmark, by the start of its name.
CONTENDERS = {"SRU++": "srupp", "SRU": "sru", "LSTM": "lstm", "GRU": "gru", "QRNN": "qrnn", "Conv": "cnn"}


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


def wrap(text: str, width: int, lines: int = 99) -> str:
    """Text in at most so many lines, for Plotly, which reads a few tags of HTML."""
    wrapped = textwrap.wrap(text, width, max_lines=lines, placeholder=" …")
    return "<br>".join(escape(line, quote=False) for line in wrapped)


def lay_out(x: str, y: str, *, plot: int, legend: list[str] | None = None, **options: Any) -> dict[str, Any]:
    """A layout with titles of both axes and a plot of `plot` pixels, above a legend of these names if there are any."""
    lines = min(14, sum(1 + name.count("<br>") for name in legend or []))
    axes = {
        key: {"title": {"text": wrap(title, 48)}, "automargin": True} for key, title in (("xaxis", x), ("yaxis", y))
    }
    return axes | {
        "height": plot + 80 + 20 * lines,
        "margin": {"l": 48, "r": 12, "t": 24, "b": 56 + 20 * lines},
        "showlegend": bool(legend),
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0}
        | {"entrywidth": 1, "entrywidthmode": "fraction", "font": {"size": 11}},
        "hovermode": "closest",
        "uirevision": "kept",  # a zoom outlives a filter
        **options,
    }


def style_of(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def thin(points: Any) -> Any:
    """At most POINTS of the points, with the first and the last."""
    last = len(points) - 1
    return points[sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)})] if last >= POINTS else points


def draw_curves(groups: list[Group]) -> list[Chart]:
    """A chart for each data set, a line for each group, over time; `meta` has the steps for the page's switch."""
    panels, messages = average_curves(groups)
    for message in messages:
        print(message, file=sys.stderr)
    labels = list(dict.fromkeys(group.label for lines in panels.values() for group, _ in lines))
    charts = []
    for (data, task, monitor), lines in panels.items():
        figure, names = go.Figure(), []
        for i, (group, mean) in enumerate(lines):
            # A model looks the same in all panels, as long as there are enough styles.
            colour, dash = style_of(labels.index(group.label) if len(labels) <= len(COLOURS) * len(DASHES) else i)
            points = thin(mean)
            runs = f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"
            names.append(wrap(f"{group.label} ({runs})", 36))
            figure.add_scatter(
                x=points[:, 1].tolist(),
                y=points[:, 2].tolist(),
                mode="lines+markers" if len(points) < 30 else "lines",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 5},
                name=names[-1],
                uid=f"line{i}",
                meta={"task": task, "model": group.runs[0].names["model"], "steps": points[:, 0].tolist()},
                hovertemplate="%{fullData.name}: %{y:.5g} at %{x:.4g}<extra></extra>",
            )
        figure.update_layout(
            lay_out("training time (s)", monitor, plot=280, legend=names, meta={"steps": "steps of the optimiser"})
        )
        charts.append(Chart(data, f"{task}: {monitor}, mean over runs", figure))
    return charts


def draw_ablations(groups: list[Group]) -> list[Chart]:
    """Figure 5: for each data set, the model whole and without parts, in clusters by depth and other options."""
    alike: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Group]]] = {}
    for group in groups:
        first = group.runs[0]
        options = {key: value for key, value in first.options.items() if not key.startswith(ABLATED)}
        names = tuple(first.names[key] for key in ("task", "data", "model", "metric"))
        key = (first.names["depth"], json.dumps(options, sort_keys=True))
        alike.setdefault(names, {}).setdefault(key, []).append(group)
    charts = []
    for (task, data, model, metric), kinds in alike.items():
        kinds = {key: same for key, same in kinds.items() if len({g.runs[0].names["ablation"] for g in same}) > 1}
        depths, seen = Counter(key[0] for key in kinds), Counter[int]()
        bars: dict[str, list[tuple[str, float, float | None, int]]] = {}
        for (depth, _), members in kinds.items():
            seen[depth] += 1
            cluster = f"{depth} layers" + (f" ({seen[depth]})" if depths[depth] > 1 else "")
            for group in members:
                mean, std = mean_and_std([run.value for run in group.runs])
                bars.setdefault(group.runs[0].names["ablation"], []).append((cluster, mean, std, len(group.runs)))
        if bars:
            order = sorted(bars, key=lambda name: ABLATIONS.index(name) if name in ABLATIONS else len(ABLATIONS))
            subtitle = f"{task}: {model}, {metric}, ± one standard deviation"
            charts.append(Chart(data, subtitle, draw_parts({name: bars[name] for name in order}, task, model, metric)))
    return charts


def draw_parts(
    bars: dict[str, list[tuple[str, float, float | None, int]]], task: str, model: str, metric: str
) -> go.Figure:
    """Bars (cluster, mean, deviation, number of runs) for each ablation, on an axis that starts below the smallest."""
    figure, names = go.Figure(), [wrap(name or "full", 36) for name in bars]
    for i, cluster in enumerate(bars.values()):
        clusters, means, deviations, _ = zip(*cluster, strict=True)
        figure.add_bar(
            x=clusters,
            y=means,
            error_y={"type": "data", "array": [std or 0.0 for std in deviations]},
            marker={"color": style_of(i)[0]},
            name=names[i],
            uid=f"bars{i}",
            meta={"task": task, "model": model},
            text=[format_value(mean, std, count) for _, mean, std, count in cluster],
            textposition="none",
            hovertemplate="%{x}, %{fullData.name}: %{text}<extra></extra>",
        )
    ends = [m + sign * (s or 0.0) for cluster in bars.values() for _, m, s, _ in cluster for sign in (-1, 1)]
    ends = [end for end in ends if math.isfinite(end)] or [0.0, 1.0]
    low, span = min(ends), (max(ends) - min(ends)) or abs(max(ends)) or 1.0
    start = low - 0.35 * span
    figure.update_layout(lay_out("", f"{metric} (the axis starts at {start:.3g})", plot=260, legend=names))
    figure.update_yaxes(range=[start, max(ends) + 0.1 * span])
    return figure


def format_value(mean: float, std: float | None, count: int) -> str:
    return f"{mean:.4g}" + (f" ± {std:.2g}" if std is not None and math.isfinite(std) else "") + f", n={count}"


def draw_benchmarks(files: list[Path]) -> list[Chart]:
    """Figure 1: one layer's passes, from the files that scripts/benchmark.py --device writes."""
    charts = []
    for file in files:
        try:
            found = json.loads(file.read_bytes())
            device = str(found["machines"][0]["device"])
            charts += [draw_layer(each, device) for each in found["levels"].get("layer", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            print(f"skipped: {file}: {error!r} is not what scripts/benchmark.py writes", file=sys.stderr)
    return charts


def draw_layer(row: dict[str, Any], device: str) -> Chart:
    """Bars of the forward pass, and of forward and backward, for each contender at one shape."""
    (steps, batch, size), figure, names = row["shape"], go.Figure(), []
    for i, (name, passes) in enumerate(row["cells"].items()):
        cells = {label: passes.get(kind, {}) for kind, label in (("infer", "forward"), ("train", "and backward"))}
        times = {
            label: cell.get("device", cell["eager"])["median"] * 1e3 for label, cell in cells.items() if "eager" in cell
        }
        if times:
            names.append(wrap(name, 36))
            model = next((known for start, known in CONTENDERS.items() if name.startswith(start)), "other")
            figure.add_bar(
                x=[*times],
                y=[*times.values()],
                name=names[-1],
                uid=f"bars{i}",
                marker={"color": style_of(i)[0]},
                meta={"task": "", "model": model},
                hovertemplate="%{fullData.name}, %{x}: %{y:.3g} ms<extra></extra>",
            )
    figure.update_layout(lay_out("", "ms", plot=260, legend=names))
    title = f"One layer: {steps} steps, {batch} sequences, {size} features, {row['mode']}"
    return Chart(title, f"{device}; forward alone, and with backward; less is faster", figure)


def draw_logged_speed(groups: list[Group]) -> list[Chart]:
    """The speed that whole runs logged: a chart for each data set, a bar for each group."""
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
            figure.add_bar(
                x=[mean],
                y=[str(i)],
                orientation="h",
                name=wrap(group.label, 36),
                error_x={"type": "data", "array": [std or 0.0]},
                marker={"color": COLOURS[0]},
                meta={"task": task, "model": group.runs[0].names["model"]},
                text=[wrap(f"{mean:,.4g} {unit}/s, n={len(speeds)}, on {machines}", 36)],
                textposition="none",
                hovertemplate="%{fullData.name}: %{text}<extra></extra>",
            )
        figure.update_layout(lay_out(f"{unit}/s", "", plot=40 + 44 * len(bars)))
        labels = [wrap(group.label, 24, lines=3) for group, _ in bars]
        ticks = {"tickvals": [str(i) for i in range(len(bars))], "ticktext": labels, "tickfont": {"size": 11}}
        figure.update_yaxes(autorange="reversed", type="category", title=None, **ticks)
        charts.append(Chart(data, f"{task}: {unit} a second of training; more is faster", figure))
    return charts
