"""Measure speed as ratios within one run: python scripts/benchmark.py [recurrence|epoch|import|all]."""

import argparse
import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SHAPES = [(1, 1, 512), (1, 32, 128), (32, 32, 128), (40, 32, 128), (128, 32, 512), (256, 16, 1024)]


def medians(contenders: dict[str, Callable[[], object]], seconds: float = 2.0) -> dict[str, float]:
    """Median seconds a call; contenders take turns, so that a disturbance meets them all."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(head: list[str], rows: list[list[str]]) -> None:
    for cells in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(cells) + " |")
    print()


def recurrence(_: argparse.Namespace) -> None:
    """The elementwise kernel: ns an element, its share of the copy bandwidth, and the eager reference beside it."""
    from sru.kernels import recurrence

    large = torch.randn(64 * 2**20 // 4)
    target = torch.empty_like(large)
    copy = 2 * large.numel() * 4 / medians({"copy": lambda: target.copy_(large)})["copy"]
    print(f"Recurrence, float32, highway. Copy bandwidth of this run: {copy / 1e9:.0f} GB/s.\n")
    rows = []
    for steps, batch, size in SHAPES:
        inputs = [
            torch.randn(shape, requires_grad=True)
            for shape in ((steps, batch, 3, size), (steps, batch, size), (2, size), (2, size), (batch, size))
        ]
        grads = [torch.randn(steps, batch, size), torch.randn(batch, size)]

        def infer(inputs=inputs):
            with torch.no_grad():
                recurrence(*inputs)

        outputs = recurrence(*inputs)
        eager = recurrence(*inputs, backend="reference")

        def forward(inputs=inputs):
            return recurrence(*inputs)

        def backward(outputs=outputs, inputs=inputs, grads=grads):
            torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

        def reference(inputs=inputs, eager=eager, grads=grads):
            recurrence(*inputs, backend="reference")
            torch.autograd.grad(eager, inputs, grads, retain_graph=True)

        found = medians({"infer": infer, "forward": forward, "backward": backward})
        # By itself: what the reference frees goes back to the system, and the next one to ask pays for new pages.
        found |= medians({"reference": reference}, seconds=1.0)
        elements = steps * batch * size
        cells = [f"({steps}, {batch}, {size})"]
        # Bytes that must move: see bench/NOTES.md.
        for name, necessary in (("infer", 20), ("forward", 24), ("backward", 40)):
            share = necessary * elements / found[name] / copy
            cells.append(f"{found[name] / elements * 1e9:.2f} ({share:.0%})")
        cells.append(f"{found['reference'] / (found['forward'] + found['backward']):.0f}x")
        rows.append(cells)
    head = ["(T, B, D)", "inference, ns (of copy)", "forward, ns", "backward, ns", "reference / kernel, both passes"]
    table(head, rows)


def epoch(options: argparse.Namespace) -> None:
    """Epochs of classification with fixed vectors and the published sizes, through the trainer, loading included."""
    import logging
    import warnings

    import pytorch_lightning as pl
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from torch.nn import functional as F

    from tasks.record import Clock

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    overrides = [f"data={options.data}", "run_dir=."]
    if options.root:
        overrides.append(f"data.root={options.root}")
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        configs = {
            name: compose("config", overrides=[*overrides, *words])
            for name, words in {
                "SRU, 2 layers": ["model=sru"],
                "LSTM, 2 layers": ["model=lstm"],
                "QRNN + highway, 2 layers": ["model=qrnn", "model.highway=true"],
                "CNN": ["model=cnn"],
            }.items()
        }
    data = instantiate(next(iter(configs.values())).data)
    dims = data.dims
    # Speed does not depend on what the vectors say.
    dims["vectors"] = F.normalize(torch.randn(dims["vocab_size"], 300))
    loader = data.train_dataloader()
    tasks = {name: instantiate(cfg.task)(encoder=instantiate(cfg.model), **dims) for name, cfg in configs.items()}
    speeds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(options.turns + 1):
        for name, task in tasks.items():
            clock = Clock()
            trainer = pl.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                callbacks=[clock],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(task, loader)
            if turn:  # the first one warms up
                speeds[name].append(clock.examples_per_second)
    start = time.perf_counter()
    for _ in loader:
        pass
    loading = time.perf_counter() - start
    lstm = statistics.median(speeds["LSTM, 2 layers"])
    examples = len(data.splits["train"])
    print(f"Training, data={options.data}: {examples} examples, batch 32, fixed 300-dimensional vectors.\n")
    table(
        ["model", "examples/s", "against LSTM", "loading, share of the epoch"],
        [
            [
                name,
                f"{(speed := statistics.median(found)):.0f}",
                f"{speed / lstm:.2f}x",
                f"{loading * speed / examples:.2%}",
            ]
            for name, found in speeds.items()
        ],
    )


def imports(_: argparse.Namespace) -> None:
    """What `import sru` adds to torch's own import, and the first call with and without compiled code on disk."""

    def seconds(code: str, **environment: str) -> float:
        code = f"import time, torch\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    measure = "t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    first = (
        "from sru import SRU; m = SRU(64, 64); x = torch.randn(8, 4, 64)\n"
        + measure.format("m(x)[0].sum().backward()")
    )  # fmt: skip
    rows = [
        [
            "import sru, beyond torch",
            f"{statistics.median(seconds(measure.format('import sru')) for _ in range(5)):.2f}",
        ]
    ]
    with tempfile.TemporaryDirectory() as cache:
        rows.append(["first forward and backward, compiling", f"{seconds(first, NUMBA_CACHE_DIR=cache):.2f}"])
        rows.append(["the same in the next process", f"{seconds(first, NUMBA_CACHE_DIR=cache):.2f}"])
    table(["what", "seconds"], rows)


SECTIONS = {"recurrence": recurrence, "epoch": epoch, "import": imports}


def main() -> None:
    corpora = sorted(path.stem for path in (ROOT / "conf/data").glob("[!_]*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="?", default="all", choices=[*SECTIONS, "all"])
    parser.add_argument("--data", default="pydoc", choices=corpora, help="the corpus of `epoch` (default: pydoc)")
    parser.add_argument("--root", help="where that corpus lies (data.root)")
    parser.add_argument("--turns", type=int, default=3, help="epochs that `epoch` measures for each model (default: 3)")
    options = parser.parse_args()
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, not {options.turns}")
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")]
    print(
        f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; ", end=""
    )
    print(", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in ("torch", "numba"))]) + "\n")
    for name, section in SECTIONS.items():
        if options.section in (name, "all"):
            section(options)


if __name__ == "__main__":
    from tasks.door import guard

    guard(main)
