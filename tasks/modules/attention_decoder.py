"""A recurrent decoder with global attention (Luong et al., 2015; SRU 2017, section 4.4)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.modules.layers import Dropout


class GlobalAttention(nn.Module):
    """Any model of one direction, the steps of whose last layer attend to those of a source, by h W s.

    What a step saw does not go into the next one (no input feeding), so that in training all steps of a layer are one
    call. It is called as the models that attend in every layer are: `read`, `decoder(x, state, None, source)`, `step`.

    Args:
        encoder: builds the model from `input_size` and `bidirectional`.
        source_size: features of the source's steps.
        output_size: features of what it returns.
        dropout: on what it returns.
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
        """What the steps look into: source (S, B, source_size) itself, and which of it is padding (S, B)."""
        return source, pad

    def forward(self, x: Tensor, state: Any, mask_pad: None, source: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """(T, B, output_size) of x (T, B, input_size), and the model's state.

        The source may be of a part of the B sequences: then sequence i has source i // (B / sources).
        """
        h, state = self.decoder(x, state, mask_pad)
        return self.attend(h, *source), state

    def step(self, x: Tensor, state: Any, source: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """One step: (B, output_size) and the state, of x (B, input_size)."""
        h, state = self.decoder.step(x, state)
        return self.attend(h[None], *source)[0], state

    def attend(self, h: Tensor, source: Tensor, pad: Tensor) -> Tensor:
        query = self.attention(h).unflatten(1, (source.shape[1], -1))
        scores = torch.einsum("tbgn,sbn->bgts", query, source)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(pad.T[:, None, None], -math.inf).softmax(dim=3).to(source.dtype)
        context = torch.einsum("bgts,sbn->tbgn", weights, source).flatten(1, 2)
        return self.dropout(torch.tanh(self.combination(torch.cat([context, h], dim=2))))


def has_memory(state: Any) -> bool:
    """Whether a state has, beside numbers of its own, lists of what an attention looks back on."""
    return isinstance(state, list) or (isinstance(state, tuple) and any(isinstance(part, list) for part in state))
