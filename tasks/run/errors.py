"""Turn exceptions into one message: what is wrong, what is possible, and what to type."""

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
    """The message for a failure of the machine; None for other errors."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(MEMORY, str(error))):
        return (
            f"the memory is too small ({str(error).strip().splitlines()[0] if str(error) else 'MemoryError'}); type a "
            "smaller data.batch_size= (or, where the data has it, data.tokens_per_batch=, data.frames_per_batch=, "
            "data.unroll=, data.segment=; in evaluation data.eval_batch_size=), with trainer.accumulate_grad_batches= "
            "for as many examples per step, or a smaller width=."
        )
    if not isinstance(error, OSError) or error.filename is None:
        return None
    path = Path(str(error.filename))
    if error.errno in FULL:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        return (
            f"{path}: {error.strerror}, {shutil.disk_usage(place).free / 2**20:.0f} MiB are free there. Files saved "
            "before are complete. Make room (or raise the quota), and type the same command again; a run that has "
            "checkpoints/last.ckpt continues with: python train.py resume=FOLDER"
        )
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names or name == "__main__"]
    if ours and ours[-1].startswith("hydra."):
        return f"{path}: {error.strerror}. Runs are written below hydra.run.dir=FOLDER (hydra.sweep.dir)"
    if not any(name.startswith("data.") for name in modules):
        return f"{path}: {error.strerror}"
    return f"{path}: {error.strerror}. Corpora are stored in data.root=FOLDER, prepared data in data.cache=FOLDER"


def explain(error: BaseException) -> str:
    """The message for any error, with suggestions."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if message := explain_failure(error):
        return message
    needs_type = not isinstance(error, (ValueError, OSError, HydraException))
    text = f"{type(error).__name__}: {error}" if needs_type else f"{error}"
    if isinstance(error, OverrideParseException):
        word = error.override
        if "=" in word:
            return (
                f"{word} cannot be read; type a list as 'ablation=[no_vc,no_highway]', a text as \"run_dir='a (b)'\"."
            )
        group = next((path.parent.name for path in config_checks.CONF.glob("*/*.yaml") if path.stem == word), None)
        return f"{word!r}: expected KEY=VALUE; type {f'{group}={word}' if group else 'for example depth=3'}."
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        key, values = several.groups()
        return f"{key}={values} has several values; for a run of each add -m; type a list as '{key}=[{values}]'."
    missing_file = re.search(r"Could not (?:find|load) '([\w/]+)/([^']+)'", text)
    if missing_file and isinstance(error, HydraException):
        group, wrong = missing_file[1], missing_file[2]
        listed = re.findall(r"^\t(\w\S*)$", text, re.MULTILINE)  # by Hydra, also for its own groups
        known = [name for name in listed if name[0] != "_"] or config_checks.choices(group)
        return f"There is no {group}={wrong}.{config_hints.suggest_keys(wrong, known)}"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        text = config_hints.explain_hydra(text, sys.argv[1:]) or text
    removed = [word for word in sys.argv[1:] if word.startswith("~")]
    if removed and isinstance(error, (OmegaConfBaseException, TypeError)):
        return f"{text.splitlines()[0]}: perhaps a run needs what {' '.join(removed)} removes; leave that out"
    return text


def guard(main: Callable[[], Any]) -> None:
    """Run a command; an error becomes one message and exit status 1, or a traceback with HYDRA_FULL_ERROR=1."""
    # Both variables reach the processes that this one starts; SRU_MESSAGES tells them that the user set neither.
    show_traceback = "HYDRA_FULL_ERROR" in os.environ and "SRU_MESSAGES" not in os.environ
    if not show_traceback:
        os.environ["SRU_MESSAGES"] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it, Hydra prints a traceback and exits
    try:
        main()
        sys.stdout.flush()  # here, so that an error is handled below
    except KeyboardInterrupt:  # before training; preemption.py handles it during training
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_closed(sys.stdout):
            # Nobody reads on, as with `| head`. Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)  # the status of SIGPIPE
        if show_traceback:
            raise
        sys.exit(f"error: {explain(error)}\n(--help lists the choices, HYDRA_FULL_ERROR=1 shows where.)")
    except SystemExit as refused:
        if refused.code == 2:  # from argparse, which knows only Hydra's own flags
            print("Options have no dashes: depth=3, not --depth 3. --help lists the choices.", file=sys.stderr)
        raise
    finally:
        os.environ.pop("SRU_MESSAGES", None)


def is_closed(stream: TextIO) -> bool:
    """Whether the reader of a pipe has closed it."""
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported in any case
    return bool(poll.poll(0))
