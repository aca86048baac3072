"""Averaged checkpoints: which validations are kept, their mean, and the test with it."""

import json

import pytest
import torch

import tasks.trained
import train
from tasks.run.checkpoint_averaging import load, mean

SMALL = ("task=translation", "depth=1", "width=16", "data.tokens_per_batch=1200", "trainer.val_check_interval=2")


def weights(path):
    return load(str(path))["state_dict"]


def test_a_mean_of_numbers():
    states = [{"w": torch.tensor([value, 1.0]), "n": torch.tensor(3)} for value in (1.0, 2.0, 6.0)]
    found = mean(states)
    assert found["w"].tolist() == [3.0, 1.0]
    assert found["n"] == 3
    assert mean([{"w": torch.tensor([256.0]).bfloat16()}] * 3)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("of", ["best", "last"])
def test_the_test_uses_the_mean_of_the_kept_checkpoints(configure, tmp_path, of):
    train.run(configure(*SMALL, "trainer.max_epochs=2", "callbacks.average.count=3", f"callbacks.average.of={of}"))
    folder = tmp_path / "run/checkpoints"
    kept = sorted(folder.glob("kept-*.ckpt"))
    assert len(kept) == 3
    if of == "last":
        assert load(str(folder / "last.ckpt"))["global_step"] == max(int(path.stem[5:]) for path in kept)
    found, expected = weights(folder / "average.ckpt"), [weights(path) for path in kept]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(state[name] for state in expected) / 3)
    record = json.loads((tmp_path / "run/metrics.json").read_text())
    assert record["tested"] == "average.ckpt"
    default, _ = tasks.trained.load(str(tmp_path / "run"))
    assert all(torch.equal(value, found[name]) for name, value in default.state_dict().items())
    # The loss of the test shows which weights it used.
    task, _ = tasks.trained.load(str(folder / "average.ckpt"))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    data = train.instantiate(configure(*SMALL).data)
    data.setup()
    with torch.no_grad():
        total = count = 0
        for source, target, _ in data.test_dataloader():
            wanted = target[1:]
            losses = torch.nn.functional.cross_entropy(
                task(source, target[:-1]).flatten(0, 1), wanted.flatten(), ignore_index=0, reduction="sum"
            )
            total, count = total + float(losses), count + int((wanted != 0).sum())
    assert metrics["test/loss"] == pytest.approx(total / count, rel=1e-4)


def test_without_averaging_nothing_is_kept(configure, tmp_path):
    train.run(configure(*SMALL, "trainer.max_epochs=1"))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("of", ["best", "last"])
def test_a_resumed_run_has_the_same_mean(configure, tmp_path, of):
    """Stopped after more validations than are kept, and again before the test."""
    words = (*SMALL, "callbacks.average.count=3", f"callbacks.average.of={of}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(configure(*words, "trainer.max_epochs=6", f"run_dir={whole}"))
    for epochs in (4, 6, 6):
        resume = [f"resume={parts}"] if parts.exists() else []
        train.run(configure(*words, f"trainer.max_epochs={epochs}", f"run_dir={parts}", *resume))
        assert len(list((parts / "checkpoints").glob("kept-*"))) == 3
    one, two = (weights(folder / "checkpoints/average.ckpt") for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_file_deleted_before_a_kill_is_not_averaged(configure, tmp_path):
    words = (*SMALL, "callbacks.average.count=3", f"run_dir={tmp_path / 'run'}")
    train.run(configure(*words, "trainer.max_epochs=4"))
    folder = tmp_path / "run/checkpoints"
    first = min(folder.glob("kept-*"), key=lambda path: int(path.stem[5:]))
    first.unlink()
    train.run(configure(*words, "trainer.max_epochs=4", f"resume={tmp_path / 'run'}"))
    kept = [weights(path) for path in folder.glob("kept-*")]
    assert len(kept) == 2
    for name, value in weights(folder / "average.ckpt").items():
        torch.testing.assert_close(value, (kept[0][name] + kept[1][name]) / 2)


def test_a_resume_keeps_the_kind_of_mean(configure, tmp_path):
    words = (*SMALL, "callbacks.average.count=2", f"run_dir={tmp_path / 'run'}")
    train.run(configure(*words, "trainer.max_epochs=2", "callbacks.average.of=last"))
    with pytest.raises(ValueError, match=r"callbacks\.average\.of was last and is best"):
        train.run(configure(*words, "trainer.max_epochs=3", f"resume={tmp_path / 'run'}"))


def test_a_damaged_checkpoint_is_named(configure, tmp_path, capsys):
    words = (*SMALL, "callbacks.average.count=2", f"run_dir={tmp_path / 'run'}")
    train.run(configure(*words, "trainer.max_epochs=2"))
    folder = tmp_path / "run/checkpoints"
    path = sorted(folder.glob("kept-*"))[0]
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"kept-\d+\.ckpt is damaged; move it away to average the others"):
        train.run(configure(*words, f"resume={tmp_path / 'run'}", "trainer.max_epochs=2"))
    path.unlink()
    train.run(configure(*words, f"resume={tmp_path / 'run'}", "trainer.max_epochs=2"))
    assert "only 1 checkpoints to average" in capsys.readouterr().out
    assert not (folder / "average.ckpt").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("callbacks.average.monitor=nonsense", r"callbacks\.average\.monitor=nonsense mode=min: leave both out"),
        ("callbacks.average.count=0", r"callbacks\.average\.count=0 must be a whole number, 1 for no mean"),
        ("callbacks.average.of=all", r"callbacks\.average\.of=all must be best or last"),
    ],
)
def test_a_wrong_mean_is_refused(configure, word, message):
    with pytest.raises(Exception, match=message):
        train.run(configure(*SMALL, word))
