"""The rows of the papers' tables: every experiment in conf/ with a published number, and its runs."""

import functools
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from reporting.runs import Run, flatten
from reporting.table import format_table, mean_and_std

CONF = Path(__file__).resolve().parents[2] / "conf"
# Names of config groups, whose options are compared anyway, and options that only choose the hardware.
PROCESSES = ("trainer.devices", "trainer.num_nodes")
HARDWARE = ("trainer.accelerator", "trainer.strategy", "trainer.plugins", "trainer.use_distributed_sampler", *PROCESSES)
NAMES = ("choices.", "ablations.", "monitor", *HARDWARE)
# A row counts as run with substitutes if only these options differ, because the original is not available: other
# pretrained vectors (and their case), a part of the training data, another spaCy model.
SUBSTITUTES = {"data.vectors", "data.lowercase", "data.train", "data.spacy_model"}
STATES = ("reached", "not reached", "run with substitutes", "not run")


@dataclass
class Row:
    """A published number and its runs. `others` are runs of its experiment with other options, by these options.

    `substitutes` are the keys of `others` that differ by SUBSTITUTES only.
    """

    experiment: str
    task: str
    data: str
    model: str
    source: str
    metric: str
    value: float
    std: float | None
    digits: int  # decimal places, as published
    verified: bool
    words: list[str]  # overrides of train.py
    runs: list[Run] = field(default_factory=list)
    others: dict[str, list[Run]] = field(default_factory=dict)
    substitutes: set[str] = field(default_factory=set)

    @property
    def command(self) -> str:
        return f"python train.py {' '.join(self.words)}"

    @property
    def state(self) -> str:
        if self.runs:
            return judge(self, summarise(self.metric, self.runs)[0])
        return "run with substitutes" if self.substitute else "not run"

    @property
    def substitute(self) -> str:
        """The most frequent substitute; "" if there is none, or if the row itself was run."""
        return "" if self.runs else max(self.substitutes, key=lambda differs: len(self.others[differs]), default="")

    @property
    def counted_runs(self) -> list[Run]:
        """The runs of the row or, if there are none, those with its substitute."""
        return self.runs or self.others.get(self.substitute, [])


def summarise(metric: str, runs: list[Run]) -> tuple[float, float | None]:
    """Mean and standard deviation; nan if a run lacks the metric."""
    return mean_and_std([float(run.record["metrics"].get(metric, math.nan)) for run in runs])


def judge(row: Row, mean: float) -> str:
    """Whether the mean is as good as published: to the published decimal places, or within the published deviation."""
    worse = row.value - mean if is_rising(row.metric, row.task) else mean - row.value
    half = 0.5 * 10.0**-row.digits
    return "reached" if worse <= max(half + 1e-9, row.std or 0.0) else "not reached"


@functools.cache
def read_best(task: str) -> dict[str, str]:
    """`monitor` and `mode` of the metric that chooses the task's best epoch."""
    return yaml.safe_load((CONF / f"task/{task}.yaml").read_text(encoding="utf-8"))["callbacks"]["best"]


def is_rising(metric: str, task: str) -> bool:
    """Whether higher is better: as for the metric that chooses the best epoch, but scores beside a loss rise."""
    if metric.rpartition("/")[2] in ("loss", "bpc", "perplexity"):
        return False
    return read_best(task)["mode"] == "max" or read_best(task)["monitor"] == "val/loss"


def compose_config(*words: str) -> Any:
    """The configuration of train.py for these overrides, as in a run's config.yaml."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=["run_dir=.", "logger=csv", *words], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def compose_rows(names: str = "[!_]*") -> list[Row]:
    """Every row, by experiment and data set; `names` is a file pattern of experiments."""
    from omegaconf import OmegaConf

    rows = []
    for path in sorted((CONF / "experiment").glob(f"{names}.yaml")):
        config = compose_config(f"experiment={path.stem}")
        paper: Any = OmegaConf.to_container(config.paper or OmegaConf.create(), resolve=True)
        choices = config.choices
        values, spreads = paper.get("value"), paper.get("std")
        for data, value in (values if isinstance(values, dict) else {choices["data"]: values}).items():
            if value is None:
                continue
            spread = spreads.get(data) if isinstance(spreads, dict) else spreads
            row = Row(
                experiment=path.stem,
                task=choices["task"],
                data=data,
                model=choices["model"],
                source=str(paper.get("source") or "").rstrip("."),
                metric=paper["metric"],
                value=float(value),
                std=None if spread is None else float(spread),
                digits=paper.get("digits") or len(repr(float(value)).partition(".")[2]),  # 82.0 has one
                verified=paper.get("verified", True),
                words=[f"experiment={path.stem}", *([f"data={data}"] if data != choices["data"] else [])],
            )
            if "values" not in paper:
                rows.append(row)
                continue
            # A value for each place of the first attention layer.
            for place, value in enumerate(paper["values"]):
                if value is not None:
                    layers = ",".join(map(str, [place, *config.model.attention_layers[1:]]))
                    rows.append(replace(row, value=value, words=[*row.words, f"model.attention_layers=[{layers}]"]))
    return rows


def compare_options(options: dict[str, str], run: Run) -> dict[str, str | None]:
    """The run's options that differ from these, None for a missing one; without seeds, paths and hardware."""
    ours, theirs = (
        {k: v for k, v in multiply_batch(o).items() if not k.startswith(NAMES)} for o in (run.options, options)
    )
    keys = [*ours, *theirs]
    # A run from before an option existed equals one with null.
    pairs = {k: (ours.get(k), theirs.get(k)) for k in keys if ours.get(k, "null") != theirs.get(k, "null")}
    # `epochs` sets trainer.max_epochs by interpolation: name it once.
    sources = {pair for key, pair in pairs.items() if "." not in key}
    return {key: pair[0] for key, pair in pairs.items() if "." not in key or pair not in sources}


def multiply_batch(options: dict[str, str]) -> dict[str, str]:
    """The options, with data.batch_size and similar sizes multiplied by the number of processes."""
    count = math.prod(int(options.get(name, "1")) for name in PROCESSES if options.get(name, "1").isdigit())
    sizes = ("data.batch_size", "data.tokens_per_batch", "data.frames_per_batch")
    return options | {name: str(int(options[name]) * count) for name in sizes if options.get(name, "").isdigit()}


def match(rows: list[Row], runs: list[Run]) -> list[Row]:
    """Give every row its runs, and the runs of its experiment and data set that match no row."""
    from omegaconf import OmegaConf

    unmatched: dict[tuple[str, str], list[tuple[str, Run]]] = {}
    substitutes: set[str] = set()
    for row in rows:
        here = [run for run in runs if run.names["data"] == row.data]
        composed: Any = OmegaConf.to_container(compose_config(*row.words), resolve=True) if here else {}
        options = flatten(composed)
        for run in here:
            other = compare_options(options, run)
            differs = ", ".join(f"without {k}" if v is None else f"{k}={v.strip(chr(34))}" for k, v in other.items())
            if row.metric not in run.record["metrics"]:
                differs = differs or f"no {row.metric}"
            elif other and other.keys() <= SUBSTITUTES and other.get("data.vectors") != "null":
                substitutes.add(differs)
            if not differs:
                row.runs.append(run)
            elif json.loads(run.options.get("choices.experiment", "null")) == row.experiment:
                unmatched.setdefault((row.experiment, row.data), []).append((differs, run))
    matched = {id(run) for row in rows for run in row.runs}
    for row in rows:  # the first row of an experiment
        for differs, run in unmatched.pop((row.experiment, row.data), []):
            if id(run) not in matched:
                matched.add(id(run))
                row.others.setdefault(differs, []).append(run)
        row.substitutes = substitutes & row.others.keys()
    return rows


def judge_orders(rows: list[Row]) -> list[str]:
    """For each table and data set, a sentence that says how far its rows are in the published order.

    Rows are compared if their runs have the same substitute, or none.
    """
    from scipy.stats import spearmanr

    tables: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.counted_runs:
            tables.setdefault((row.source, row.data, row.metric, row.substitute), []).append(row)
    sentences = []
    for (source, data, metric, substitute), same in tables.items():
        if len(same) < 3:
            continue
        pairs = [(row.value, summarise(metric, row.counted_runs)[0]) for row in same]
        ranked = [(a, b) for i, a in enumerate(pairs) for b in pairs[:i] if a[0] != b[0]]
        right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in ranked)
        rho = float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)
        where = f"{source}, {data}, {metric}" + (f", with {substitute}" if substitute else "")
        sentences.append(
            f"{where}: {right} of {len(ranked)} pairs of rows come in the published order, rank correlation {rho:.2f}."
        )
    return sentences


def describe_runs(row: Row, runs: list[Run]) -> dict[str, str]:
    """The table cells for runs of a row."""
    mean, std = summarise(row.metric, runs)
    places = row.digits + 1
    value = "" if math.isnan(mean) else f"{mean:.{places}f}"
    deviation = "" if std is None or math.isnan(std) else f"{std:.{places}f}"
    repeats = len(runs) - len({run.chance for run in runs})
    hardware = {
        f"{o.get('machine')}, "
        + (f"{o['processes']} processes, " if o.get("processes", 1) > 1 else "")
        + f"{o.get('threads')} threads, torch {o.get('torch')}"
        for o in (run.origin for run in runs if run.origin)
    }
    hours = [run.record["seconds"] / 3600 for run in runs if "seconds" in run.record]
    return {
        "mean": value,
        "std": deviation,
        "measured": value + (f" ± {deviation}" if deviation else ""),
        "n": f"{len(runs)}" + (f" (repeated {repeats})" if repeats else ""),
        "difference": "" if math.isnan(mean) else f"{mean - row.value:+z.{places}f}",
        "hours": f"{sum(hours) / len(hours):.2g}" if hours else "",
        "hardware": "; ".join(sorted(hardware)),
    }


def describe_row(row: Row) -> list[dict[str, str]]:
    """The table cells of a row, then of its runs with other options, which they have as `experiment`."""
    cells = {"state": row.state, "experiment": row.experiment, "data": row.data, "metric": row.metric}
    cells |= {"published": format_published(row), "command": row.command, "substitute": row.substitute}
    lines = [cells | (describe_runs(row, row.counted_runs) if row.counted_runs else {})]
    for differs, runs in row.others.items():
        if differs != row.substitute:
            lines.append({"experiment": differs} | describe_runs(row, runs))
    return lines


def format_published(row: Row) -> str:
    deviation = "" if row.std is None else f" ± {row.std}"
    return f"{row.value:.{row.digits}f}{deviation}{'' if row.verified else '?'}"


def tabulate_papers(rows: list[Row]) -> str:
    """The Markdown table: a line per row, and below it a line for each other set of options that was run."""
    names = ["state", "row", "data", "metric", "published", "mean", "std", "n", "difference", "substitute", "hours"]
    lines = [[*names, "hardware", "command"]]
    for row in rows:
        first, *others = describe_row(row)
        first |= {"row": f"{row.source}: {row.experiment}", "command": f"`{row.command}`"}
        others = [cells | {"state": "–", "row": f"– with {cells['experiment']}"} for cells in others]
        lines += [[cells.get(name, "") for name in lines[0]] for cells in (first, *others)]
    numbers = ("published", "mean", "std", "n", "difference", "hours")
    text = format_table(lines, [name in numbers for name in lines[0]])
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES)
    text += ["", f"{len(rows)} rows of the papers: {counts}.", *judge_orders(rows), *NOTES]
    return "\n".join(text)


NOTES = (
    "Reached: the mean of n runs is no worse than the published value, to its decimal places or within its published "
    "deviation. Hours are training hours of one run.",
    "A run counts if all its options are the experiment's, except seed, fold, folders and hardware (the batch size is "
    "the total over all processes). Repeated: runs with the same seed and fold as another, so n and std overstate the "
    "evidence. Runs with other options are listed below their experiment's row and do not count.",
    "Run with substitutes: as published except for the substitute in that column, because the original is not "
    "available. Such a row is neither reached nor missed.",
    "?: the published value is quoted from memory, not verified in the paper.",
)
