"""Complete runs: every task with every model, resume, sweeps, wandb, and wrong input."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, options
from hydra.utils import instantiate
from offline_runs import read_offline_run

import train
from tasks.run import errors, run_dir

SHORT = ("trainer.limit_train_batches=6", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")


def start(*words, **options):
    command = [sys.executable, "train.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options)


def checkpoint(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        clock = re.compile("seconds|.*_per_second|step_ms/.*|peak_memory_mb")
        return [{k: v for k, v in row.items() if not clock.fullmatch(k)} for row in csv.DictReader(file)]


def pairs():
    """Every task with every model. Not slow: two models with each task, and two tasks with each model."""
    for task in options("task"):
        for model in options("model"):
            is_quick = model in ("sru", "srupp") or task in ("classification", "lm")
            yield pytest.param(task, model, marks=[] if is_quick else [pytest.mark.slow])


@pytest.mark.parametrize(("task", "model"), list(pairs()))
def test_every_task_trains_every_model(configure, tmp_path, task, model):
    # The default corpora of the other tasks need no download.
    data = [f"data={name}" for name in ("squad_sample",) if task == "squad"]
    train.run(configure(f"task={task}", *data, f"model={model}", "trainer=debug", "depth=2", "width=64"))
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_hooks_of_a_step_are_called_where_they_do_something(configure, tmp_path, monkeypatch):
    from tasks.classification import Classification

    class Own(pl.Callback):
        def on_before_backward(self, *_):
            called.append("class")

    called, late = [], pl.Callback()
    late.on_after_backward = lambda *_: called.append("instance")
    monkeypatch.setattr(Classification, "on_before_zero_grad", lambda *_: called.append("task"))
    (tmp_path / "run").mkdir()
    cfg = configure("trainer=debug", "trainer.max_steps=1")
    data, trainer = instantiate(cfg.data), instantiate(cfg.trainer)
    task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **data.model_kwargs)
    trainer.callbacks += [Own(), late]
    trainer.fit(task, datamodule=data)
    assert called == ["task", "class", "instance"]
    assert late.on_train_batch_start is task.on_before_backward is None


def test_a_run_writes_its_record(configure, tmp_path):
    value = train.run(configure("trainer.max_epochs=2", *SHORT))
    folder = tmp_path / "run"
    outcome = json.loads((folder / "metrics.json").read_text())
    assert value == outcome["metrics"]["val/accuracy"] == max(float(row["val/accuracy"] or 0) for row in rows(folder))
    assert 0 <= outcome["metrics"]["test/accuracy"] <= 100
    assert outcome["epochs"] == 2
    assert outcome["best_epoch"] in (1, 2)
    assert outcome["encoder_parameters"] == 203_776
    assert outcome["parameters"] > outcome["encoder_parameters"]
    with (folder / "metrics.csv").open(newline="") as file:
        timed = [row for row in csv.DictReader(file) if row["seconds"]]
    clocks = [row["seconds"] for row in timed]
    for row in timed:
        examples = 32 * int(row["step"])
        assert float(row["examples_per_second"]) == pytest.approx(examples / float(row["seconds"]), rel=1e-4)
    assert outcome["examples_per_second"] == pytest.approx(32 * 12 / outcome["seconds"])
    assert outcome["seconds"] == pytest.approx(float(clocks[-1]), rel=1e-4)
    assert outcome["seconds_per_epoch"] == pytest.approx(outcome["seconds"] / 2)
    assert sum(outcome[f"step_ms/{part}"] for part in ("data", "forward", "backward", "optimizer")) > 0
    assert outcome["peak_memory_mb"] > 10
    assert "commit" in outcome
    assert [(int(row["step"]), float(row["epoch"])) for row in rows(folder)[:2]] == [(6, 1), (12, 2)]
    assert "num_layers: 2" in (folder / "config.yaml").read_text()


def test_the_network_learns_the_embedded_corpus(configure):
    accuracy = train.run(configure("trainer.max_epochs=8"))
    assert accuracy > 30  # ten classes; the largest is about a fifth


@pytest.mark.slow
@pytest.mark.parametrize("model", options("model"))
def test_every_model_learns_the_embedded_corpus_well(configure, model):
    assert train.run(configure(f"model={model}", "trainer.max_epochs=30")) > 45


def test_the_same_seed_gives_the_same_bits(configure, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        train.run(configure(f"run_dir={folder}", f"seed={seed}", "trainer.max_epochs=1", *SHORT))
    one, two, three = (checkpoint(folder)["state_dict"] for folder in folders)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["output.weight"], three["output.weight"])


def test_resumed_equals_uninterrupted(configure, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(configure(f"run_dir={whole}", "trainer.max_epochs=3", *SHORT))
    train.run(configure(f"run_dir={parts}", "trainer.max_epochs=1", *SHORT))
    torch.manual_seed(99)
    train.run(configure(f"run_dir={parts}", f"resume={parts}", "trainer.max_epochs=3", *SHORT))
    for name in ("last", "best"):
        one, two = checkpoint(whole, name), checkpoint(parts, name)
        assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
        assert one["epoch"] == two["epoch"]
    moments = [c["optimizer_states"][0]["state"] for c in (checkpoint(whole), checkpoint(parts))]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    # The resumed run replaces the row of the first part's test.
    assert rows(whole) == rows(parts)


def test_a_run_of_an_earlier_version_resumes_to_the_same_bits(configure, tmp_path):
    """Checkpoints of earlier versions store v, bias and their moments as (2, D)."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*SHORT, "callbacks.average.count=2", "callbacks.average.of=last")
    train.run(configure(*words, f"run_dir={whole}", "trainer.max_epochs=2"))
    train.run(configure(*words, f"run_dir={parts}", "trainer.max_epochs=1"))
    for path in (parts / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        state = content["state_dict"]
        for name in [name for name in state if name.startswith("encoder.") and name.endswith((".v", ".bias"))]:
            state[name] = state[name].view(2, -1)
        for moments in content.get("optimizer_states", [{"state": {}}])[0]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape == (256,):  # of a gate's biases
                    moments[name] = moments[name].view(2, -1)
        torch.save(content, path)
    train.run(configure(*words, f"run_dir={parts}", f"resume={parts}", "trainer.max_epochs=2"))
    for name in ("last", "average"):
        one, two = checkpoint(whole, name)["state_dict"], checkpoint(parts, name)["state_dict"]
        # The mean has the shapes of the best epoch, which may be that of the earlier version.
        assert all(torch.equal(one[key].flatten(), two[key].flatten()) for key in one)
    moments = [c["optimizer_states"][0]["state"] for c in (checkpoint(whole), checkpoint(parts))]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])


def test_a_resume_at_the_end_of_an_epoch_trains_no_extra_step(configure, tmp_path):
    """No validation was due there: an epoch has six batches, and every fourth has a validation."""
    often = (*SHORT, "trainer.val_check_interval=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(configure(*often, f"run_dir={whole}", "trainer.max_epochs=3"))
    for epochs in (2, 2, 3):
        more = [f"resume={parts}"] if parts.exists() else []
        train.run(configure(*often, f"run_dir={parts}", *more, f"trainer.max_epochs={epochs}"))
        assert checkpoint(parts)["global_step"] == 6 * epochs
    one, two = checkpoint(whole)["state_dict"], checkpoint(parts)["state_dict"]
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_patience_lasts_over_a_resume(configure, tmp_path):
    """With a learning rate of 0 the first epoch stays the best: both stop after the same epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ("trainer=patient", "callbacks.stop.patience=3", "task.optimizer.lr=0", *SHORT)
    train.run(configure(f"run_dir={whole}", *words))
    train.run(configure(f"run_dir={parts}", *words, "trainer.max_epochs=2"))
    train.run(configure(f"run_dir={parts}", f"resume={parts}", *words, "trainer.max_epochs=100"))
    assert [json.loads((folder / "metrics.json").read_text())["epochs"] for folder in (whole, parts)] == [4, 4]


def test_a_mean_is_over_examples_not_over_batches(configure, tmp_path, monkeypatch):
    """The last batch is shorter and has another loss, so that a mean over batches would differ."""
    from tasks.classification import Classification

    monkeypatch.setattr(
        Classification, "loss", lambda self, batch: (self.output.bias.sum() * 0 + len(batch[1]), {}, len(batch[1]))
    )
    cfg = configure("epochs=1", "callbacks.best.monitor=val/loss", "callbacks.best.mode=min", "data.batch_size=100")
    train.run(cfg)
    splits = instantiate(cfg.data)
    splits.setup()
    for stage in ("val", "test"):
        total = len(splits.splits[stage])
        full, left = divmod(total, 100)
        assert left
        found = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"][f"{stage}/loss"]
        assert found == pytest.approx((full * 100 * 100 + left * left) / total)


def test_a_moved_run_remembers_its_best_epoch(configure, tmp_path):
    """The resumed epoch has no validation, so only an earlier one can be the best."""
    train.run(configure(f"run_dir={tmp_path / 'one'}", "trainer.max_epochs=2", *SHORT))
    best = checkpoint(tmp_path / "one", "best")
    (tmp_path / "one").rename(tmp_path / "two")
    still = ("trainer.max_epochs=3", "trainer.limit_val_batches=0", *SHORT[::2])
    value = train.run(configure(f"run_dir={tmp_path / 'two'}", f"resume={tmp_path / 'two'}", *still))
    assert value == json.loads((tmp_path / "two/metrics.json").read_text())["metrics"]["val/accuracy"]
    assert value == float(
        best["callbacks"][next(key for key in best["callbacks"] if "Checkpoint" in key and "accuracy" in key)][
            "best_model_score"
        ]
    )


def test_a_run_is_not_overwritten(configure, tmp_path):
    train.run(configure("trainer=debug"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="resume="):
        train.run(configure("seed=5"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_finished_run_only_tests_again_and_refuses_fewer_epochs(configure, tmp_path, capsys):
    folder = tmp_path / "run"
    train.run(configure("trainer.max_epochs=2", *SHORT))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"trainer\.max_epochs=1 is less than the 2 epochs .* trainer\.max_epochs=3"):
        train.run(configure("trainer.max_epochs=1", f"resume={folder}", *SHORT))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    train.run(configure("trainer.max_epochs=2", f"resume={folder}", "trainer.enable_progress_bar=true", *SHORT))
    told = capsys.readouterr().out
    assert "All 2 epochs are trained, only the test is left. To train longer: trainer.max_epochs=N." in told
    assert "resumed with" not in told
    assert re.search(r"wall time +[\d.]+ s for this call; training [\d.]+ s in all", told)


@pytest.mark.parametrize("override", ["depth=3", "data.fold=2", "seed=9", "task.optimizer.lr=0.5", "model=lstm"])
def test_a_resume_refuses_another_experiment_and_leaves_the_record(configure, tmp_path, override):
    folder = tmp_path / "run"
    train.run(configure("trainer=debug"))
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=rf"resume={folder} continues the same experiment"):
        train.run(configure("trainer=debug", "trainer.max_epochs=2", f"resume={folder}", override))
    assert (folder / "config.yaml").read_text() == before


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "malicious"])
def test_a_damaged_checkpoint_is_refused_by_name(configure, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    train.run(configure("trainer=debug"))
    last = tmp_path / "run/checkpoints/last.ckpt"
    if damage in ("truncated", "empty"):
        last.write_bytes(last.read_bytes()[: 1000 if damage == "truncated" else 0])
    else:
        torch.save({"state_dict": {}} if damage == "foreign" else {"state_dict": Evil()}, last)
    with pytest.raises(ValueError, match=r"last\.ckpt is (damaged|not a checkpoint)"):
        train.run(configure("trainer=debug", f"resume={tmp_path / 'run'}"))
    assert not (tmp_path / "executed").exists()


def test_one_run_folder_takes_one_process_at_a_time(configure, tmp_path):
    cfg = configure("trainer=debug")
    with run_dir.open_run_dir(cfg), pytest.raises(FileExistsError, match="Another process"):
        train.run(cfg)


def test_a_folder_without_a_checkpoint_can_be_used_again(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 1\n")
    train.run(configure("trainer=debug"))
    assert (tmp_path / "run/metrics.json").exists()


def test_the_command_line_resumes_in_the_same_folder_and_the_same_wandb_run(tmp_path):
    folder = tmp_path / "a run"
    quiet = ("trainer.enable_progress_bar=false", f"hydra.run.dir='{folder}'")
    first = start("trainer=debug", "model=qrnn", "logger=wandb", *quiet)
    assert first.returncode == 0, first.stderr
    assert "val/accuracy" in first.stdout
    assert str(folder) in first.stdout
    identity = (folder / "wandb_id.txt").read_text()
    second = start(f"resume={folder}", "trainer.max_epochs=2")
    assert second.returncode == 0, second.stderr
    assert "resumed with trainer.max_epochs: 1 -> 2" in second.stdout
    assert (folder / "wandb_id.txt").read_text() == identity
    assert len(list((folder / "wandb").glob(f"offline-run-*-{identity}"))) == 2
    assert "sru.QRNN" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "metrics.json").read_text())["epochs"] == 2


def test_each_job_of_a_sweep_has_a_folder_and_a_wandb_run(tmp_path):
    done = start(
        "-m", "ablation=[],[no_vc]", "depth=1,2", "trainer=debug", "trainer.enable_progress_bar=false",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("*/metrics.json"))
    assert len(folders) == 4
    found = [read_offline_run(folder) for folder in folders]
    assert len({run["id"] for run in found}) == 4
    assert {run["config"]["depth"] for run in found} == {1, 2}
    assert {"sru", "pydoc", "classification"} <= set(found[0]["tags"])
    assert sum("no_vc" in run["tags"] for run in found) == 2
    assert all("val/accuracy" in run["summary"] for run in found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=sruu"], "Did you mean: sru"),
        (["task=clasification"], "Did you mean: classification"),
        (["data=pydocs"], "Did you mean: pydoc"),
        (["trainer.max_epoch=3"], "Did you mean: trainer.max_epochs"),
        (["modle=sru"], "Did you mean: model"),
        (["data.fold=10"], "data.fold=10 must be a whole number, 0 to 9; type for example data.fold=0"),
        (["trainer.devices=2"], "trainer.devices=2 needs several processes: type trainer=ddp"),
        (["run_dir="], "run_dir= must name a folder"),
        (["data=cr", "data.root=/dev/null/x"], "/dev/null/x"),
        (["model=lstm", "ablation=[no_vc]"], "sru.LSTM has no option 'has_vc_term'"),
        (["run_dir=/proc/nowhere"], "run_dir=/proc/nowhere cannot be written"),
        (["resume=/nonexistent"], "resume=/nonexistent is not a run folder"),
        (["depth=deep"], "depth=deep must be a whole number, 1 to 1000"),
        (["hydra.run.dir=/dev/null/x"], "hydra.run.dir=FOLDER"),
        (["ablation=[no_vx]"], "Did you mean: no_vc"),
        (["model.dropout=1.5"], "dropout must lie in [0, 1), not 1.5"),
        (["trec"], "'trec': expected KEY=VALUE; type data=trec"),
        (["depth", "3"], "'depth': expected KEY=VALUE; type for example depth=3"),
        (["--depth", "3"], "depth=3, not --depth 3"),
        (["--model=lstm"], "--help lists"),
        (["ablation=no_vc,no_highway"], "add -m; type a list as 'ablation=[no_vc,no_highway]'."),
        (["ablation=[no_vc,", "no_highway]"], "'ablation=[no_vc,no_highway]'"),
    ],
)
def test_bad_input_gets_one_message(tmp_path, monkeypatch, capsys, words, expected):
    """In this process, because a new one takes seconds."""
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that monkeypatch restores it
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}/hydra", "logger=csv", *words])
    try:
        with pytest.raises(SystemExit) as caught:
            errors.guard(train.command)
    finally:
        HydraConfig.instance().cfg = None
    told = f"{capsys.readouterr().err}{caught.value.code}"
    assert caught.value.code != 0
    assert expected in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_a_refused_command_ends_with_its_message_and_status_1(tmp_path):
    done = start(f"hydra.run.dir={tmp_path}/hydra", "logger=csv", "model=sruu")
    assert done.returncode == 1
    assert "Did you mean: sru" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_no_folder(tmp_path):
    done = start(f"run_dir={tmp_path}/own", f"hydra.run.dir={tmp_path}/hydra", "logger=csv", "model.dropout=1.5")
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())
