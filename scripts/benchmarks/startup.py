"""Start-up time in seconds: imports, the first call, and train.py up to its first step."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.framework import corpus_words
from benchmarks.timing import ROOT, print_table

MEASURE = "t = time.perf_counter(); {}; print(time.perf_counter() - t)"
FIRST = "from sru import SRU; m = SRU(64, 64); x = torch.randn(8, 4, 64)\n"
FIRST += MEASURE.format("m(x)[0].sum().backward()")
# Ends the process after the first step.
FIRST_STEP = """
import os, train
from tasks.run import distributed
resolve = distributed.resolve_devices
def resolve_and_patch(cfg):
    from tasks.run.throughput import ThroughputMonitor
    ThroughputMonitor.on_train_batch_end = lambda *_: os._exit(0)
    return resolve(cfg)
distributed.resolve_devices = resolve_and_patch
train.command()
"""
COMMANDS = (["--help"], ["data=trec", "--cfg", "job"], ["depth=0"], ["task.nonsense=1"])


def time_code(code: str, **environment: str) -> float:
    """The seconds that code prints in a new process, after importing torch."""
    command = [sys.executable, "-c", f"import time, torch\n{code}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def time_command(words: list[str]) -> float:
    """CPU seconds of `train.py`, which may fail."""
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
    rows = {"import sru, beyond torch": imported}
    with tempfile.TemporaryDirectory() as cache:
        rows["first forward and backward, compiling"] = time_code(FIRST, NUMBA_CACHE_DIR=cache)
        rows["the same in the next process"] = time_code(FIRST, NUMBA_CACHE_DIR=cache)
    for words in COMMANDS:
        rows[f"train.py {' '.join(words)}, CPU"] = statistics.median(time_command(words) for _ in range(5))
    words = ["logger=csv", *corpus_words(options)]
    time_first_step(words)  # prepares the data
    step = statistics.median(time_first_step(words) for _ in range(5))
    rows[f"train.py data={options.data} until its first step is done"] = step
    print_table(["what", "seconds"], [[name, f"{seconds:.2f}"] for name, seconds in rows.items()])
