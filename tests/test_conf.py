"""Every file of conf/ composes, and names classes and options that exist."""

import inspect
import itertools
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, options
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from tasks.run import config_checks, run_dir

EVERY = [
    *(f"task={name}" for name in options("task")),
    *(f"data={name}" for name in options("data")),
    *(f"model={name}" for name in options("model")),
    *(f"ablation=[{name}]" for name in options("ablation")),
    *(f"trainer={name}" for name in options("trainer")),
    *(f"logger={name}" for name in options("logger")),
    *(f"experiment={name}" for name in options("experiment")),
    *(f"sweep={name}" for name in options("sweep")),  # their jobs: tests/tasks/run/test_sweep.py
]


def bind(node):
    """Check the signature of every _target_ below a resolved node."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list):
            bind(value)
    if isinstance(node, dict) and "_target_" in node:
        keywords = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
        signature = inspect.signature(get_object(node["_target_"]))
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**keywords)


@pytest.mark.parametrize("override", EVERY)
def test_a_configuration_composes_and_binds(configure, override):
    cfg = configure(override)
    bind(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    config_checks.check(cfg)


@pytest.mark.parametrize("name", options("ablation"))
def test_an_ablation_changes_one_value_and_names_itself(configure, name):
    plain, ablated = configure(), configure(f"ablation=[{name}]")
    changed = {key: new for key, _, new in run_dir.changes(plain, ablated)}
    assert changed.pop(f"ablations.{name}") is True
    assert changed.pop("choices.ablation") == [name]
    assert [key.split(".")[0] for key in changed] == ["model"]


def test_ablations_combine_as_a_list(configure):
    cfg = configure("ablation=[no_vc,no_highway,no_scaling]")
    assert cfg.choices.ablation == ["no_vc", "no_highway", "no_scaling"]
    assert not cfg.model.has_vc_term
    assert not cfg.model.has_skip_term
    assert not cfg.model.rescale


@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("name", options("model"))
def test_a_model_keeps_the_contract_of_an_encoder(configure, name, both):
    encoder = instantiate(configure(f"model={name}", f"bidirectional={both}").model)(input_size=6).eval()
    assert bool(encoder.bidirectional) == both
    x, pad = torch.randn(5, 2, 6), torch.arange(5)[:, None] >= torch.tensor([5, 2])
    h, state = encoder(x, None, pad)
    assert h.shape == (5, 2, encoder.output_size)
    assert not h[pad].any()
    torch.testing.assert_close(encoder(x[:2, 1:])[0], h[:2, 1:], rtol=1e-4, atol=1e-5)
    h, _ = encoder(torch.randn(3, 2, 6), state)
    assert h.shape == (3, 2, encoder.output_size)


def test_depth_reaches_the_model(configure):
    assert configure("depth=7").model.num_layers == 7


def test_an_experiment_overrides_the_defaults_and_the_command_line_overrides_it(configure):
    name = "classification_sru_8l"
    assert configure(f"experiment={name}").model.num_layers == 8
    assert configure(f"experiment={name}", "depth=3").model.num_layers == 3


def test_every_yaml_file_is_reached_by_a_test():
    files = {path for path in (ROOT / "conf").rglob("*.yaml") if not path.name.startswith("_")}
    groups = itertools.groupby(sorted(files), key=lambda path: path.parent.name)
    found = {f"{group}/{path.stem}" for group, paths in groups for path in paths if group != "conf"}
    assert found == {override.replace("=[", "/").replace("=", "/").rstrip("]") for override in EVERY}


def test_help_is_short_and_lists_every_choice():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) < 40
    for group in ("task", "data", "model", "ablation", "trainer", "logger", "experiment", "sweep"):
        assert re.search(rf"^ *{group}: .*{', '.join(options(group))}$", done.stdout, re.MULTILINE)
    assert "KEY=VALUE" in done.stdout


def test_an_option_of_another_model_is_refused_by_name(configure):
    with pytest.raises(ValueError, match=r"sru\.LSTM has no option 'has_skip_term'"):
        config_checks.check(configure("model=lstm", "ablation=[no_highway]"))


@pytest.mark.parametrize(
    ("task", "key", "inside", "outside"),
    [
        ("speech", "task.warp", [0, 0.9], [-0.01, 0.91, 9]),
        ("speech", "task.colour", [0, 10], [-0.01, 10.1]),
        ("speech", "task.time_width", [0, 1], [-0.01, 1.01]),
        ("classification", "dropout", [0, 0.999], [-0.01, 1.0]),
        ("classification", "seed", [0, 2**32 - 1], [-1, 2**32, 0.5]),
        ("classification", "data.fold", [0, 9], [-1, 10]),
        ("classification", "task.optimizer.lr", [0, 1.0], [-0.001]),
        ("translation", "task.label_smoothing", [0, 0.999], [-0.01, 1.0]),
        ("classification", "trainer.max_epochs", [1], [0, -1, 1.5]),
    ],
)
def test_a_value_is_taken_up_to_the_edge_of_its_range_and_no_further(configure, task, key, inside, outside):
    for value in inside:
        config_checks.check(configure(f"task={task}", f"{key}={value}"))
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{re.escape(key)}={value} must be"):
            config_checks.check(configure(f"task={task}", f"{key}={value}"))
