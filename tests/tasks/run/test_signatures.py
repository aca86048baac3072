"""Signatures read from source equal those of the imported classes; help and refusals import no torch."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra.utils import get_object

from tasks.run import imports, signatures
from tasks.run.signatures import KINDS

NAMED = {name for path in ROOT.glob("conf/**/*.yaml") for name in re.findall(r"_target_: ([\w.]+)", path.read_text())}
# Classes that a user may type.
TYPED = (
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.RichProgressBar",
    "sru.SRUpp",
    "torch.optim.AdamW",
    "torch.optim.LBFGS",
    "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "torch.optim.lr_scheduler.StepLR",
)
HEAVY = {"torch", "pytorch_lightning", "wandb", "datasets", "torchtext", "numba", "scipy"}


def shape(found):
    """The arguments of an object, and of each of its bases of this project."""
    ours = [c for c in inspect.getmro(found) if "__init__" in vars(c)] if isinstance(found, type) else []
    ours = [c for c in ours if c.__module__.partition(".")[0] in signatures.OURS]
    return [
        (
            getattr(each, "__qualname__", ""),
            p.name,
            p.kind,
            p.default is p.empty,
            inspect.formatannotation(p.annotation).strip("'") in KINDS,
        )
        for each in (found, *ours)
        for p in inspect.signature(each).parameters.values()
    ]


@pytest.mark.parametrize(
    "target", sorted({*NAMED, *TYPED} - {"hydra.utils.get_class", "tasks.run.sweep.SweepCallback"})
)
def test_an_outline_has_the_arguments_of_the_class(target):
    found, real = signatures.outline(target), get_object(target)
    assert shape(found) == shape(real)
    assert isinstance(getattr(found, "MODEL_KWARGS", ()), tuple) == isinstance(getattr(real, "MODEL_KWARGS", ()), tuple)
    if isinstance(getattr(real, "MODEL_KWARGS", None), tuple):
        assert found.MODEL_KWARGS == real.MODEL_KWARGS


@pytest.mark.parametrize(
    "target",
    [
        "hydra.utils.get_class",  # in another package
        "tasks.run.sweep.SweepCallback",  # its base is in another package
        "torch.nn.functional.dropou",
        "torch.Tensor",  # its base has no source
        "sru",
        "nothing",
    ],
)
def test_an_incomplete_source_has_no_outline(target):
    assert signatures.outline(target) is None


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --help",
        "evaluate checkpoint=/nowhere",
        "predict --help",
        "predict prompt=x",
        "train --help",
        "train data=trec --cfg job",
        "train data=nosuch",
        "train depth=0",
        "train task.nonsense=1",
        "train +task.optimizer.weigth_decay=1",
        "train task.optimizer=adamw",
        "train callbacks.best.mode=up",
        "train logger=csv trainer.devices=2",
    ],
)
def test_help_and_a_refusal_import_nothing_heavy(tmp_path, words):
    script, *words = words.split()
    command = "command()" if script == "train" else "main(sys.argv[1:])"
    code = (
        f"import sys, {script}\nfrom tasks.run import errors\n"
        f"try:\n    errors.guard(lambda: {script}.{command})\nexcept SystemExit:\n    pass\n"
        f"assert not {HEAVY} & set(sys.modules), 'heavy import'"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_MODE")
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scipy_signal_can_be_imported_after_lightning():
    code = (
        "import sys\nfrom tasks.run import imports\nimports.import_lightning()\n"
        "assert not any(name.startswith('scipy.signal') for name in sys.modules)\n"
        "import scipy.signal, torchmetrics\nassert scipy.signal.lfilter"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_import_of_lightning_keeps_an_imported_scipy_signal():
    import scipy.signal

    imports.import_lightning()
    assert sys.modules["scipy.signal"] is scipy.signal
