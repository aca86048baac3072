"""Errors, told to a person: what is wrong, what there is, what to type."""

import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from tasks import door, failures, hints


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
    if missing_file and isinstance(error, HydraException):
        group, wrong = missing_file[1], missing_file[2]
        listed = re.findall(r"^\t(\w\S*)$", text, re.MULTILINE)  # by Hydra, of its own groups too
        known = [name for name in listed if name[0] != "_"] or hints.choices(group)
        return f"There is no {group}={wrong}.{meant(wrong, known)}"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        text = hints.told(text, sys.argv[1:]) or text
    removed = [word for word in sys.argv[1:] if word.startswith("~")]
    if removed and isinstance(error, (OmegaConfBaseException, TypeError)):
        return f"{text.splitlines()[0]}: perhaps a run needs what {' '.join(removed)} removes; leave that out"
    return text


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
