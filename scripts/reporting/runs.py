"""Reads finished runs, from their folders or a file of kept runs, and groups the runs of one experiment."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# Paths and outputs of a run; kept runs do not contain these.
PLACES = {
    *("run_dir", "resume", "data.root", "data.cache", "loggers", "trainer.callbacks", "trainer.logger"),
    *("callbacks.best.dirpath", "callbacks.average.dirpath", "callbacks.last.dirpath", "trainer.default_root_dir"),
    "callbacks.interruption",  # does not change the result
}
# Options that may differ between runs of one experiment: seeds, paths and the display.
NOT_THE_EXPERIMENT = PLACES | {
    *("seed", "data.seed", "data.fold", "paper", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
}
IDENTITY = ("task", "data", "model", "depth", "ablation", "vectors", "metric")
FILES = ("config.yaml", "run.json", "metrics.json", "metrics.csv")
LoadYAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Why a run is not in the table.
REASONS = {
    "unfinished": "no metrics.json",
    "failed": "failed.json says why",
    "tested in part": "on a few batches only, trainer=debug",
    "damaged": "a file cannot be read",
}


class DamagedError(Exception):
    """A file of a run folder, or a line of a file of kept runs, is malformed; the message names it."""


@dataclass(frozen=True)
class Place:
    """The place of a run: a folder, or a line (from 1) of a .jsonl file with its text."""

    path: Path
    line: int = 0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn any error of a damaged file into one that names the file."""
        where = f"{self}, {name}" if self.line else self.path / name
        try:
            yield
        except KeyError as error:
            raise DamagedError(f"{where}: no {error} in it") from error
        except Exception as error:  # malformed content raises many types
            raise DamagedError(f"{where}: {' '.join(str(error).split())}") from error

    def has(self, name: str) -> bool:
        return bool(self.line) or (self.path / name).exists()

    def read(self, name: str) -> Any:
        """The content of one of FILES; metrics.csv is a list of rows. Call it within `reading`."""
        from tasks.run.run_dir import rename_moved  # results.py makes tasks/ importable

        if self.line:
            content = json.loads(rename_moved(self.text))[name]
            if name != "metrics.csv":
                return content
            return [dict(zip(content, cells, strict=True)) for cells in zip(*content.values(), strict=True)]
        text = (self.path / name).read_text(encoding="utf-8-sig")
        if name == "metrics.csv":
            return list(csv.DictReader(text.splitlines()))
        return yaml.load(rename_moved(text), LoadYAML) if name == "config.yaml" else json.loads(text)


@dataclass(frozen=True)
class Run:
    """One finished run.

    `options` is the experiment as {dotted key: JSON}. `value` is the metric in `names`; `tested` is False if it is a
    validation value for lack of the metric asked for. `chance` is the seeds and the fold, `record` is metrics.json,
    `origin` is run.json.
    """

    place: Place
    names: dict[str, Any]  # the columns of IDENTITY
    options: dict[str, str]
    monitor: str
    chance: str
    value: float
    tested: bool
    published: float | None
    verified: bool
    source: str
    encoder_parameters: int
    seconds_per_epoch: float
    record: dict[str, Any]
    origin: dict[str, Any]

    @property
    def identity(self) -> str:
        """Equal for a run and its copies."""
        return json.dumps([self.chance, self.record], sort_keys=True)


@dataclass
class Group:
    """The runs of one experiment; `differs` has the options in which it differs from groups with the same names."""

    runs: list[Run]
    differs: str = ""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, [self.name(), self.differs, "" if self.runs[0].tested else "†"]))

    def name(self, *, has_vectors: bool = True) -> str:
        """Its model, depth, ablations and vectors."""
        names = self.runs[0].names
        depth = f"{names['depth']} layers" if names["depth"] else ""
        return ", ".join(filter(None, [names["model"], depth, names["ablation"], names["vectors"] * has_vectors]))


@dataclass
class Found:
    """The runs in folders and files; `left_out` has the places of others, by the keys of REASONS."""

    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, list[Place]] = field(default_factory=lambda: {reason: [] for reason in REASONS})


def find_runs(paths: list[Path]) -> list[Place]:
    """Every run folder at or below the given ones, each once, then every line of the given .jsonl files.

    A run folder has a config.yaml, or a failed.json; the folders of Hydra and wandb are not runs.
    """
    found = {}
    for top in paths:
        for folder, below, files in os.walk(top):
            is_run = "config.yaml" in files or "failed.json" in files
            if is_run:
                found[Path(folder).resolve()] = Place(Path(folder))
            below[:] = sorted(name for name in below if not name.startswith(".") and not (is_run and name == "wandb"))
    kept = []
    for file in {path.resolve(): path for path in paths if path.is_file()}.values():
        # splitlines() would also split at characters that may occur in a JSON text.
        lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        kept += [Place(file, number, text) for number, text in enumerate(lines, start=1) if text.strip()]
    return [*found.values(), *kept]


def read_runs(places: list[Place]) -> Found:
    """Read every run, and name the damaged ones on standard error.

    A kept run is skipped if its folder, or a copy of it, was read before.
    """
    found, seen = Found(), set()
    for place in places:
        try:
            if not place.has("metrics.json"):
                found.left_out["failed" if place.has("failed.json") else "unfinished"].append(place)
                continue
            run = read_run(place)
            if place.line and run.identity in seen:
                continue
            seen.add(run.identity)
            if run.options.get("trainer.limit_test_batches", "null") == "null":
                found.runs.append(run)
            else:
                found.left_out["tested in part"].append(place)
        except DamagedError as error:
            found.left_out["damaged"].append(place)
            print(f"skipped: {error}", file=sys.stderr)
    return found


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted key: value as JSON} for the options that define the experiment."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in NOT_THE_EXPERIMENT:
            continue
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = json.dumps(value, default=str, ensure_ascii=False)
    return flat


def read_run(place: Place) -> Run:
    """Read a finished run; raises DamagedError."""
    with place.reading("config.yaml"):
        config = place.read("config.yaml")
        choices, data, paper = config["choices"], config["data"], config.get("paper") or {}
        # The order of ablations makes no difference.
        choices["ablation"] = sorted(choices.get("ablation") or [])
        published = paper.get("value")
        if isinstance(published, dict):
            published = published.get(choices["data"])
        published = None if published is None else float(published)
        names: dict[str, Any] = {key: str(choices[key]) for key in ("task", "data", "model")}
        # 0 for a model without layers to count, such as the CNN.
        layers = int(config["depth"]) if "num_layers" in config["model"] else 0
        names |= {"depth": layers, "ablation": " ".join(choices["ablation"])}
        names["vectors"] = str(data["vectors"] or "random") if "vectors" in data else ""
        options = flatten(config)
        chance = json.dumps([config["seed"], data.get("seed"), data.get("fold")], default=str)
    with place.reading("run.json"):
        origin = dict(place.read("run.json")) if place.has("run.json") else {}
    with place.reading("metrics.json"):
        record = place.read("metrics.json")
        metrics, monitor = record["metrics"], record["monitor"]
        # Tasks that monitor their loss are reported by a more meaningful metric.
        follows = next((name for name in ("test/bleu", "test/bpc", "test/perplexity") if name in metrics), None)
        wanted = paper.get("metric") or follows or "test/" + monitor.partition("/")[2]
        rows = place.read("metrics.csv") if wanted.startswith("train/") and place.has("metrics.csv") else []
        if wanted not in metrics and (losses := [row[wanted] for row in rows if row.get(wanted) not in (None, "")]):
            metrics[wanted] = float(losses[-1])  # at the end of training
        validated = "val/" + wanted.partition("/")[2]
        metric = next((name for name in (wanted, validated, monitor) if name in metrics), None)
        if metric is None:
            raise KeyError(wanted)
        if type(metrics[metric]) not in (int, float):
            raise TypeError(f"{metric} is {metrics[metric]!r:.40}, not a number")
        return Run(
            place=place,
            names=names | {"metric": metric},
            # The monitor chose the epoch, so it is part of the experiment; old runs name it only in metrics.json.
            options=options | ({} if "callbacks.best.monitor" in options else {"monitor": monitor}),
            monitor=monitor,
            chance=chance,
            value=float(metrics[metric]),
            tested=metric == wanted,
            published=published,
            verified=bool(paper.get("verified", True)),
            source=str(paper.get("source") or "").rstrip("."),
            encoder_parameters=int(record["encoder_parameters"]),
            seconds_per_epoch=float(record["seconds_per_epoch"]),
            record=record,
            origin=origin,
        )


def group_runs(runs: list[Run]) -> list[Group]:
    """Group runs that differ only in seed or fold, in the order of the table."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        key = [run.options, run.names["metric"]]
        same.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    groups = [Group(members) for members in same.values()]
    same_names: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        same_names.setdefault(tuple(group.runs[0].names[key] for key in IDENTITY), []).append(group)
    for members in same_names.values():
        set_differences(members)
    return [
        group for names in sorted(same_names) for group in sorted(same_names[names], key=lambda group: group.differs)
    ]


def set_differences(groups: list[Group]) -> None:
    """Set `differs` to the options whose values are not the same in all of these groups."""
    options = [group.runs[0].options for group in groups]
    values = {key: tuple(each.get(key) for each in options) for option in options for key in option}
    values = {key: column for key, column in values.items() if len(set(column)) > 1}
    # `width` sets model.hidden_size by interpolation: name it once.
    sources = {column for key, column in values.items() if "." not in key}
    keys = [key for key, column in values.items() if "." not in key or column not in sources]
    for group, each in zip(groups, options, strict=True):
        group.differs = ", ".join(f"{key}={each[key].strip(chr(34))}" for key in keys if key in each)
