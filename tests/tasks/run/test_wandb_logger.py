"""What a run logs to wandb, read from the files of offline runs."""

import json
import os

import pytest
import wandb
import yaml
from conftest import ROOT
from hydra.utils import instantiate
from offline_runs import read_offline_run
from omegaconf import OmegaConf

import train
from tasks.classification import Classification
from tasks.run import config_checks

QUICK = ("logger=wandb", "trainer=debug", "depth=1", "width=8", "data.batch_size=8")


@pytest.fixture(autouse=True)
def _no_run_is_left():
    yield
    assert wandb.run is None


def begun(cfg):
    """What is logged at the start of a run; nothing is trained."""
    logger = instantiate(cfg.loggers.wandb)
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    logger.finish(None)
    return read_offline_run(logger.run_dir)


@pytest.mark.parametrize(("tags", "left"), [("a,b,", "a,b"), (",,", None), ("a,, b", "a,b")])
def test_variables_are_cleaned_before_wandb_reads_them(configure, monkeypatch, tags, left):
    monkeypatch.setenv("WANDB_TAGS", tags)
    monkeypatch.setenv("WANDB_MODE", "OFFLINE")
    cfg = configure("logger=wandb")
    config_checks.check(cfg)
    assert (os.environ.get("WANDB_TAGS"), os.environ["WANDB_MODE"]) == (left, "offline")
    assert begun(cfg)["tags"] == ["classification", "pydoc", "sru", *(left.split(",") if left else ())]


def test_a_run_logs_its_configuration_and_its_result(configure, tmp_path):
    folder = tmp_path / "run"
    train.run(configure(*QUICK, "trainer.max_epochs=2", "ablation=[no_vc]", "loggers.wandb.tags=[mine]"))
    run, outcome = read_offline_run(folder), json.loads((folder / "metrics.json").read_text())
    assert run["name"] == "pydoc sru 1x8 no_vc seed 1234 fold 0"
    assert run["group"] == "pydoc sru 1x8 no_vc"
    assert (run["project"], run["job_type"], run["exit_code"]) == ("sru", "train", 0)
    assert run["tags"] == ["classification", "pydoc", "sru", "no_vc", "mine"]
    assert run["id"] == (folder / "wandb_id.txt").read_text()
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: value for key, value in run["config"].items() if key != "_wandb"} == plain
    metrics = outcome.pop("metrics")
    assert {"val/accuracy", "test/accuracy", "test/loss"} <= set(metrics)
    for name, value in (outcome | metrics).items():
        assert run["summary"][name] == value, name
    assert {"parameters", "encoder_parameters", "examples_per_second", "seconds_per_epoch"} <= set(run["summary"])
    assert {"peak_memory_mb", "commit"} <= set(run["summary"])
    assert not any("published" in name or "difference" in name for name in run["summary"])
    assert run["artifacts"] == {}


def test_steps_seconds_and_epochs_are_axes_and_the_best_epoch_is_the_summary(configure, tmp_path):
    train.run(configure(*QUICK, "trainer.max_epochs=3", "callbacks.best.monitor=val/loss", "callbacks.best.mode=min"))
    run = read_offline_run(tmp_path / "run")
    step = "trainer/global_step"
    assert run["metrics"]["*"] == (step,)
    assert run["metrics"]["val/loss"] == (step, "min")
    assert {"seconds", "epoch", step} <= set(run["metrics"])
    trained = [row for row in run["rows"] if "val/loss" in row]
    assert [(row[step], row["epoch"]) for row in trained] == [(2, 1), (4, 2), (6, 3)]
    assert 0 < trained[0]["seconds"] < trained[1]["seconds"] < trained[2]["seconds"]
    assert run["summary"]["val/loss"] == pytest.approx(min(row["val/loss"] for row in trained))


def test_a_published_value_is_a_line_beside_the_curves_and_a_difference(configure, tmp_path):
    cfg = configure(*QUICK)
    cfg.paper = {"metric": "test/accuracy", "value": {"pydoc": 71.5, "cr": 1.0}, "source": "a table"}
    train.run(cfg)
    run = read_offline_run(tmp_path / "run")
    assert len(run["rows"]) == 2  # an epoch and the test
    assert {row["published/test/accuracy"] for row in run["rows"]} == {71.5}
    assert run["summary"]["published/test/accuracy"] == 71.5
    assert run["summary"]["difference/test/accuracy"] == run["summary"]["test/accuracy"] - 71.5


def test_artifacts_are_the_tested_checkpoint_and_the_files_of_the_test(configure, tmp_path):
    train.run(configure(*QUICK, "loggers.wandb.artifacts=true"))
    found = read_offline_run(tmp_path / "run")["artifacts"]
    folder = tmp_path / "run"
    assert found == {
        "model": {
            "best.ckpt": str(folder / "checkpoints/best.ckpt"),
            "config.yaml": str(folder / "config.yaml"),
        }
    }


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["task=hybrid"], {"likelihoods.ark", "likelihoods.scp"}),
        (["task=squad", "data=squad_sample"], {"predictions.json"}),
    ],
)
def test_the_files_of_a_test_are_uploaded_as_predictions(configure, tmp_path, words, names):
    train.run(configure(*words, "logger=wandb", "trainer=debug", "loggers.wandb.artifacts=true"))
    paths = {name: tmp_path / "run" / name for name in names}
    assert all(path.stat().st_size for path in paths.values())
    found = read_offline_run(tmp_path / "run")["artifacts"]["predictions"]
    assert found == {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("words", "name", "group"),
    [
        (
            ["experiment=classification_sru_8l", "data.fold=3", "seed=7"],
            "cr sru 8x128 seed 7 fold 3",
            "classification_sru_8l cr",  # one of six corpora
        ),
        (["experiment=squad_sru_4l"], "{} seed 1234", "squad_sru_4l"),
        (["model=cnn"], "pydoc cnn seed 1234 fold 0", "pydoc cnn"),
        (["task=lm", "ablation=[no_vc,no_highway]"], "{} no_highway no_vc seed 1234", "{} no_highway no_vc"),
        (["loggers.wandb.group=mine"], "{} seed 1234 fold 0", "mine"),
    ],
)
def test_a_group_is_the_experiment_or_the_name_without_seed_and_fold(configure, words, name, group):
    cfg = configure("logger=wandb", *words)
    own = f"{cfg.choices.data} {cfg.choices.model} {cfg.depth}x{cfg.width}"
    run = begun(cfg)
    assert (run["name"], run["group"]) == (name.format(own), group.format(own))
    assert (cfg.choices.experiment in run["tags"]) == (cfg.choices.experiment is not None)


def test_a_failed_run_is_marked_as_failed_and_keeps_its_best_value(configure, tmp_path, monkeypatch):
    real, calls = Classification.loss, []

    def loss(self, batch):
        calls.append(1)
        if len(calls) > 6:  # in the second epoch
            raise RuntimeError("out of luck")
        return real(self, batch)

    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", loss)
        with pytest.raises(RuntimeError, match="out of luck"):
            train.run(configure(*QUICK, "trainer.max_epochs=3", f"run_dir={one}"))
    train.run(configure(*QUICK, f"run_dir={two}"))
    failed, done = read_offline_run(one), read_offline_run(two)
    assert (failed["exit_code"], done["exit_code"]) == (1, 0)
    assert failed["id"] != done["id"]
    assert failed["summary"]["val/accuracy"] == {"max": failed["rows"][0]["val/accuracy"]}
    assert "test/accuracy" not in failed["summary"]
    train.run(configure(*QUICK, "trainer.max_epochs=3", f"run_dir={one}", f"resume={one}"))
    resumed = read_offline_run(one)
    assert (resumed["id"], resumed["exit_code"]) == (failed["id"], 0)
    assert [row["epoch"] for row in resumed["rows"] if "val/accuracy" in row] == [2, 3]
    assert len(list(one.glob("wandb/offline-run-*"))) == 2


def test_disabled_wandb_writes_no_file(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train.run(configure(*QUICK, "loggers.wandb.artifacts=true"))
    assert (tmp_path / "run/metrics.json").exists()
    assert not list((tmp_path / "run").rglob("*.wandb"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("project=a/b", r"loggers\.wandb\.project=a/b must be .* without any of / .* type for example .*project=sru"),
        ("project=", "loggers.wandb.project= must be"),
        ("entity=3", "loggers.wandb.entity=3 must be a user's or team's name, or null"),
        (f"group={'x' * 129}", "must be a text of up to 128 characters, or null"),
        ("job_type=null", "loggers.wandb.job_type=None must be a text"),
        ("tags=mine", r"loggers\.wandb\.tags=mine must be a list of texts .* loggers\.wandb\.tags=\[\]"),
        ("tags=[mine,'']", "must be a list of texts of up to 64 characters"),
        ("artifacts=all", "loggers.wandb.artifacts=all must be true or false"),
    ],
)
def test_a_wrong_option_is_refused_before_training(configure, word, message):
    with pytest.raises(ValueError, match=message):
        config_checks.check(configure("logger=wandb", f"loggers.wandb.{word}"))


def test_the_file_lists_every_option_with_its_default():
    import inspect

    from tasks.run.wandb_logger import Wandb

    cfg = OmegaConf.load(ROOT / "conf/logger/wandb.yaml")
    cfg.run_dir = "run"
    listed = OmegaConf.to_container(cfg, resolve=True)["loggers"]["wandb"]
    defaults = {name: p.default for name, p in inspect.signature(Wandb).parameters.items() if name != "run_dir"}
    assert {k: v for k, v in listed.items() if k not in ("_target_", "run_dir")} == defaults | {"tags": []}


SAID = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_NAME": "a name",
    "WANDB_RUN_GROUP": "a group",
    "WANDB_JOB_TYPE": "a job",
    "WANDB_RUN_ID": "id7",
    "WANDB_TAGS": "one, two",
    "WANDB_NOTES": "a note",
}


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=VALUE, ...): set the variables and make wandb read them again; undone after the test."""

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()

    yield set_variables
    monkeypatch.undo()
    wandb.teardown()


def test_environment_variables_of_wandb_are_defaults(configure, environment):
    environment(**SAID)
    run = begun(configure("logger=wandb"))
    assert (run["project"], run["entity"], run["name"], run["group"]) == ("theirs", "team", "a name", "a group")
    assert (run["job_type"], run["id"], run["notes"]) == ("a job", "id7", "a note")
    assert run["tags"] == ["classification", "pydoc", "sru", "one", "two"]


def test_options_override_environment_variables_of_wandb(configure, environment):
    environment(**SAID)
    words = {"project": "mine", "entity": "own", "name": "my name", "group": "my group", "job_type": "job"}
    words = [f"loggers.wandb.{name}={value}" for name, value in words.items()]
    run = begun(configure("logger=wandb", *words, "loggers.wandb.tags=[three]"))
    assert [run[key] for key in ("project", "entity", "name", "group", "job_type")] == [
        "mine",
        "own",
        "my name",
        "my group",
        "job",
    ]
    assert run["tags"][-1] == "three"
    assert "one" not in run["tags"]


def test_an_empty_environment_variable_of_wandb_is_ignored(configure, environment):
    environment(**dict.fromkeys([*SAID, "WANDB_MODE", "WANDB_DIR"], ""))
    cfg = configure("logger=wandb", "depth=1", "width=8")
    config_checks.check(cfg)
    assert (cfg.loggers.wandb.project, cfg.loggers.wandb.entity) == ("sru", None)
    run = begun(cfg)
    assert (run["project"], run["name"], len(run["id"])) == ("sru", "pydoc sru 1x8 seed 1234 fold 0", 8)


def test_a_resume_keeps_its_wandb_run_if_the_environment_variables_change(
    configure, tmp_path, environment, monkeypatch, capsys
):
    environment(**SAID)
    train.run(configure(*QUICK))
    for name in SAID:
        monkeypatch.delenv(name)
    environment(WANDB_RUN_ID="id8", WANDB_PROJECT="another")
    again = (*QUICK, "trainer.max_epochs=2", f"resume={tmp_path / 'run'}")
    train.run(configure(*again))
    run = read_offline_run(tmp_path / "run")
    for key in ("project", "entity", "name", "group", "job_type", "id"):
        assert run[key] == SAID[{"group": "WANDB_RUN_GROUP", "id": "WANDB_RUN_ID"}.get(key, f"WANDB_{key.upper()}")]
    told = capsys.readouterr().out
    assert "WANDB_RUN_ID=id8 is not used: the run continues as id7 on wandb" in told
    assert "WANDB_PROJECT=another is not used: type loggers.wandb.project= to change theirs" in told
    assert begun(configure(*again, "loggers.wandb.project=moved"))["project"] == "moved"


def test_wandb_writes_to_wandb_dir_and_the_table_names_it(configure, tmp_path, environment, capsys):
    place = tmp_path / "elsewhere"
    environment(WANDB_DIR=str(place), WANDB_RUN_ID="id9")
    train.run(configure(*QUICK))
    assert read_offline_run(place)["id"] == "id9"
    assert not (tmp_path / "run/wandb").exists()
    assert f"wandb sync {place}/wandb/offline-run-*-id9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WANDB_MODE", "nonsense", "WANDB_MODE=nonsense must be one of online, offline, disabled, shared"),
        ("WANDB_MODE", "online", "WANDB_MODE=online needs an account: type wandb login, or WANDB_MODE=offline"),
        ("WANDB_RUN_ID", "a/b", "WANDB_RUN_ID=a/b must be a name of up to 128 characters without any of"),
        ("WANDB_PROJECT", "a/b", "WANDB_PROJECT=a/b must be a name .* type for example loggers.wandb.project=sru"),
        ("WANDB_NAME", "x" * 129, "WANDB_NAME=x* must be a text of up to 128 characters"),
        ("WANDB_TAGS", f"a,{'x' * 65}", "WANDB_TAGS has x*, longer than 64 characters"),
    ],
)
def test_a_wrong_environment_variable_of_wandb_is_refused_before_training(
    configure, tmp_path, environment, name, value, message
):
    environment(**{name: value}, WANDB_CONFIG_DIR=str(tmp_path), NETRC=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=message):
        config_checks.check(configure("logger=wandb"))
    config_checks.check(configure())  # wandb is not asked


def test_modes_are_those_of_wandb():
    from typing import get_args

    from tasks.run.wandb_options import MODES

    assert set(MODES) == set(get_args(wandb.Settings.model_fields["mode"].annotation))


def sweep_words(parameters):
    """The command that a wandb agent starts for these parameters, from wandb's own functions."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    sweep = load_sweep_config(str(ROOT / "scripts/wandb_sweep.yaml"))
    args = create_sweep_command_args({"args": {name: {"value": value} for name, value in parameters.items()}})
    words = []
    for word in create_sweep_command(sweep["command"]):
        words += args.get(word[2:-1], [word] if word != "${env}" else []) if word.startswith("${") else [word]
    return sweep, words


def test_the_command_of_an_agent_composes_and_optimises_a_logged_metric(configure):
    sweep, _ = sweep_words({})
    for pick in (min, max):
        chosen = {
            name: p["value"] if "value" in p else pick(p["values"]) if "values" in p else p[pick.__name__]
            for name, p in sweep["parameters"].items()
        }
        _, words = sweep_words(chosen)
        assert words[:2] == ["python", "train.py"]
        cfg = configure(*words[2:])
        config_checks.check(cfg)
        assert cfg.loggers.wandb._target_ == "tasks.run.wandb_logger.Wandb"
        assert (cfg.model.num_layers, cfg.task.optimizer.lr) == (chosen["depth"], chosen["task.optimizer.lr"])
        best = cfg.callbacks.best
        assert sweep["metric"] == {"name": best.monitor, "goal": {"max": "maximize", "min": "minimize"}[best.mode]}
    assert sweep["method"] in ("bayes", "random", "grid")
    assert sweep["program"] == "train.py"


def test_an_agents_run_keeps_the_id_and_project_of_the_agent(configure, tmp_path, monkeypatch):
    parameters = tmp_path / "config-abc123.yaml"
    parameters.write_text("wandb_version: 1\ndepth: {value: 1}\nmodel: {value: sru}\n")
    agents = {"SWEEP_ID": "sweep7", "RUN_ID": "abc123", "PROJECT": "theirs", "SWEEP_PARAM_PATH": str(parameters)}
    with monkeypatch.context() as patch:
        for name, value in agents.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # what it knows of the environment
        train.run(configure(*QUICK))
        run = read_offline_run(tmp_path / "run")
    assert (run["id"], run["project"], run["sweep"], run["exit_code"]) == ("abc123", "theirs", "sweep7", 0)
    assert run["name"] == "pydoc sru 1x8 seed 1234 fold 0"
    assert (run["config"]["depth"], run["config"]["width"]) == (1, 8)
    assert isinstance(run["summary"]["val/accuracy"], float)  # the metric of the sweep
    # A later resume by hand keeps the id.
    cfg = configure(*QUICK, "trainer.max_epochs=2", f"resume={tmp_path / 'run'}")
    assert begun(cfg)["id"] == "abc123"
