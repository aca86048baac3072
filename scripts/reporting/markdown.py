"""Writes the tables between <!-- results: ... --> and <!-- end --> in README.md and docs/ from kept runs."""

import json
import re
import shlex
from pathlib import Path

from reporting.kept_runs import replace_file
from reporting.runs import IDENTITY, DamagedError, Group, Run, find_runs, group_runs, read_runs
from reporting.table import format_table, mean_and_std

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?P<start>^<!-- results: (?P<words>[^\n]*?) -->\n)(?P<body>.*?)(?P<end>^<!-- end -->$)", re.M | re.S
)
OPENING = re.compile(r"^<!-- results:", re.M)
EXAMPLE = "<!-- results: bench/results/figure5.jsonl rows=model,depth,ablation columns=data -->"


def find_pages() -> list[Path]:
    """The documents that contain such tables."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in paths if OPENING.search(path.read_text(encoding="utf-8"))]


def fill(text: str, root: Path = ROOT) -> str:
    """The text with its tables rewritten; files are named relative to `root`. Raises DamagedError."""
    blocks = list(BLOCK.finditer(text))
    if len(OPENING.findall(text)) != len(blocks):
        raise DamagedError(f"a line like `{EXAMPLE}` lacks its line `<!-- end -->`, or does not close with ` -->`")
    for block in reversed(blocks):
        # Between empty lines, which some renderers need to recognise a table.
        lines = "".join(f"{line}\n" for line in ["", *write_table(block["words"], root), ""])
        text = text[: block.start("body")] + lines + text[block.end("body") :]
    return text


def write_table(words: str, root: Path) -> list[str]:
    """The lines of the table that a marker describes.

    The words of a marker: FILE ... of kept runs; rows=A,B: the columns that identify a row; columns=C: a column for
    each value of C; or without it metric=A,B: a column for each of these, from metrics.json; by default the metric that
    the runs report. cell=mean leaves deviations out; places=: decimal places, one for all metrics or one for each.
    NAME:TITLE in rows= and metric= sets a column's title.

    With paper= the table shows the rows of a paper's table that were run, with the published numbers and their order.
    """
    options = {"rows": "model,depth,ablation", "columns": "", "metric": "", "cell": "", "places": "1", "paper": ""}
    files = []
    try:
        for key, sign, value in (word.partition("=") for word in shlex.split(words)):
            if sign and key not in options:
                raise ValueError(f"no option {key}")
            options |= {key: value} if sign else {}
            files += [] if sign else [root / key]
        if options["cell"] not in ("", "mean"):
            raise ValueError("cell= can be mean only")
        digits = [int(places) for places in options["places"].split(",")]
    except ValueError as error:
        raise DamagedError(f"the table `{words}` cannot be read ({error}); such a line is `{EXAMPLE}`") from error
    for file in files:
        if not file.is_file():
            raise DamagedError(f"no file {file}, which a table names; make it: results.py RUNS --keep {file}")
    found = read_runs(find_runs(files))
    if damaged := found.left_out["damaged"]:
        raise DamagedError(f"{damaged[0]} is damaged; nothing was written")
    if options["paper"]:
        return write_paper_table(found.runs, options["paper"], words)
    groups = group_runs(found.runs)
    if not groups:
        raise DamagedError(f"no run for the table `{words}`; such a line is `{EXAMPLE}`")
    rows, row_titles = split_titles(options["rows"])
    check_names(groups, [*rows, *(options["columns"] and [options["columns"]])])
    cells: dict[tuple[str, ...], dict[str, tuple[Group, str]]] = {}
    for group in groups:
        row = cells.setdefault(tuple(read_column(group, key) for key in rows), {})
        metrics, titles = split_titles(options["metric"] or group.runs[0].names["metric"])
        titles = [read_column(group, options["columns"])] if options["columns"] else titles
        places = digits * len(metrics) if len(digits) == 1 else digits
        if not len(metrics) == len(titles) == len(places):
            raise DamagedError(
                f"the table `{words}` needs one of places= for each metric, and with columns= one metric"
            )
        for title, metric, count in zip(titles, metrics, places, strict=True):
            if title in row:
                names = [f"{each.runs[0].names['data']}: {each.label}" for each in (row[title][0], group)]
                raise DamagedError(
                    f"the table `{words}` has two groups in one cell ({' / '.join(names)}): add to rows="
                )
            row[title] = (group, format_cell(group, metric, count, has_std=options["cell"] != "mean"))
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [[*row_titles, *columns]]
    lines += [[*row, *(here[c][1] if c in here else "" for c in columns)] for row, here in cells.items()]
    numbers = [all(re.fullmatch(r"[\d.,-]*", line[column]) for line in lines[1:]) for column in range(len(rows))]
    return format_table(lines, numbers + [True] * len(columns))


def write_paper_table(runs: list[Run], source: str, words: str) -> list[str]:
    """The lines of a paper's table: a row per experiment, a column per data set; mean, runs and published value."""
    from reporting.paper_rows import compose_rows, format_published, judge_orders, match, summarise

    experiments = sorted({json.loads(run.options.get("choices.experiment", "null")) or "" for run in runs} - {""})
    rows = match([row for name in experiments for row in compose_rows(name) if row.source == source], runs)
    rows = [row for row in rows if row.counted_runs]
    if not rows:
        raise DamagedError(f"no run for the table `{words}`: none is of an experiment of {source}")
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        mean, std = summarise(row.metric, row.counted_runs)
        ours = f"{mean:.{row.digits}f}" + ("" if std is None else f" ± {std:.{row.digits}f}")
        cells.setdefault(row.experiment, {})[row.data] = (
            f"{ours} (n = {len(row.counted_runs)}; {format_published(row)})"
        )
    columns = list(dict.fromkeys(row.data for row in rows))
    lines = [["experiment", *columns]]
    lines += [[name, *(here.get(data, "") for data in columns)] for name, here in cells.items()]
    table = format_table(lines, [False] + [True] * len(columns))
    substitutes = sorted({row.substitute for row in rows} - {""})
    notes = [f"With substitutes: {'; '.join(substitutes)}."] if substitutes else []
    notes = [f"- {note}" for note in [*notes, *judge_orders(rows)]]
    return [*table, "", "In brackets: runs, and the published value.", "", *notes]


def split_titles(words: str) -> tuple[list[str], list[str]]:
    """The names and the titles in `name,name:title`."""
    pairs = [word.partition(":") for word in words.split(",") if word]
    return [name for name, _, _ in pairs], [title or name for name, _, title in pairs]


def check_names(groups: list[Group], names: list[str]) -> None:
    """Refuse names that no run has. An option that only some models have is empty for the others."""
    known = {*IDENTITY, "parameters", *(name for group in groups for name in group.runs[0].options)}
    if unknown := [name for name in names if name not in known]:
        raise DamagedError(
            f"no run has an option {unknown[0]}; there are {', '.join(IDENTITY)}, parameters and the runs' options"
        )


def read_column(group: Group, key: str) -> str:
    """The value of a column of the table of runs, or of an option, for a group."""
    first: Run = group.runs[0]
    if key in IDENTITY:
        return str(first.names[key] or "")
    if key == "parameters":
        return f"{first.encoder_parameters:,}"
    return first.options.get(key, "").strip('"')


def format_cell(group: Group, metric: str, places: int, *, has_std: bool) -> str:
    """The mean and, with several runs, the deviation."""
    values = []
    for run in group.runs:
        found = run.record["metrics"] | run.record
        if not isinstance(value := found.get(metric), int | float):
            numbers = [name for name, value in found.items() if isinstance(value, int | float)]
            raise DamagedError(f"{run.place} has no {metric}; it has {', '.join(numbers)}")
        values.append(float(value))
    mean, std = mean_and_std(values)
    return f"{mean:,.{places}f}" + (f" ± {std:.{places}f}" if has_std and std is not None else "")


def rewrite(path: Path) -> str:
    """Rewrite the file's tables; returns a message."""
    try:
        before = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"--readme {path} is not text ({error.reason}); name a Markdown file") from error
    after = fill(before)
    count = len(BLOCK.findall(after))
    if after == before:
        return f"{path}: {count} tables, unchanged"
    replace_file(path.resolve(), after.encode())  # a symbolic link stays one
    return f"{path}: {count} tables, rewritten"
