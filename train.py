"""Train, test and record one run: `python train.py task=classification data=trec model=sru`."""

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
    imports,
    malloc,
    run_dir,
    sweep,
    wandb_options,
)


def run(cfg: DictConfig) -> float | None:
    """Run what the configuration says; returns the monitored metric's best value, which sweepers optimise."""
    config_hints.drop_null(cfg)
    config_checks.check(cfg)
    config_hints.check(cfg)
    wandb_options.keep_place(cfg)
    with imports.no_garbage():
        # Not at the top: help, and a command that is refused, would wait seconds for torch.
        imports.import_lightning()
        import pytorch_lightning as pl

        from tasks.run import checkpoint_averaging, checkpoints, metrics, wandb_logger

        config_hints.import_classes(cfg)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # their reports
    # A corpus in memory needs no workers, a resumed run finds its checkpoints, how Lightning uses torch is its own.
    warnings.filterwarnings(
        "ignore",
        ".*does not have many workers.*|Checkpoint directory .* is not empty|.*isinstance.treespec, LeafSpec|"
        # Metrics are summed over the processes before they are logged.
        ".*recommended to use .self.log.*sync_dist=True.",
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
        # A bar in a file is a wall of lines.
        cfg.trainer.enable_progress_bar &= sys.stdout.isatty()
        if not cfg.trainer.enable_progress_bar:
            config_hints.drop_bars(cfg)
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        recorder = checkpoints.Recorder(config, metrics.provenance(on_gpu=distributed.on_gpu(cfg)), folder)
        if any(".monitor=" in word for word in distributed.overrides()) and not cfg.trainer.num_sanity_val_steps:
            cfg.trainer.num_sanity_val_steps = 1  # a batch shows whether there is such a metric
        sizes, outcome = metrics.sizes(task), None
        trainer = instantiate(cfg.trainer)
        try:
            trainer.callbacks.insert(0, metrics.Monitors())
            if not trainer.fast_dev_run:  # of which nothing is kept
                trainer.callbacks.append(recorder)
            for logger in trainer.loggers:
                logger.log_hyperparams(config)
            trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
            # Before the test, which sets the callbacks back to the best epoch.
            found = metrics.result(trainer, task) | sizes | {"commit": recorder.origin["commit"]}
            path = checkpoint_averaging.checkpoint_to_test(trainer)
            found["tested"] = path and Path(path).name
            for tested in trainer.test(task, datamodule=data, ckpt_path=path, verbose=False, weights_only=True):
                found["metrics"] |= {name: value for name, value in tested.items() if name != "step"}
            found["wall_seconds"] = time.perf_counter() - start
            if not distributed.rank() and not trainer.fast_dev_run:
                metrics.write_result(found, folder)
            outcome = found
        finally:
            wandb_logger.finish(trainer.loggers, outcome, task.test_artifacts)
            if outcome is None and recorder.has_begun and (folder / "checkpoints/last.ckpt").exists():
                print(f"The run stopped early. Go on with: python train.py resume={shlex.quote(str(folder))}")
        print(metrics.summary_table(outcome, folder))
        return outcome["metrics"].get(outcome["monitor"])


@hydra.main(version_base="1.3", config_path=str(config_checks.ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    if sweep.is_job():
        return sweep.job(run, cfg)
    try:
        return run(cfg)
    finally:
        # Hydra's folder, which a refused run or one with another run_dir leaves empty.
        if not distributed.rank():
            run_dir.remove_if_empty(Path(HydraConfig.get().runtime.output_dir))


def is_no_resume(word: str) -> bool:
    name, equals, value = word.partition("=")
    return name == "resume" and bool(equals) and config_hints.is_nothing(value)


def command() -> None:
    if (cfg := distributed.config_from_parent()) is not None:
        run(cfg)
        return
    words = distributed.arguments([word for word in sys.argv[1:] if not is_no_resume(word)])
    words.sort(key=lambda word: word not in ("-m", "--multirun"))  # argparse takes no flag between two overrides
    words = sweep.add_recorded_words(words) if sweep.resumes_sweep(words) else run_dir.add_recorded_words(words)
    sys.argv[1:] = config_hints.drop_empty_words(words)
    with sweep.report_failures():
        main()


if __name__ == "__main__":
    console.use_utf8()
    errors.guard(command)
