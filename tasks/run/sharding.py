"""FSDP2: each process keeps a part of every weight, gradient and moment, and gathers a layer when it computes it."""

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn

STEPS = ("training_step", "validation_step", "test_step")


class FullyShard(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with a network that this class shards, on GPUs or CPUs.

    Args:
        module_classes: modules that are gathered as one unit; the rest of the network is another unit.
        save_distributed_checkpoint: False, so that checkpoints are complete files, interchangeable with others.
    """

    def __init__(self, module_classes: Sequence[type[nn.Module]]) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.module_classes = tuple(module_classes)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, task: pl.LightningModule) -> None:
        """Called by Task.configure_model before each stage; the second call changes nothing."""
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(task, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for module in task.modules():
            if isinstance(module, self.module_classes):
                fully_shard(module, mesh=mesh)
        fully_shard(task, mesh=mesh)
        for name in STEPS:
            register_fsdp_forward_method(task, name)
