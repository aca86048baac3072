"""A recurrent decoder with global attention (Luong et al., 2015; SRU 2017, section 4.4)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.modules.layers import Dropout


class GlobalAttention(nn.Module):
    """Any one-directional model; the output h of its last layer attends to the source s with scores h W s.

    The attention's result is not fed into the next step (no input feeding), so that in training each layer computes
    all steps in one call. The interface is the one of models with attention in every layer: `read`,
    `decoder(x, state, None, source)` and `step`.

    Args:
        encoder: builds the model from `input_size` and `bidirectional`.
        source_size: features of a source step.
        output_size: features of the output.
        dropout: on the output.
    """

    def __init__(
        self, encoder: Callable[..., Any], *, input_size: int, source_size: int, output_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.decoder = encoder(input_size=input_size, bidirectional=False)
        size = self.decoder.output_size
        self.attention = nn.Linear(size, source_size, bias=False)
        self.combination = nn.Linear(size + source_size, output_size, bias=False)
        self.dropout = Dropout(dropout)
        self.output_size = output_size

    def read(self, source: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
        """What the steps attend to: source (S, B, source_size), and pad (S, B), True at padding."""
        return source, pad

    def forward(self, x: Tensor, state: Any, mask_pad: None, source: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """The output (T, B, output_size) for x (T, B, input_size), and the model's state.

        The source may hold fewer sequences, G: then sequence i attends to source i // (B / G).
        """
        h, state = self.decoder(x, state, mask_pad)
        return self.attend(h, *source), state

    def step(self, x: Tensor, state: Any, source: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """One step: the output (B, output_size) for x (B, input_size), and the state."""
        h, state = self.decoder.step(x, state)
        return self.attend(h[None], *source)[0], state

    def attend(self, h: Tensor, source: Tensor, pad: Tensor) -> Tensor:
        query = self.attention(h).unflatten(1, (source.shape[1], -1))
        scores = torch.einsum("tbgn,sbn->bgts", query, source)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(pad.T[:, None, None], -math.inf).softmax(dim=3).to(source.dtype)
        context = torch.einsum("bgts,sbn->tbgn", weights, source).flatten(1, 2)
        return self.dropout(torch.tanh(self.combination(torch.cat([context, h], dim=2))))
