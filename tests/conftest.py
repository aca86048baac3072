"""Shared by the tests: a composed configuration, and no network or account."""

import ctypes
import gc
import os
import re
import sys
from pathlib import Path

import pytest

# The tests' tensors are small: a second thread mostly waits. Before torch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# oneDNN keeps a compiled product of about 0.1 MB for each of the last 1,024 shapes, and the tests have as many.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
import torch

ROOT = Path(__file__).parent.parent
OURS = ("sru", "tasks", "data", "scripts", "train", "evaluate", "predict")
# Real corpora, next to recordings of the official package. The path is absolute because tests change folders.
REAL = Path(os.environ.get("SRU_TEST_DATA") or ROOT.parent / "shared/data").expanduser().absolute()
GOLDEN = (ROOT / "tests/samples/golden", REAL.parent / "golden")  # a few of the recordings, and all
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


def options(group: str) -> list[str]:
    """The files of a group of conf/; a leading underscore marks what others share."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml"))


def real_data(*patterns: str) -> Path:
    """The folder of real corpora; a test that finds no file for one of the patterns there is skipped."""
    for pattern in patterns:
        if not any(REAL.glob(pattern)):
            pytest.skip(f"{REAL / pattern} is not there; SRU_TEST_DATA names the folder of the real corpora")
    return REAL


def all_recordings() -> None:
    """Skip a test of all recordings where only those of samples/ are."""
    if not any(GOLDEN[1].glob("*.pt")):
        pytest.skip(f"no recordings in {GOLDEN[1]}; SRU_TEST_DATA names the folder beside it")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """With `-m gpu`, skip a file that needs a package which is not installed, and name it.

    A GPU machine may have no network, and few packages.
    """
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] not in OURS and collector.config.getoption("markexpr") == "gpu":
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: needs the package {missing[1]}")
    return report


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # its keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _give_memory_back(monkeypatch):
    """Training keeps what it frees; a process of thousands of tests would keep what the largest of them took."""
    if memory := sys.modules.get("tasks.run.malloc"):
        monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)
    yield
    # Trainer, network and optimiser refer to one another: only a collection frees them.
    if resident() > last_resident[0] + 30:
        gc.collect()
        if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)
        last_resident[0] = resident()


if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
    library.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: from 1 MiB on, freed memory goes back to the system

last_resident = [0.0]  # MB after the last collection


def resident() -> float:
    """Resident memory of this process in MB, if the system reports it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20 if statm.exists() else 0.0


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """configure(*overrides): the configuration of a short, quiet run in tmp_path, as train.py would get it."""
    # Here, so that the library's tests need the library alone.
    pytest.importorskip("hydra")
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    monkeypatch.setenv("SRU_CACHE", str(tmp_path / "cache"))

    def composed(*overrides):
        quiet = ["logger=csv", "trainer.enable_progress_bar=false", f"run_dir={tmp_path / 'run'}"]
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            cfg = compose("config", overrides=[*quiet, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    yield composed
    HydraConfig.instance().cfg = None
