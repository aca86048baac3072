"""Answers to words that do not fit: a missing plus, a similar key, and null for a group."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import train
from tasks.run import config_checks, config_hints, errors, run_dir

TINY = ("task=image", "depth=1", "width=8", "epochs=1", "logger=csv", "trainer.enable_progress_bar=false")
TINY += ("trainer.limit_train_batches=2", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")
STOP = "+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping"


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """answer("words of a command"): the error, or else the last configuration; nothing is trained."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(cfg):
        config_hints.drop_null(cfg)
        config_checks.check(cfg)
        config_checks.check_classes(cfg)
        seen.append(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))

    monkeypatch.setattr(train, "run", run)

    def run_command(words):
        monkeypatch.delenv("HYDRA_FULL_ERROR")
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(words)])
        try:
            errors.guard(train.command)
        except SystemExit as ended:
            if isinstance(ended.code, str):
                return ended.code.partition("\n")[0].removeprefix("error: ")
        finally:
            HydraConfig.instance().cfg = None
        (failed,) = tmp_path.rglob("failed.json") if list(tmp_path.rglob("failed.json")) else (None,)
        return json.loads(failed.read_text())["error"] if failed else seen[-1]

    return run_command


@pytest.mark.parametrize(
    ("words", "plus"),
    [
        ("task=image task.optimizer.weight_decay=0.1", "+task.optimizer.weight_decay=0.1"),
        ("task.optimizer.betas=[0.9,0.98]", "'+task.optimizer.betas=[0.9,0.98]'"),
        ("task.optimizer._target_=torch.optim.SGD task.optimizer.nesterov=true", "+task.optimizer.nesterov=true"),
        ("trainer.profiler=simple", "+trainer.profiler=simple"),
        ("trainer.overfit_batches=0.1", "+trainer.overfit_batches=0.1"),
        ("callbacks.best.save_last=true", "+callbacks.best.save_last=true"),
        ("+trainer.profiler=simple +trainer.profiler=advanced", "trainer.profiler=advanced"),
        ("model.layer_norm=true", "+model.layer_norm=true"),
        ("task=lm data.unit=bytes", "+data.unit=bytes"),
        (STOP.lstrip("+"), STOP),
        (f"{STOP} callbacks.stop.patience=3", "+callbacks.stop.patience=3"),
        ("-m depth=1,2 task.optimizer.weight_decay=0,0.1", "+task.optimizer.weight_decay=0,0.1"),
        ("-m task=lm,squad task.scheduler._target_=a.noam", "+task.scheduler._target_=a.noam"),
        (
            "task=lm task.scheduler.warmup=9",
            "+task.scheduler._target_=CLASS +task.scheduler._partial_=true, and then +task.scheduler.warmup=9",
        ),
        (
            "task=image task.scheduler.gamma=0.5",
            "+task.scheduler._target_=CLASS +task.scheduler._partial_=true, and then +task.scheduler.gamma=0.5",
        ),
        (
            "task=image task.scheduler._target_=torch.optim.lr_scheduler.StepLR",
            "+task.scheduler._target_=torch.optim.lr_scheduler.StepLR +task.scheduler._partial_=true",
        ),
    ],
)
def test_an_argument_that_no_file_lists_is_answered_with_a_plus(answer, words, plus):
    assert f"type {plus}" in answer(words) or f"first, {plus}" in answer(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model=lstm model.zoneout=0.1", "sru.LSTM takes no 'zoneout'. There are: model.hidden_size,"),
        ("task=lm task.cutofs=[9]", "tasks.lm.LanguageModelling takes no 'cutofs'. Did you mean: task.cutoffs?"),
        ("task=lm task.max_answer=9", "tasks.lm.LanguageModelling takes no 'max_answer'. There are: task."),
        ("weight_decay=0.1", "Did you mean: +task.optimizer.weight_decay?"),
        ("lr=0.1", "Did you mean: task.optimizer.lr?"),
        ("modle=sru", "Did you mean: model?"),
        ("logger.wandb.project=a", "Did you mean: loggers.wandb.project,"),
        (
            "logger=csv loggers.wandb.project=a",
            "There is no loggers.wandb yet: type its class first,",
        ),
        ("callbacks.stop.patience=3", "There is no callbacks.stop yet: type its class first, +callbacks.stop._target_"),
        ("data.root.x=3", "There is no key 'data.root.x'"),
        ("paper.value=3", "Did you mean: paper?"),
        ("hydra.foo=3", "type +hydra.foo=3"),
        ("hydra/launcher=jobli", "There is no hydra/launcher=jobli. Did you mean: joblib?"),
        ("+depth=3", "depth already exists: leave out the plus, type depth=3"),
        ("+model=lstm", "model already exists: leave out the plus, type model=lstm"),
        ("+experiment=squad_sru_4l", "leave out the plus, type experiment=squad_sru_4l"),
        ("~seed", "perhaps a run needs what ~seed removes"),
        ("~callbacks.clock", "callbacks.clock is missing, and every run needs it"),
        ("callbacks=null", "type callbacks.NAME=null for one of them"),
        ("+task.optimizer.weigth_decay=1", "Did you mean: weight_decay, "),
        ("++trainer.max_epoch=1", "trainer pytorch_lightning.Trainer has no option 'max_epoch' "),
        ("+callbacks.best.save_top_k=3", "best.ckpt is one file; to keep more, type +callbacks.top._target_="),
        ("model.batch_first=true", "model.batch_first cannot be set in a run: time comes first in every task"),
        ("+model.dtype=float64", "cannot be set in a run: trainer.precision sets it, for example 64-true"),
        ("+callbacks.best.save_weights_only=true", "a resume and the test need the whole checkpoint; leave it out"),
        ("callbacks.last.save_weights_only=true", "a resume and the test need the whole checkpoint; leave it out"),
        ("trainer.callbacks=[]", "type +callbacks.NAME._target_=CLASS to add one"),
        (
            "trainer.logger=false",
            "type +loggers.NAME._target_=CLASS to add one, loggers.NAME=null to remove one, or logger=csv",
        ),
        (
            "task.optimizer=sgd",
            "task.optimizer=sgd must have a class; type for example task.",
        ),
        ("task.optimizer=null", "must have a class; type for example task.optimizer._target_=torch.optim.AdamW"),
        ("optimizer=adamw", "Did you mean: task.optimizer?"),
        ("~task.optimizer", "task.optimizer=None must have a class"),
        ("task=lm task.scheduler=noam", "task.scheduler=noam must have a class; type +task.scheduler._target_=CLASS"),
        ("task=image +task.scheduler.gamma=1", "task.scheduler must have a class; type +task.scheduler._target_=CLASS"),
        ("+trainer.strategy=ddp", "trainer.strategy=ddp: leave that out, and type trainer=ddp"),
        ("trainer.num_nodes=2", "several machines need trainer=ddp"),
        ("trainer.strategy=ddp", "several processes need trainer=ddp"),
        (
            "callbacks.best.monitor=null",
            "monitor=None callbacks.best.mode=max must be a metric of the validation",
        ),
        ("callbacks.best.mode=up", "callbacks.best.mode=up must be a metric of the validation, and min or max"),
        ("logger.wandb=null", "Did you mean: loggers.wandb"),
        ("+callbacks.last.save_top_k=0", "last.ckpt is one file, and a resume needs it; leave it out"),
        ("+epoch=3", "Nothing reads 'epoch'. Did you mean: epochs"),
        ("+model.input_size=3", "model.input_size is set by the program"),
        (STOP, "EarlyStopping needs monitor; type +callbacks.stop.monitor=VALUE"),
        (f"{STOP}s", "cannot be imported. Did you mean: pytorch_lightning.callbacks.EarlyStopping"),
        ("+callbacks.x=3", "callbacks.x=3 must have a class"),
        ("task=lm +task.scheduler._target_=tasks.schedules.noam", "type +task.scheduler._partial_=true"),
    ],
)
def test_an_unknown_key_is_answered_with_keys_of_this_command(answer, words, said):
    assert said in answer(words)


@pytest.mark.parametrize(
    "word",
    [
        "logger=null",
        "~logger",
        "logger=None",
        "logger=",
        "logger=[]",
        "+logger=null",
        "~logger=wandb",
        "loggers=null",
        "~loggers",
        "loggers.wandb=null",
        "~loggers.wandb",
        "logger=[null]",
    ],
)
def test_no_logger_leaves_the_file_only(answer, word):
    assert list(answer(word).loggers) == ["csv"]


@pytest.mark.parametrize(
    "word",
    [
        "ablation=null",
        "~ablation",
        "experiment=null",
        "~experiment",
        "sweep=null",
        "~sweep",
        "ablation=[null]",
        "resume=null",
        "resume=",
        "trainer=patient callbacks.stop=null",
        "experiment=classification_sru_4l experiment=null",
        "sweep=seeds ~sweep",
        "ablation=no_vc ablation=null",
    ],
)
def test_null_for_an_optional_group_changes_nothing(answer, word):
    plain, cfg = answer(""), answer(word)
    for part in ("choices", "data", "model", "task", "ablations"):
        assert cfg[part] == plain[part]
    assert list(cfg.callbacks) == list(plain.callbacks)


def test_unusable_options_are_not_suggested(configure):
    for name in config_checks.choices("model"):
        known = [key.rpartition(".")[2] for key in config_hints.candidates(configure(f"model={name}"))]
        assert not {key.rpartition(".")[2] for key in config_checks.UNUSABLE} & set(known)


@pytest.mark.parametrize("task", config_checks.choices("task"))
def test_every_task_refuses_batch_first(configure, task):
    with pytest.raises(ValueError, match=r"model\.batch_first=True cannot be set .*: time comes first in every task"):
        config_checks.check(configure(f"task={task}", "model=sru", "+model.batch_first=true"))
    config_checks.check(configure(f"task={task}", "model=sru", "+model.batch_first=false"))


def test_an_unknown_metric_is_refused_before_the_first_epoch(configure, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"the validation has no metric val/acc, .* there are: val/loss, val/accuracy"):
        train.run(configure(*TINY, "trainer=patient", "callbacks.best.monitor=val/acc"))
    assert "epoch 1" not in capsys.readouterr().out


@pytest.mark.parametrize("task", ["image", "squad", "translation"])
def test_a_typed_metric_changes_no_result(configure, tmp_path, task):
    words = [word for word in TINY if not word.startswith("task=")] + [f"task={task}"]
    words += ["data=squad_sample"] if task == "squad" else []
    found = []
    for i, monitor in enumerate([["callbacks.best.monitor=val/loss"], ["+callbacks.best.verbose=false"]]):
        train.run(configure(*words, "callbacks.best.mode=min", *monitor, f"run_dir={tmp_path / str(i)}"))
        found.append(json.loads((tmp_path / f"{i}/metrics.json").read_text())["metrics"]["test/loss"])
    assert found[0] == found[1]


def test_a_progress_bar_is_left_out_without_a_terminal(configure, capfd):
    bar = "+callbacks.p._target_=pytorch_lightning.callbacks.RichProgressBar"
    train.run(configure(*TINY, bar, "trainer.enable_progress_bar=true"))
    assert "Epoch 0" not in "".join(capfd.readouterr())


def test_batches_to_overfit_are_the_same_in_every_epoch(configure, tmp_path, monkeypatch):
    from tasks.base import Task

    seen, step = [], Task.training_step
    monkeypatch.setattr(
        Task, "training_step", lambda self, batch: (seen.append(float(batch[0].double().sum())), step(self, batch))[1]
    )
    words = (*TINY, "+trainer.overfit_batches=2")
    train.run(configure(*words, "epochs=2"))
    train.run(configure(*words, "epochs=3", f"resume={tmp_path / 'run'}"))
    assert len(seen) == 6
    assert seen == 3 * seen[:2]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("group", ["task", "data", "model", "trainer"])
def test_null_for_a_required_group_is_answered_with_its_choices(answer, group):
    names = config_checks.choices(group)
    for word in (f"{group}=null", f"~{group}", f"{group}=none"):
        assert f"a run needs {group}=NAME, where NAME is one of: {', '.join(names)}" in answer(word)
    assert answer("task=[lm,image]").endswith("a run has one task; to run several, type -m task=lm,image")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("-m experiment=null,squad_sru_4l", "null is not a file of conf/"),
        ("logger=csv loggers.wandb=null", "There is no key 'loggers.wandb'"),
        ("hydra/launcher=null", "null is not a file of conf/"),
    ],
)
def test_null_for_something_absent_is_refused(answer, word, said):
    assert said in answer(word)


@pytest.mark.parametrize("name", ["classification", "lm", "hybrid"])
def test_suggestions_for_a_task_are_accepted(configure, name):
    """Each suggestion with a plus composes and passes the checks, for any value."""
    cfg = configure(f"task={name}")
    known = [
        key
        for key in config_hints.candidates(cfg)
        if key.startswith(("+task.optimizer.", "+model.", "+callbacks.clock"))
    ]
    assert "+task.optimizer.maximize" in known
    for key in known:
        config_checks.check_classes(configure(f"task={name}", f"{key}=null"))


@pytest.mark.parametrize("group", ["task", "model", "trainer", "logger", "data"])
def test_the_files_of_conf_pass_the_checks(configure, group):
    for name in config_checks.choices(group):
        config_checks.check_classes(configure(f"{group}={name}"))


def test_a_profiler_reports_and_a_monitor_of_the_rate_is_in_the_file(configure, tmp_path, caplog, capfd):
    import logging

    logging.getLogger("pytorch_lightning").propagate = True
    monitor = "+callbacks.rate._target_=pytorch_lightning.callbacks.LearningRateMonitor"
    decay = ("+task.optimizer.weight_decay=0.1", "+task.optimizer.betas=[0.9,0.98]")
    train.run(configure(*TINY, "+trainer.profiler=simple", monitor, *decay, "+trainer.overfit_batches=2"))
    assert "FIT Profiler Report" in caplog.text + capfd.readouterr().err
    assert "lr-Adam" in (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    # The run also resumes: its record can be read.
    train.run(configure(*TINY, "+trainer.profiler=simple", monitor, *decay, "epochs=2", f"resume={tmp_path / 'run'}"))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_fast_dev_run_ends_and_saves_nothing(configure, tmp_path, capsys, logger):
    assert train.run(configure(*TINY, f"logger={logger}", "+trainer.fast_dev_run=true")) is None
    told = capsys.readouterr().out
    assert "none: fast_dev_run saves nothing" in told
    assert "test/accuracy" in told
    assert not (tmp_path / "run").exists()


def test_fast_dev_run_does_not_change_an_existing_run(configure, tmp_path):
    train.run(configure(*TINY))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="leave it out, or resume="):
        train.run(configure(*TINY, "+trainer.fast_dev_run=true", f"resume={tmp_path / 'run'}"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_repeated_word_with_a_plus_counts_once_in_a_resume(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"overrides": ["+trainer.profiler=simple", "depth=1"]}))
    found = run_dir.add_recorded_words(
        [f"resume={tmp_path}", "+trainer.profiler=simple", "+trainer.detect_anomaly=true"]
    )
    assert found[:3] == ["+trainer.profiler=simple", "depth=1", "+trainer.detect_anomaly=true"]
    assert Path(found[3].partition("=")[2].strip("'")) == tmp_path


@pytest.mark.parametrize("word", ["+model.use_tanh=true", "+model.v1=true", "+model.custom_m=null"])
def test_a_run_accepts_the_official_names_of_options(configure, word):
    cfg = configure("task=image", word)
    config_checks.check(cfg)
    config_checks.check_classes(cfg)


def test_the_example_of_each_range_lies_within_it(configure):
    for low, high, example, keys in config_checks.RANGES:
        assert low <= example <= high, keys
        assert type(high) is float or type(example) is int, keys
