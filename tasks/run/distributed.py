"""Training by several processes: start them, number them, and exchange data between them.

There are three ways to start them. `python train.py trainer=ddp trainer.devices=2` starts them itself: it composes the
configuration once and passes it to each. torchrun, and srun on SLURM, start every process: each composes the same
configuration, and the run's folder has the name of the job.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict

ROOT = Path(__file__).parents[2]
FSDP_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")  # those of Lightning's strategy
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
CONFIG_VARIABLE = "SRU_CONFIG"  # passes the configuration, as JSON, to the processes that `launch` starts
FOLDERS = ("run_dir=", "hydra.run.dir=")  # the first has priority


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_srun() -> bool:
    """Whether this is one of several tasks of a job step; a single task, or a batch script, starts its own."""
    is_step = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return is_step and os.environ.get("SLURM_NTASKS", "1") != "1" and not by_torchrun()


def number(name: str, low: int = 0) -> int:
    """An environment variable that torchrun or srun sets for each process."""
    value = os.environ.get(name, "")
    if not value.isdecimal() or int(value) < low:
        raise ValueError(
            f"the variable {name} is {value or 'not set'}, but torchrun and srun set a whole number, {low} or more; "
            "to train without them, type unset TORCHELASTIC_RUN_ID SLURM_STEP_ID"
        )
    return int(value)


def world_size() -> int:
    """The number of processes that were started together."""
    return number("WORLD_SIZE" if by_torchrun() else "SLURM_NTASKS", 1) if by_torchrun() or by_srun() else 1


def rank() -> int:
    """The number of this process; process 0 writes the run's folder."""
    return number("RANK" if by_torchrun() else "SLURM_PROCID") if by_torchrun() or by_srun() else 0


def on_gpu(cfg: DictConfig) -> bool:
    import torch

    accelerator = cfg.trainer.accelerator
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def check(cfg: DictConfig) -> None:
    """Refuse wrong numbers of processes, and several processes without trainer=ddp or trainer=fsdp."""
    strategy, accelerator = cfg.trainer.get("strategy", "auto"), cfg.trainer.accelerator
    for name, value, known in (("strategy", strategy, STRATEGIES), ("accelerator", accelerator, ACCELERATORS)):
        if not OmegaConf.is_dict(value) and value not in known:
            raise ValueError(f"trainer.{name}={value} must be one of {', '.join(known)}")
    if "strategy" in cfg.trainer and "num_nodes" not in cfg.trainer:
        raise ValueError(f"trainer.strategy={strategy}: leave that out, and type trainer=ddp for several processes")
    for name in ("devices", "num_nodes"):
        value = cfg.trainer.get(name, 1)
        if value != "auto" and (type(value) is not int or not 1 <= value <= 10**5):
            raise ValueError(
                f"trainer.{name}={value} must be a whole number, 1 or more, or auto; type for example trainer=ddp "
                f"trainer.{name}=2 (the variable CUDA_VISIBLE_DEVICES selects the GPUs)"
            )
        if value != 1 and "strategy" not in cfg.trainer:
            raise ValueError(f"trainer.{name}={value} needs several processes: type trainer=ddp trainer.{name}={value}")


def resolve_devices(cfg: DictConfig) -> int:
    """Replace auto by numbers and check them against the GPUs and the processes that were started; returns the total.

    With one process, the strategy becomes auto.
    """
    import torch

    if on_gpu(cfg) and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator}: torch finds no GPU here; type trainer.accelerator=cpu"
        )
    if "strategy" not in cfg.trainer:
        if world_size() > 1:
            raise ValueError(f"{world_size()} processes were started, but this trainer uses one: type trainer=ddp")
        return 1
    gpus = torch.cuda.device_count() if on_gpu(cfg) else 0
    local, nodes = max(1, gpus), 1
    if by_torchrun():
        local = number("LOCAL_WORLD_SIZE", 1)
        nodes = world_size() // local
    elif by_srun():
        nodes = number("SLURM_NNODES", 1) if "SLURM_NNODES" in os.environ else 1
        local = world_size() // nodes
    devices = local if cfg.trainer.devices == "auto" else cfg.trainer.devices
    num_nodes = nodes if cfg.trainer.num_nodes == "auto" else cfg.trainer.num_nodes
    if world_size() > 1 and (devices, num_nodes) != (local, nodes):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}: {local} processes were started on each of "
            f"{nodes} machines; leave both out, or type trainer.devices={local} trainer.num_nodes={nodes}"
        )
    if world_size() == 1 and num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={num_nodes}: start it on every machine, with torchrun --nnodes={num_nodes} "
            f"--nproc-per-node={devices}, or with srun (docs/cluster.md)"
        )
    if on_gpu(cfg) and devices > gpus:
        raise ValueError(
            f"trainer.devices={devices}: this machine has {gpus} GPUs; type trainer.devices={max(1, gpus)}, or "
            "trainer.accelerator=cpu"
        )
    with open_dict(cfg):
        cfg.trainer.devices, cfg.trainer.num_nodes = devices, num_nodes
        if devices * num_nodes == 1:
            cfg.trainer.strategy = "auto"
        elif OmegaConf.is_dict(cfg.trainer.strategy) and cfg.trainer.precision not in FSDP_PRECISIONS:
            raise ValueError(
                f"trainer.precision={cfg.trainer.precision}: trainer=fsdp takes {', '.join(FSDP_PRECISIONS)}; type for "
                "example trainer.precision=bf16-mixed"
            )
        if by_srun():
            # Lightning's requeue would save inside a signal handler, while the processes exchange gradients.
            target = "pytorch_lightning.plugins.environments.SLURMEnvironment"
            cfg.trainer.plugins.append({"_target_": target, "auto_requeue": False})
        if rank():
            cfg.trainer.logger = False
    return devices * num_nodes


def launch(cfg: DictConfig, count: int) -> float | None:
    """Run `cfg` in `count` processes of this machine; returns what train.run returns.

    torch's elastic agent starts them, passes signals on to them, and stops the others within seconds if one fails.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    content = {"config": OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), "overrides": overrides()}
    if HydraConfig.initialized():
        content["logging"] = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=10,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    # Its report of a failure describes its own functions.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[CONFIG_VARIABLE] = json.dumps(content)
    sys.stdout.flush()
    try:
        elastic_launch(config, sys.executable)(str(ROOT / "train.py"))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}, explained above"
        message = f"process {number} of {count} ended by {how}; the others were stopped."
        if (Path(cfg.run_dir) / "checkpoints/last.ckpt").exists():
            message += f" Continue with: python train.py resume={shlex.quote(cfg.run_dir)}"
        raise ChildProcessError(message) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None  # after an Exception, a sweep would begin its next job
    finally:
        del os.environ[CONFIG_VARIABLE]
    if cfg.trainer.get("fast_dev_run"):
        return None
    outcome = json.loads((Path(cfg.run_dir) / "metrics.json").read_text(encoding="utf-8"))
    return outcome["metrics"].get(outcome["monitor"])


def config_from_parent() -> DictConfig | None:
    """The configuration that `launch` passes to this process; None if something else started it."""
    if CONFIG_VARIABLE not in os.environ:
        return None
    content = json.loads(os.environ[CONFIG_VARIABLE])
    if "logging" in content:
        configure_log(OmegaConf.create(content["logging"]))
    return OmegaConf.create(content["config"])


def overrides() -> list[str]:
    """The words of the command."""
    if CONFIG_VARIABLE in os.environ:
        return json.loads(os.environ[CONFIG_VARIABLE])["overrides"]
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def arguments(words: list[str]) -> list[str]:
    """The words of a command, with the common folder of the processes that torchrun or srun started.

    A restarted job, also of one process, resumes from its last checkpoint. Each torchrun counts its own restarts, and
    one that replaces a lost machine has counted none; so with torchrun a checkpoint in the folder is enough.
    """
    folders = [word.partition("=")[2].strip("'\"") for key in FOLDERS for word in words if word.startswith(key)]
    is_resumed = any(word.startswith("resume=") for word in words)
    if world_size() > 1 and {"-m", "--multirun"} & set(words):
        raise ValueError("the jobs of a sweep start their processes themselves: leave out torchrun, or srun, or -m")
    if world_size() > 1 and not folders and not is_resumed:
        name = os.environ["TORCHELASTIC_RUN_ID"] if by_torchrun() else os.environ["SLURM_JOB_ID"]
        if not re.fullmatch(r"[\w.-]+", name) or name == "none":
            raise ValueError(
                f"the job's name, {name}, is no common folder: type run_dir=FOLDER, or torchrun --rdzv-id=NAME"
            )
        folders = [f"runs/{'torchrun' if by_torchrun() else 'slurm'}/{name}"]
        words = [*words, f"hydra.run.dir='{folders[0]}'"]
    may_be_restart = by_torchrun() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if may_be_restart and folders and not is_resumed and (Path(folders[0]) / "checkpoints/last.ckpt").exists():
        return [*(word for word in words if not word.startswith(FOLDERS)), f"resume={folders[0]}"]
    return words


@contextlib.contextmanager
def process_group(cfg: DictConfig) -> Iterator[None]:
    """Connect the processes; the others print nothing."""
    if world_size() == 1:
        yield
        return
    import torch
    from pytorch_lightning.plugins.environments import SLURMEnvironment
    from torch import distributed

    if by_srun():
        environment = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    store, _, _ = next(distributed.rendezvous("env://", rank(), world_size()))
    # After a restart, torchrun's store still has the addresses of the processes before. docs/cluster.md names the
    # variable that gives a new store, which machines with different counts of restarts need.
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"] if is_torchruns else "0", store)
    options: dict[str, Any] = {"store": store, "rank": rank(), "world_size": world_size()}
    if on_gpu(cfg):
        device = torch.device("cuda", number("LOCAL_RANK" if by_torchrun() else "SLURM_LOCALID"))
        torch.cuda.set_device(device)
        options["device_id"] = device
    distributed.init_process_group("nccl" if on_gpu(cfg) else "gloo", **options)
    with contextlib.ExitStack() as stack:
        if rank():
            logging.disable(logging.INFO)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    # Not after an error: the other processes would not answer.
    distributed.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """The first process runs the block before the others: a corpus is prepared once."""
    if world_size() == 1:
        yield
        return
    from torch import distributed

    group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))  # to prepare a corpus
    if rank():
        distributed.barrier(group)
    yield
    if not rank():
        distributed.barrier(group)


def all_gather_object(own: Any) -> list[Any]:
    """The objects of all processes, in order of rank; every process must call it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return every


def all_reduce_sum(own: Any) -> Any:
    """Sum the tensor `own` over the processes, in place; every process must call it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(own)
    return own
