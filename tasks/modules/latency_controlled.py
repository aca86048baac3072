"""Latency-controlled bidirectional networks, which look a few steps ahead (Zhang et al., 2016)."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.modules.layers import Dropout

State = tuple[Any, ...]


class LatencyControlled(nn.Module):
    """A stack of bidirectional layers that reads a sequence in chunks, each with `right` future steps.

    In every layer the forward state carries over from chunk to chunk; the backward state starts from zero at the last
    future step. Future steps are read again as part of the next chunk. If each chunk has all future steps, the stack
    is an ordinary bidirectional network.

    Args:
        encoder: builds a layer from `input_size`, `num_layers` and `bidirectional`. Its state has the two directions
            side by side in the last dimension, or one after the other in the first dimension, forward first.
        input_size: features of a step.
        num_layers: layers of the stack.
        segment, right: steps of a chunk, and future steps, in `read`.
        dropout: between the layers.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        *,
        input_size: int,
        num_layers: int,
        segment: int,
        right: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        known = inspect.signature(encoder).parameters
        if "num_layers" not in known or {"source_size", "memory_length"} & known.keys():
            raise ValueError(
                f"{getattr(getattr(encoder, 'func', encoder), '__name__', encoder)} has no states of two directions, "
                "so it cannot read a sequence in chunks bidirectionally: type model=sru, lstm, gru or qrnn, or "
                "bidirectional=false"
            )
        self.segment, self.right = segment, right
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            layer = encoder(input_size=input_size, num_layers=1, bidirectional=True)
            self.layers.append(layer)
            input_size = layer.output_size
        self.output_size: int = input_size
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, state: State | None = None, mask_pad: Tensor | None = None, right: int = 0
    ) -> tuple[Tensor, State]:
        """h (T - right, B, output_size) of a chunk x (T, B, input_size), whose last `right` steps are future steps.

        The state is the state of each layer at the end of the chunk, with zeros for the backward direction. mask_pad
        (T, B) is True after the end of a sequence.
        """
        steps = len(x) - right
        main, after = x[:steps], x[steps:]
        pads = (None, None) if mask_pad is None else (mask_pad[:steps], mask_pad[steps:])
        states = []
        for i, layer in enumerate(self.layers):
            if i:
                main, after = self.dropout(main), self.dropout(after)
            before = None if state is None else state[i]
            # Only the backward half of this state is used.
            behind = layer(after, None, pads[1])[1] if right else None
            main, last = layer(main, merge_states(before, behind), pads[0])
            states.append(merge_states(last, None))
            if right and i + 1 < len(self.layers):
                after, _ = layer(after, states[-1], pads[1])
        return main, tuple(states)

    def read(self, x: Tensor, mask_pad: Tensor | None = None) -> Tensor:
        """h (T, B, output_size) of whole sequences x (T, B, input_size), chunk by chunk."""
        state, outputs = None, []
        for begin in range(0, len(x), self.segment):
            part = x[begin : begin + self.segment + self.right]
            pad = None if mask_pad is None else mask_pad[begin : begin + len(part)]
            h, state = self(part, state, pad, max(0, len(part) - self.segment))
            outputs.append(h)
        return torch.cat(outputs)


def merge_states(forward: Any, backward: Any) -> Any:
    """The forward half of one layer's state and the backward half of another, zeros for None; None of two None.

    A state is a tensor (2, B, H) or (1, B, 2 H), or a tuple of such tensors.
    """
    known = forward if forward is not None else backward
    if isinstance(known, tuple):
        halves = [[None] * len(known) if half is None else half for half in (forward, backward)]
        return tuple(merge_states(*both) for both in zip(*halves, strict=True))
    if known is None:
        return None
    if not isinstance(known, Tensor) or known.dim() != 3 or len(known) > 2:
        form = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
        raise TypeError(f"a state of two directions is (2, B, H) or (1, B, 2 H), not {form}")
    one, two = (torch.zeros_like(known) if half is None else half for half in (forward, backward))
    if len(known) == 2:
        return torch.cat([one[:1], two[1:]])
    return torch.cat([one.chunk(2, dim=2)[0], two.chunk(2, dim=2)[1]], dim=2)
