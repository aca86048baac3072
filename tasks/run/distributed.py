"""Training by several processes: who starts them, which one this is, and what they hand to one another.

Three ways lead to several processes. `python train.py trainer=ddp trainer.devices=2` starts them itself: the command
composes the configuration once and hands it over, whole. torchrun, and srun on SLURM, start every process by
themselves: each composes the same configuration, and the run's folder is named after the job.
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
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:  # torch is imported where it is used: a command that is refused does not wait for it
    from torch import Tensor

ROOT = Path(__file__).parents[2]
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
HANDED_OVER = "SRU_CONFIG"  # the variable with the configuration, as JSON, of the processes that `launch` starts
PREPARING = timedelta(days=7)  # that the others wait for the first process to prepare a corpus
FOLDERS = ("run_dir=", "hydra.run.dir=")  # the first counts


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_srun() -> bool:
    """Of several tasks; one of a single task starts its own processes. A batch script itself is no job step."""
    is_step = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return is_step and os.environ.get("SLURM_NTASKS", "1") != "1" and not by_torchrun()


def number(name: str, low: int = 0) -> int:
    """A variable that torchrun, or srun, has set for this process."""
    value = os.environ.get(name, "")
    if not value.isdecimal() or int(value) < low:
        by, own = ("torchrun", "TORCHELASTIC_RUN_ID") if by_torchrun() else ("srun", "SLURM_STEP_ID")
        raise ValueError(
            f"the variable {name} is {value or 'not set'}, where {by} sets a whole number, {low} or more: start the "
            f"command by {by}, or without it `unset {own}`"
        )
    return int(value)


def world_size() -> int:
    """How many processes were started together, by whomever."""
    return number("WORLD_SIZE" if by_torchrun() else "SLURM_NTASKS", 1) if by_torchrun() or by_srun() else 1


def rank() -> int:
    """The number of this process among them; process 0 writes the run's folder."""
    return number("RANK" if by_torchrun() else "SLURM_PROCID") if by_torchrun() or by_srun() else 0


def on_gpu(cfg: DictConfig) -> bool:
    import torch

    accelerator = cfg.trainer.accelerator
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def check(cfg: DictConfig) -> None:
    """Refuse numbers of processes that are none, and any but one without trainer=ddp or trainer=fsdp."""
    strategy, accelerator = cfg.trainer.get("strategy", "auto"), cfg.trainer.accelerator
    if not OmegaConf.is_dict(strategy) and strategy not in STRATEGIES:
        raise ValueError(f"trainer.strategy={strategy} must be one of {', '.join(STRATEGIES)}; or type trainer=fsdp")
    if accelerator not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator={accelerator} must be one of {', '.join(ACCELERATORS)}")
    if "strategy" in cfg.trainer and "num_nodes" not in cfg.trainer:
        raise ValueError(f"trainer.strategy={strategy}: leave that out, and type trainer=ddp for several processes")
    for name, is_auto in (("devices", "strategy" in cfg.trainer), ("num_nodes", "strategy" in cfg.trainer)):
        value = cfg.trainer.get(name, 1)
        if not (type(value) is int and 1 <= value <= 10**5) and not (is_auto and value == "auto"):
            raise ValueError(
                f"trainer.{name}={value} must be a whole number, 1 or more"
                f"{', or auto' if is_auto else ''}; type for example trainer=ddp trainer.{name}=2"
                + (" (which GPUs, says the variable CUDA_VISIBLE_DEVICES)" if name == "devices" else "")
            )
        if not is_auto and value != 1:
            raise ValueError(f"trainer.{name}={value} needs several processes: type trainer=ddp trainer.{name}={value}")


def resolve_devices(cfg: DictConfig) -> int:
    """Put numbers for auto, check them against this machine and who started it; returns how many processes there are.

    Of one process nothing is left that is of several.
    """
    import torch

    is_parted = OmegaConf.is_dict(cfg.trainer.get("strategy"))
    if on_gpu(cfg) and not (is_parted or torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator}: torch finds no GPU here; type trainer.accelerator=cpu"
        )
    if rank() >= world_size():
        raise ValueError(f"process {rank()} was started as one of {world_size()}, which are 0 to {world_size() - 1}")
    if "strategy" not in cfg.trainer:
        if world_size() > 1:
            raise ValueError(
                f"{world_size()} processes were started, and trainer={cfg.choices.get('trainer', 'default')} is of "
                "one: type trainer=ddp"
            )
        return 1
    gpus = torch.cuda.device_count() if on_gpu(cfg) else 0
    if not gpus and OmegaConf.is_dict(cfg.trainer.strategy):
        raise ValueError("trainer=fsdp parts a network among GPUs, and torch finds none here: type trainer=ddp")
    if by_torchrun():
        local = number("LOCAL_WORLD_SIZE", 1)
        nodes = world_size() // local
    elif by_srun():
        nodes = number("SLURM_NNODES", 1) if "SLURM_NNODES" in os.environ else 1
        local = world_size() // nodes
    else:
        local, nodes = max(1, gpus), 1
    devices, num_nodes = (
        own if given == "auto" else given
        for own, given in ((local, cfg.trainer.devices), (nodes, cfg.trainer.num_nodes))
    )
    if world_size() > 1 and (devices, num_nodes) != (local, nodes):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={num_nodes}: {local} processes were started on each of "
            f"{nodes} machines; leave both out, or type trainer.devices={local} trainer.num_nodes={nodes}"
        )
    if world_size() == 1 and num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={num_nodes}: start it on every machine, by torchrun --nnodes={num_nodes} "
            f"--nproc-per-node={devices}, or by srun (docs/cluster.md)"
        )
    if on_gpu(cfg) and devices > gpus:
        raise ValueError(
            f"trainer.devices={devices}: this machine has {gpus} GPUs; type trainer.devices={max(1, gpus)}, or "
            "trainer.accelerator=cpu"
        )
    with open_dict(cfg):
        cfg.trainer.devices, cfg.trainer.num_nodes = devices, num_nodes
        if devices * num_nodes == 1 and not OmegaConf.is_dict(cfg.trainer.strategy):
            cfg.trainer.strategy = "auto"
        if by_srun():
            # Lightning's own requeue saves from a signal, in the midst of what the processes send one another.
            target = "pytorch_lightning.plugins.environments.SLURMEnvironment"
            cfg.trainer.plugins.append({"_target_": target, "auto_requeue": False})
        if rank():
            cfg.trainer.logger = False
    return devices * num_nodes


def launch(cfg: DictConfig, count: int) -> float | None:
    """Run `cfg` by so many processes of this machine, to the end; what run() returns.

    The first that fails ends the others, within seconds. A signal to this process is handed to them, and ends it when
    they have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    handed = {"config": OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), "overrides": overrides()}
    if HydraConfig.initialized():
        handed["logging"] = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
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
    # Its report of a failure, and its advice, are of its own functions.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[HANDED_OVER] = json.dumps(handed)
    sys.stdout.flush()
    try:
        elastic_launch(config, sys.executable)(str(ROOT / "train.py"))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"status {failure.exitcode}, as told above"
        folder = Path(cfg.run_dir)
        again = f" Go on with: python train.py resume={shlex.quote(str(folder))}"
        go_on = again if (folder / "checkpoints/last.ckpt").exists() else ""
        raise ChildProcessError(
            f"process {number} of {count} ended by {how}; the others were stopped.{go_on}"
        ) from None
    except SignalException as error:
        # No Exception, after which a sweep would begin its next job.
        raise SystemExit(128 + error.sigval) from None
    finally:
        del os.environ[HANDED_OVER]
    if cfg.trainer.get("fast_dev_run"):
        return None
    outcome = json.loads((Path(cfg.run_dir) / "metrics.json").read_text(encoding="utf-8"))
    return outcome["metrics"].get(outcome["monitor"])


def config_from_parent() -> DictConfig | None:
    """The configuration that `launch` hands to this process, if it was started by it."""
    if HANDED_OVER not in os.environ:
        return None
    handed = json.loads(os.environ[HANDED_OVER])
    if "logging" in handed:
        configure_log(OmegaConf.create(handed["logging"]))
    return OmegaConf.create(handed["config"])


def overrides() -> list[str]:
    """What was typed."""
    if HANDED_OVER in os.environ:
        return json.loads(os.environ[HANDED_OVER])["overrides"]
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def arguments(given: list[str]) -> list[str]:
    """The words of a command, with the folder that all processes have in common that torchrun or srun started.

    A job that was started again, of one process too, goes on from its last checkpoint. Each torchrun counts its own
    restarts, and one on a machine that takes another's place has none, so that there the checkpoint alone decides.
    """
    folders = [word.partition("=")[2].strip("'\"") for key in FOLDERS for word in given if word.startswith(key)]
    is_resumed = any(word.startswith("resume=") for word in given)
    if world_size() > 1 and {"-m", "--multirun"} & set(given):
        raise ValueError("the jobs of a sweep start their processes themselves: leave out torchrun, or srun, or -m")
    if world_size() > 1 and not folders and not is_resumed:
        name = os.environ["TORCHELASTIC_RUN_ID"] if by_torchrun() else os.environ["SLURM_JOB_ID"]
        if not re.fullmatch(r"[\w.-]+", name) or name == "none":
            raise ValueError(
                f"the processes of this job have no folder in common: its name is {name}. Type run_dir=FOLDER, or "
                "torchrun --rdzv-id=NAME"
            )
        folders = [f"runs/{'torchrun' if by_torchrun() else 'slurm'}/{name}"]
        given = [*given, f"hydra.run.dir='{folders[0]}'"]
    is_again = by_torchrun() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if is_again and folders and not is_resumed and (Path(folders[0]) / "checkpoints/last.ckpt").exists():
        return [*(word for word in given if not word.startswith(FOLDERS)), f"resume={folders[0]}"]
    return given


@contextlib.contextmanager
def process_group(cfg: DictConfig) -> Iterator[None]:
    """The processes know one another, and the first one speaks for all."""
    if world_size() == 1:
        yield
        return
    import torch
    from pytorch_lightning.plugins.environments import SLURMEnvironment
    from torch import distributed

    environment = SLURMEnvironment(auto_requeue=False) if by_srun() else None
    if environment is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    server = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=not is_served and not rank(),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # torchrun's may be the one of before a restart, with the addresses of processes that are gone. Machines that count
    # restarts otherwise do not meet there, nor at torch's own: docs/cluster.md says which variable gives a new one.
    store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"] if is_served else "0", server)
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
    # Not after an error: the others do not come.
    distributed.destroy_process_group()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """What the first process does before the others, which then find it done: a corpus is prepared once."""
    if world_size() == 1:
        yield
        return
    from torch import distributed

    group = distributed.new_group(backend="gloo", timeout=PREPARING)
    if rank():
        distributed.barrier(group)
    yield
    if not rank():
        distributed.barrier(group)


def all_gather_object(own: Any) -> list[Any]:
    """What each process has, in the order of their numbers; every process must call it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, own)
    return every


def all_reduce_sum(own: "Tensor") -> "Tensor":
    """The sum of the processes' tensors, put into `own`; every process must call it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(own)
    return own
