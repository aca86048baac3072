"""Import torch and Lightning faster: the import takes most of the time before the first step of a small run."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Disable the garbage collector during imports, which create no garbage: this saves a fifth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: a later freeze would keep the garbage of earlier jobs of a sweep
            gc.freeze()
        if was_enabled:
            gc.enable()


def import_lightning() -> None:
    """Import pytorch_lightning without scipy.signal, which takes half as long as torch.

    Lightning imports torchmetrics, which imports scipy.signal only to add an alias, `hamming`, for another package. A
    later import of scipy.signal gets the real module.
    """
    if "pytorch_lightning" in sys.modules:
        return
    placeholder = ModuleType("scipy.signal")
    vars(placeholder)["hamming"] = None  # so that torchmetrics adds nothing
    is_placeholder = sys.modules.setdefault("scipy.signal", placeholder) is placeholder
    # Lightning logs to stderr only if the root logger has no handler; Hydra's handler writes to stdout.
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        import pytorch_lightning  # noqa: F401
    finally:
        root.handlers = handlers
        if is_placeholder:
            del sys.modules["scipy.signal"]
