"""Errors as a person can use them: one message for what was typed wrong, and for failures of the machine."""

import difflib
import errno
import os
import re
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from tasks.run import config_checks, config_hints

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY = "can't allocate memory|out of memory|bad_alloc|Unable to allocate"


def explain_failure(error: BaseException) -> str | None:
    """The message for a failure of the machine; None for any other error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(MEMORY, str(error))):
        return (
            f"the memory is too small ({str(error).strip().splitlines()[0] if str(error) else 'MemoryError'}); type a "
            "smaller data.batch_size= (or, where the data has it, data.tokens_per_batch=, data.frames_per_batch=, "
            "data.unroll=; in evaluation data.eval_batch_size=), with trainer.accumulate_grad_batches= for as many "
            "examples a step, or a smaller width=."
        )
    if not isinstance(error, OSError) or error.filename is None:
        return None
    path = Path(str(error.filename))
    if error.errno in FULL:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        return (
            f"{path}: {error.strerror}, {shutil.disk_usage(place).free / 2**20:.0f} MiB are free there. Whatever was "
            "saved before is whole. Make room (or raise the quota), and type the same command again; a run that has "
            "checkpoints/last.ckpt goes on with: python train.py resume=FOLDER"
        )
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names or name == "__main__"]
    if ours and ours[-1].startswith("hydra."):
        return f"{path}: {error.strerror}. Runs are written below hydra.run.dir=FOLDER (hydra.sweep.dir)"
    if not any(name.startswith("data.") for name in modules):
        return f"{path}: {error.strerror}"
    return f"{path}: {error.strerror}. Corpora lie in data.root=FOLDER, what is prepared of them in data.cache=FOLDER"


def explain(error: BaseException) -> str:
    """One message for a person: what is wrong, what is there, what was perhaps meant."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if message := explain_failure(error):
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
        group = next((path.parent.name for path in config_checks.ROOT.glob("conf/*/*.yaml") if path.stem == word), None)
        return f"{word!r} is no KEY=VALUE; type {f'{group}={word}' if group else 'for example depth=3'}."
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        key, values = several.groups()
        return f"{key}={values} has several values; for a run of each add -m; type a list as '{key}=[{values}]'."
    missing_file = re.search(r"Could not (?:find|load) '([\w/]+)/([^']+)'", text)
    if missing_file and isinstance(error, HydraException):
        group, wrong = missing_file[1], missing_file[2]
        listed = re.findall(r"^\t(\w\S*)$", text, re.MULTILINE)  # by Hydra, of its own groups too
        known = [name for name in listed if name[0] != "_"] or config_hints.choices(group)
        return f"There is no {group}={wrong}.{suggest_keys(wrong, known)}"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        text = config_hints.explain_hydra(text, sys.argv[1:]) or text
    removed = [word for word in sys.argv[1:] if word.startswith("~")]
    if removed and isinstance(error, (OmegaConfBaseException, TypeError)):
        return f"{text.splitlines()[0]}: perhaps a run needs what {' '.join(removed)} removes; leave that out"
    return text


def suggest_keys(wrong: str, known: list[str]) -> str:
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
    except KeyboardInterrupt:  # before a training that saves itself (tasks/run/preemption.py) has begun
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
