"""The page of results: one self-contained HTML file with the papers' rows, curves, ablations and speed."""

from collections import Counter
from html import escape
from pathlib import Path
from string import Template

from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from reporting.figures import Chart, draw_ablations, draw_benchmarks, draw_curves, draw_logged_speed
from reporting.paper_rows import NOTES, STATES, Row, describe_row, judge_orders
from reporting.runs import IDENTITY, REASONS, Found, Group
from reporting.table import NUMBERS, describe_group

SIGNS = {"reached": "✓", "not reached": "✗", "run with substitutes": "≈", "not run": "–"}
NO_ABLATION = """No model was run both whole and without a part. To make such runs:
<code>python train.py -m 'ablation=[],[no_vc],[no_highway],[no_scaling]'</code>"""
LOGGED = """There is no output of scripts/benchmark.py, so these are the speeds that whole runs logged. They include
embedding, softmax and optimiser. Runs on busy or different machines are not comparable.
<code>python scripts/benchmark.py layer --device cpu</code> measures as Figure 1 does."""
UNFINISHED = """Unfinished runs are still training, or continue with
<code>python train.py resume=FOLDER</code>."""
Line = tuple[dict[str, str], dict[str, str]]  # the attributes of a row, and its cells by column


def write_table(label: str, columns: list[str], numbers: set[str], bodies: dict[str, list[Line]]) -> str:
    """A table that scrolls, with a heading for each body that has a name."""
    text = "".join(f'<th scope="col"{" class=number" * (name in numbers)}>{escape(name)}</th>' for name in columns)
    text = f"<thead><tr>{text}</tr></thead>"
    for title, lines in bodies.items():
        text += "<tbody>"
        text += f'<tr><th scope="rowgroup" colspan="{len(columns)}">{escape(title)}</th></tr>' if title else ""
        for attributes, cells in lines:
            text += "".join(["<tr", *(f' {key}="{escape(value)}"' for key, value in attributes.items()), ">"])
            for name in columns:
                kind = "number" if name in numbers else name.split()[0]
                text += f'<td class="{kind}">{escape(cells.get(name, ""))}</td>'
            text += "</tr>"
        text += "</tbody>"
    scroll = f'class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"'
    return f"<div {scroll}><table>{text}</table></div>"


def write_papers(rows: list[Row]) -> str:
    """The papers' rows: one table, with a body for each table of a paper."""
    columns = ["state", "experiment", "data", "metric", "published", "measured", "n", "difference", "substitute"]
    bodies: dict[str, list[Line]] = {}
    # Rows with runs come first.
    for row in sorted(rows, key=lambda row: not (row.runs or row.others)):
        attributes = {"data-task": row.task, "data-model": row.model, "data-state": row.state}
        first, *others = describe_row(row)
        lines = bodies.setdefault(row.source if row.runs or row.others else f"{row.source}: not run", [])
        lines.append((attributes, first | {"state": f"{SIGNS[row.state]} {row.state}"}))
        for cells in others:
            lines.append((attributes | {"class": "other"}, cells | {"experiment": f"↳ with {cells['experiment']}"}))
    numbers = {"published", "measured", "n", "difference", "hours"}
    notes = "".join(f"<p>{escape(note)}</p>" for note in (*judge_orders(rows), *NOTES))
    return write_table("Rows of the papers", [*columns, "hours", "hardware", "command"], numbers, bodies) + notes


def write_groups(groups: list[Group]) -> str:
    columns = [*IDENTITY, *NUMBERS, "differs"]
    lines = []
    for group in groups:
        names = group.runs[0].names
        lines.append(({"data-task": names["task"], "data-model": names["model"]}, describe_group(group)))
    return write_table("Finished runs, in groups", columns, set(NUMBERS), {"": lines}) if lines else "<p>None.</p>"


def write_left_out(found: Found) -> str:
    """The runs that appear in nothing above, and why."""
    lines: list[Line] = []
    for reason, places in found.left_out.items():
        cells = {"state": reason, "why": REASONS[reason]}
        lines += [({"data-task": "", "data-model": ""}, cells | {"run": str(place)}) for place in places]
    return write_table("Runs left out", ["state", "why", "run"], set(), {"": lines}) if lines else "<p>None.</p>"


def write_select(name: str, values: list[str]) -> str:
    options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
    return f'<label>{name.capitalize()} <select name="{name}"><option value="">all</option>{options}</select></label>'


def build_page(rows: list[Row], groups: list[Group], found: Found, speeds: list[Path]) -> str:
    """The page; `speeds` are .json files of scripts/benchmark.py."""
    charts: list[Chart] = []

    def write_charts(drawn: list[Chart], none: str) -> str:
        figures = ""
        for chart in drawn:
            caption = f"{escape(chart.title)}<small>{escape(chart.subtitle)}</small>"
            figures += f'<figure data-chart="{len(charts)}"><figcaption>{caption}</figcaption><div></div></figure>'
            charts.append(chart)
        empty = "Nothing matches the filter." if drawn else none
        return f'<div class="charts">{figures}<p class="empty">{empty}</p></div>'

    benchmarks = draw_benchmarks(speeds)
    sections = {
        "Finished runs": "<p>Runs that differ only in seed or fold share a line.</p>" + write_groups(groups),
        "Compared with the papers": "<p>All rows of the papers' tables for which this repository has an experiment.</p>"
        + write_papers(rows),
        "Learning curves": "<p>Validation during training. Click an entry of a legend to hide or show its line.</p>"
        + write_charts(draw_curves(groups), "No run here has a learning curve."),
        "Without parts (Figure 5)": "<p>The same model whole and with one part removed.</p>"
        + write_charts(draw_ablations(groups), NO_ABLATION),
        "Speed (Figure 1)": f"<p>{'Measured by scripts/benchmark.py.' if benchmarks else LOGGED}</p>"
        + write_charts(benchmarks or draw_logged_speed(groups), "No run has logged its speed."),
        "Runs left out": f"<p>{UNFINISHED}</p>" + write_left_out(found),
    }
    ids = {title: title.split(" (")[0].lower().replace(" ", "-") for title in sections}
    tasks = {row.task for row in rows} | {group.runs[0].names["task"] for group in groups}
    models = {row.model for row in rows} | {group.runs[0].names["model"] for group in groups}
    controls = write_select("task", sorted(tasks)) + write_select("model", sorted(models))
    controls += write_select("state", [*STATES])
    controls += """<span role="radiogroup" aria-label="Curves by">Curves by
<label><input type="radio" name="axis" value="time" checked>time</label>
<label><input type="radio" name="axis" value="steps">steps</label></span>"""
    states = Counter(row.state for row in rows)
    return Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(
        summary=f"{len(rows)} rows of the papers: {', '.join(f'{states[state]} {state}' for state in STATES)}. "
        f"{len(found.runs)} finished runs. " + " · ".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        controls=controls,
        sections="".join(
            f'<section id="{ids[title]}"><h2>{title}</h2>{content}</section>' for title, content in sections.items()
        ),
        plotly=get_plotlyjs(),
        charts=to_json_plotly([chart.specification() for chart in charts]),
    )
