"""predict.py: continue a prompt, score a text, and refuse wrong input."""

import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from test_lm import SMALL

import predict
import tasks.trained
import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of a small model."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, "train.py", *SMALL, "epochs=1", "logger=csv", f"run_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_a_prompt_is_continued(trained, capsys):
    told = []
    for checkpoint, seed in ((trained, 1), (trained / "checkpoints/best.ckpt", 1), (trained, 2)):
        predict.main([f"checkpoint={checkpoint}", "prompt=The ", "length=40", f"seed={seed}"])
        told.append(capsys.readouterr().out)
    assert told[0].startswith("The ")
    assert len(told[0]) == 45
    assert told[0] == told[1] != told[2]


def test_a_text_is_scored_line_by_line(trained, tmp_path, capsys):
    (tmp_path / "text").write_text("def f(x):\n    return x\n\nThe end\n")
    predict.main([f"checkpoint={trained}", f"input={tmp_path / 'text'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1:] for line in lines[:-1]] == [["def f(x):"], ["return x"], [], ["The end"]]
    scores = [float(line.split()[0]) for line in lines]
    lengths = [10, 13, 1, 8]
    mean = sum(score * length for score, length in zip(scores, lengths, strict=False)) / sum(lengths)
    assert scores[-1] == pytest.approx(mean, abs=2e-3)
    assert lines[-1].endswith("bits per character of all")


def test_any_bytes_are_scored_as_they_are(configure, tmp_path, capsys):
    """Invalid UTF-8, a form feed, a carriage return, and no newline at the end."""
    content = b"abc\xff\x0cd\r\n\xe9a\n" * 400
    (tmp_path / "text").write_bytes(content)
    train.run(configure(*SMALL, "data=bytes", f"data.path={tmp_path / 'text'}", "epochs=1"))
    (tmp_path / "some").write_bytes(content[:11] + b"abc\xff")
    capsys.readouterr()
    predict.main([f"checkpoint={tmp_path / 'run'}", f"input={tmp_path / 'some'}"])
    lines = capsys.readouterr().out.split("\n")
    assert [line[10:] for line in lines[:3]] == ["abc\ufffd\x0cd\r", "\ufffda", "abc\ufffd"]
    predict.main([f"checkpoint={tmp_path / 'run'}", "prompt=abc", "length=9", "temperature=1e-40"])


def test_a_prompt_and_its_continuation_are_utf8_in_any_locale(configure, tmp_path, monkeypatch, capsys):
    text = "ab\u2026c \u00e9\n"
    (tmp_path / "text").write_text(text * 400, encoding="utf-8")
    files = ("data=bytes", "data.unit=characters", f"data.path={tmp_path / 'text'}")
    train.run(configure(*SMALL, *files, "epochs=1"))
    command = [sys.executable, "predict.py", f"checkpoint={tmp_path / 'run'}", "prompt=b\u2026c \u00e9", "length=1"]
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "b\u2026c \u00e9" in done.stdout.decode()
    # Standard input in an encoding that has none of these characters.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))
    predict.main([f"checkpoint={tmp_path / 'run'}", "input=-"])
    assert text.strip() in capsys.readouterr().out


def test_a_text_without_lines_is_scored(configure, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"abc de f " * 500)
    train.run(configure(*SMALL, "data=bytes", f"data.path={tmp_path / 'text'}", "epochs=1"))
    (tmp_path / "some").write_text("ab\ncd\n")
    predict.main([f"checkpoint={tmp_path / 'run'}", f"input={tmp_path / 'some'}"])
    assert "  cd\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prompt=x"], "checkpoint is missing"),
        (["checkpoint=/nowhere", "prompt=x"], "checkpoint=/nowhere is neither"),
        (["checkpoint={run}"], "give prompt='some text'"),
        (["checkpoint={run}", "prompt="], "the prompt is empty"),
        (["checkpoint={run}", "prompt=\u4e2d"], "'\u4e2d' is not in the model's vocabulary of"),
        (["checkpoint={run}", "prompt=x", "length=-1"], "length=-1 must be 0 or above"),
        (["checkpoint={run}", "prompt=x", "length=many"], "length=many must be a whole number"),
        (["checkpoint={run}", "prompt=x", "device=tpu"], "device=tpu must be auto, cpu"),
        (["checkpoint={run}", "prompt=x", "top_p=0"], "top_p=0.0 above 0"),
        (["checkpoint={run}", "prompt=x", "temperature=-1"], "temperature=-1.0 must be 0"),
        (["checkpoint={run}", "prompt=x", "temperature=nan"], "temperature=nan must be 0"),
        (
            ["checkpoint={run}", "prompt=x", "topk=3"],
            "there is no option 'topk'; there are: checkpoint, device, prompt",
        ),
        (["checkpoint={run}", "input=/nowhere"], "input=/nowhere cannot be read"),
        (["checkpoint={run}", "prompt"], "'prompt': expected KEY=VALUE"),
        (["checkpoint={run}/config.yaml", "prompt=x"], "config.yaml"),
    ],
)
def test_wrong_options_of_predict_are_refused(trained, words, expected):
    with pytest.raises((ValueError, OSError)) as caught:
        predict.main([word.replace("{run}", str(trained)) for word in words])
    assert expected in str(caught.value)


def test_the_command_explains_itself_and_its_errors():
    def run(*words):
        return subprocess.run(
            [sys.executable, "predict.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )

    usage, wrong = run(), run("prompt=x")
    assert (usage.returncode, wrong.returncode) == (0, 1)
    assert "temperature: 1 as trained" in usage.stdout
    assert wrong.stderr.startswith("error: checkpoint is missing; type checkpoint=FOLDER")
    assert "Traceback" not in wrong.stderr


def copy_of(trained, folder, **changes):
    """A copy of the run with a changed config.yaml and, as in older versions, no configuration in its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    content = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    config = OmegaConf.create(content.pop("config"))
    torch.save(content, folder / "checkpoints/best.ckpt")
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def test_a_checkpoint_of_another_size_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml is damaged, or does not belong to .*best\.ckpt"):
        tasks.trained.load(str(copy_of(trained, tmp_path / "run", model__hidden_size=24)))


@pytest.mark.parametrize("target", ["os.system", "tasks.run.files.write_text", "data.lm.Text", "torch.nn.Linear"])
def test_a_folder_from_a_stranger_builds_none_of_its_classes(trained, tmp_path, target):
    with pytest.raises(ValueError, match="not part of this project; nothing was built"):
        tasks.trained.load(str(copy_of(trained, tmp_path / "one", model___target_=target)))
    with pytest.raises(ValueError, match="not part of this project; nothing was built"):
        tasks.trained.load(str(copy_of(trained, tmp_path / "two", model__transform_module={"_target_": target})))
    with pytest.raises(ValueError, match="not part of this project; nothing was built"):
        tasks.trained.load(
            str(copy_of(trained, tmp_path / "three", task__linear={"_target_": target, "_partial_": True}))
        )
