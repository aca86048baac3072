"""Answer words that do not fit the configuration: null for a group, unknown keys, a missing or wrong plus."""

import difflib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tasks.run import distributed, run_dir, signatures
from tasks.run.config_checks import (
    HYDRA_KEYS,
    ROOT,
    arguments,
    check_required,
    code_arguments,
    import_class,
    targets,
    why_unusable,
)

CONF = ROOT / "conf"
NOTHING = ("null", "none", "false", "~", "[]", "{}", "")
# The value of a group without a choice. The other groups need one.
EMPTY_CHOICES = {"logger": "csv", "ablation": "[]", "experiment": "[]", "sweep": "[]"}
REQUIRED_CALLBACKS = ("best", "average", "last", "clock", "interruption")  # train.py and the callbacks read them
MAX_JOBS = 64  # jobs of a sweep that are searched for a key


def groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


# Null in words, before Hydra reads them, and in the configuration.


def drop_empty_words(words: list[str]) -> list[str]:
    """Replace `logger=null`, `~logger` and the like by words that Hydra accepts: `logger=csv`.

    ValueError with the choices if the group needs one. `experiment=null` also removes an earlier experiment.
    """
    accepted: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        key = name.lstrip("+~")
        if key == "loggers" and (name.startswith("~") or is_nothing(value)):
            word = "logger=csv"
        elif made := re.match(r"trainer\.(callbacks|logger)(?:\.(.*))?$", key):
            raise ValueError(explain_list(made[1], made[2], word))
        elif key in groups():
            word = replace_null_choice(word, key, accepted)
        accepted.append(word)
    for key in ("experiment", "sweep"):
        # Hydra would keep the earlier choice.
        last = max((i for i, word in enumerate(accepted) if word == f"{key}=[]"), default=-1)
        accepted = [word for i, word in enumerate(accepted) if i > last or not word.startswith(f"{key}=")]
    return accepted


def replace_null_choice(word: str, group: str, before: list[str]) -> str:
    """The word for a group, with its empty choice in place of null."""
    name, equals, value = word.partition("=")

    def empty_choice() -> str:
        if group not in EMPTY_CHOICES:
            raise ValueError(f"{word}: a run needs {group}=NAME, where NAME is one of: {', '.join(choices(group))}")
        return EMPTY_CHOICES[group]

    if name.startswith("~"):
        chosen = [each.partition("=")[2] for each in before if each.startswith(f"{group}=")]
        now = chosen[-1] if chosen else {"logger": "wandb"}.get(group, "")
        if equals and value != now and group in EMPTY_CHOICES:
            return word  # it removes what is not chosen: Hydra refuses it
        return f"{group}={empty_choice()}"
    if not equals or (CONF / group / f"{value}.yaml").exists():
        return word
    if is_nothing(value):
        return f"{group}={empty_choice()}"
    parts = re.split(r",(?![^\[]*\])", value)  # not the commas inside brackets
    if group in ("experiment", "sweep") and any(map(is_nothing, parts)):
        raise ValueError(f"{word}: a sweep cannot contain null here; run one command with it and one without")
    parts = [empty_choice() if is_nothing(part) else drop_nulls(part) for part in parts]
    without_null = ",".join(parts)
    return word if without_null == value else f"{group}={without_null}"


def is_nothing(value: str) -> bool:
    """Whether a value is null, or a list of nulls."""
    items = value.strip().removeprefix("[").removesuffix("]").split(",") if value.strip().startswith("[") else [value]
    return all(item.strip("'\" ").lower() in NOTHING for item in items)


def drop_nulls(value: str) -> str:
    """A list without its nulls; other values unchanged."""
    if not re.fullmatch(r"\[[^\[\]]*\]", value):
        return value
    return f"[{','.join(item for item in value[1:-1].split(',') if not is_nothing(item))}]"


def explain_list(option: str, rest: str | None, word: str) -> str:
    """The answer to a word that changes a list which the trainer gets from a group."""
    value, group = word.partition("=")[2], {"logger": "loggers"}.get(option, option)
    if option == "logger" and not rest:
        hint = "type logger=csv for metrics.csv only"
    elif rest and "." in rest:
        hint = f"type {shlex.quote(f'+{group}.{rest}={value}')}"
    else:
        name = rest if rest and rest[0].isalpha() else "NAME"
        hint = f"type +{group}.{name}._target_=CLASS to add one, {group}.{name}=null to remove one"
    return f"{word}: trainer.{option} is made of {group}; {hint}"


def drop_null(cfg: DictConfig) -> None:
    """Remove loggers and callbacks that are null."""
    for group in ("loggers", "callbacks"):
        if cfg.get(group) is None:
            raise ValueError(f"{group} is null or removed; leave that out, and type {group}.NAME=null for one of them")
        with open_dict(cfg):
            for name in [name for name, value in cfg[group].items() if value is None]:
                del cfg[group][name]


def drop_bars(cfg: DictConfig) -> None:
    """Remove progress bars, which Lightning refuses with trainer.enable_progress_bar=false."""
    with open_dict(cfg):
        for name in [name for name, value in cfg.callbacks.items() if is_bar(value)]:
            del cfg.callbacks[name]
        if not OmegaConf.is_interpolation(cfg.trainer, "callbacks"):  # in a process that `launch` started
            cfg.trainer.callbacks = [value for value in cfg.trainer.callbacks if not is_bar(value)]


def is_bar(node: DictConfig) -> bool:
    from pytorch_lightning.callbacks import ProgressBar

    kind = import_class(node, "callbacks")
    return isinstance(kind, type) and issubclass(kind, ProgressBar)


# Keys that compose, but that no class takes.


def check(cfg: DictConfig) -> None:
    """Refuse keys that nothing reads: `+task.optimizer.lrr=1`, `+trainer.epochs=3`, `+foo=1`."""
    known = [*(key for key in OmegaConf.load(CONF / "config.yaml") if key not in ("defaults", "hydra")), *groups()]
    known += ["loggers", "callbacks"]
    text = OmegaConf.to_yaml(cfg, resolve=False)
    for key in [key_of(word).split(".")[0] for word in distributed.overrides() if word[0] == "+"]:
        if key not in known and not re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", text):
            raise ValueError(f"Nothing reads {key!r}.{suggest_keys(key, candidates(cfg, without=key))}")
    check_callbacks(cfg)
    for name, may_be_null in (("optimizer", False), ("scheduler", True)):
        value = cfg.task.get(name, "")
        has_class = OmegaConf.is_dict(value) and "_target_" in value
        if name in cfg.task and not has_class and not (value is None and may_be_null):
            said = "" if OmegaConf.is_dict(value) else f"={value}"
            raise ValueError(f"task.{name}{said} must have a class; {suggest_class(name, value)}")
    for path, node in targets(cfg):
        names, takes_more = arguments(node, path)
        supplied = code_arguments(cfg, path, node)
        check_required(node, path)
        for name in map(str, node):
            if name in supplied:
                raise ValueError(f"{path}.{name} is set by the program: leave it out")
            # config_checks has checked data, model and task.
            is_known = name in HYDRA_KEYS or name in names or takes_more or path in ("data", "model", "task")
            if not is_known:
                wrong = f"{path}.{name}"
                near = suggest_keys(wrong, candidates(cfg, without=wrong))
                raise ValueError(f"{node._target_} takes no {name!r}.{near}")


def check_callbacks(cfg: DictConfig) -> None:
    """Refuse loggers and callbacks without a class, and options of `best` and `last` that break a resume or test."""
    for name in REQUIRED_CALLBACKS:
        if name not in cfg.callbacks:
            raise ValueError(f"callbacks.{name} is missing, and every run needs it; leave out the word that removes it")
    for group in ("loggers", "callbacks"):
        for name, value in cfg[group].items():
            if not OmegaConf.is_dict(value) or "_target_" not in value:
                raise ValueError(
                    f"{group}.{name} must have a class; type for example +{group}.{name}._target_=CLASS, or {group}."
                    f"{name}=null for none"
                )
    best, last = cfg.callbacks.best, cfg.callbacks.last
    if (kept := last.get("save_top_k", 1)) != 1:
        raise ValueError(
            f"callbacks.last.save_top_k={kept}: last.ckpt is one file, and a resume needs it; leave that out"
        )
    if (kept := best.get("save_top_k", 1)) != 1:
        raise ValueError(
            f"callbacks.best.save_top_k={kept}: best.ckpt is one file. To keep more, type "
            "+callbacks.top._target_=pytorch_lightning.callbacks.ModelCheckpoint "
            f"+callbacks.top.monitor={best.monitor} +callbacks.top.mode={best.mode} "
            f"+callbacks.top.save_top_k={kept} '+callbacks.top.dirpath=${{run_dir}}/top'"
        )
    if not str(best.get("monitor")).startswith("val/"):
        raise ValueError(
            f"callbacks.best.monitor={best.get('monitor')} must be a metric of the validation; type for example "
            "callbacks.best.monitor=val/loss callbacks.best.mode=min"
        )
    if best.get("mode") not in ("min", "max"):
        raise ValueError(f"callbacks.best.mode={best.get('mode')} must be min or max; type callbacks.best.mode=min")
    for name in ("best", "last"):
        if cfg.callbacks[name].get("save_weights_only"):
            raise ValueError(why_unusable(f"callbacks.{name}", "save_weights_only"))


def suggest_class(option: str, value: Any = None) -> str:
    """The word that gives a task an optimiser or a schedule; `value` may be the name of one."""
    if option == "optimizer":
        known = {
            each.lower(): each
            for each in signatures.names("torch.optim")
            if isinstance(signatures.outline(f"torch.optim.{each}"), type)
        }
        return f"type task.optimizer._target_=torch.optim.{known.get(str(value).lower(), 'SGD')}"
    if str(value) in ("noam", "cosine", "decay"):
        return f"type +task.scheduler._target_=tasks.schedules.{value} +task.scheduler._partial_=true"
    return "type +task.scheduler._target_=CLASS +task.scheduler._partial_=true, or task.scheduler=null for none"


# Suggestions.


def candidates(cfg: DictConfig, without: str = "") -> list[str]:
    """The keys that this configuration accepts: groups, its keys, and, with a plus, more arguments of its classes."""
    content = OmegaConf.to_container(cfg, resolve=False)
    keys = [key for key in run_dir.leaves(content) if key.rpartition(".")[2] not in HYDRA_KEYS]
    more = []
    for path, node in targets(cfg):
        if path.startswith("hydra"):
            continue
        try:
            names, _ = arguments(node, path)
            supplied = code_arguments(cfg, path, node)
        except ValueError:
            continue
        if path in ("callbacks.best", "callbacks.last"):
            supplied.append("save_top_k")
        more += [f"+{path}.{name}" for name in names if name not in (*node, *supplied) and not why_unusable(path, name)]
    return [key for key in (*groups(), *keys, *more) if not f"{key}.".startswith(f"{without}.") or not without]


def suggest_keys(wrong: str, known: list[str]) -> str:
    """Up to three similar keys: the same name elsewhere, or a similar name; otherwise all keys beside it."""
    bare = {key.lstrip("+"): key for key in known}
    parent, _, last = wrong.rpartition(".")
    same = [key for key in bare if key.rpartition(".")[2] == last or key.endswith(f".{wrong}")]
    beside = {key.rpartition(".")[2]: key for key in bare if key.rpartition(".")[0] == parent}
    similar = [beside[name] for name in difflib.get_close_matches(last.lower(), beside, n=3, cutoff=0.6)]
    if parent and not beside:
        similar = difflib.get_close_matches(wrong.lower(), bare, n=3, cutoff=0.6)
    if close := list(dict.fromkeys([*sorted(same, key=len)[:2], *similar]))[:3]:
        return f" Did you mean: {', '.join(bare[key] for key in close)}?"
    listed = [bare[key] for key in beside.values()] or [key for key in known if "." not in key]
    return f" There are: {', '.join(listed)}."


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def compose_without(key: str, words: list[str]) -> DictConfig:
    """The configuration of a command without a wrong key, and without other words that do not compose.

    For a sweep, the first job without such a key.
    """
    words = [word for word in words if not word.startswith(("-", "hydra", "+hydra", "resume=")) and key_of(word) != key]
    jobs: Iterator[Any] = iter([()])
    try:
        parsed = OverridesParser.create().parse_overrides(words)
        values = [
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if override.is_discrete_sweep()
            else [str(override.input_line)]
            for override in parsed
            if override.is_discrete_sweep() or not override.is_sweep_override()
        ]
        jobs = itertools.islice(itertools.product(*values), MAX_JOBS)
    except (HydraException, ValueError):
        pass
    for job in jobs:
        cfg = compose_valid(list(job))
        if OmegaConf.select(cfg, key, default=None) is None:
            break
    return cfg


def compose_valid(words: list[str]) -> DictConfig:
    """The configuration of the words that compose."""
    left = [f"run_dir={ROOT}", *words]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        while True:
            try:
                return hydra.compose("config", left)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                wrong = re.findall(r"'~?([\w./@]+)(?:=[^']*)?'", str(error))
                kept = [word for word in left if key_of(word) not in wrong and key_of(word).split("/")[0] not in wrong]
                if len(kept) == len(left):  # the error names none: keep the words that select files
                    kept = [word for word in left if key_of(word) in groups()]
                left = kept if len(kept) < len(left) else []


def class_words(path: str) -> str:
    """The words that give an option a class; a task calls its classes itself."""
    return f"+{path}._target_=CLASS" + (f" +{path}._partial_=true" if path.startswith("task.") else "")


def explain_key(key: str, words: list[str]) -> str:
    """The answer to a key that is not in the configuration of a command."""
    word = next((word for word in words if key_of(word) == key and word[0] not in "~+"), f"{key}=VALUE")
    value, plus = word.partition("=")[2], shlex.quote(f"+{word}")
    parts, start = key.split("."), f"There is no key {key!r}"
    if key in ("optimizer", "scheduler"):
        return f"{start}; {suggest_class(key, value)}"
    if re.fullmatch(r"logger\.\w+", key) and is_nothing(value):
        return f"{start}: type {key.replace('logger', 'loggers')}=null, or logger=csv"
    if re.fullmatch(r"(loggers|callbacks)\.\w+", key) and is_nothing(value):
        return f"There is no {key} to remove: leave out {word}"
    if parts[0] == "hydra":
        return f"{start}; --cfg hydra shows those of Hydra. Where a launcher or sweeper takes it, type {plus}"
    cfg, absent = compose_without(key, words), object()
    # The longest part of the key that is in the configuration, and the name after it.
    for i in range(len(parts) - 1, 0, -1):
        path, name, below = ".".join(parts[:i]), parts[i], parts[i + 1 :]
        try:
            parent = OmegaConf.select(cfg, path, default=absent)
        except OmegaConfBaseException:
            parent = absent
        if parent is None and name == "_target_":
            return f"{path} is null. To give it a class, type {plus} (and perhaps +{path}._partial_=true)"
        if parent is None and "." not in path:
            return f"{path} is null: type {plus}"
        if parent is None:
            return f"{path} is null: type its class first, {class_words(path)}, and then {plus}"
        if parent is not absent and not OmegaConf.is_config(parent):
            return f"{start}: {path} is one value, {parent}; type {path}=VALUE"
        if not OmegaConf.is_dict(parent):
            continue
        if "_target_" in parent:
            names, takes_more = arguments(parent, path)
            if name in code_arguments(cfg, path, parent):
                return f"{path}.{name} is set by the program: leave it out"
            if why := why_unusable(path, name):
                return why
            if name in names and below and below[0] not in HYDRA_KEYS:
                return (
                    f"There is no {path}.{name} yet: type its class first, {class_words(f'{path}.{name}')}, and then "
                    f"{plus}"
                )
            if name in names and below == ["_target_"] and path == "task":
                return f"There is no {path}.{name} yet: type {plus} +{path}.{name}._partial_=true"
            if name in HYDRA_KEYS or name in names or takes_more:
                return f"{start} in the configuration, but {parent._target_} takes {name}: type {plus}"
            start += f", and {parent._target_} takes no {name!r}"
        elif path in ("callbacks", "loggers") and name not in parent and below:
            if below[0] == "_target_":
                return f"There is no {path}.{name} yet. To add it, type {plus}"
            files = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("[lt]*/*.yaml")) if has(file, key)]
            either = f"type {' or '.join(files)}, or add" if files else "add"
            if files or not difflib.get_close_matches(name, list(map(str, parent)), cutoff=0.6):
                return f"There is no {path}.{name} yet: {either} its class first, +{path}.{name}._target_=CLASS"
        break
    return f"{start}.{suggest_keys(key, candidates(cfg))}"


def has(file: Path, key: str) -> bool:
    """Whether a file of conf/ has the callback or logger that a key belongs to."""
    return OmegaConf.select(OmegaConf.load(file), ".".join(key.split(".")[:2]), default=None) is not None


def explain_hydra(text: str, words: list[str]) -> str | None:
    """The answer to an error message of Hydra about a command's words; None for other messages."""
    if missing := re.search(r"Could not override '([^']+)'", text):
        return explain_key(missing[1], words)
    if there := re.search(r"already at '([^']+)'|^(\S+) appears more than once|Multiple values for (\S+)\.", text):
        key = next(filter(None, there.groups()))
        typed = [word for word in words if word[:1] == "+" and key_of(word) == key]  # after those of a resumed run
        word = typed[-1] if typed else f"+{key}=VALUE"
        return f"{key} already exists: leave out the plus, type {shlex.quote(word.lstrip('+'))}"
    if forced := re.search(r"force-add of config groups is not supported: '\++([^']+)'", text):
        return f"{forced[1].partition('=')[0]} already exists: leave out the plus, type {shlex.quote(forced[1])}"
    if absent := re.search(r"Could not delete '([^']+)'\. No match", text):
        return f"There is no {absent[1]} to remove: leave out ~{absent[1]}"
    if absent := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        key = absent[1]
        if key.startswith("logger."):
            return f"There is no key {key!r} to remove: type ~loggers{key[6:]}, or logger=csv"
        known = [each for each in candidates(compose_without(key, words)) if each[0] != "+"]
        return f"There is no key {key!r} to remove.{suggest_keys(key, known)}"
    if other := re.search(r"Could not delete from config\. The value of '([^']+)' is (.*) and not (.*)\.", text):
        return f"{other[1]} is {other[2]} and not {other[3]}: type ~{other[1]}, or leave it out"
    if "Config group override must be a string or a list" in text:
        wrong = next((word for word in words if "=" in word and is_nothing(word.partition("=")[2])), "null")
        return f"{wrong}: null is not a file of conf/; leave it out"
    return None
