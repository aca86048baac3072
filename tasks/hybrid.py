"""Acoustic model of a DNN-HMM hybrid: which HMM state each frame of speech belongs to (SRU 2017, section 4.5)."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import StatefulTask
from tasks.modules.encoders import detach, has_memory, map_state, sees_future
from tasks.modules.latency_controlled import LatencyControlled
from tasks.modules.layers import Dropout, apply_linear
from tasks.modules.newbob import Newbob
from tasks.run.distributed import rank, world_size


class Hybrid(StatefulTask):
    """Encoder and softmax over the targets of each frame; metric: frame_error, per cent of the frames.

    Training reads utterances in segments. Each starts from the encoder's state after the one before it, without
    gradient, and from zeros where a new utterance begins. The memory of an attention is not carried over. Validation
    and test read whole utterances. A bidirectional network is latency-controlled in training and evaluation
    (tasks/modules/latency_controlled.py).

    A batch has x (T, B, input_size), targets (S, B) of its first S steps, -1 for none, pad (T, B), begins (B,): True
    where an utterance begins, and in evaluation keys: the names of its whole utterances.

    A test writes likelihoods.ark and likelihoods.scp into the run folder for Kaldi's latgen-faster-mapped: for each
    frame the log posteriors minus the log priors.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer, scheduler: see Task. The schedule of tasks/modules/newbob.py also gets each validation loss.
        input_size, num_targets: sizes of a frame and of the softmax.
        log_priors (num_targets,): log frequencies of the targets in training.
        delay: the output at step t is for frame t - delay.
        segment, right: frames of a segment, and frames after it that a bidirectional network sees.
        archive: opens an archive for writing; its `write(key, matrix)` adds an utterance.
        bidirectional, num_layers: direction and depth of the encoder.
        dropout: before the softmax, and between the layers of a bidirectional network. (The encoder has its own.)
        uniform_init: initialise matrices uniformly within plus or minus this value; None keeps the layers' own.
        writes_likelihoods: write likelihoods in a test; with 8802 targets, an hour of speech takes 12.7 GB.
        linear: computes the softmax's products; torch.nn.functional.linear or a faster one.
    """

    unit = "frames"
    test_artifacts = ("likelihoods.ark", "likelihoods.scp")
    log_priors: Tensor

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        input_size: int,
        num_targets: int,
        log_priors: Tensor,
        delay: int,
        segment: int,
        right: int,
        archive: Callable[[Path], Any],
        bidirectional: bool,
        num_layers: int,
        dropout: float = 0.0,
        uniform_init: float | None = None,
        writes_likelihoods: bool = True,
        linear: Callable[..., Tensor] = F.linear,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if uniform_init is not None and not 0 < uniform_init < 1:
            raise ValueError(f"task.uniform_init={uniform_init} must be above 0 and below 1, or null")
        if right and not bidirectional:
            raise ValueError(
                f"data.right={right} future frames need a bidirectional network: type data.right=0, or "
                "bidirectional=true"
            )
        self.delay, self.archive = delay, archive
        self.writes_likelihoods = writes_likelihoods
        self.linear = linear
        self.encoder = (
            LatencyControlled(
                encoder, input_size=input_size, num_layers=num_layers, segment=segment, right=right, dropout=dropout
            )
            if bidirectional
            else encoder(input_size=input_size)
        )
        if sees_future(self.encoder):
            raise ValueError(
                "bidirectional=false does not go with model.bidirectional=true or model.causal=false: leave these out, "
                "or type bidirectional=true"
            )
        self.dropout = Dropout(dropout)
        self.softmax = nn.Linear(self.encoder.output_size, num_targets)
        self.register_buffer("log_priors", log_priors, persistent=False)  # saved by the DataModule
        if uniform_init is not None:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if parameter.dim() > 1 and name.rpartition(".")[2].startswith("weight"):
                        parameter.uniform_(-uniform_init, uniform_init)
        self.likelihoods: Any = None  # the open archive of a test

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        """Logits (T, B, num_targets) of whole utterances x (T, B, input_size)."""
        mask = pad if pad.any() else None
        is_chunked = isinstance(self.encoder, LatencyControlled)
        return self.logits(self.encoder.read(x, mask) if is_chunked else self.encoder(x, None, mask)[0])

    def logits(self, h: Tensor) -> Tensor:
        return apply_linear(self.softmax, self.dropout(h), self.linear).float()

    def segment_logits(self, batch: Any) -> Tensor:
        """Logits (S, B, num_targets) of the next segment of each sequence; updates `state`."""
        state = None if batch.begins.all() else self.state
        if state is not None and batch.begins.any():
            state = map_state(lambda tensor: tensor.masked_fill(batch.begins[:, None], 0.0), state)
        if isinstance(self.encoder, LatencyControlled):
            mask = batch.pad if batch.pad.any() else None
            h, state = self.encoder(batch.x, state, mask, len(batch.x) - len(batch.targets))
        else:  # padding follows its utterance, so it does not change the frames that count
            h, state = self.encoder(batch.x, state)
        self.state = None if has_memory(state) else detach(state)
        return self.logits(h)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        logits = self.segment_logits(batch) if self.training else self(batch.x, batch.pad)
        if self.likelihoods is not None:
            self.write_likelihoods(self.likelihoods, logits, batch)
        targets = batch.targets.flatten()
        places = (targets >= 0).nonzero()[:, 0]
        logits, targets = logits.flatten(0, 1).index_select(0, places), targets[places]
        size = max(1, len(places))
        errors = (logits.detach().argmax(dim=1) != targets).sum()
        loss = F.cross_entropy(logits, targets, reduction="sum") / size
        return loss, {"frame_error": 100 * errors / size}, len(places)

    def write_likelihoods(self, archive: Any, logits: Tensor, batch: Any) -> None:
        """Add a matrix (frames, num_targets) to the archive for each utterance of a batch."""
        scores = (logits.log_softmax(dim=2) - self.log_priors).cpu().numpy()
        for column, (key, length) in enumerate(zip(batch.keys, (~batch.pad).sum(dim=0).tolist(), strict=True)):
            archive.write(key, scores[self.delay : length, column])

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        scheduler = self.lr_schedulers() if self.trainer.state.fn == "fit" else None
        if isinstance(scheduler, Newbob) and (loss := self.trainer.callback_metrics.get("val/loss")) is not None:
            scheduler.after_validation(float(loss))

    def on_test_start(self) -> None:
        if self.writes_likelihoods:
            part = f".{rank()}" if world_size() > 1 else ""
            path = Path(self.trainer.default_root_dir) / f"likelihoods{part}.ark"
            self.likelihoods = self.archive(path).__enter__()

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self.likelihoods is not None:
            self.likelihoods.__exit__(None, None, None)
            self.likelihoods = None

    def test_step(self, batch: Any) -> None:
        try:
            super().test_step(batch)
        except BaseException as error:
            if self.likelihoods is not None:  # removes the incomplete archive
                self.likelihoods.__exit__(type(error), error, error.__traceback__)
                self.likelihoods = None
            raise

    @torch.no_grad()
    def predict(self, vocabulary: Any, *, input: str, output: str, frames_per_batch: int = 8000) -> Iterator[str]:
        """Write the likelihoods of utterances into an archive; yields a line that says what was written.

        Args:
            input: a Kaldi folder, or its feats.scp, with cmvn.scp and utt2spk in the same folder if the network was
                trained with data.cmvn=speaker. No targets are needed.
            output: FILE.ark; FILE.scp is written beside it. Neither file may exist.
            frames_per_batch: frames per batch (8000).
        """
        path = Path(output).expanduser()
        if existing := [str(each) for each in (path, path.with_suffix(".scp")) if each.exists()]:
            raise FileExistsError(f"output={output}: {' and '.join(existing)} would be overwritten; name another")
        if frames_per_batch < 1:
            raise ValueError(f"frames_per_batch={frames_per_batch} must be 1 or more")
        frames, batches = vocabulary.read(input, frames_per_batch)
        with self.archive(path) as archive:
            for batch in batches:
                logits = self(batch.x.to(self.device), batch.pad.to(self.device))
                self.write_likelihoods(archive, logits, batch)
        yield f"{frames.report}: their likelihoods of {len(self.log_priors):,} targets are in {path}\n"
