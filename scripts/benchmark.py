"""Measure speed, as ratios within one run: `python scripts/benchmark.py SECTION`.

With --device, compare SRU with other networks on that device.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# {section: module.function}; imported at use, since most need the packages of the experiments.
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
LEVELS = "accuracy", "recurrence", "layer", "stack", "step"  # with --device
SCALING = "scaling"  # computed, not measured: a step on many GPUs
CUTS = "cuts"  # with --device cuda: how the CUDA kernels should divide the work


def parse() -> argparse.Namespace:
    corpora = sorted(path.stem for path in (ROOT / "conf/data").glob("[!_]*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "section",
        nargs="?",
        default="all",
        choices=[*dict.fromkeys([*SECTIONS, *LEVELS]), CUTS, SCALING, "all"],
        metavar="SECTION",
        help=f"one of {', '.join(SECTIONS)} or all (the default); or {SCALING}, a model of many GPUs",
    )
    parser.add_argument(
        "--data", default="pydoc", choices=corpora, metavar="DATA", help="corpus of epoch and framework (pydoc)"
    )
    parser.add_argument("--root", help="folder of that corpus (data.root)")
    parser.add_argument("--turns", type=int, default=3, help="epochs per model in epoch and framework (3)")
    parser.add_argument("--official", help="a Python interpreter with sru 2.6.0 installed, to compare layer with")
    parser.add_argument(
        "--parameters", type=float, help="size of each model in lm (1e6), translation (6e6) and speech (2e6)"
    )
    parser.add_argument("--depth", type=int, help="layers of each model in lm and speech (4), translation (3 per side)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a GPU and batch in scaling (4096)")
    parser.add_argument("--seconds", type=float, default=0.25, help="time for each contender and pass (0.25)")
    device = parser.add_argument_group(
        f"SRU and other networks on one device, SECTION of {', '.join(LEVELS)}, {CUTS} or all"
    )
    device.add_argument("--device", choices=("cpu", "cuda"))
    device.add_argument("--shapes", help="A,B,C,D,E or TxBxD, separated by commas (default depends on the section)")
    device.add_argument("--modes", help="fp32,tf32,bf16,fp16 (default: all that the device supports)")
    device.add_argument("--out", default="bench/results", help="folder for the results (bench/results)")
    device.add_argument("--minutes", type=float, default=math.inf, help="start no shape after so long (no limit)")
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, not {options.turns}")
    if options.depth is not None and options.depth < 1:
        parser.error(f"--depth {options.depth} must be at least 1")
    if options.parameters is not None and not 1e5 <= options.parameters <= 1e8:
        parser.error(f"--parameters {options.parameters:g} must be 1e5 to 1e8")
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {options.minutes}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be more than 0, not {options.seconds}")
    if options.section == CUTS and options.device != "cuda":
        parser.error("cuts needs --device cuda")
    if options.device and options.section not in (*LEVELS, CUTS, "all"):
        parser.error(f"{options.section} is measured without --device")
    if options.tokens < 1:
        parser.error(f"--tokens must be at least 1, not {options.tokens}")
    if not options.device and options.section not in (*SECTIONS, SCALING, "all"):
        parser.error(f"{options.section} needs --device cpu or --device cuda")
    return options


def load(name: str) -> Callable[[argparse.Namespace], None]:
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"benchmarks.{module}"), function)


def main(options: argparse.Namespace) -> None:
    if options.device:
        return load("cuts.run" if options.section == CUTS else "device_report.run")(options)
    if options.section == SCALING:
        return load("scaling.run")(options)
    from benchmarks.timing import describe_machine

    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()) + "\n")
    for name, function in SECTIONS.items():
        if options.section in (name, "all"):
            load(function)(options)


if __name__ == "__main__":
    words = parse()
    try:
        from tasks.run.errors import guard
    except ModuleNotFoundError:  # a machine with a GPU may have what the layer needs, but not the experiments' packages
        main(words)
    else:
        guard(lambda: main(words))
