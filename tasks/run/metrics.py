"""The results of a run: metrics.csv, metrics.json and the final table."""

import contextlib
import csv
import difflib
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from tasks.run import distributed
from tasks.run.files import write_text
from tasks.run.throughput import ThroughputMonitor, peak_memory

TESTED = {"average.ckpt": "the mean of several checkpoints", "best.ckpt": "the best epoch", None: "the last weights"}


class Monitors(pl.Callback):
    """Refuses a callback whose monitored metric does not exist, with a better message than Lightning's."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        known = [name for name in trainer.callback_metrics if name.startswith("val/")]
        for callback in trainer.callbacks:
            wanted = str(getattr(callback, "monitor", None))
            if known and wanted.startswith("val/") and wanted not in known:
                typed = [word.lstrip("+").partition("=") for word in distributed.overrides()]
                key = next((k for k, _, value in typed if k.endswith(".monitor") and value == wanted), None)
                near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
                raise ValueError(
                    f"the validation has no metric {wanted}, which {type(callback).__name__} monitors; there are: "
                    f"{', '.join(known)}. Type {key or 'callbacks.best.monitor'}={(near or known)[0]}"
                )


class MetricsFile(Logger):
    """metrics.csv in the run folder: one row per validation and one for the test, complete after each epoch.

    A resumed run continues the file and replaces the rows after the checkpoint that it starts from.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[tuple[bool, int], dict[str, Any]] = {}
        if self.path.exists():
            try:
                with self.path.open(newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        cells = {key: value for key, value in row.items() if value != ""}
                        self.rows[self.key(cells, int(row["step"]))] = cells
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged; move it away to resume without its rows.") from error

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @staticmethod
    def key(metrics: dict[str, Any], step: int) -> tuple[bool, int]:
        """The order of rows: the test comes last."""
        return any(name.startswith("test/") for name in metrics), step

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = step or 0
        key = self.key(metrics, step)
        self.rows = {k: row for k, row in self.rows.items() if k <= key}
        self.rows.setdefault(key, {"step": step}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows[key] for key in sorted(self.rows))
        write_text(self.path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def result(trainer: Any, task: Any) -> dict[str, Any]:
    """The content of metrics.json after training; the monitored metric is the best epoch's."""
    best = trainer.checkpoint_callback
    clock = next(callback for callback in trainer.callbacks if isinstance(callback, ThroughputMonitor))
    metrics = {}
    best_epoch = None  # the epochs trained until then
    if best.best_model_path:
        metrics[best.monitor] = float(best.best_model_score)
        checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True, mmap=True)
        best_epoch = round(checkpoint["callbacks"]["Clock"]["epochs"], 3)
    return {
        "metrics": metrics,
        "monitor": best.monitor,
        "best_epoch": best_epoch,
        "epochs": round(clock.epochs, 3),
        "seconds": clock.seconds,
        "seconds_per_epoch": (seconds_per_epoch := clock.seconds / clock.epochs if clock.epochs else 0.0),
        "encoder_seconds_per_epoch": clock.encoder_share * seconds_per_epoch,
        f"{task.unit}_per_second": clock.speed,
        **clock.step_milliseconds(),
        "peak_memory_mb": peak_memory(task.device),
    }


def sizes(task: Any) -> dict[str, int]:
    """The numbers of parameters; call it before FSDP shards the network."""
    return {
        "parameters": sum(p.numel() for p in task.parameters()),
        "encoder_parameters": sum(p.numel() for encoder in task.encoders for p in encoder.parameters()),
    }


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):  # on Linux, where `platform` knows only x86_64
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def provenance(*, on_gpu: bool) -> dict[str, Any]:
    """Commit, command line, versions and machine: what run.json records."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = None
    if shutil.which("git"):
        commit = git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain") else "")
    return {
        "commit": commit,
        "overrides": distributed.overrides(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else processor(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }


def summary_table(outcome: dict[str, Any], folder: Path) -> str:
    """The table at the end of a run."""
    best = "no best one" if outcome["best_epoch"] is None else f"the best is {outcome['best_epoch']:g}"
    rows = [
        *metric_rows(outcome["metrics"], outcome),
        ("wall time", f"{outcome['wall_seconds']:.1f} s for this call; training {outcome['seconds']:.1f} s in all"),
        ("epochs", f"{outcome['epochs']:g}, {best}"),
        (
            "an epoch",
            f"{outcome['seconds_per_epoch']:.1f} s, {outcome['encoder_seconds_per_epoch']:.1f} s in the encoder",
        ),
        *((f"{name.removesuffix('_per_second')}/s", f"{outcome[name]:.0f}") for name in outcome if "_per_s" in name),
        ("tested", TESTED.get(outcome["tested"], outcome["tested"])),
        ("run folder", str(folder) if (folder / "metrics.json").exists() else "none: fast_dev_run saves nothing"),
    ]
    place, id_file = Path(os.environ.get("WANDB_DIR") or folder), folder / "wandb_id.txt"
    own = "*" if place == folder else f"*-{id_file.read_text(encoding='utf-8')}" if id_file.exists() else ""
    if own and list(place.glob(f"wandb/offline-run-{own}")):
        rows.append(("to upload", f"wandb sync {shlex.quote(str(place))}/wandb/offline-run-{own}"))
    return table(rows)


def metric_rows(metrics: dict[str, float], counts: dict[str, int]) -> list[tuple[str, str]]:
    """The first rows of a table: the metrics and the numbers of parameters."""
    parameters = f"{counts['parameters']:,} ({counts['encoder_parameters']:,} in the encoder)"
    return [*((name, f"{value:.4g}") for name, value in metrics.items()), ("parameters", parameters)]


def table(rows: list[tuple[str, str]]) -> str:
    """Rows of names and values between two lines."""
    width = max(len(name) for name, _ in rows)
    line = "-" * (width + 2 + max(len(value) for _, value in rows))
    return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])
