"""Freed memory stays with the process, in huge pages on Linux."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import resource, sys, torch
from tasks.run import malloc
if sys.argv[1] == "kept":
    malloc.keep_freed_memory()
def use():
    for _ in range(20):
        torch.ones(12, 2**20).add_(1)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
pages = [line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, *pages)
"""


def run(how: str, **environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_freed_memory_is_used_again_without_a_page_fault():
    faults, huge = run("kept")
    assert faults < 1000
    assert run("given back")[0] > 20 * 12 * 2**20 * 4 // 2**21  # at least one per huge page
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.exists() and "[never]" not in enabled.read_text():
        assert huge > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_environment_variables_of_malloc_have_priority():
    assert run("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] > 1000
