"""The figures of the page of results: learning curves, the model without parts, and speed."""

import json
import math
import sys
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from reporting.charts import COLOURS, Bar, Mark, bar_chart, line_chart
from reporting.curves import mean_curves
from reporting.runs import Group
from reporting.table import mean_and_std

POINTS = 150  # of a curve on the page
# What an ablation changes, and the names of parts.
ABLATED = ("model.has_vc_term", "model.has_skip_term", "model.rescale", "ablations.", "choices.")
# The models that a speed benchmark's contenders are, by how their names begin.
CONTENDERS = {"SRU++": "srupp", "SRU": "sru", "LSTM": "lstm", "GRU": "gru", "QRNN": "qrnn", "Conv": "cnn"}
NOTHING = "Nothing here fits the filter."


def belongs(task: str, model: str) -> str:
    return f'data-task="{escape(task)}" data-model="{escape(model)}"'


def tag(name: str, content: str, attributes: str = "") -> str:
    return f"<{name}{' ' if attributes else ''}{attributes}>{content}</{name}>"


def curves(groups: list[Group]) -> str:
    """A figure for each data set, with a chart by time and one by steps, and a legend whose entries toggle lines."""
    panels, messages = mean_curves(groups)
    for message in messages:
        print(message, file=sys.stderr)
    labels = list(dict.fromkeys(group.label for lines in panels.values() for group, _ in lines))
    figures = []
    for (data, task, monitor), lines in panels.items():
        charts: dict[str, list[Any]] = {"time": [], "steps": []}
        legend = []
        for i, (group, mean) in enumerate(lines):
            # A model looks alike in all panels, as long as there are enough colours.
            style = labels.index(group.label) if len(labels) <= COLOURS else i
            mark = Mark(group.label, task, group.runs[0].names["model"], style, str(i))
            last = len(mean) - 1
            points = mean[sorted({round(j * last / (POINTS - 1)) for j in range(POINTS)})] if last >= POINTS else mean
            charts["time"].append((mark, [(x, y) for _, x, y in points]))
            charts["steps"].append((mark, [(x, y) for x, _, y in points]))
            sample = (
                f'<svg {mark.attributes} viewBox="0 0 30 8" aria-hidden="true"><path class="line" d="M1 4H29"/></svg>'
            )
            runs = f"{len(group.runs)} runs" if len(group.runs) > 1 else "1 run"
            button = f'<button type="button" aria-pressed="true" data-toggles="{i}">{sample}<span>'
            button += f"{escape(group.label)} ({runs})</span></button>"
            legend.append(tag("li", button, belongs(task, mark.model)))
        caption = f"{escape(data)}<small>{escape(task)}: {escape(monitor)}, mean over runs</small>"
        drawn = [
            line_chart(f"{monitor} on {data} by {kind}", label, monitor, charts[kind], f"by-{kind}")
            for kind, label in (("time", "training time (s)"), ("steps", "steps of the optimiser"))
        ]
        inside = tag("figcaption", caption) + "".join(drawn) + tag("ul", "".join(legend), 'class="legend"')
        figures.append(tag("figure", inside, "data-box"))
    return panelled(figures, "No run here has a learning curve.")


def panelled(figures: list[str], none: str) -> str:
    hidden = " hidden" if figures else ""
    return (
        tag("div", "".join(figures), 'class="panels"')
        + f'<p class="empty"{hidden}>{none if not figures else NOTHING}</p>'
    )


def ablations(groups: list[Group]) -> str:
    """Figure 5: for each data set, the model whole and without parts, in clusters by depth and what else differs."""
    alike: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Group]]] = {}
    for group in groups:
        first = group.runs[0]
        options = {key: value for key, value in first.options.items() if not key.startswith(ABLATED)}
        names = tuple(first.names[key] for key in ("task", "data", "model", "metric"))
        key = (first.names["depth"], json.dumps(options, sort_keys=True))
        alike.setdefault(names, {}).setdefault(key, []).append(group)
    order = ["", "no_vc", "no_highway", "no_scaling"]
    figures = []
    for (task, data, model, metric), kinds in alike.items():
        kinds = {
            key: members for key, members in kinds.items() if len({m.runs[0].names["ablation"] for m in members}) > 1
        }
        depths = Counter(key[0] for key in kinds)
        clusters: list[tuple[str, list[Bar]]] = []
        for (depth, _), members in kinds.items():
            seen = Counter(heading for heading, _ in clusters)
            number = f" ({sum(h.startswith(f'{depth} layers') for h in seen) + 1})" if depths[depth] > 1 else ""
            bars = []
            for group in members:
                name = group.runs[0].names["ablation"]
                style = order.index(name) if name in order else len(order)
                bars.append((style, bar_of(group, Mark(name or "full", task, model, style))))
            clusters.append((f"{depth} layers{number}", [bar for _, bar in sorted(bars, key=lambda pair: pair[0])]))
        if clusters:
            chart = bar_chart(f"{metric} on {data} without parts", metric, clusters, from_zero=False)
            caption = f"{escape(data)}<small>{escape(task)}: {escape(model)}, {escape(metric)}, ± one deviation</small>"
            figures.append(tag("figure", tag("figcaption", caption) + chart, "data-box"))
    return panelled(
        figures,
        "No model was run both whole and without a part. Make such runs: "
        "<code>python train.py -m 'ablation=[],[no_vc],[no_highway],[no_scaling]'</code>",
    )


def bar_of(group: Group, mark: Mark) -> Bar:
    mean, std = mean_and_std([run.value for run in group.runs])
    text = f"{mean:.4g}" + (f" ± {std:.2g}" if std is not None and math.isfinite(std) else "")
    return Bar(mark, mean, std if std is not None and math.isfinite(std) else None, text, f", n={len(group.runs)}")


def measured_speed(files: list[Path]) -> list[str]:
    """Figure 1: one layer's passes, from what scripts/benchmark.py --device wrote."""
    figures = []
    for file in files:
        try:
            found = json.loads(file.read_bytes())
            device = str(found["machines"][0]["device"])
            for each in found["levels"].get("layer", []):
                steps, batch, size = each["shape"]
                clusters = []
                for name, passes in each["cells"].items():
                    model = next((known for start, known in CONTENDERS.items() if name.startswith(start)), "other")
                    bars = []
                    for style, kind, label in ((0, "infer", "forward"), (1, "train", "and backward")):
                        cell = passes.get(kind, {})
                        if "eager" in cell:
                            ms = cell.get("device", cell["eager"])["median"] * 1e3
                            bars.append(Bar(Mark(label, "", model, style), ms, None, f"{ms:.3g}"))
                    if bars:
                        clusters.append((name, bars))
                title = f"One layer: {steps} steps, {batch} sequences, {size} features, {each['mode']}"
                chart = bar_chart(title, "ms", clusters, from_zero=True)
                caption = (
                    f"{escape(title)}<small>{escape(device)}; forward alone, and with backward; less is faster</small>"
                )
                figures.append(tag("figure", tag("figcaption", caption) + chart, "data-box"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            print(f"skipped: {file}: {error!r} is not what scripts/benchmark.py writes", file=sys.stderr)
    return figures


def speed(groups: list[Group], files: list[Path]) -> str:
    figures = measured_speed(files)
    if figures:
        return tag("p", "Measured by scripts/benchmark.py.") + panelled(figures, "")
    panels: dict[tuple[str, str, str], list[Bar]] = {}
    for group in groups:
        first = group.runs[0]
        unit = next((name for name in first.record if name.endswith("_per_second")), "")
        speeds = [run.record[unit] for run in group.runs if isinstance(run.record.get(unit), int | float)]
        if speeds:
            mean, std = mean_and_std(speeds)
            machines = sorted({str(run.origin.get("machine", "?")) for run in group.runs})
            mark = Mark(group.label, first.names["task"], first.names["model"], 0)
            about = f", n={len(speeds)}, on {', '.join(machines)}"
            panel = (first.names["data"], first.names["task"], unit.removesuffix("_per_second"))
            panels.setdefault(panel, []).append(Bar(mark, mean, std, number_text(mean), about))
    for (data, task, unit), bars in sorted(panels.items()):
        chart = bar_chart(f"{unit} a second on {data}", f"{unit}/s", [("", bars)], from_zero=True)
        caption = f"{escape(data)}<small>{escape(task)}: {escape(unit)} a second of training; more is faster</small>"
        figures.append(tag("figure", tag("figcaption", caption) + chart, "data-box"))
    said = (
        "There is no output of scripts/benchmark.py, so these are the speeds that whole runs logged: embedding, "
        "softmax and optimiser are in them, and runs beside other work, or on other machines, do not compare. "
        "Figure 1's kind is made by <code>python scripts/benchmark.py layer --device cpu</code>."
    )
    return tag("p", said) + panelled(figures, "No run has logged its speed.")


def number_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
