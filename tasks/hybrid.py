"""The hybrid of a network and HMMs: which of an HMM's states each frame of speech is of (SRU 2017, section 4.5)."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.lm import detach
from tasks.modules.attention_decoder import has_memory
from tasks.modules.latency_controlled import LatencyControlled
from tasks.modules.layers import Dropout, apply_linear
from tasks.modules.newbob import Newbob
from tasks.run.distributed import rank, world_size


class Hybrid(Task):
    """Encoder and softmax over targets, by frame; metric: frame_error, per cent of the frames.

    Training reads utterances in segments (truncated back-propagation through time): the state that a segment leaves is
    where the next one starts, without its gradient, and zeros where another utterance begins. A memory of steps, which
    what attends has instead, begins anew with each segment. A bidirectional network is latency-controlled, in training
    and in evaluation: tasks/modules/latency_controlled.py. Validation and test read whole utterances.

    A batch has x (T, B, input_size), targets (S, B) of its first S steps with -1 for none, pad (T, B), begins (B,), and
    keys, the utterances where it has whole ones.

    A test writes likelihoods.ark and likelihoods.scp into the run's folder, for Kaldi's latgen-faster-mapped: of each
    frame the logarithm of the posterior less that of the prior.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer: as in Task. scheduler: as in Task; tasks/modules/newbob.py is told of each validation.
        input_size, num_targets, delay, segment, right: of the data; at step t the target is that of frame t - delay.
        log_priors (num_targets,): of the targets in training.
        archive: opens an archive at a path, whose `write(key, matrix)` writes to it.
        bidirectional, num_layers: of the encoder.
        dropout: before the softmax, and between the layers of a bidirectional network. (The encoder has its own.)
        uniform_init: matrices start uniformly within plus or minus this; None as their layers start.
        writes_likelihoods: in a test; of 8802 targets an hour of speech takes 12.7 GB.
        linear: makes the softmax's products, as torch.nn.functional.linear or faster.
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
        if not isinstance(writes_likelihoods, bool):
            raise ValueError(f"task.writes_likelihoods={writes_likelihoods} must be true or false")
        if uniform_init is not None and not 0 < uniform_init < 1:
            raise ValueError(f"task.uniform_init={uniform_init} must be above 0 and below 1, or null")
        if right and not bidirectional:
            raise ValueError(
                f"data.right={right} steps that follow are for a bidirectional network: type data.right=0, or "
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
        if getattr(self.encoder, "bidirectional", False) or not getattr(self.encoder, "causal", True):
            raise ValueError(
                "a network of one direction is wanted, and model.bidirectional or model.causal say otherwise: leave "
                "them out, or type bidirectional=true"
            )
        self.dropout = Dropout(dropout)
        self.softmax = nn.Linear(self.encoder.output_size, num_targets)
        self.register_buffer("log_priors", log_priors, persistent=False)  # the data's checkpoint has it
        if uniform_init is not None:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if parameter.dim() > 1 and name.rpartition(".")[2].startswith("weight"):
                        parameter.uniform_(-uniform_init, uniform_init)
        self.state: Any = None  # what training has come to
        self.likelihoods: Any = None  # the archive that is being written

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        """Logits (T, B, num_targets) of whole utterances x (T, B, input_size)."""
        mask = pad if pad.any() else None
        h = self.encoder.read(x, mask) if self.is_latency_controlled else self.encoder(x, None, mask)[0]
        return self.logits(h)

    @property
    def is_latency_controlled(self) -> bool:
        return isinstance(self.encoder, LatencyControlled)

    def logits(self, h: Tensor) -> Tensor:
        return apply_linear(self.softmax, self.dropout(h), self.linear).float()

    def segment_logits(self, batch: Any) -> Tensor:
        """Logits (S, B, num_targets) of a segment of each stream, whose state goes on."""
        state = None if batch.begins.all() else self.state
        if state is not None and batch.begins.any():
            state = clear_states(state, batch.begins)
        right = len(batch.x) - len(batch.targets)
        if self.is_latency_controlled:
            mask = batch.pad if batch.pad.any() else None
            h, state = self.encoder(batch.x, state, mask, right)
        else:  # padding comes last in its utterance, so that it changes nothing that counts
            h, state = self.encoder(batch.x, state)
        self.state = None if has_memory(state) else detach(state)
        return self.logits(h)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        logits = self.segment_logits(batch) if self.training else self(batch.x, batch.pad)
        if self.likelihoods is not None:
            self.write(self.likelihoods, logits, batch)
        targets = batch.targets.flatten()
        places = (targets >= 0).nonzero()[:, 0]
        logits, targets = logits.flatten(0, 1).index_select(0, places), targets[places]
        size = max(1, len(places))
        errors = (logits.detach().argmax(dim=1) != targets).sum()
        loss = F.cross_entropy(logits, targets, reduction="sum") / size
        return loss, {"frame_error": 100 * errors / size}, len(places)

    def write(self, archive: Any, logits: Tensor, batch: Any) -> None:
        """The likelihoods (frames, num_targets) of each utterance of a batch."""
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
            if self.likelihoods is not None:  # half an archive is none
                self.likelihoods.__exit__(type(error), error, error.__traceback__)
                self.likelihoods = None
            raise

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {
            "state": self.transfer_batch_to_device(self.state, torch.device("cpu"), 0),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.state = state["state"]

    def on_train_start(self) -> None:
        super().on_train_start()
        # What a checkpoint brought lies on the CPU.
        self.state = self.transfer_batch_to_device(self.state, self.device, 0)

    @torch.no_grad()
    def predict(self, vocabulary: Any, *, input: str, output: str, frames_per_batch: int = 8000) -> Iterator[str]:
        """Write the likelihoods of utterances into an archive; one line of what was written.

        Args:
            input: a Kaldi folder, or its feats.scp (with cmvn.scp and utt2spk beside it where the network was trained
                with data.cmvn=speaker); targets are not looked for.
            output: FILE.ark, beside which FILE.scp is written; neither may be there yet.
            frames_per_batch: frames that are read at once (8000).
        """
        path = Path(output).expanduser()
        if there := [str(each) for each in (path, path.with_suffix(".scp")) if each.exists()]:
            raise FileExistsError(f"output={output}: {' and '.join(there)} would be overwritten; name another")
        if frames_per_batch < 1:
            raise ValueError(f"frames_per_batch={frames_per_batch} must be 1 or more")
        frames, batches = vocabulary.read(input, frames_per_batch)
        with self.archive(path) as archive:
            for batch in batches:
                logits = self(batch.x.to(self.device), batch.pad.to(self.device))
                self.write(archive, logits, batch)
        yield f"{frames.report}: their likelihoods of {len(self.log_priors):,} targets are in {path}\n"


def clear_states(state: Any, begins: Tensor) -> Any:
    """A state with zeros for the streams in which an utterance begins (B,)."""
    if isinstance(state, Tensor):
        return state.masked_fill(begins[:, None], 0.0)
    return type(state)(clear_states(part, begins) for part in state) if isinstance(state, tuple | list) else state
