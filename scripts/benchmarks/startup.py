"""Seconds before anything is computed: imports, the first call, and train.py up to its first step."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.timing import ROOT, print_table

MEASURE = "t = time.perf_counter(); {}; print(time.perf_counter() - t)"
FIRST = "from sru import SRU; m = SRU(64, 64); x = torch.randn(8, 4, 64)\n"
FIRST += MEASURE.format("m(x)[0].sum().backward()")
# Ends after the first step and keeps nothing of it.
FIRST_STEP = """
import os, train
from tasks.run import distributed
settle = distributed.resolve_devices
def settle_and_watch(cfg):
    from tasks.run.throughput import ThroughputMonitor
    ThroughputMonitor.on_train_batch_end = lambda *_: os._exit(0)
    return settle(cfg)
distributed.resolve_devices = settle_and_watch
train.command()
"""
COMMANDS = (["--help"], ["data=trec", "--cfg", "job"], ["depth=0"], ["task.nonsense=1"])


def time_code(code: str, **environment: str) -> float:
    """The seconds that code prints in a new process, after torch's import."""
    command = [sys.executable, "-c", f"import time, torch\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def time_answer(words: list[str]) -> float:
    """Seconds of the processor until `train.py` ends."""
    before = os.times()
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, check=False)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def time_first_step(words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_STEP, *words, f"run_dir={folder}/run", f"hydra.run.dir={folder}/run"]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - start


def run(options: argparse.Namespace) -> None:
    imported = statistics.median(time_code(MEASURE.format("import sru")) for _ in range(5))
    rows = [["import sru, beyond torch", f"{imported:.2f}"]]
    with tempfile.TemporaryDirectory() as cache:
        rows.append(["first forward and backward, compiling", f"{time_code(FIRST, NUMBA_CACHE_DIR=cache):.2f}"])
        rows.append(["the same in the next process", f"{time_code(FIRST, NUMBA_CACHE_DIR=cache):.2f}"])
    for words in COMMANDS:
        found = statistics.median(time_answer(words) for _ in range(5))
        rows.append([f"train.py {' '.join(words)}, CPU", f"{found:.2f}"])
    words = [f"data={options.data}", "logger=csv", *([f"data.root={options.root}"] if options.root else [])]
    time_first_step(words)  # prepares the data
    step = statistics.median(time_first_step(words) for _ in range(5))
    rows.append([f"train.py data={options.data} until its first step is done", f"{step:.2f}"])
    print_table(["what", "seconds"], rows)
