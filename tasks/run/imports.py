"""The import of torch and Lightning, which takes most of the time before the first step of a small run."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Turn the garbage collector off during imports, which make no garbage: this saves a fifth of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # only once: a later freeze would keep the garbage of a sweep's earlier jobs
            gc.freeze()
        if was_on:
            gc.enable()


def import_lightning() -> None:
    """Import pytorch_lightning without scipy.signal, which takes half as long as torch.

    Lightning imports torchmetrics, which imports scipy.signal only to add an alias, `hamming`, for another package. A
    later import of scipy.signal gets the real module.
    """
    if "pytorch_lightning" in sys.modules:
        return
    signal = ModuleType("scipy.signal")
    vars(signal)["hamming"] = None  # so that torchmetrics adds nothing
    is_free = sys.modules.setdefault("scipy.signal", signal) is signal
    # Lightning logs to stderr only if the root logger has no handler; Hydra's handler writes to stdout.
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        import pytorch_lightning  # noqa: F401
    finally:
        root.handlers = handlers
        if is_free:
            del sys.modules["scipy.signal"]
