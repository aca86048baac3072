"""Measure speed as ratios within one run: python scripts/benchmark.py [SECTION], one of those below or all.

With `--device cpu` or `--device cuda`, the SRU beside other networks on that device.
"""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A section's module and function; imported at use, since most need the packages of the experiments.
SECTIONS = {
    "recurrence": "kernels.run_recurrence",
    "layer": "kernels.run_layer",
    "epoch": "framework.run_epochs",
    "framework": "framework.run",
    "lm": "lm.run",
    "squad": "squad.run",
    "translation": "translation.run",
    "speech": "speech.run",
    "import": "startup.run",
}
LEVELS = "accuracy", "recurrence", "layer", "stack", "step"  # of --device


def parse() -> argparse.Namespace:
    corpora = sorted(path.stem for path in (ROOT / "conf/data").glob("[!_]*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="?", default="all", choices=[*dict.fromkeys([*SECTIONS, *LEVELS]), "all"])
    parser.add_argument("--data", default="pydoc", choices=corpora, help="of `epoch`, `framework` (default: pydoc)")
    parser.add_argument("--root", help="where that corpus lies (data.root)")
    parser.add_argument(
        "--turns", type=int, default=3, help="epochs of each model in `epoch`, `framework` (default: 3)"
    )
    parser.add_argument("--official", help="a Python whose environment holds sru 2.6.0, for `layer` to compare with")
    parser.add_argument(
        "--parameters", type=float, help="of each model of `lm` (default: 1e6), `translation` (6e6), `speech` (2e6)"
    )
    parser.add_argument(
        "--depth", type=int, help="layers of each model of `lm`, `speech` (default: 4), `translation` (3 a side)"
    )
    device = parser.add_argument_group(f"the SRU beside others on one device: {', '.join(LEVELS)}")
    device.add_argument("--device", choices=("cpu", "cuda"), help="measure these levels, instead of the sections")
    device.add_argument("--shapes", help="A,B,C,D,E or TxBxD, with commas (default: those for the device and level)")
    device.add_argument("--modes", help="fp32,tf32,bf16,fp16 (default: all that the device takes)")
    device.add_argument("--seconds", type=float, default=0.25, help="for each contender and pass (default: 0.25)")
    device.add_argument("--out", default="bench/results", help="folder of what is written (default: bench/results)")
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, not {options.turns}")
    if options.depth is not None and options.depth < 1:
        parser.error(f"--depth {options.depth} must be at least 1")
    if options.parameters is not None and not 1e5 <= options.parameters <= 1e8:
        parser.error(f"--parameters {options.parameters:g} must be 1e5 to 1e8")
    if not options.seconds > 0:
        parser.error(f"--seconds must be more than 0, not {options.seconds}")
    if options.device and options.section not in (*LEVELS, "all"):
        parser.error(f"{options.section} is measured without --device")
    if not options.device and options.section not in (*SECTIONS, "all"):
        parser.error(f"{options.section} needs --device cpu or --device cuda")
    return options


def load(name: str) -> Callable[[argparse.Namespace], None]:
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


def describe_machine() -> str:
    import torch

    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba"))
    return (
        f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {packages}"
    )


def main(options: argparse.Namespace) -> None:
    if options.device:
        return load("device_report.run")(options)
    print(f"{describe_machine()}\n")
    for name, function in SECTIONS.items():
        if options.section in (name, "all"):
            load(function)(options)


if __name__ == "__main__":
    words = parse()
    try:
        from tasks.run.errors import guard
    except ModuleNotFoundError:  # a machine with a GPU may hold what the layer needs, and not the experiments' packages
        main(words)
    else:
        guard(lambda: main(words))
