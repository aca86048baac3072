"""What Transformer and Transformer-XL share: sizes, checks, masks and sinusoidal positions."""

from typing import Any

import torch
from torch import Tensor, nn

from sru.checks import (
    check_flags,
    check_heads,
    check_input,
    check_optional_sizes,
    check_probabilities,
    check_sizes,
    state_dtype,
)


class AttentionStack(nn.Module):
    """The sizes of a stack of attention layers, and a projection of x if its size differs from hidden_size."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        num_heads: int = 8,
        inner_size: int | None = None,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        bidirectional: bool = False,
        memory_length: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
        check_optional_sizes(1, inner_size=inner_size)
        check_probabilities(dropout=dropout, attn_dropout=attn_dropout)
        check_flags(bidirectional=bidirectional)
        check_optional_sizes(0, memory_length=memory_length)
        check_heads(hidden_size, num_heads)
        self.input_size = input_size
        self.output_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.inner_size = 4 * hidden_size if inner_size is None else inner_size
        self.dropout = dropout
        self.attn_dropout = attn_dropout
        self.bidirectional = bidirectional
        self.memory_length = self.eval_memory_length = memory_length
        self.projection = nn.Linear(input_size, hidden_size, bias=False) if input_size != hidden_size else None

    def check_x(self, x: Any, parameter: Tensor) -> None:
        """Check the type, dtype and shape of a sequence x, given a parameter of the stack."""
        check_input(x, parameter)
        if x.dim() != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"x must be (T, B, {self.input_size}), time first, not {tuple(x.shape)}")

    def check_step(self, x: Any, parameter: Tensor) -> None:
        """Do the same for one step; ValueError if the stack is bidirectional."""
        if self.bidirectional:
            raise ValueError(f"a bidirectional {type(self).__name__} needs the whole sequence: it has no step")
        check_input(x, parameter)
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x must be (B, {self.input_size}), not {tuple(x.shape)}")

    def keep_last(self, a: Tensor) -> Tensor:
        """The steps of a (S, B, ...) that the memory keeps."""
        length = self.memory_length if self.training else self.eval_memory_length
        return a if length is None else a[max(0, len(a) - length) :]


def mask(steps: int, past: int, pad: Tensor | None, x: Tensor, *, causal: bool) -> Tensor | None:
    """The steps hidden (B or 1, 1, T or 1, S) from T steps after `past` earlier ones; pad (S, B) is True at padding."""
    hidden = None if pad is None else pad.t()[:, None, None]
    if causal and steps > 1:
        later = torch.ones(steps, past + steps, dtype=torch.bool, device=x.device).triu(past + 1)[None, None]
        hidden = later if hidden is None else hidden | later
    if pad is None or hidden is None:
        return hidden
    return hidden & ~hidden.all(-1, keepdim=True)  # a softmax over nothing is NaN: padding that sees nothing sees all


def sines(positions: Tensor, x: Tensor) -> Tensor:
    """Sines and cosines (..., n) of positions (...), in the dtype and with the features of x (..., n)."""
    n = x.shape[-1]
    factory: dict[str, Any] = {"device": x.device, "dtype": state_dtype(x)}  # bfloat16 is exact only up to 256
    angles = positions[..., None].to(factory["dtype"]) * 10000 ** (-torch.arange(0, n, 2, **factory) / n)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :n].to(x.dtype)
