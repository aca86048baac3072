"""A network that learns nothing and records the batches that a trainer gives it."""

import pytorch_lightning as pl
import torch


class Recorder(pl.LightningModule):
    """Keeps `describe(batch)` of each batch, and writes a checkpoint to `path` after `save_at` batches."""

    def __init__(self, describe, save_at=0, path=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.describe, self.save_at, self.path, self.batches = describe, save_at, path, []

    def training_step(self, batch, _):
        self.batches.append(self.describe(batch))
        return self.weight**2

    def on_train_batch_end(self, *_):
        if len(self.batches) == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(recorder, data, path=None, *, epochs=3, limit=None):
    """The batches of epochs of at most `limit` batches, from the checkpoint at `path` on; and the trainer."""
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, limit_train_batches=limit,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data, ckpt_path=path, weights_only=True if path else None)
    return recorder.batches, trainer
