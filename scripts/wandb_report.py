"""Save a wandb report that compares the runs of a task: `python scripts/wandb_report.py classification`."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from reporting.paper_rows import RISING

ROOT = Path(__file__).parent.parent
STEP = "trainer/global_step"  # as in tasks/run/wandb_logger.py
# The metric that papers report, if the task monitors another one. (For words: --metric test/perplexity.)
REPORTED = {"lm": "test/bpc", "translation": "test/bleu", "squad": "test/em"}
SPEEDS = ("examples_per_second", "tokens_per_second", "frames_per_second", "steps_per_second")


def build(task: str, monitor: str, metric: str, mode: str, data: str | None, project: str, entity: str) -> Any:
    """A wandb report on the finished and running runs of one task, grouped over seeds and folds.

    With entity="" it does not contact a server.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    published, difference, is_up = f"published/{metric}", f"difference/{metric}", mode == "max"

    def runs(*, grouped: bool) -> list[Any]:
        # By tags: wandb's filters do not support nested configuration keys well.
        wanted = [expr.Tags().isin([name]) for name in (task, data) if name]
        columns = [metric, monitor, published, difference, "parameters", "encoder_parameters", "seconds_per_epoch"]
        columns += ["peak_memory_mb", "best_epoch", "commit"]
        return [
            wr.Runset(
                project=project,
                entity=entity,
                name=" ".join([task, *([data] if data else []), *(["by group"] if grouped else [])]),
                filters=expr.And(*wanted),
                groupby=["group"] if grouped else [],
                order=[wr.OrderBy(wr.SummaryMetric(metric), ascending=not is_up)],
                pinned_columns=[f"summary:{metric}"],
                visible_columns=["run:displayName", *(f"summary:{name}" for name in columns[1:])],
            )
        ]

    def curve(title: str, x: str, y: list[str]) -> Any:
        return wr.LinePlot(
            title=title, x=x, y=list(y), groupby="Group", groupby_aggfunc="mean", groupby_rangefunc="minmax"
        )

    def bars(title: str, *metrics: str) -> Any:
        return wr.BarPlot(
            title=title, metrics=list(metrics), groupby="Group", groupby_aggfunc="mean", groupby_rangefunc="minmax"
        )

    def points(title: str, x: str, *, log_x: bool) -> Any:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(metric), log_x=log_x)

    options = ("depth", "width", "dropout", "data.batch_size", "task.optimizer.lr")
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in options]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(metric), inverted=not is_up))
    curves = [curve(f"{monitor} by {x}", x, [monitor, published]) for x in (STEP, "seconds", "epoch")]
    return wr.Report(
        project=project,
        entity=entity,
        title=" ".join(["SRU:", task, *([data] if data else [])]),
        description=f"{metric}, {'highest' if is_up else 'lowest'} first. A bar or line is the mean of a group.",
        width="fluid",
        blocks=[
            wr.H1(text="Measured and published result"),
            wr.PanelGrid(
                runsets=runs(grouped=True),
                panels=[bars(metric, metric, published), bars("difference from published", difference)],
            ),
            wr.H1(text="Curves"),
            wr.PanelGrid(
                runsets=runs(grouped=False),
                panels=[*curves, curve("loss by epoch", "epoch", ["train/loss", "val/loss"])],
            ),
            wr.H1(text="Time and memory"),
            wr.PanelGrid(
                runsets=runs(grouped=False),
                panels=[
                    bars("training speed per second", *SPEEDS),
                    bars("seconds per epoch", "seconds_per_epoch", "encoder_seconds_per_epoch"),
                    bars("peak memory, MB", "peak_memory_mb"),
                    points(f"{metric} by parameters", "parameters", log_x=True),
                    points(f"{metric} by seconds of training", "seconds", log_x=True),
                ],
            ),
            wr.H1(text="Differences between runs"),
            wr.PanelGrid(
                runsets=runs(grouped=False),
                panels=[
                    wr.ParallelCoordinatesPlot(title="options", columns=columns),
                    wr.ParameterImportancePlot(with_respect_to=metric),
                    wr.RunComparer(diff_only="split"),
                ],
            ),
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Save the report and print its address; returns the exit code."""
    tasks = sorted(path.stem for path in (ROOT / "conf/task").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=tasks, help="one of %(choices)s", metavar="task")
    corpora = sorted(path.stem for path in (ROOT / "conf/data").glob("[!_]*.yaml"))
    parser.add_argument("--data", choices=corpora, metavar="DATA", help="only runs on this corpus")
    parser.add_argument("--metric", help="metric to compare (default: the one that papers report)")
    parser.add_argument(
        "--mode", choices=("max", "min"), help="max if higher is better (default depends on the metric)"
    )
    parser.add_argument("--project", default="sru", help="wandb project (%(default)s)")
    parser.add_argument("--entity", help="wandb team (default: your own entity)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the specification into this file and save nothing online"
    )
    options = parser.parse_args(arguments)
    best = yaml.safe_load((ROOT / f"conf/task/{options.task}.yaml").read_text(encoding="utf-8"))["callbacks"]["best"]
    metric = options.metric or REPORTED.get(options.task) or re.sub("^val/", "test/", best["monitor"])
    mode = options.mode or ("max" if metric.rpartition("/")[2] in RISING else "min")
    selection = (options.task, best["monitor"], metric, mode, options.data, options.project)
    try:
        report = build(*selection, "")
    except ModuleNotFoundError as error:
        return fail(f"this needs {error.name}: type pip install -e '.[report]'")
    if options.json:
        text = report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)
        try:
            options.json.write_text(text, encoding="utf-8")
        except OSError as error:
            return fail(f"--json {options.json} cannot be written ({error.strerror}); name another file")
        print(f"{options.json} was written; nothing was saved online.")
        return 0
    import wandb

    if not wandb.login(prompt=False, verify=False):
        return fail("wandb has no API key: type `wandb login`; --json FILE needs none")
    try:
        entity = options.entity or wandb.Api(timeout=20).default_entity
        if not entity:
            return fail("wandb has no default entity for you: type --entity NAME")
        report = build(*selection, entity)
        report.save()
    except Exception as error:  # wandb, the network and the server raise many types
        message = " ".join(str(error).split()).rstrip(".")
        return fail(f"{message}. Are you online, and is --entity/--project right? --json FILE needs no network")
    print(report.url)
    return 0


def fail(message: str) -> int:
    print(f"error: {message}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tasks/ is in the parent folder
    from tasks.run import console

    console.use_utf8()
    sys.exit(main())
