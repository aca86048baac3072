"""The Markdown table of finished runs and published numbers."""

import numpy as np

from reporting.runs import IDENTITY, Group

NUMBERS = ("mean", "std", "n", "parameters", "s/epoch")


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, which is None for a single value."""
    array = np.array(values)
    with np.errstate(invalid="ignore"):  # the loss of a run that diverged may be infinite
        return float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else None


def describe_group(group: Group) -> dict[str, str]:
    """The cells of one line of the table."""
    run = group.runs[0]
    mean, std = mean_and_std([run.value for run in group.runs])
    places = 2 if abs(mean) >= 10 else 3
    cells = {key: str(run.names[key] or "") for key in IDENTITY}
    cells["metric"] += "" if run.tested else " †"
    cells["mean"] = f"{mean:.{places}f}"
    cells["std"] = "" if std is None else f"{std:.{places}f}"
    cells["n"] = str(len(group.runs))
    cells["parameters"] = " / ".join(f"{n:,}" for n in sorted({run.encoder_parameters for run in group.runs}))
    cells["s/epoch"] = f"{np.mean([run.seconds_per_epoch for run in group.runs]):.2f}"
    if run.published is not None:
        cells["published"] = f"{run.published:g}" + ("" if run.verified else "?")
        cells["difference"] = f"{mean - run.published:+z.{places}f}" if run.tested else ""
    cells["differs"] = group.differs
    return cells


def format_table(rows: list[list[str]], right: list[bool]) -> list[str]:
    """The lines of a table whose first row is its head; `right` says which columns are right-aligned."""
    lines = [rows[0], ["---:" if is_right else "---" for is_right in right], *rows[1:]]
    return ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in line) + " |" for line in lines]


def tabulate(groups: list[Group]) -> str:
    """The Markdown table, a line per group, and a legend of its marks."""
    rows = [describe_group(group) for group in groups]
    columns = [*IDENTITY, *NUMBERS]
    columns += [key for key in ("published", "difference", "differs") if any(cells.get(key) for cells in rows)]
    words = (*IDENTITY, "differs")
    lines = [columns, *([cells.get(key, "") for key in columns] for cells in rows)]
    text = format_table(lines, [key not in words or key == "depth" for key in columns])
    runs = [run for group in groups for run in group.runs]
    accuracy = "Accuracy is in per cent; " if any("accuracy" in run.names["metric"] for run in runs) else ""
    text += ["", f"{accuracy}std is the sample standard deviation of n runs; parameters are those of the encoder."]
    sources = sorted({run.source for run in runs if run.published is not None and run.source})
    if sources:
        text.append(f"Published: {'; '.join(sources)}.")
    if any(run.published is not None and not run.verified for run in runs):
        text.append("?: the published value is quoted from memory, not verified in the paper.")
    if not all(run.tested for run in runs):
        text.append(
            "†: the run has no test value; this is the validation value, not comparable with the published one."
        )
    repeats = sum(len(group.runs) - len({run.chance for run in group.runs}) for group in groups)
    if repeats:
        text.append(
            f"Runs that repeat the seed and fold of another in their group: {repeats}. "
            "n is too high there, and std too low."
        )
    return "\n".join(text)
