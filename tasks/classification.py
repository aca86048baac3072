"""Classification: the last state of an encoder under a linear softmax (2018 paper, section 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules.layers import Dropout


class Classification(Task):
    """Encoder, and a linear layer on its last step; metric: accuracy in per cent. Words are embedded first.

    A batch is (x, labels (B,)), where x is words (T, B), padded on the left, or features (T, B, input_size); or (x,
    labels, pad) with features that are padded at their end, where pad (T, B) is True.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer, scheduler: as in Task.
        num_classes: of the data.
        vocab_size, pad: of the data, where it is words; pad is the padding's word index.
        vectors: fixed word vectors (vocab_size, n), or None to train embeddings from random ones.
        embedding_size: width of trained embeddings.
        input_size: of the data, where it is features.
        dropout: on the embeddings and before the softmax (the encoder has its own, between layers).
    """

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
        num_classes: int,
        vocab_size: int | None = None,
        vectors: Tensor | None = None,
        pad: int | None = None,
        embedding_size: int = 300,
        input_size: int | None = None,
        dropout: float,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.embedding: nn.Embedding | None = None
        if vocab_size is not None:
            self.embedding = embedding(vocab_size, vectors, pad, embedding_size)
            input_size = self.embedding.embedding_dim
        self.encoder = encoder(input_size=input_size)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(self.encoder.output_size, num_classes)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of words or features x, by the last step that is no padding."""
        x = x if self.embedding is None else self.dropout(self.embedding(x))
        h, _ = self.encoder(x, None, pad)
        if pad is None:
            return self.output(self.dropout(h[-1]))
        last = (~pad).sum(0).sub(1).clamp(min=0)
        return self.output(self.dropout(h[last, torch.arange(len(last), device=h.device)]))

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor], int]:
        x, labels, *pad = batch
        logits = self(x, *pad)
        accuracy = 100.0 * (logits.detach().argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}, len(labels)


def embedding(vocab_size: int, vectors: Tensor | None, pad: int | None, size: int) -> nn.Embedding:
    """Fixed vectors or, without any, vectors of `size` that are learnt."""
    if vectors is not None:  # as published, the padding has a fixed vector too
        return nn.Embedding.from_pretrained(vectors, freeze=True)
    made = nn.Embedding(vocab_size, size, padding_idx=pad)
    # As Kim (2014) and as unknown words here. torch's N(0, 1) is seven times as wide: under dropout of 0.5 it drowns
    # the first epochs in noise, and the SRU, whose highway lets its input through, more than the LSTM.
    with torch.no_grad():
        made.weight.uniform_(-0.25, 0.25)[pad] = 0
    return made
