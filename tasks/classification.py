"""Classification: a linear softmax on the last state of an encoder (SRU 2018, section 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Task
from tasks.modules.layers import Dropout, word_embedding


class Classification(Task):
    """Word embedding (for texts), encoder, and a linear layer on its last step; metric: accuracy in per cent.

    A batch is (x, labels (B,)) or (x, labels, pad). x holds words (T, B), padded on the left, or features
    (T, B, input_size). pad (T, B) is True where features are padding, which follows at the end.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer, scheduler: see Task.
        num_classes: number of labels.
        vocab_size, pad: for words: the vocabulary's size and the index of padding.
        vectors: fixed word vectors (vocab_size, n), or None to train embeddings.
        embedding_size: features of trained embeddings.
        embedding_deviation: root mean square of the features of vectors or embeddings at the start; None leaves them as
            they are. An SRU's initial weights expect 1; vectors of length 1 have 1 / sqrt(n) (docs/learning.md).
        input_size: for features: their number.
        dropout: on the embeddings and before the softmax. (The encoder has its own, between layers.)
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
        embedding_deviation: float | None = None,
        input_size: int | None = None,
        dropout: float,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.embedding: nn.Embedding | None = None
        if vocab_size is not None:
            self.embedding = word_embedding(vocab_size, vectors, pad, embedding_size, embedding_deviation)
            input_size = self.embedding.embedding_dim
        self.encoder = encoder(input_size=input_size)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(self.encoder.output_size, num_classes)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) from the last step of each sequence that is not padding."""
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
