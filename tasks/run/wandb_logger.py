"""Log a run to wandb, with a name, group and summary that make runs comparable."""

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from tasks.run.files import write_text
from tasks.run.wandb_options import environment_tags

STEP = "trainer/global_step"  # Lightning's name for the steps of the optimiser


class Wandb(WandbLogger):
    """Lightning's wandb logger: one wandb run per run folder, offline unless the user is logged in.

    A run's name has data, model, depth x width, ablations, seed and fold. Its group is the experiment, with the data if
    the experiment has several corpora; without an experiment, the name without seed and fold. If the configuration has
    a published value, `published/METRIC` is a constant series beside the curves, and the summary has the run's
    `difference/METRIC`. The summary of a finished run has all of metrics.json, with the metric of the best epoch.

    An agent of a wandb sweep chooses project, entity and id. Otherwise the id is WANDB_RUN_ID, or a new one.

    Args:
        run_dir: the folder for wandb's files, unless WANDB_DIR is set, and for wandb_id.txt, which a resume reads.
        project, entity, job_type: as in wandb.init.
        name, group: replace those above.
        tags: added to task, data, model, ablations and experiment; by default those of WANDB_TAGS.
        artifacts: whether to upload the tested checkpoint, its configuration, and the files that the test wrote.
            Offline they stay in the run folder, until `wandb sync` reads them there.
    """

    def __init__(
        self,
        run_dir: str,
        project: str = "sru",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str = "train",
        tags: Iterable[str] = (),
        artifacts: bool = False,
    ) -> None:
        import wandb

        super().__init__(
            project=project,
            entity=entity,
            name=name,
            group=group,
            job_type=job_type,
            tags=list(tags) or environment_tags(),
            save_dir=os.environ.get("WANDB_DIR") or run_dir,
            settings=wandb.Settings(quiet=True),
        )
        # Lightning passes an option that wandb no longer has, which causes a warning.
        self._wandb_init.pop("anonymous", None)
        self.run_dir = Path(run_dir)
        self.artifacts = artifacts
        self.published: dict[str, float] = {}

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Start the wandb run: its name depends on the whole configuration."""
        import wandb

        choices, options, id_file = params["choices"], self._wandb_init, self.run_dir / "wandb_id.txt"
        if "WANDB_SWEEP_ID" in os.environ:
            # wandb.init uses those of the agent, and warns about others.
            options |= {"project": None, "entity": None, "id": None}
        else:
            wanted = os.environ.get("WANDB_RUN_ID")
            kept = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
            options["id"] = kept or wanted or secrets.token_hex(4)
            if kept and wanted not in (None, kept):
                print(f"WANDB_RUN_ID={wanted} is not used: the run continues as {kept} on wandb")
        if "WANDB_MODE" in os.environ:
            options["mode"] = os.environ["WANDB_MODE"]
        else:
            options["mode"] = "online" if wandb.login(prompt=False, verify=False) else "offline"
        has_depth = "num_layers" in params["model"]
        parts = [choices["data"], choices["model"], *([f"{params['depth']}x{params['width']}"] if has_depth else [])]
        parts += sorted(choices["ablation"])
        fold = params["data"].get("fold")
        chance = [f"seed {params['seed']}", *([] if fold is None else [f"fold {fold}"])]
        options["name"] = options["name"] or " ".join([*parts, *chance])
        paper, data, experiment = params["paper"] or {}, choices["data"], choices["experiment"]
        values = paper.get("value")
        values = values if isinstance(values, Mapping) else {data: values}
        if experiment and len(values) > 1:
            experiment = f"{experiment} {data}"
        options["group"] = options["group"] or experiment or " ".join(parts)
        named = [choices["task"], data, choices["model"], *choices["ablation"], choices["experiment"]]
        options["tags"] = list(dict.fromkeys([*filter(None, named), *options["tags"]]))
        super().log_hyperparams(params)
        run, best = self.experiment, params["callbacks"]["best"]
        write_text(id_file, run.id)
        # Axes to choose from; the default is the step.
        run.define_metric("seconds")
        run.define_metric("epoch")
        # A killed run then has its best value too, as METRIC.max or METRIC.min.
        run.define_metric(best["monitor"], step_metric=STEP, step_sync=True, summary=best["mode"])
        value = values.get(data)
        self.published = {} if value is None else {paper["metric"]: value}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({**metrics, **{f"published/{name}": v for name, v in self.published.items()}}, step)

    @rank_zero_only
    def finish(self, outcome: dict[str, Any] | None, writes: Iterable[str] = ()) -> None:
        """Close the wandb run; the next job of a sweep has its own.

        outcome: the content of metrics.json, or None for a failed run. writes: the names of files that tests write.
        """
        if self._experiment is None:
            return
        run = self.experiment
        if outcome is not None:
            metrics = outcome["metrics"]
            difference = {f"difference/{n}": metrics[n] - v for n, v in self.published.items() if n in metrics}
            run.summary.update({k: v for k, v in outcome.items() if k != "metrics"} | metrics | difference)
            if self.artifacts:
                checkpoint = self.run_dir / "checkpoints" / (outcome["tested"] or "last.ckpt")
                self._upload("checkpoint", "model", [checkpoint, self.run_dir / "config.yaml"])
                # Several processes write likelihoods.0.ark and so on.
                written = [p for name in writes for p in self.run_dir.glob("*".join(os.path.splitext(name)))]
                self._upload("predictions", "predictions", sorted(written))
        run.finish(exit_code=0 if outcome is not None else 1)

    def _upload(self, name: str, kind: str, files: list[Path]) -> None:
        import wandb

        if not files:
            return
        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", kind)
        for file in files:
            # Otherwise copies would stay in the home folder.
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)


def finish(loggers: Iterable[Logger], outcome: dict[str, Any] | None, writes: Iterable[str] = ()) -> None:
    """Call `Wandb.finish` for each wandb logger."""
    for logger in loggers:
        if isinstance(logger, Wandb):
            logger.finish(outcome, writes)
