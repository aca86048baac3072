"""Save a wandb report that compares the runs of a task: `python scripts/wandb_report.py classification`."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tasks/ is not installed

from reporting.paper_rows import is_rising, read_best

from tasks.run import console

ROOT = Path(__file__).resolve().parent.parent
STEP = "trainer/global_step"  # as in tasks/run/wandb_logger.py
# The metric that papers report, if the task monitors another one. (For words: --metric test/perplexity.)
REPORTED = {"lm": "test/bpc", "translation": "test/bleu", "squad": "test/em"}
SPEEDS = ("examples_per_second", "tokens_per_second", "frames_per_second", "steps_per_second")


def build(task: str, monitor: str, metric: str, is_up: bool, data: str | None, project: str, entity: str) -> Any:
    """A wandb report on the finished and running runs of one task, grouped over seeds and folds.

    With entity="" it does not contact a server.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    published, difference = f"published/{metric}", f"difference/{metric}"
    names = [task, *([data] if data else [])]
    columns = [monitor, published, difference, "parameters", "encoder_parameters", "seconds_per_epoch"]
    columns += ["peak_memory_mb", "best_epoch", "commit"]
    by_group: dict[str, Any] = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}

    def grid(title: str, panels: list[Any], *, grouped: bool = False) -> list[Any]:
        runs = wr.Runset(
            project=project,
            entity=entity,
            name=" ".join([*names, *(["by group"] if grouped else [])]),
            # By tags: wandb's filters do not support nested configuration keys well.
            filters=expr.And(*(expr.Tags().isin([name]) for name in names)),
            groupby=["group"] if grouped else [],
            order=[wr.OrderBy(wr.SummaryMetric(metric), ascending=not is_up)],
            pinned_columns=[f"summary:{metric}"],
            visible_columns=["run:displayName", *(f"summary:{name}" for name in columns)],
        )
        return [wr.H1(text=title), wr.PanelGrid(runsets=[runs], panels=panels)]

    def curve(title: str, x: str, y: list[Any]) -> Any:
        return wr.LinePlot(title=title, x=x, y=y, **by_group)

    def bars(title: str, *metrics: str) -> Any:
        return wr.BarPlot(title=title, metrics=list(metrics), **by_group)

    def points(title: str, x: str) -> Any:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(metric), log_x=True)

    options = ("depth", "width", "dropout", "data.batch_size", "task.optimizer.lr")
    axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in options]
    axes.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(metric), inverted=not is_up))
    curves = [curve(f"{monitor} by {x}", x, [monitor, published]) for x in (STEP, "seconds", "epoch")]
    return wr.Report(
        project=project,
        entity=entity,
        title=" ".join(["SRU:", *names]),
        description=f"{metric}, {'highest' if is_up else 'lowest'} first. A bar or line is the mean of a group.",
        width="fluid",
        blocks=[
            *grid(
                "Measured and published result",
                [bars(metric, metric, published), bars("difference from published", difference)],
                grouped=True,
            ),
            *grid("Curves", [*curves, curve("loss by epoch", "epoch", ["train/loss", "val/loss"])]),
            *grid(
                "Time and memory",
                [
                    bars("training speed per second", *SPEEDS),
                    bars("seconds per epoch", "seconds_per_epoch", "encoder_seconds_per_epoch"),
                    bars("peak memory, MB", "peak_memory_mb"),
                    points(f"{metric} by parameters", "parameters"),
                    points(f"{metric} by seconds of training", "seconds"),
                ],
            ),
            *grid(
                "Differences between runs",
                [
                    wr.ParallelCoordinatesPlot(title="options", columns=axes),
                    wr.ParameterImportancePlot(with_respect_to=metric),
                    wr.RunComparer(diff_only="split"),
                ],
            ),
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    """Save the report and print its address; SystemExit if it cannot be saved."""
    tasks, corpora = (
        sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")) for group in ("task", "data")
    )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=tasks, help="one of %(choices)s", metavar="task")
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
    monitor = read_best(options.task)["monitor"]
    metric = options.metric or REPORTED.get(options.task) or re.sub("^val/", "test/", monitor)
    is_up = options.mode == "max" if options.mode else is_rising(metric, options.task)
    selection = (options.task, monitor, metric, is_up, options.data, options.project)
    try:
        report = build(*selection, "")
    except ModuleNotFoundError as error:
        sys.exit(f"error: this needs {error.name}: type pip install -e '.[report]'.")
    if options.json:
        text = report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)
        try:
            options.json.write_text(text, encoding="utf-8")
        except OSError as error:
            sys.exit(f"error: --json {options.json} cannot be written ({error.strerror}); name another file.")
        print(f"{options.json} was written; nothing was saved online.")
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        sys.exit("error: wandb has no API key: type `wandb login`; --json FILE needs none.")
    try:
        entity = options.entity or wandb.Api(timeout=20).default_entity
        if not entity:
            sys.exit("error: wandb has no default entity for you: type --entity NAME.")
        report = build(*selection, entity)
        report.save()
    except Exception as error:  # wandb, the network and the server raise many types
        message = " ".join(str(error).split()).rstrip(".")
        sys.exit(f"error: {message}. Are you online, and is --entity/--project right? --json FILE needs no network.")
    print(report.url)


if __name__ == "__main__":
    console.use_utf8()
    main()
