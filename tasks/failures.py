"""What the machine refuses, told to a person: a full disk, too little memory, a file that cannot be had."""

import contextlib
import errno
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MEMORY = "can't allocate memory|out of memory|bad_alloc|Unable to allocate"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of the system, which says nothing of it where writing fails."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except RuntimeError as error:
        # torch.save hides what the system said behind a complaint of its own.
        if not isinstance(error.__context__, OSError):
            raise
        raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error


def told(error: BaseException) -> str | None:
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
