"""`python -m sru.doctor` runs every backend on this machine and says what to type if one fails."""

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

import sru
from sru import kernels
from sru.kernels.linear import prefers_onednn


def version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run(backend: str, device: str, dtype: torch.dtype, precision: torch.dtype) -> list[Tensor]:
    """Outputs and gradients, as float64, for inputs rounded to dtype and computed in `precision`."""

    def numbers(*shape: int) -> Tensor:
        values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).sin().view(shape)
        return values.to(device, dtype).to(precision).requires_grad_()

    u, v, b, c0 = numbers(5, 3, 4, 6), numbers(2, 6), numbers(2, 6), numbers(3, 6)
    h, c = kernels.recurrence(u, None, v, b, c0, activation="tanh", bidirectional=True, backend=backend)
    gradients = torch.autograd.grad(h.square().sum() + c.square().sum(), [u, v, b, c0])
    return [a.detach().double().cpu() for a in (h, c, *gradients)]


def failure(backend: str, device: str) -> str:
    """Run a backend on a device; return why it does not work, or an empty string."""
    for dtype in kernels.DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            truth, found = run("reference", "cpu", dtype, torch.float64), run(backend, device, dtype, dtype)
        except Exception as error:  # a broken installation may raise anything
            return f"{in_one_line(error)} (with {name})"
        for t, f in zip(truth, found, strict=True):
            allowed = max(16 * torch.finfo(dtype).eps, 1e-12) * max(1.0, t.abs().max().item())
            # This form also fails for NaN.
            if t.shape != f.shape or not (t - f).abs().max().item() <= allowed:
                return f"wrong numbers with {name}: {f.flatten()[:2].tolist()}, not {t.flatten()[:2].tolist()}"
    return ""


def auto(device: str) -> tuple[str, bool]:
    """The backend that auto chooses on a device, and whether it works."""
    chosen: dict[str, list[str]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing kernels, which the table shows
            for dtype in kernels.DTYPES:
                u = torch.empty(0, device=device, dtype=dtype)
                name = u.device.type if kernels.has_kernel(u) else "reference"
                chosen.setdefault(name, []).append(str(dtype).removeprefix("torch."))
    except Exception as error:  # a GPU that torch counts but cannot use
        return f"FAILS: {in_one_line(error)}", False
    finally:
        kernels.warn_once.cache_clear()  # the warnings suppressed here must still appear later
    problems = {name: failure(name, device) for name in chosen}
    texts = [
        f"{name} for {', '.join(dtypes)}" + (f" (FAILS: {problems[name]})" if problems[name] else "")
        for name, dtypes in chosen.items()
    ]
    return "; ".join(texts), not any(problems.values())


def on_gpu(device: str) -> str:
    """Whether the CUDA kernels work on a device."""
    try:
        missing = kernels.why_not_cuda(torch.empty(0, device=device))
        name = torch.cuda.get_device_name(device)
    except Exception as error:  # a GPU that torch counts but cannot use
        return f"FAILS: {in_one_line(error)}"
    if missing:
        return f"does not run on {name}: {missing}"
    problem = failure("cuda", device)
    return f"FAILS on {name}: {problem}" if problem else f"works on {name}, forward and backward"


def cache_folder() -> str:
    """The folder in which numba caches compiled kernels."""
    try:
        import numba

        from sru.kernels import cpu_kernels

        # numba tests here that the folder is writable.
        return f"{numba.njit(cache=True)(cpu_kernels.forward(0)).stats.cache_path} (writable)"
    except Exception as error:
        if "no locator" not in str(error):
            return f"nowhere: {in_one_line(error)}"
        return "nowhere, so every process compiles: set NUMBA_CACHE_DIR to a writable folder"


def examine() -> tuple[dict[str, str], bool]:
    """The table, and whether the choice of auto works on every device."""
    cpuinfo = Path("/proc/cpuinfo")
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    processors = [line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")]
    rows = {
        "sru": f"{sru.__version__} in {Path(sru.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.backends.cpu.get_cpu_capability()}",
        "packages": ", ".join(map(version, ("numba", "numpy", "cupy-cuda12x", "cupy-cuda13x"))),
        "processor": (processors or [platform.processor() or platform.machine()])[0],
        "threads": f"{torch.get_num_threads()} on {os.cpu_count()} cores",
    }
    for name, missing in {"reference": "", "cpu": kernels.why_not_cpu(torch.empty(0))}.items():
        problem = "" if missing else failure(name, "cpu")
        works = f"FAILS: {problem}" if problem else "works, forward and backward"
        rows[f"backend {name}"] = f"does not run here: {missing}" if missing else works
    rows["backend cuda"] = "does not run here: torch is built without CUDA; see https://pytorch.org/get-started"
    if torch.version.cuda is not None:
        rows["backend cuda"] = f"does not run here: torch finds no GPU for CUDA {torch.version.cuda}; type: nvidia-smi"
    for i in range(torch.cuda.device_count()):
        rows["backend cuda" if i == 0 else f"backend cuda:{i}"] = on_gpu(f"cuda:{i}")
    healthy = True
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        rows[f"auto on {device}"], works_here = auto(device)
        healthy = healthy and works_here
    rows["matrix product"] = "oneDNN for float32 on the CPU, else torch's own" if prefers_onednn() else "torch's own"
    rows["compiled code"] = cache_folder()
    return rows, healthy


def main() -> int:
    """Print the table; return the exit status: 1 if the choice of auto fails on a device, else 0."""
    rows, healthy = examine()
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")
    print("\nAll is well." if healthy else "\nThe choice of auto FAILS here; SRU(..., backend='reference') may run.")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
