"""Words of a command: what null chooses in a group, options that nothing takes, and where a plus belongs."""

import difflib
import inspect
import itertools
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tasks.run import config_checks, distributed, imports, run_dir, signatures

CONF = config_checks.ROOT / "conf"
NOTHING = ("null", "none", "false", "~", "[]", "{}", "")
# What a group without a choice is. The others need one.
WITHOUT = {"logger": "csv", "ablation": "[]", "experiment": "[]", "sweep": "[]"}
HYDRAS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")
# What train.py and the callbacks read, beside the groups.
NEEDED = ("best", "average", "last", "clock", "interruption")
JOBS = 64  # of a sweep that are looked at


def groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def drop_empty_words(words: list[str]) -> list[str]:
    """The words with `logger=null` and the like, and `~logger`, as Hydra takes them: `logger=csv`.

    Nothing of a group that needs a choice is refused with its choices. An experiment that is taken back is left out.
    """
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        key = name.lstrip("+~")
        if key == "loggers" and (name.startswith("~") or is_nothing(value)):
            found.append("logger=csv")
        elif made := re.match(r"trainer\.(callbacks|logger)(?:\.(.*))?$", key):
            raise ValueError(explain_list(made[1], made[2], word))
        elif key not in groups():
            found.append(word)
        elif name.startswith("~"):
            before = [each.partition("=")[2] for each in found if each.startswith(f"{key}=")]
            now = before[-1] if before else {"logger": "wandb"}.get(key, "")
            # One that is not chosen is Hydra's to refuse.
            found.append(choose(key, word) if not equals or value == now or key not in WITHOUT else word)
        elif not equals or ("," not in value and not has_nothing(value)) or (CONF / key / f"{value}.yaml").exists():
            found.append(word)
        elif is_nothing(value):
            found.append(choose(key, word))
        else:
            parts = re.split(r",(?![^\[]*\])", value)  # commas within brackets are of a list
            if key in ("experiment", "sweep") and any(map(is_nothing, parts)):
                raise ValueError(f"{word}: null is no choice of a sweep; type a command for it, one for the others")
            parts = [choose(key, word).partition("=")[2] if is_nothing(part) else drop_nulls(part) for part in parts]
            found.append(f"{key}={','.join(parts)}")
    for key in ("experiment", "sweep"):
        # Hydra would forget that there was a choice.
        last = max((i for i, word in enumerate(found) if word == f"{key}=[]"), default=-1)
        found = [word for i, word in enumerate(found) if i > last or not word.startswith(f"{key}=")]
    return found


def is_nothing(value: str) -> bool:
    """Whether that is null, or a list of it alone."""
    items = value.strip().removeprefix("[").removesuffix("]").split(",") if value.strip().startswith("[") else [value]
    return all(item.strip("'\" ").lower() in NOTHING for item in items)


def has_nothing(value: str) -> bool:
    return is_nothing(value) or drop_nulls(value) != value


def drop_nulls(value: str) -> str:
    """A list without its nulls."""
    if not re.fullmatch(r"\[[^\[\]]*\]", value):
        return value
    items = value[1:-1].split(",")
    kept = [item for item in items if not is_nothing(item)]
    return value if kept == items else f"[{','.join(kept)}]"


def explain_list(option: str, rest: str | None, word: str) -> str:
    """What to say of a word for a list that the trainer gets from a group."""
    value, group = word.partition("=")[2], {"logger": "loggers"}.get(option, option)
    if option == "logger" and not rest:
        what = "type logger=csv for none but the file"
    elif rest and "." in rest:
        what = f"type {shlex.quote(f'+{group}.{rest}={value}')}"
    else:
        name = rest if rest and rest[0].isalpha() else "NAME"
        what = f"type +{group}.{name}._target_=CLASS to add one, {group}.{name}=null to take one away"
    return f"{word}: trainer.{option} is made of {group}; {what}"


def choose(group: str, word: str) -> str:
    if group not in WITHOUT:
        raise ValueError(f"{word}: a run needs {group}=NAME, where NAME is one of: {', '.join(choices(group))}")
    return f"{group}={WITHOUT[group]}"


def drop_null(cfg: DictConfig) -> None:
    """A logger or a callback of null is none."""
    for group in ("loggers", "callbacks"):
        if cfg.get(group) is None:
            raise ValueError(f"{group} is null or removed; leave that out, and type {group}.NAME=null for one of them")
        with open_dict(cfg):
            for name in [name for name, value in cfg[group].items() if value is None]:
                del cfg[group][name]


def drop_bars(cfg: DictConfig) -> None:
    """Take away the callbacks that are bars, which Lightning refuses where none is to be shown."""
    with open_dict(cfg):
        for name in [name for name, value in cfg.callbacks.items() if is_bar(value)]:
            del cfg.callbacks[name]
        if not OmegaConf.is_interpolation(cfg.trainer, "callbacks"):  # in a process that was handed the values
            cfg.trainer.callbacks = [value for value in cfg.trainer.callbacks if not is_bar(value)]


def is_bar(node: DictConfig) -> bool:
    from pytorch_lightning.callbacks import ProgressBar

    kind = class_of(node, "callbacks")
    return isinstance(kind, type) and issubclass(kind, ProgressBar)


def check(cfg: DictConfig) -> None:
    """Refuse what no class takes and nothing reads: `+task.optimizer.lrr=1`, `+trainer.epochs=3`, `+foo=1`."""
    known = [*(key for key in OmegaConf.load(CONF / "config.yaml") if key not in ("defaults", "hydra")), *groups()]
    known += ["loggers", "callbacks"]
    text = OmegaConf.to_yaml(cfg, resolve=False)
    for key in [key_of(word).split(".")[0] for word in distributed.overrides() if word[0] == "+"]:
        if key not in known and not re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", text):
            raise ValueError(f"Nothing reads {key!r}.{suggest_keys(key, candidates(cfg, without=key))}")
    for name in NEEDED:
        if name not in cfg.callbacks:
            raise ValueError(f"callbacks.{name} is missing, and every run needs it; leave out the word that removes it")
    for group in ("loggers", "callbacks"):
        for name, value in cfg[group].items():
            if not OmegaConf.is_dict(value) or "_target_" not in value:
                raise ValueError(
                    f"{group}.{name} must have a class; type for example +{group}.{name}._target_=CLASS, or {group}."
                    f"{name}=null for none"
                )
    if (kept := cfg.callbacks.last.get("save_top_k", 1)) != 1:
        raise ValueError(
            f"callbacks.last.save_top_k={kept}: last.ckpt is one file, and a resume needs it; leave that out"
        )
    if (kept := cfg.callbacks.best.get("save_top_k", 1)) != 1:
        raise ValueError(
            f"callbacks.best.save_top_k={kept}: best.ckpt is one file. To keep more, type "
            "+callbacks.top._target_=pytorch_lightning.callbacks.ModelCheckpoint "
            f"+callbacks.top.monitor={cfg.callbacks.best.monitor} +callbacks.top.mode={cfg.callbacks.best.mode} "
            f"+callbacks.top.save_top_k={kept} '+callbacks.top.dirpath=${{run_dir}}/top'"
        )
    best = cfg.callbacks.best
    if not str(best.get("monitor")).startswith("val/"):
        raise ValueError(
            f"callbacks.best.monitor={best.get('monitor')} must be a metric of the validation; type for example "
            "callbacks.best.monitor=val/loss callbacks.best.mode=min"
        )
    if best.get("mode") not in ("min", "max"):
        raise ValueError(f"callbacks.best.mode={best.get('mode')} must be min or max; type callbacks.best.mode=min")
    for name in ("best", "last"):
        if cfg.callbacks[name].get("save_weights_only"):
            raise ValueError(config_checks.why_unusable(f"callbacks.{name}", "save_weights_only"))
    for name, may_be_none in (("optimizer", False), ("scheduler", True)):
        value = cfg.task.get(name, "")
        has_class = OmegaConf.is_dict(value) and "_target_" in value
        if name in cfg.task and not has_class and not (value is None and may_be_none):
            raise ValueError(f"task.{name}{to_word(value)} must have a class; {with_class(name, value)}")
    for path, node in targets(cfg):
        names, takes_more = arguments(node, path)
        supplied = code_arguments(cfg, path, node)
        check_required(node, path)
        for name in map(str, node):
            if name in HYDRAS or (name in names and name not in supplied):
                continue
            if name in supplied:
                raise ValueError(f"{path}.{name} is not for the configuration, the program gives it: leave it out")
            if not takes_more and path not in ("data", "model", "task"):  # of which the door says more
                wrong = f"{path}.{name}"
                raise ValueError(
                    f"{node._target_} takes no {name!r}.{suggest_keys(wrong, candidates(cfg, without=wrong))}"
                )


def import_classes(cfg: DictConfig) -> None:
    """Refuse a class whose source was found and whose import fails."""
    for path, node in targets(cfg):
        class_of(node, path)


def to_word(value: Any) -> str:
    return "" if OmegaConf.is_dict(value) else f"={value}"


def with_class(name: str, value: Any = None) -> str:
    """How to give a task an optimiser or a schedule; `value` is perhaps the name of one."""
    if name == "optimizer":
        known = {
            each.lower(): each
            for each in signatures.names("torch.optim")
            if isinstance(signatures.outline(f"torch.optim.{each}"), type)
        }
        return f"type task.optimizer._target_=torch.optim.{known.get(str(value).lower(), 'SGD')}"
    known = {each: each for each in ("noam", "cosine", "decay")}
    found = f"tasks.schedules.{known[str(value)]}" if str(value) in known else "CLASS"
    null = ", or task.scheduler=null for none" if found == "CLASS" else ""
    return f"type +task.scheduler._target_={found} +task.scheduler._partial_=true{null}"


def check_required(node: DictConfig, path: str) -> None:
    """Refuse a class without an argument that it cannot do without."""
    if node.get("_partial_") or "_args_" in node:
        return
    try:
        parameters = inspect.signature(outline_of(node, path)).parameters.values()
    except ValueError:
        return
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    absent = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds and p.name not in node]
    if absent and path.startswith(("task", "model")):
        raise ValueError(f"{path}: the program gives {node._target_} {absent[0]}; type +{path}._partial_=true")
    if absent:
        raise ValueError(f"{path}: {node._target_} needs {', '.join(absent)}; type +{path}.{absent[0]}=VALUE")


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The nodes that name a class, by their dotted paths; what an interpolation repeats is left out."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{path}.{key}" if path else key)
    elif isinstance(node, ListConfig):
        for i, value in enumerate(node):
            yield from targets(value, f"{path}.{i}")


def arguments(node: DictConfig, path: str) -> tuple[list[str], bool]:
    """What the class of a node takes, and whether it takes anything else besides."""
    target = outline_of(node, path)
    try:
        own = next((c for c in getattr(target, "__mro__", ()) if "__init__" in vars(c)), target)
        if own.__module__.split(".")[0] in ("sru", "data", "tasks") and inspect.isclass(target):
            return config_checks.options_of(target), False
        parameters = inspect.signature(target).parameters.values()
    except ValueError:  # a class of C, which says nothing of its arguments
        return [], True
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.kind not in various], any(p.kind is various[0] for p in parameters)


def outline_of(node: DictConfig, path: str) -> Any:
    """What stands for a class here: its outline, or itself where only the import tells what it takes."""
    return signatures.outline(str(node._target_)) or class_of(node, path)


def class_of(node: DictConfig, path: str) -> Any:
    """What `_target_` names; ValueError with names that come near."""
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # which would tell the same
    imports.import_lightning()
    try:
        return get_object(node._target_)
    except Exception as error:  # of the import of any module
        module, _, name = str(node._target_).rpartition(".")
        try:
            known = [f"{module}.{each}" for each in difflib.get_close_matches(name, dir(get_object(module)))]
        except Exception:  # as above
            known = []
        said = f". Did you mean: {', '.join(known)}?" if known else f" ({str(error).strip().splitlines()[-1]})"
        raise ValueError(f"{path}._target_={node._target_} cannot be imported{said}") from error


def code_arguments(cfg: DictConfig, path: str, node: DictConfig) -> list[str]:
    """Arguments that the configuration does not set: the program calls the class with them."""
    if not node.get("_partial_"):
        return []
    if path == "model":
        return ["input_size", "source_size"]
    if path == "task":
        names = getattr(outline_of(cfg.data, "data"), "MODEL_KWARGS", ())
        return ["encoder", *(names if isinstance(names, tuple) else ())]  # or a property, which depends on options
    parameters = list(inspect.signature(outline_of(node, path)).parameters.values())
    return [p.name for p in parameters[:1] if p.default is p.empty]


def candidates(cfg: DictConfig, without: str = "") -> list[str]:
    """What could be typed in this configuration: its keys, the groups, and, with a plus, what its classes also take."""
    content = OmegaConf.to_container(cfg, resolve=False)
    keys = [key for key in run_dir.leaves(content) if key.rpartition(".")[2] not in HYDRAS]
    more = []
    for path, node in targets(cfg):
        if path.startswith("hydra"):
            continue
        try:
            names, _ = arguments(node, path)
            supplied = code_arguments(cfg, path, node)
        except ValueError:
            continue
        more += [f"+{path}.{name}" for name in names if name not in (*node, *supplied) and not is_unusable(path, name)]
    return [key for key in (*groups(), *keys, *more) if not f"{key}.".startswith(f"{without}.") or not without]


def is_unusable(path: str, name: str) -> bool:
    """Whether a run cannot have an option that its class takes."""
    return config_checks.why_unusable(path, name) is not None or (
        path in ("callbacks.best", "callbacks.last") and name == "save_top_k"
    )


def suggest_keys(wrong: str, known: list[str]) -> str:
    """The keys that come near: those of the same name elsewhere, those that look alike, or else those beside it."""
    bare = {key.lstrip("+"): key for key in known}
    parent, _, last = wrong.rpartition(".")
    same = [key for key in bare if key.rpartition(".")[2] == last or key.endswith(f".{wrong}")]
    beside = {key.rpartition(".")[2]: key for key in bare if key.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(last.lower(), beside, n=3, cutoff=0.6)
    alike = [beside[name] for name in near]
    if parent and not beside:
        alike = difflib.get_close_matches(wrong.lower(), bare, n=3, cutoff=0.6)
    if close := list(dict.fromkeys([*sorted(same, key=len)[:2], *alike]))[:3]:
        return f" Did you mean: {', '.join(bare[key] for key in close)}?"
    listed = [bare[key] for key in beside.values()] or [key for key in known if "." not in key]
    return f" There are: {', '.join(listed)}."


def of_command(words: list[str], without: str = "") -> DictConfig:
    """The configuration that the words compose, but for those of the key `without` and what does not compose.

    Of a sweep it is the first job that has no such key.
    """
    words = [word for word in words if not word.startswith(("-", "hydra", "+hydra", "resume="))]
    words = [word for word in words if key_of(word) != without]
    jobs: list[list[str]] = [[]]
    try:
        several = [
            [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            if override.is_discrete_sweep()
            else [str(override.input_line)]
            for override in OverridesParser.create().parse_overrides(words)
            if override.is_discrete_sweep() or not override.is_sweep_override()
        ]
        jobs = [list(job) for job in itertools.islice(itertools.product(*several), JOBS)]
    except (HydraException, ValueError):
        pass
    for job in jobs:
        cfg = compose_valid(job)
        if without and OmegaConf.select(cfg, without, default=None) is None:
            break
    return cfg


def compose_valid(words: list[str]) -> DictConfig:
    """What words compose, without those that do not."""
    left = [f"run_dir={config_checks.ROOT}", *words]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        while True:
            try:
                return hydra.compose("config", left)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                wrong = re.findall(r"'~?([\w./@]+)(?:=[^']*)?'", str(error))
                kept = [word for word in left if key_of(word) not in wrong and key_of(word).split("/")[0] not in wrong]
                if len(kept) == len(left):  # it names none: those that choose files are worth more than values
                    kept = [word for word in left if key_of(word) in groups()]
                left = kept if len(kept) < len(left) else []


def key_of(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def of_key(key: str, words: list[str]) -> str:
    """What to say of a key that is not in the configuration of this command."""
    word = next((word for word in words if key_of(word) == key and word[0] not in "~+"), f"{key}=VALUE")
    if key in ("optimizer", "scheduler"):
        return f"There is no key {key!r}; {with_class(key, word.partition('=')[2])}"
    if re.fullmatch(r"logger\.\w+", key) and is_nothing(word.partition("=")[2]):
        return f"There is no key {key!r}: type {key.replace('logger', 'loggers')}=null, or logger=csv"
    if re.fullmatch(r"(loggers|callbacks)\.\w+", key) and is_nothing(word.partition("=")[2]):
        return f"There is no {key} to take away: leave out {word}"
    cfg = of_command(words, without=key)
    plus = shlex.quote(f"+{word}")
    parts, absent = key.split("."), object()
    start = f"There is no key {key!r}"
    if parts[0] == "hydra":
        return f"{start}; --cfg hydra shows those of Hydra. Where a launcher or sweeper takes it, type {plus}"
    for i in range(len(parts) - 1, 0, -1):
        path, name = ".".join(parts[:i]), parts[i]
        try:
            parent = OmegaConf.select(cfg, path, default=absent)
        except OmegaConfBaseException:
            parent = absent
        if parent is None:
            if name == "_target_":
                return f"{path} is null. To give it a class, type {plus} (and perhaps +{path}._partial_=true)"
            if "." not in path:
                return f"{path} is null: type {plus}"
            return f"{path} is null: type its class first, {first(path)}, and then {plus}"
        if parent is not absent and not OmegaConf.is_config(parent):
            return f"{start}: {path} is one value, {parent}; type {path}=VALUE"
        if not OmegaConf.is_dict(parent):
            continue
        if "_target_" in parent:
            names, takes_more = arguments(parent, path)
            if name in code_arguments(cfg, path, parent):
                return f"{path}.{name} is not for the configuration, the program gives it: leave it out"
            if why := config_checks.why_unusable(path, name):
                return why
            if name in names and i + 1 < len(parts) and parts[i + 1] not in HYDRAS:
                return (
                    f"There is no {path}.{name} yet: type its class first, {first(f'{path}.{name}')}, and then {plus}"
                )
            if name in names and parts[i + 1 :] == ["_target_"] and path == "task":
                return f"There is no {path}.{name} yet: type {plus} +{path}.{name}._partial_=true"
            if name in HYDRAS or name in names or takes_more:
                return f"{start} in the configuration, but {parent._target_} takes {name}: type {plus}"
            start += f", and {parent._target_} takes no {name!r}"
        elif path in ("callbacks", "loggers") and name not in parent and i + 1 < len(parts):
            if parts[i + 1] == "_target_":
                return f"There is no {path}.{name} yet. To add it, type {plus}"
            files = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("[lt]*/*.yaml")) if has(file, key)]
            either = f"type {' or '.join(files)}, or add" if files else "add"
            if files or not difflib.get_close_matches(name, list(map(str, parent)), cutoff=0.6):
                return f"There is no {path}.{name} yet: {either} its class first, +{path}.{name}._target_=CLASS"
        break
    return f"{start}.{suggest_keys(key, candidates(cfg))}"


def first(path: str) -> str:
    """The words that give an option a class; a task calls its own."""
    return f"+{path}._target_=CLASS" + (f" +{path}._partial_=true" if path.startswith("task.") else "")


def has(file: Path, key: str) -> bool:
    """Whether a file of conf/ has the entry of callbacks or loggers that a key is below."""
    return OmegaConf.select(OmegaConf.load(file), ".".join(key.split(".")[:2]), default=None) is not None


def explain_hydra(text: str, words: list[str]) -> str | None:
    """What to say of Hydra's complaints of a command's words; None of others."""
    if missing := re.search(r"Could not override '([^']+)'", text):
        return of_key(missing[1], words)
    there = re.search(r"already at '([^']+)'|^(\S+) appears more than once|Multiple values for (\S+)\.", text)
    if there:
        key = next(filter(None, there.groups()))
        typed = [word for word in words if word[:1] == "+" and key_of(word) == key]  # a resume has older ones before
        word = typed[-1] if typed else f"+{key}=VALUE"
        return f"{key} is there already: leave out the plus, type {shlex.quote(word.lstrip('+'))}"
    if forced := re.search(r"force-add of config groups is not supported: '\++([^']+)'", text):
        return f"{forced[1].partition('=')[0]} is there already: leave out the plus, type {shlex.quote(forced[1])}"
    if gone := re.search(r"Could not delete '([^']+)'\. No match", text):
        return f"There is no {gone[1]} to remove: leave out ~{gone[1]}"
    if gone := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        if gone[1].startswith("logger."):
            return f"There is no key {gone[1]!r} to remove: type ~loggers{gone[1][6:]}, or logger=csv"
        cfg = of_command(words, without=gone[1])
        known = [key for key in candidates(cfg) if key[0] != "+"]
        return f"There is no key {gone[1]!r} to remove.{suggest_keys(gone[1], known)}"
    if other := re.search(r"Could not delete from config\. The value of '([^']+)' is (.*) and not (.*)\.", text):
        return f"{other[1]} is {other[2]} and not {other[3]}: type ~{other[1]}, or leave it out"
    if re.search(r"Config group override must be a string or a list", text):
        wrong = next((word for word in words if "=" in word and is_nothing(word.partition("=")[2])), "null")
        return f"{wrong}: null is no file of conf/; leave it out"
    return None
