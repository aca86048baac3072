"""Train, test and record one run: `python train.py task=classification data=trec model=sru`."""

import json
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tasks.run import (
    config_checks,
    config_hints,
    console,
    distributed,
    errors,
    files,
    imports,
    malloc,
    run_dir,
    sweep,
    wandb_options,
)


def run(cfg: DictConfig) -> float | None:
    """Train and test one configuration; returns the best value of the monitored metric, which searches optimise."""
    config_hints.drop_null(cfg)
    config_checks.check(cfg)
    config_checks.check_classes(cfg)
    wandb_options.keep_place(cfg)
    with imports.no_garbage():
        # Not at the top: --help and refused commands must not wait seconds for torch.
        imports.import_lightning()
        import pytorch_lightning as pl

        from tasks.run import checkpoint_averaging, checkpoints, metrics, wandb_logger

        for key, node in config_checks.targets(cfg):
            config_checks.import_class(node, key)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # their reports
    warnings.filterwarnings(
        "ignore",
        ".*does not have many workers.*|"  # the corpus is in memory
        "Checkpoint directory .* is not empty|"  # a resume
        ".*isinstance.treespec, LeafSpec|"  # Lightning's use of torch
        "The .srun. command is available|"  # this command starts its processes itself
        "FSDP2-wrapped module .* returned a view|"  # nothing changes it in place
        ".*recommended to use .self.log.*sync_dist=True.",  # metrics are summed over the processes before
    )
    if (count := distributed.resolve_devices(cfg)) > distributed.world_size():
        return distributed.launch(cfg, count)
    malloc.keep_freed_memory()
    start = time.perf_counter()
    with distributed.process_group(cfg), run_dir.open_run_dir(cfg) as folder:
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        last = folder / "checkpoints/last.ckpt" if cfg.resume else None
        data = instantiate(cfg.data)
        with distributed.rank_zero_first():
            config_checks.check_data(cfg, data, last)
            kwargs = data.model_kwargs
        task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **kwargs)
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        recorder = checkpoints.Recorder(config, metrics.provenance(on_gpu=distributed.on_gpu(cfg)), folder)
        if any(".monitor=" in word for word in distributed.overrides()) and not cfg.trainer.num_sanity_val_steps:
            cfg.trainer.num_sanity_val_steps = 1  # one batch shows whether the metric exists
        sizes, outcome = metrics.sizes(task), None
        trainer = instantiate(cfg.trainer)
        if trainer.progress_bar_callback and not sys.stdout.isatty():  # each update would be a line of a file
            trainer.callbacks.remove(trainer.progress_bar_callback)
        try:
            trainer.callbacks.insert(0, metrics.Monitors())
            if not trainer.fast_dev_run:  # it saves nothing
                trainer.callbacks.append(recorder)
            for logger in trainer.loggers:
                logger.log_hyperparams(config)
            trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
            # Before the test, which resets the callbacks to the best epoch.
            result = metrics.result(trainer, task) | sizes | {"commit": recorder.origin["commit"]}
            path = checkpoint_averaging.checkpoint_to_test(trainer)
            result["tested"] = path and Path(path).name
            for values in trainer.test(task, datamodule=data, ckpt_path=path, verbose=False, weights_only=True):
                result["metrics"] |= {name: value for name, value in values.items() if name != "step"}
            result["wall_seconds"] = time.perf_counter() - start
            if not distributed.rank() and not trainer.fast_dev_run:
                files.write_text(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
            outcome = result
        finally:
            wandb_logger.finish(trainer.loggers, outcome, task.test_artifacts)
            if outcome is None and recorder.has_begun and (folder / "checkpoints/last.ckpt").exists():
                print(f"The run stopped early. Continue with: python train.py resume={shlex.quote(str(folder))}")
        print(metrics.summary_table(outcome, folder))
        return outcome["metrics"].get(outcome["monitor"])


@hydra.main(version_base="1.3", config_path=str(config_checks.ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    if sweep.is_job():
        return sweep.job(run, cfg)
    try:
        return run(cfg)
    finally:
        # Hydra's folder is empty if the run was refused, or has another run_dir.
        if not distributed.rank():
            run_dir.remove_if_empty(Path(HydraConfig.get().runtime.output_dir))


def command() -> None:
    if (cfg := distributed.config_from_parent()) is not None:
        run(cfg)
        return
    # resume=null changes nothing.
    words = [word for word in sys.argv[1:] if not (word.startswith("resume=") and config_hints.is_nothing(word))]
    words = distributed.arguments(words)
    words.sort(key=lambda word: word not in ("-m", "--multirun"))  # argparse accepts no flag between two overrides
    folder = sweep.folder_to_resume(words)
    words = sweep.add_recorded_words(folder, words) if folder else run_dir.add_recorded_words(words)
    sys.argv[1:] = config_hints.drop_empty_words(words)
    with sweep.report_failures():
        main()


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(command)
