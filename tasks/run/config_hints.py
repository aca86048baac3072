"""Answer words that do not fit the configuration: null for a group, unknown keys, a missing or wrong plus."""

import contextlib
import difflib
import re
import shlex
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tasks.run import run_dir, signatures
from tasks.run.config_checks import (
    CONF,
    HYDRA_KEYS,
    ROOT,
    UNUSABLE,
    choices,
    code_arguments,
    groups,
    outline_of,
    targets,
)

NOTHING = ("null", "none", "false", "~", "[]", "[null]", "{}", "")
# The value of a group without a choice. The other groups need one.
EMPTY_CHOICES = {"logger": "csv", "ablation": "[]", "experiment": "[]", "sweep": "[]"}


def is_nothing(word: str) -> bool:
    """Whether a word removes its key: `~logger` or `logger=null`."""
    name, equals, value = word.partition("=")
    return name.startswith("~") or (bool(equals) and value.strip("'\" ").lower() in NOTHING)


def drop_empty_words(words: list[str]) -> list[str]:
    """Replace `logger=null`, `~logger` and the like by words that Hydra accepts: `logger=csv`.

    ValueError with the choices if the group needs one, and for lists that the trainer gets from a group.
    """
    accepted = []
    for word in words:
        key = key_of(word)
        if made := re.match(r"trainer\.(callback|logger)(s?)\b", key):
            group = f"{made[1]}s"
            raise ValueError(
                f"{word}: trainer.{made[1]}{made[2]} is made of {group}; type +{group}.NAME._target_=CLASS to add one, "
                f"{group}.NAME=null to remove one, or logger=csv for metrics.csv only"
            )
        group = "logger" if key == "loggers" else key
        if group in EMPTY_CHOICES:
            word = f"{group}={EMPTY_CHOICES[group]}" if is_nothing(word) else word
        elif group in groups():
            value = word.partition("=")[2].strip("'\"")
            if is_nothing(word):
                raise ValueError(f"{word}: a run needs {group}=NAME, where NAME is one of: {', '.join(choices(group))}")
            if value[:1] == "[":
                raise ValueError(f"{word}: a run has one {group}; to run several, type -m {group}={value.strip('[]')}")
        accepted.append(word)
    return accepted


def drop_null(cfg: DictConfig) -> None:
    """Remove loggers and callbacks that are null."""
    for group in ("loggers", "callbacks"):
        if cfg.get(group) is None:
            raise ValueError(f"{group} is null or removed; leave that out, and type {group}.NAME=null for one of them")
        with open_dict(cfg):
            for name in [name for name, value in cfg[group].items() if value is None]:
                del cfg[group][name]


def candidates(cfg: DictConfig) -> list[str]:
    """The keys that a configuration accepts: groups, its keys, and, with a plus, more arguments of its classes."""
    leaves = run_dir.leaves(OmegaConf.to_container(cfg, resolve=False))
    keys = [*groups(), *(key for key in leaves if key.rpartition(".")[2] not in HYDRA_KEYS)]
    for path, node in targets(cfg):
        keys.append(path)
        with contextlib.suppress(ValueError):  # a class that cannot be imported
            taken = {*map(str, node), *code_arguments(cfg, path, node)}
            names = [name for name in signatures.parameters(outline_of(node, path)) if name not in taken]
            keys += [f"+{path}.{name}" for name in names if f"{path}.{name}" not in UNUSABLE]
    return keys


def suggest_keys(wrong: str, known: list[str]) -> str:
    """Up to three similar keys: the same name elsewhere, or a similar name; otherwise all keys beside it."""
    bare = {key.lstrip("+"): key for key in known}
    parent, _, last = wrong.rpartition(".")
    same = sorted((key for key in bare if key.rpartition(".")[2] == last), key=len)[:2]
    beside = {key.rpartition(".")[2]: key for key in bare if key.rpartition(".")[0] == parent}
    similar = [beside[name] for name in difflib.get_close_matches(last.lower(), beside)]
    if not beside:
        similar = difflib.get_close_matches(wrong.lower(), bare)
    if close := list(dict.fromkeys([*same, *similar]))[:3]:
        return f" Did you mean: {', '.join(bare[key] for key in close)}?"
    return f" There are: {', '.join([bare[key] for key in beside.values()] or groups())}."


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def compose_files(words: list[str], wrong: str) -> DictConfig:
    """The configuration of the files and classes that a command names; for a sweep, of its first job."""
    kept = [f"run_dir={ROOT}"]
    for word in words:
        if key_of(word) != wrong and (key_of(word) in groups() or key_of(word).endswith("._target_")):
            kept.append(re.split(r",(?![^\[]*\])", word)[0])  # not at commas inside brackets
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        try:
            return hydra.compose("config", kept)
        except (HydraException, OmegaConfBaseException):  # another word is wrong too
            return hydra.compose("config", kept[:1])


def explain_key(key: str, words: list[str]) -> str:
    """The answer to a key that is not in the configuration of a command."""
    word = next((word for word in words if key_of(word) == key and word[0] not in "~+"), f"{key}=VALUE")
    plus, start = shlex.quote(f"+{word}"), f"There is no key {key!r}"
    if key.startswith("hydra."):
        return f"{start}; --cfg hydra shows those of Hydra. Where a launcher or sweeper takes it, type {plus}"
    cfg = compose_files(words, key)
    parts = key.split(".")
    # The longest part of the key that is in the configuration, and the names after it.
    depth = max((i for i in range(len(parts)) if OmegaConf.is_dict(select(cfg, parts[:i]))), default=0)
    path, name, below = ".".join(parts[:depth]), parts[depth], parts[depth + 1 :]
    node: Any = select(cfg, parts[:depth])
    is_added = path in ("loggers", "callbacks")
    if "_target_" in node:
        parameters = signatures.parameters(outline_of(node, path))
        if f"{path}.{name}" in UNUSABLE:
            return f"{path}.{name} cannot be set in a run: {UNUSABLE[f'{path}.{name}']}; leave it out"
        if name in code_arguments(cfg, path, node):
            return f"{path}.{name} is set by the program: leave it out"
        is_added = name in parameters or name in HYDRA_KEYS or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if is_added and not below:
            return f"{start} in the configuration, but {node._target_} takes {name}: type {plus}"
        start += f", and {node._target_} takes no {name!r}" if not is_added else ""
    if is_added and below and node.get(name) is None:
        partial = f" +{path}.{name}._partial_=true" if path == "task" else ""
        if below == ["_target_"]:
            return f"There is no {path}.{name} yet: type {plus}{partial}"
        made = f"+{path}.{name}._target_=CLASS{partial}"
        return f"There is no {path}.{name} yet: type its class first, {made}, and then {plus}"
    return f"{start}.{suggest_keys(key, candidates(cfg))}"


def select(cfg: DictConfig, parts: list[str]) -> Any:
    """The part of a configuration at a path; None without one."""
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.select(cfg, ".".join(parts)) if parts else cfg
    return None


def explain_hydra(text: str, words: list[str]) -> str | None:
    """The answer to an error message of Hydra about a command's words; None for other messages."""
    if missing := re.search(r"Could not override '([^']+)'", text):
        return explain_key(missing[1], words)
    if there := re.search(r"already at '([^']+)'|^(\S+) appears more than once|Multiple values for (\S+)\.", text):
        key = next(filter(None, there.groups()))
        typed = [word for word in words if word[:1] == "+" and key_of(word) == key]  # after those of a resumed run
        word = typed[-1] if typed else f"+{key}=VALUE"
        return f"{key} already exists: leave out the plus, type {shlex.quote(word.lstrip('+'))}"
    if "Config group override must be a string or a list" in text:
        return f"null is not a file of conf/: leave it out of {' '.join(words)}, or type [] for none"
    return None
