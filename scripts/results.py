"""Tabulate finished runs beside the published numbers: `python scripts/results.py runs/ --png curves.png`."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# What may differ between two runs of one experiment: chance, places, and what a person sees of the run.
NOT_THE_EXPERIMENT = {
    "seed",
    "data.seed",
    "data.fold",
    "run_dir",
    "resume",
    "data.root",
    "data.cache",
    "callbacks",
    "loggers",
    "paper",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
}
IDENTITY = ("task", "data", "model", "depth", "ablation", "vectors", "metric")
LoadYAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DamagedError(Exception):
    """A file of a run folder does not hold what it should; the message names it."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    `options` is the experiment as {dotted key: JSON}. `metric` is the name of `value`, `tested` whether it is the one
    asked for rather than the validation's; `chance` is the run's seeds and fold.
    """

    folder: Path
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


@dataclass
class Group:
    """The runs of one experiment, with what tells it from groups of the same names ("" if nothing need)."""

    runs: list[Run]
    differs: str = ""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file causes into one error that names the file."""
    try:
        yield
    except KeyError as error:
        raise DamagedError(f"{path}: no {error} in it") from error
    except (OSError, ValueError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        raise DamagedError(f"{path}: {' '.join(str(error).split())}") from error


def find_runs(folders: list[Path]) -> list[Path]:
    """Every folder with a config.yaml at or below the given ones, each once; what Hydra and wandb keep is no run."""
    found = {}
    for top in folders:
        for folder, below, files in os.walk(top):
            is_run = "config.yaml" in files
            if is_run:
                found[Path(folder).resolve()] = Path(folder)
            below[:] = sorted(name for name in below if not name.startswith(".") and not (is_run and name == "wandb"))
    return list(found.values())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted key: value as JSON}, without what is no part of the experiment."""
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


def read_run(folder: Path) -> Run:
    """Read a finished run; raises DamagedError."""
    path = folder / "config.yaml"
    with reading(path):
        config = yaml.load(path.read_text(encoding="utf-8"), LoadYAML)
        if not isinstance(config, dict):
            raise ValueError(f"a mapping is wanted, this is {config!r:.40}")
        choices, data, paper = config["choices"], config["data"], config.get("paper") or {}
        # The order in which ablations were named is no difference.
        choices["ablation"] = sorted(choices.get("ablation") or [])
        published = paper.get("value")
        if isinstance(published, dict):
            published = published.get(choices["data"])
        published = None if published is None else float(published)
        names: dict[str, Any] = {key: str(choices[key]) for key in ("task", "data", "model")}
        # 0: a model like the CNN, which has no depth to choose.
        layers = int(config["depth"]) if "num_layers" in config["model"] else 0
        names |= {"depth": layers, "ablation": " ".join(choices["ablation"])}
        names["vectors"] = str(data["vectors"] or "random") if "vectors" in data else ""
        options = flatten(config)
        chance = json.dumps([config["seed"], data.get("seed"), data.get("fold")], default=str)
    path = folder / "metrics.json"
    with reading(path):
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics, monitor = record["metrics"], record["monitor"]
        # What is chosen by its loss is reported by what says more.
        follows = next((name for name in ("test/bleu", "test/bpc", "test/perplexity") if name in metrics), None)
        wanted = paper.get("metric") or follows or "test/" + monitor.partition("/")[2]
        validated = "val/" + wanted.partition("/")[2]
        metric = next((name for name in (wanted, validated, monitor) if name in metrics), None)
        if metric is None:
            raise KeyError(wanted)
        # The monitor chose the epoch, so it is part of the experiment; the callback that held it was left out.
        return Run(
            folder=folder,
            names=names | {"metric": metric},
            options=options | {"monitor": monitor},
            monitor=monitor,
            chance=chance,
            value=float(metrics[metric]),
            tested=metric == wanted,
            published=published,
            verified=paper.get("verified", True),
            source=str(paper.get("source") or "").rstrip("."),
            encoder_parameters=int(record["encoder_parameters"]),
            seconds_per_epoch=float(record["seconds_per_epoch"]),
        )


def group_runs(runs: list[Run]) -> list[Group]:
    """Put runs together that differ in seed or fold only, in the order of the table."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        key = [run.options, run.names["metric"], run.published, run.verified]
        same.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    groups = [Group(members) for members in same.values()]
    alike: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        alike.setdefault(tuple(group.runs[0].names[key] for key in IDENTITY), []).append(group)
    for rivals in alike.values():
        tell_apart(rivals)
    return [group for identity in sorted(alike) for group in sorted(alike[identity], key=lambda group: group.differs)]


def tell_apart(groups: list[Group]) -> None:
    """Name in each group the options whose values are not the same in all of them."""
    options = [group.runs[0].options for group in groups]
    values = {key: tuple(each.get(key) for each in options) for option in options for key in option}
    values = {key: column for key, column in values.items() if len(set(column)) > 1}
    # `width` reaches model.hidden_size by interpolation: naming it once is enough.
    sources = {column for key, column in values.items() if "." not in key}
    keys = [key for key, column in values.items() if "." not in key or column not in sources]
    for group, each in zip(groups, options, strict=True):
        group.differs = ", ".join(f"{key}={each[key].strip(chr(34))}" for key in keys if key in each)


def row(group: Group) -> dict[str, str]:
    """The cells of one line of the table."""
    run = group.runs[0]
    values = np.array([run.value for run in group.runs])
    with np.errstate(invalid="ignore"):  # a run that diverged may have left an infinite loss
        mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else None
    places = 2 if abs(mean) >= 10 else 3
    cells = {key: str(run.names[key] or "") for key in IDENTITY}
    cells["metric"] += "" if run.tested else " †"
    cells["mean"] = f"{mean:.{places}f}"
    cells["std"] = "" if std is None else f"{std:.{places}f}"
    cells["n"] = str(len(values))
    cells["parameters"] = " / ".join(f"{n:,}" for n in sorted({run.encoder_parameters for run in group.runs}))
    cells["s/epoch"] = f"{np.mean([run.seconds_per_epoch for run in group.runs]):.2f}"
    if run.published is not None:
        cells["published"] = f"{run.published:g}" + ("" if run.verified else "?")
        cells["difference"] = f"{mean - run.published:+z.{places}f}" if run.tested else ""
    cells["differs"] = group.differs
    return cells


def table(groups: list[Group]) -> str:
    """The Markdown table, a line a group, and the explanation of its marks."""
    rows = [row(group) for group in groups]
    columns = [*IDENTITY, "mean", "std", "n", "parameters", "s/epoch"]
    columns += [key for key in ("published", "difference", "differs") if any(cells.get(key) for cells in rows)]
    words = (*IDENTITY, "differs")
    lines = [columns, ["---" if key in words and key != "depth" else "---:" for key in columns]]
    lines += [[cells.get(key, "") for key in columns] for cells in rows]
    text = ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in line) + " |" for line in lines]
    runs = [run for group in groups for run in group.runs]
    accuracy = "Accuracy is in per cent; " if any("accuracy" in run.names["metric"] for run in runs) else ""
    text += ["", f"{accuracy}std is the sample's over n runs; parameters are the encoder's."]
    sources = sorted({run.source for run in runs if run.published is not None and run.source})
    if sources:
        text.append(f"Published: {'; '.join(sources)}.")
    if any(run.published is not None and not run.verified for run in runs):
        text.append("?: the published value is quoted from memory, not verified in the paper.")
    if not all(run.tested for run in runs):
        text.append("†: the run has no test value; this is the validation's, not comparable with the published one.")
    repeats = sum(len(group.runs) - len({run.chance for run in group.runs}) for group in groups)
    if repeats:
        text.append(
            f"Runs that repeat the seed and fold of another in their group: {repeats}. n and std overstate them."
        )
    return "\n".join(text)


def read_curve(run: Run) -> dict[int, tuple[float, float]]:
    """{step: (seconds of training so far, validation metric)}; raises DamagedError."""
    path = run.folder / "metrics.csv"
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
        points = {
            int(row["step"]): (float(row["seconds"]), float(row[run.monitor]))
            for row in rows
            if row.get("seconds") and row[run.monitor]
        }
        if not points:
            raise ValueError(f"no row has both seconds and {run.monitor}")
        return points


def draw(groups: list[Group], path: Path) -> list[str]:
    """Draw validation metric against training time, a panel a data set, a line a group, as Figure 3 of the 2018 paper.

    A line is the mean over a group's runs of both, by step, over the steps after which all of them have validated, so
    that every point is a mean over the same runs. Returns messages about the file and about curves that cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    messages = []
    panels: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
    for group in groups:
        first, curves = group.runs[0], []
        for run in group.runs:
            try:
                curves.append(read_curve(run))
            except DamagedError as error:
                messages.append(f"no curve: {error}")
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        if steps:
            depth = f"{first.names['depth']} layers" if first.names["depth"] else ""
            parts = [depth, first.names["ablation"], first.names["vectors"], group.differs]
            label = ", ".join(part for part in [first.names["model"], *parts, "" if first.tested else "†"] if part)
            mean = np.mean([[curve[step] for step in steps] for curve in curves], axis=0)
            panels.setdefault((first.names["data"], first.names["task"], first.monitor), []).append((label, mean))
    if not panels:
        return [*messages, f"{path} was not drawn: no run has a learning curve"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(label for lines in panels.values() for label, _ in lines))
    for place, ((data, _, monitor), lines) in enumerate(sorted(panels.items()), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, mean in lines:
            # A model looks alike in all panels; after ten colours come other dashes.
            number = labels.index(label)
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axes.plot(*mean.T, style, color=f"C{number % 10}", marker=".", markersize=5, label=label)
        axes.set(title=data, xlabel="training time (s)", ylabel=monitor)
        axes.grid(alpha=0.3)
        # Below the axes: a long one would hide the curves.
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return [*messages, f"{path} was drawn"]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code: 0, or 1 without a finished run to show or a file that can be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="where the run folders are, at any depth")
    parser.add_argument("--png", type=Path, help="draw the learning curves into this file")
    parser.add_argument("--output", type=Path, help="write the table into this file too")
    given = parser.parse_args(arguments)
    missing = [folder for folder in given.folders if not folder.is_dir()]
    if missing:
        return fail(
            f"no folder {', '.join(map(str, missing))}. Runs lie below runs/ unless run_dir=... said otherwise."
        )
    folders = find_runs(given.folders)
    if not folders:
        below = ", ".join(map(str, given.folders))
        return fail(f"no run (a folder with config.yaml) below {below}. Make one: python train.py data=trec model=sru")
    runs, unfinished, brief, damaged = [], [], [], []
    for folder in folders:
        try:
            if not (folder / "metrics.json").exists():
                unfinished.append(folder)
            elif (run := read_run(folder)).options.get("trainer.limit_test_batches", "null") == "null":
                runs.append(run)
            else:
                brief.append(folder)
        except DamagedError as error:
            damaged.append(folder)
            print(f"skipped: {error}", file=sys.stderr)
    groups = group_runs(runs)
    text = [table(groups)] if groups else []
    for word, left_out in (
        ("unfinished (no metrics.json)", unfinished),
        ("tested on a few batches only (trainer=debug)", brief),
        ("damaged", damaged),
    ):
        if left_out:
            text += [f"\n{len(left_out)} {word}, left out:\n", *(f"- `{folder}`" for folder in left_out)]
    print("\n".join(text))
    if not groups:
        return fail(
            "no finished run to show. Go on with an unfinished one: python train.py resume=FOLDER; "
            "or make one: python train.py data=trec model=sru"
        )
    try:
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text("\n".join(text) + "\n", encoding="utf-8")
        if given.png:
            for message in draw(groups, given.png):
                print(message, file=sys.stderr)
    except OSError as error:
        return fail(f"{error.filename} cannot be written: {error.strerror}.")
    except ModuleNotFoundError as error:
        return fail(f"--png needs {error.name}: pip install -e '.[train]'")
    return 0


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
