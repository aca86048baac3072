"""Text classification: the last state of an encoder under a linear softmax (2018 paper, section 4.1)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.base import Dropout, Task


class Classification(Task):
    """Embedding, encoder, linear layer on the encoder's last step; metric: accuracy in per cent.

    Args:
        encoder: builds the encoder from `input_size`.
        optimizer: builds the optimiser from the trained parameters.
        vocab_size, num_classes, pad: sizes of the data; pad is the padding's word index.
        vectors: fixed word vectors (vocab_size, n), or None to train embeddings from random ones.
        embedding_size: width of trained embeddings.
        dropout: on the embeddings and before the softmax (the encoder has its own, between layers).
    """

    def __init__(
        self,
        *,
        encoder: Callable[..., Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        vocab_size: int,
        num_classes: int,
        vectors: Tensor | None,
        pad: int,
        embedding_size: int,
        dropout: float,
    ) -> None:
        super().__init__(optimizer)
        if vectors is None:
            self.embedding = nn.Embedding(vocab_size, embedding_size, padding_idx=pad)
            # As Kim (2014) and as unknown words here. torch's N(0, 1) is seven times as wide: under dropout of 0.5 it
            # drowns the first epochs in noise, and the SRU, whose highway lets its input through, more than the LSTM.
            with torch.no_grad():
                self.embedding.weight.uniform_(-0.25, 0.25)[pad] = 0
        else:
            # As published, the padding has a fixed vector too.
            self.embedding = nn.Embedding.from_pretrained(vectors, freeze=True)
        self.encoder = encoder(input_size=self.embedding.embedding_dim)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(self.encoder.output_size, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, num_classes) of tokens (T, B), padded on the left, so that the last step is a real word."""
        h, _ = self.encoder(self.dropout(self.embedding(tokens)))
        return self.output(self.dropout(h[-1]))

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
        tokens, labels = batch
        logits = self(tokens)
        accuracy = 100.0 * (logits.detach().argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}, len(labels)
