"""Measure speed as ratios within one run: python scripts/benchmark.py [SECTION], one of those below or all.

With `--device cpu` or `--device cuda`, the SRU beside other networks on that device.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SHAPES = [(1, 1, 512), (1, 32, 128), (32, 32, 128), (40, 32, 128), (333, 16, 416), (128, 32, 512), (256, 16, 1024)]


def medians(contenders: dict[Any, Callable[[], object]], seconds: float = 2.0) -> dict[Any, float]:
    """Median seconds a call; contenders take turns of a few calls, so that a disturbance meets them all.

    The first call of a turn is not counted: it finds the caches full of what another left.
    """
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in contenders.items():
            call()
            for _ in range(5):
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


# A layer as wide as its input, or one step of it; run by this process and, for the official package, by another.
LAYER_SHAPES = [(32, 32, 128), (128, 32, 512), (256, 16, 1024), (1, 1, 512)]


def layer_calls(network: torch.nn.Module, steps: int, batch: int, size: int) -> dict[str, Callable[[], object]]:
    """Inference, and a training step without an optimiser, of a recurrent network with LSTM's call."""
    x = torch.randn(steps, batch, size, requires_grad=True)
    grad = torch.randn(steps, batch, size)

    parameters = [p for p in network.parameters() if p.requires_grad]

    def infer():
        with torch.no_grad():
            network(x)

    def train():
        h, _ = network(x)
        torch.autograd.grad(h, [x, *parameters], grad.to(h.dtype))

    return {"infer": infer, "train": train}


def in_bfloat16(call: Callable[[], object]) -> Callable[[], None]:
    """The call under autocast."""

    def cast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call()

    return cast


def official(threads: int) -> None:
    """The seconds of the official package, one line a shape; in its own environment, for `layer --official`."""
    from sru import SRU  # not ours: that environment's

    torch.set_num_threads(threads)
    for shape in LAYER_SHAPES:
        print(json.dumps(medians(layer_calls(SRU(shape[2], shape[2], num_layers=1), *shape))))


def layer(options: argparse.Namespace) -> None:
    """A layer with its matrix product beside torch.nn.LSTM, and the official package where there is one."""
    from sru import SRU

    theirs: list[dict[str, float]] = []
    if options.official:
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import benchmark; "
            f"sys.path.remove({str(ROOT)!r}); benchmark.official({torch.get_num_threads()})"
        )
        command = [options.official, "-W", "ignore", "-c", code]
        with tempfile.TemporaryDirectory() as elsewhere:  # where no folder `sru` hides the package
            done = subprocess.run(command, cwd=elsewhere, stdout=subprocess.PIPE, text=True, check=True)
        theirs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = []
    for i, shape in enumerate(LAYER_SHAPES):
        networks = {"sru": SRU(shape[2], shape[2], 1), "lstm": torch.nn.LSTM(shape[2], shape[2])}
        calls = {
            f"{name} {kind}": call
            for name, network in networks.items()
            for kind, call in layer_calls(network, *shape).items()
        }
        calls |= {f"{name}, bfloat16": in_bfloat16(call) for name, call in calls.items() if name.startswith("sru")}
        found = medians(calls)
        cells = [str(shape)]
        for kind in ("infer", "train"):
            ours = found[f"sru {kind}"]
            cells += [f"{ours * 1e3:.3g}", f"{found[f'lstm {kind}'] / ours:.1f}x"]
            cells += [f"{theirs[i][kind] / ours:.1f}x"] if theirs else []
            cells += [f"{found[f'sru {kind}, bfloat16'] * 1e3:.3g}"]
        rows.append(cells)
    than = ["LSTM / SRU", "official / SRU"] if theirs else ["LSTM / SRU"]
    print(f"One layer, float32, input as wide as the layer, {torch.get_num_threads()} threads.\n")
    than.append("in bfloat16, ms")
    table(["(T, B, D)", "inference, ms", *than, "forward and backward, ms", *than], rows)

    # Callers at once, each with a sequence of its own, as a server has them.
    shape = (512, 16, 256)
    rows = []
    for name, network in {"SRU": SRU(256, 256, 2), "LSTM": torch.nn.LSTM(256, 256, 2)}.items():
        call = layer_calls(network, *shape)["infer"]
        alone = medians({"call": call}, seconds=1.0)["call"]
        times: list[float] = []

        def work(call=call, times=times):
            for _ in range(10):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)

        threads = [threading.Thread(target=work) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = statistics.median(times)
        rows.append([name, f"{alone * 1e3:.3g}", f"{together * 1e3:.3g}", f"{together / alone:.1f}x"])
    print(f"Two layers, inference of {shape}, one caller and ten at once.\n")
    table(["network", "alone, ms", "among ten, ms", "slower by"], rows)


def epoch(options: argparse.Namespace) -> None:
    """Epochs of classification with fixed vectors and the published sizes, through the trainer, loading included."""
    import logging
    import warnings

    import pytorch_lightning as pl
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from torch.nn import functional as F

    from tasks.clock import Clock

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
                speeds[name].append(clock.speed)
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


def imports(options: argparse.Namespace) -> None:
    """What `import sru` adds to torch's own import, the first call with and without compiled code on disk, and the
    time before train.py answers, or takes its first step."""

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

    def answered(*words: str) -> float:
        """Seconds of the processor until `train.py` ends."""
        before = os.times()
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, check=False)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    # Ends after the first step, of which nothing is kept.
    first_step = """
import os, train
from tasks import processes
settle = processes.settle
def settle_and_watch(cfg):
    from tasks.clock import Clock
    Clock.on_train_batch_end = lambda *_: os._exit(0)
    return settle(cfg)
processes.settle = settle_and_watch
train.command()
"""

    def started() -> float:
        words = [f"data={options.data}", "logger=csv", *([f"data.root={options.root}"] if options.root else [])]
        with tempfile.TemporaryDirectory() as folder:
            words += [f"run_dir={folder}/run", f"hydra.run.dir={folder}/run"]
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", first_step, *words], cwd=ROOT, capture_output=True, check=True)
            return time.perf_counter() - start

    for words in (["--help"], ["data=trec", "--cfg", "job"], ["depth=0"], ["task.nonsense=1"]):
        found = statistics.median(answered(*words) for _ in range(5))
        rows.append([f"train.py {' '.join(words)}, CPU", f"{found:.2f}"])
    started()  # prepares the data
    name = f"train.py data={options.data} until its first step is done"
    rows.append([name, f"{statistics.median(started() for _ in range(5)):.2f}"])
    table(["what", "seconds"], rows)


def lm(options: argparse.Namespace) -> None:
    """Language models of as many parameters: training and generation."""
    from benchmarks import lm

    lm.run(options)


def squad(options: argparse.Namespace) -> None:
    """The readers of the 2018 paper's Table 2: training, and the encoders' share of it."""
    from benchmarks import squad

    squad.run(options)


def translation(options: argparse.Namespace) -> None:
    """Translators of as many parameters: training, and decoding with and without what a step keeps for the next."""
    from benchmarks import translation

    translation.run(options)


def speech(options: argparse.Namespace) -> None:
    """Features, recognisers, streams, and sequences of 16,000 steps."""
    from benchmarks import speech

    speech.run(options)


def framework(options: argparse.Namespace) -> None:
    """A step of train.py beside a plain loop's, and that beside its matrix products."""
    from benchmarks import framework

    framework.run(options)


SECTIONS = {
    "recurrence": recurrence,
    "layer": layer,
    "epoch": epoch,
    "framework": framework,
    "lm": lm,
    "squad": squad,
    "translation": translation,
    "speech": speech,
    "import": imports,
}


def parse() -> argparse.Namespace:
    corpora = sorted(path.stem for path in (ROOT / "conf/data").glob("[!_]*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    sections = [*SECTIONS, "accuracy", "stack", "step", "all"]
    parser.add_argument("section", nargs="?", default="all", choices=sections)
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
    device = parser.add_argument_group("the SRU beside others on one device: accuracy, recurrence, layer, stack, step")
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
    levels = "accuracy", "recurrence", "layer", "stack", "step", "all"
    if options.device and options.section not in levels:
        parser.error(f"{options.section} is measured without --device")
    if not options.device and options.section not in (*SECTIONS, "all"):
        parser.error(f"{options.section} needs --device cpu or --device cuda")
    return options


def main(options: argparse.Namespace) -> None:
    if options.device:
        from benchmarks import device_report

        return device_report.run(options)
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
    words = parse()
    try:
        from tasks.messages import guard
    except ModuleNotFoundError:  # a machine with a GPU may hold what the layer needs, and not the experiments' packages
        main(words)
    else:
        guard(lambda: main(words))
