"""Keeps finished runs as lines of a file for the repository, without the paths of a machine."""

import json
import os
import re
from pathlib import Path
from typing import Any

from reporting.runs import FILES, PLACES, DamagedError, Run, find_runs, read_runs
from tasks.run.files import atomic_write

POINTS = 200  # of a kept learning curve, at most
PATH = re.compile(r"(?:^|(?<=[=\[,'\" ]))(?:~?/|[A-Za-z]:\\)[^,'\"\]]*")  # not the slash of val/loss


def drop_places(tree: dict[str, Any], root: str, prefix: str = "") -> dict[str, Any]:
    """The configuration without PLACES; other paths become relative to data.root, or are cut to their last name."""

    def shorten(value: Any) -> Any:
        if isinstance(value, str):
            return PATH.sub(lambda path: shorten_path(path[0], root), value)
        if isinstance(value, list):
            return [shorten(item) for item in value]
        return drop_places(value, root, "-") if isinstance(value, dict) else value

    result = {}
    for key, value in tree.items():
        if (name := f"{prefix}{key}") not in PLACES:
            result[key] = drop_places(value, root, f"{name}.") if isinstance(value, dict) else shorten(value)
    return result


def shorten_path(path: str, root: str) -> str:
    return os.path.relpath(path, root) if root and Path(path).is_relative_to(root) else re.split(r"[/\\]", path)[-1]


def pick_evenly(length: int, count: int) -> list[int]:
    """At most `count` of the indices below `length`, with the first and the last."""
    if length <= count:
        return list(range(length))
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})


def thin(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """{column: values} of at most POINTS rows of metrics.csv: the curves, without the row of the test."""
    rows = [row for row in rows if row.get("seconds") not in (None, "")]
    columns = [name for name in (rows[0] if rows else {}) if re.match(r"(step|epoch|seconds)$|(train|val)/", name)]

    def number(text: Any) -> float | None:
        if text in (None, ""):
            return None
        value = float(text)
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")

    return {name: [number(rows[i][name]) for i in pick_evenly(len(rows), POINTS)] for name in columns}


def format_line(run: Run, tops: list[Path]) -> str:
    """The run as a line of JSON: its name relative to the folders `tops`, and the content of its four files."""
    place = run.place
    if place.line:
        return place.text
    folder = place.path.resolve()
    name = folder.name
    for top in tops:
        if folder.is_relative_to(top.resolve()) and folder != top.resolve():
            name = str(folder.relative_to(top.resolve().parent))
    with place.reading("config.yaml"):
        config = place.read("config.yaml")
        root = str(config["data"].get("root") or "")
    origin = dict(run.origin)
    with place.reading("run.json"):
        words = [str(word) for word in origin.get("overrides", [])]
    origin["overrides"] = [
        word for word in words if word.partition("=")[0].lstrip("+~") not in PLACES and not PATH.search(word)
    ]
    with place.reading("metrics.csv"):
        curve = thin(place.read("metrics.csv")) if place.has("metrics.csv") else {}
    contents = (drop_places(config, root), origin, run.record, curve)
    with place.reading("config.yaml"):  # YAML has dates, which JSON cannot hold
        return json.dumps({"run": name} | dict(zip(FILES, contents, strict=True)), ensure_ascii=False)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step, in a new folder if need be; if the disk is full, the old one stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, path.with_name(path.name + ".part")) as file:
        file.write(content)


def keep(runs: list[Run], file: Path, tops: list[Path]) -> list[str]:
    """Replace a file by these runs, one per line; returns messages about it.

    Raises DamagedError if runs of the file would be lost.
    """
    lines, messages = [], []
    for run in runs:
        try:
            lines.append(format_line(run, tops))
        except DamagedError as error:
            messages.append(f"not kept: {error}")
    before = read_runs(find_runs([file]))
    if lost := len({run.identity for run in before.runs} - {run.identity for run in runs}) + len(
        before.left_out["damaged"]
    ):
        raise DamagedError(
            f"--keep {file} has {lost} runs that are not among these and would be lost; name it too, to keep both: "
            f"python scripts/results.py {' '.join(map(str, tops))} {file} --keep {file}"
        )
    replace_file(file, "".join(f"{text}\n" for text in lines).encode())
    return [*messages, f"{file} keeps {len(lines)} runs"]
