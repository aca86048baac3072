"""The page of results: one HTML file without a network, with the papers' rows, curves, ablations, speed and sweeps."""

import contextlib
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from reporting.figures import ablations, belongs, curves, speed, tag
from reporting.paper_rows import NOTES, STATES, Row, cells, orders, published
from reporting.runs import DamagedError, Found, Group, Place
from reporting.table import row

HERE = Path(__file__).parent
SIGNS = {"reached": "✓", "not reached": "✗", "run with substitutes": "≈", "not run": "–"}


def table(head: list[str], body: str, numbers: Iterable[str], label: str) -> str:
    ths = "".join(
        tag("th", escape(name), 'scope="col"' + (' class="number"' if name in numbers else "")) for name in head
    )
    inside = f"<table><thead><tr>{ths}</tr></thead>{body}</table>"
    return tag("div", inside, f'class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"')


def papers(rows: list[Row]) -> str:
    """The papers' rows, a body of the table for each of their tables."""
    head = ["state", "experiment", "data", "metric", "published", "measured", "n", "difference", "substitute", "hours"]
    head += ["hardware", "command"]
    numbers = {"published", "measured", "n", "difference", "hours"}

    def line(known: dict[str, str], attributes: str) -> str:
        tds = []
        for name in head:
            kind = "number" if name in numbers else "wide" if known.get("wide") == name else ""
            tds.append(tag("td", known.get(name, ""), f'class="{kind}"' if kind else ""))
        return tag("tr", "".join(tds), attributes)

    def shown(of: Row, runs: list[Any]) -> dict[str, str]:
        found = {name: escape(text) for name, text in cells(of, runs).items()}
        return found | {"measured": found["mean"] + (f" ± {found['std']}" if found["std"] else "")}

    sources: dict[str, list[str]] = {}
    # The tables of which something was run come first.
    ran = {each.source for each in rows if each.runs or each.others}
    for each in sorted(rows, key=lambda each: each.source not in ran):
        sign = f'<span aria-hidden="true">{SIGNS[each.state]}</span> {each.state}'
        known = {"state": tag("span", sign, f'class="badge {each.state.replace(" ", "-")}"')}
        known |= {"experiment": escape(each.experiment), "data": escape(each.data), "metric": escape(each.metric)}
        known |= {"published": escape(published(each)), "command": tag("code", escape(each.command))}
        known |= {"substitute": escape(each.substitute)}
        known |= shown(each, each.shown) if each.shown else {}
        names = f'{belongs(each.task, each.model)} data-state="{each.state}"'
        lines = sources.setdefault(each.source, [])
        lines.append(line(known, names))
        for differs, runs in each.others.items():
            if differs == each.substitute:
                continue
            other = shown(each, runs) | {"experiment": f"↳ with {escape(differs)}", "wide": "experiment"}
            lines.append(line(other, f'class="other" {names}'))
    bodies = "".join(
        tag(
            "tbody",
            f'<tr><th scope="rowgroup" colspan="{len(head)}">{escape(source)}</th></tr>{"".join(lines)}',
            "data-box",
        )
        for source, lines in sources.items()
    )
    tiles = "".join(
        f'<button type="button" class="tile" aria-pressed="true" data-state="{state}"><b>'
        f"{sum(each.state == state for each in rows)}</b>{SIGNS[state]} {state}</button>"
        for state in STATES
    )
    notes = "".join(tag("p", escape(note)) for note in (*orders(rows), *NOTES))
    group = tag("div", tiles, 'class="tiles" role="group" aria-label="Rows of the papers, by state"')
    return group + table(head, bodies, numbers, "Rows of the papers") + notes


def all_groups(groups: list[Group]) -> str:
    words = ("task", "data", "model", "depth", "ablation", "vectors", "metric")
    numbers = ("mean", "std", "n", "parameters", "s/epoch")
    body = ""
    for group in groups:
        found, first = row(group), group.runs[0]
        tds = "".join(tag("td", escape(found[name])) for name in words)
        tds += "".join(tag("td", escape(found[name]), 'class="number"') for name in numbers)
        tds += tag("td", escape(found["differs"]), 'class="wide"')
        body += tag("tr", tds, belongs(first.names["task"], first.names["model"]))
    head = [*words, *numbers, "differs"]
    return table(head, tag("tbody", body), numbers, "Finished runs, in groups") if body else tag("p", "None.")


def sweeps(found: Found) -> str:
    """Of every folder and file of runs: how many finished, and how the others stand."""
    kinds = ("finished", "failed", "unfinished", "tested in part", "damaged")
    counts: dict[tuple[str, str, str], Counter[str]] = {}

    def count(place: Place, kind: str, task: str, model: str) -> None:
        where = place.path if place.line else place.path.parent
        where = where.resolve().relative_to(Path.cwd()) if where.resolve().is_relative_to(Path.cwd()) else where
        counts.setdefault((str(where), task, model), Counter())[kind] += 1

    for run in found.runs:
        count(run.place, "finished", run.names["task"], run.names["model"])
    for kind, places in zip(kinds[1:], (found.failed, found.unfinished, found.brief, found.damaged), strict=True):
        for place in places:
            task = model = ""
            # A damaged run, and one that failed before it began, belong to no task.
            with contextlib.suppress(DamagedError), place.reading("config.yaml"):
                choices = place.read("config.yaml")["choices"]
                task, model = str(choices["task"]), str(choices["model"])
            count(place, kind, task, model)
    body = "".join(
        tag(
            "tr",
            "".join(tag("td", escape(text)) for text in key)
            + "".join(tag("td", str(by_kind[kind] or ""), 'class="number"') for kind in kinds),
            belongs(key[1], key[2]),
        )
        for key, by_kind in sorted(counts.items())
    )
    said = (
        "A failed run's folder has a failed.json, which says why. Unfinished ones are still training, or go on with "
        "<code>python train.py resume=FOLDER</code>. One tested in part (trainer=debug) is in nothing above."
    )
    head = ["folder or file", "task", "model", *kinds]
    return (table(head, tag("tbody", body), kinds, "Runs by folder") if body else tag("p", "No runs.")) + tag("p", said)


def page(rows: list[Row], groups: list[Group], found: Found, speeds: list[Path]) -> str:
    """The whole page; `speeds` are .json files of scripts/benchmark.py."""
    tasks = sorted({each.task for each in rows} | {group.runs[0].names["task"] for group in groups})
    models = sorted({each.model for each in rows} | {group.runs[0].names["model"] for group in groups})

    def select(name: str, values: list[str]) -> str:
        options = "".join(f'<option value="{escape(value)}">{escape(value)}</option>' for value in values)
        return (
            f'<label>{name.capitalize()}<select name="{name}"><option value="">all</option>{options}</select></label>'
        )

    def radios(name: str, legend: str, values: tuple[str, ...]) -> str:
        inside = "".join(
            f'<label><input type="radio" name="{name}" value="{value}"{"" if i else " checked"}> {value}</label>'
            for i, value in enumerate(values)
        )
        return tag("fieldset", f"<legend>{legend}</legend>{inside}")

    sections = (
        (
            "papers",
            "Beside the papers",
            "Every row of the papers' tables that this repository has an experiment for.",
            papers(rows),
        ),
        (
            "curves",
            "Learning curves",
            "Validation while training; an entry of a legend shows and hides its line.",
            curves(groups),
        ),
        ("ablations", "Without parts (Figure 5)", "The same model whole and with one part removed.", ablations(groups)),
        ("speed", "Speed (Figure 1)", "", speed(groups, speeds)),
        ("groups", "Finished runs", "Runs that differ in seed or fold only are one line.", all_groups(groups)),
        ("sweeps", "Runs by folder", "How the runs of every sweep stand.", sweeps(found)),
    )
    main = "".join(
        tag(
            "section",
            f'<h2 id="{name}-title">{title}</h2>{tag("p", said) if said else ""}{content}',
            f'id="{name}" aria-labelledby="{name}-title"',
        )
        for name, title, said, content in sections
    )
    style, script = (HERE / f"page.{kind}" for kind in ("css", "js"))
    controls = select("task", tasks) + select("model", models)
    controls += radios("axis", "Curves by", ("time", "steps")) + radios("theme", "Look", ("auto", "light", "dark"))
    nav = " · ".join(f'<a href="#{name}">{title}</a>' for name, title, _, _ in sections)
    return f"""<!doctype html>
<html lang="en" data-theme="auto">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>SRU: measured beside published</title>
<style>
{style.read_text(encoding="utf-8")}</style>
</head>
<body data-axis="time">
<header><h1>Simple Recurrent Units: measured beside published</h1>
<p>{len(rows)} rows of the papers, {len(found.runs)} finished runs. {nav}</p></header>
<div class="bar"><form autocomplete="off" aria-label="Filters">{controls}</form></div>
<main>{main}</main>
<footer>Written by scripts/results.py --html; the page holds all that it shows and loads nothing.</footer>
<script>
{script.read_text(encoding="utf-8")}</script>
</body>
</html>
"""
