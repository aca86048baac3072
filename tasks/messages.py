"""Errors, told to a person: what is wrong, what there is, what to type."""

import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

import hydra
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tasks import door, failures


def explain(error: BaseException) -> str:
    """One message for a person: what is wrong, what is there, what was perhaps meant."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if message := failures.told(error):
        return message
    text = (
        f"{error}" if isinstance(error, (ValueError, OSError, HydraException)) else f"{type(error).__name__}: {error}"
    )
    if isinstance(error, OverrideParseException):
        word = error.override
        if "=" in word:
            return (
                f"{word} cannot be read; type a list as 'ablation=[no_vc,no_highway]', a text as \"run_dir='a (b)'\"."
            )
        group = next((path.parent.name for path in door.ROOT.glob("conf/*/*.yaml") if path.stem == word), None)
        return f"{word!r} is no KEY=VALUE; type {f'{group}={word}' if group else 'for example depth=3'}."
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        key, values = several.groups()
        return f"{key}={values} has several values; for a run of each add -m; type a list as '{key}=[{values}]'."
    missing_file = re.search(r"Could not (?:find|load) '([\w/]+)/([^']+)'", text)
    missing_key = re.search(r"Could not override '([^']+)'", text)
    if not isinstance(error, (HydraException, OmegaConfBaseException)) or not (missing_file or missing_key):
        return text
    if missing_file:
        group, wrong = missing_file[1], missing_file[2]
        text = f"There is no {group}={wrong}."
        known = sorted(path.stem for path in (door.ROOT / "conf" / group).glob("[!_]*.yaml"))
    else:
        assert missing_key is not None
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(door.ROOT / "conf")):
            known = list(door.leaves(OmegaConf.to_container(hydra.compose("config"))))
        known += [path.name for path in (door.ROOT / "conf").iterdir() if path.is_dir()]
        wrong, text = missing_key[1], f"There is no key {missing_key[1]!r}."
    return text + meant(wrong, known)


def meant(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong.lower(), known, n=3, cutoff=0.5)
    return f" Did you mean: {', '.join(close)}?" if close else f" There are: {', '.join(known)}."


def guard(main: Callable[[], Any]) -> None:
    """Run a command; an error becomes one message and exit status 1, unless HYDRA_FULL_ERROR asks for the traceback."""
    # A process that another one starts has the variable from it, who may have it from here.
    show_traceback = "HYDRA_FULL_ERROR" in os.environ and "SRU_MESSAGES" not in os.environ
    if not show_traceback:
        os.environ["SRU_MESSAGES"] = "1"
    # Hydra would print a traceback and exit; with this it hands the error on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
        sys.stdout.flush()  # here, not behind all of this
    except KeyboardInterrupt:  # before a training that saves itself (tasks/interruption.py) has begun
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_unread(sys.stdout):
            # Whoever reads has seen enough; Python would complain once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)  # as SIGPIPE ends others
        if show_traceback:
            raise
        sys.exit(f"error: {explain(error)}\n(--help lists what there is, HYDRA_FULL_ERROR=1 shows where.)")
    except SystemExit as refused:
        if refused.code == 2:  # by argparse, which knows Hydra's own options only
            print("Options have no dashes: depth=3, not --depth 3. --help lists what there is.", file=sys.stderr)
        raise
    finally:
        os.environ.pop("SRU_MESSAGES", None)


def is_unread(stream: TextIO) -> bool:
    """Whether whoever read what is written there has closed it."""
    poll = select.poll()
    poll.register(stream, 0)  # an error is told unasked
    return bool(poll.poll(0))
