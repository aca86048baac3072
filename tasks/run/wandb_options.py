"""Check the options and environment variables of the wandb logger before a corpus is read."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# The environment variables that set the defaults of options, in conf/logger/wandb.yaml.
VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
}
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def environment_tags() -> list[str]:
    return [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag.strip()]


def keep_place(cfg: DictConfig) -> None:
    """Keep a resumed run's project, entity, name and group, unless the command sets them."""
    path = Path(str(cfg.resume)) / "config.yaml"
    if not cfg.resume or "wandb" not in cfg.loggers or not path.is_file():
        return
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):  # check_resume reports it
        before = OmegaConf.select(OmegaConf.load(path), "loggers.wandb", default=None) or {}
        for key, variable in VARIABLES.items():
            if key not in before or not OmegaConf.is_interpolation(cfg.loggers.wandb, key):
                continue
            if variable in os.environ and os.environ[variable] != before[key]:
                print(
                    f"{variable}={os.environ[variable]} is not used: type loggers.wandb.{key}= to change {before[key]}"
                )
            cfg.loggers.wandb[key] = before[key]


def check_environment() -> None:
    """Refuse environment variables that wandb would refuse after the corpus is read; empty ones are removed."""
    for variable in (*VARIABLES.values(), "WANDB_MODE", "WANDB_RUN_ID", "WANDB_TAGS", "WANDB_DIR"):
        if not os.environ.get(variable, "").strip():
            os.environ.pop(variable, None)
    # wandb reads these too, and accepts neither capitals nor empty tags.
    if tags := environment_tags():
        os.environ["WANDB_TAGS"] = ",".join(tags)
    else:
        os.environ.pop("WANDB_TAGS", None)
    if os.environ.get("WANDB_MODE", "").strip().lower() in MODES:
        os.environ["WANDB_MODE"] = os.environ["WANDB_MODE"].strip().lower()
    mode, run_id = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_RUN_ID", "none")
    if mode is not None and mode not in MODES:
        raise ValueError(f"WANDB_MODE={mode} must be one of {', '.join(MODES)}; type for example WANDB_MODE=offline")
    if re.search(r"[:;,#?/']|^\s|\s$", run_id) or len(run_id) > 128:
        raise ValueError(
            f"WANDB_RUN_ID={run_id} must be a name of up to 128 characters without any of : ; , # ? / '; "
            "type for example unset WANDB_RUN_ID"
        )
    if wrong := [tag for tag in environment_tags() if len(tag) > 64]:
        raise ValueError(f"WANDB_TAGS has {wrong[0]}, longer than 64 characters; type for example WANDB_TAGS=a,b")
    if mode in ("online", "run", "shared") and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise ValueError(f"WANDB_MODE={mode} needs an account: type wandb login, or WANDB_MODE=offline")


def check(options: Mapping[str, Any]) -> None:
    """Refuse options and variables that wandb would refuse after the corpus is read."""
    check_environment()

    def is_text(value: Any, longest: int = 64) -> bool:
        return isinstance(value, str) and 0 < len(value) <= longest

    project, entity, group, tags = (options[name] for name in ("project", "entity", "group", "tags"))
    run_name = options.get("name")  # runs of earlier versions have none
    is_list = isinstance(tags, Sequence) and not isinstance(tags, str)
    for name, is_right, wanted, example in (
        (
            "project",
            is_text(project, 128) and not re.search(r"[/\\#?%:\n]|^[\s.]*$", project),
            r"a name of up to 128 characters without any of / \ # ? % :",
            "sru",
        ),
        (
            "entity",
            entity is None or (is_text(entity, 128) and re.fullmatch(r"[\w.-]+", entity)),
            "a user's or team's name, or null",
            "null",
        ),
        ("group", group is None or is_text(group, 128), "a text of up to 128 characters, or null", "null"),
        ("name", run_name is None or is_text(run_name, 128), "a text of up to 128 characters, or null", "null"),
        ("job_type", is_text(options["job_type"]), "a text of up to 64 characters", "train"),
        ("tags", is_list and all(map(is_text, tags)), "a list of texts of up to 64 characters", "[]"),
        ("artifacts", type(options["artifacts"]) is bool, "true or false", "false"),
    ):
        if not is_right:
            key = f"loggers.wandb.{name}"
            is_variable = name in VARIABLES and OmegaConf.is_interpolation(options, name)
            source = VARIABLES[name] if is_variable and VARIABLES[name] in os.environ else key
            raise ValueError(f"{source}={options[name]} must be {wanted}; type for example {key}={example}")
