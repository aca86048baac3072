"""The Transformer, as encoder and as decoder (Vaswani et al., 2017)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.attention import LayerSource, Source, SourceReader, attend, attend_source
from sru.baselines.attention_stack import AttentionStack, mask, sines
from sru.cell import SRUCell
from sru.checks import check_flags, check_optional_sizes
from sru.dropout import dropout as apply_dropout
from sru.kernels.linear import affine
from sru.padding import clear_padding, join_padding, move_padding_first

State = list[Any]


class Transformer(SourceReader, AttentionStack):
    """A stack of attention and feed-forward layers: `h, state = transformer(x, state, mask_pad, source)`.

    It is an encoder or, with `source_size`, a decoder, whose layers also attend to a source: `read` computes its keys
    and values once. x is multiplied by the square root of its size and added to sinusoidal positions, which continue
    from one call to the next.

    A step sees itself, earlier steps of the call, and the last `memory_length` steps of earlier calls; when
    bidirectional it sees the whole call. The state holds the keys and values of each layer, the number of steps of each
    sequence, and the padding among the steps; the caller detaches it where wanted. Padding is not seen, and its h is 0.

    Args:
        hidden_size: features of every layer, all heads together; x of another size is projected first.
        num_heads: heads of the attention; they divide hidden_size among them.
        inner_size: features inside the feed-forward; None for 4 * hidden_size.
        dropout: on the positions, on the output of each part, and inside the feed-forward.
        attn_dropout: dropout probability of the attention weights.
        bidirectional: a step also sees later steps of the same call.
        causal: the opposite of bidirectional, for configurations that name it; None to follow bidirectional.
        norm_first: layer norm on the input of each part and on the last output; False: on each sum, as in 2017.
        source_size: features of the source; None for a stack without a source.
        memory_length: how many steps of earlier calls a step sees; None for all.
    """

    parts = 2  # tensors in a layer's state

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        bidirectional: bool = False,
        causal: bool | None = None,
        norm_first: bool = True,
        source_size: int | None = None,
        memory_length: int | None = None,
        **options: Any,
    ) -> None:
        check_flags(bidirectional=bidirectional, norm_first=norm_first)
        if causal is not None:
            check_flags(causal=causal)
            if causal and bidirectional:
                raise ValueError("causal and bidirectional contradict each other")
        check_optional_sizes(1, source_size=source_size)
        bidirectional = bidirectional if causal is None else not causal
        options |= {"bidirectional": bidirectional, "memory_length": memory_length}
        super().__init__(input_size, hidden_size, num_layers, **options)
        self.causal = not self.bidirectional
        self.norm_first = norm_first
        self.source_size = source_size
        self.layers = nn.ModuleList(TransformerLayer(self) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size) if norm_first else None
        self.reset_parameters()

    def feed_forward(self) -> nn.Module:
        """The part of a layer after the attention."""
        return FeedForward(self.output_size, self.inner_size, self.dropout)

    def reset_parameters(self) -> None:
        """Draw matrices by Glorot's rule and an SRU by its own; layer norms start at 1, biases at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | SRUCell):
                module.reset_parameters()

    def readers(self) -> Iterable[nn.Module]:
        return self.layers

    def forward(
        self, x: Tensor, state: State | None = None, mask_pad: Tensor | None = None, source: Source | None = None
    ) -> tuple[Tensor, State]:
        """h (T, B, output_size) of x (T, B, input_size), and the state.

        source: returned by `read`, for N = B sequences or fewer: sequence i uses source i // (B / N).
        """
        self.check_x(x, cast(Any, self.layers[0]).norm.weight)  # not a matrix, which may be quantised
        sources = self.check_source(source, self.num_layers)
        steps, batch = x.shape[:2]
        pad = None
        if mask_pad is not None:
            x, pad = clear_padding(x, mask_pad)
        pasts, count, past_pad = self.check_state(state, batch)
        length = 0 if state is None else len(pasts[0][0])
        position = torch.arange(steps, device=x.device)[:, None] if pad is None else (~pad).cumsum(0) - 1
        position = position if count is None else count + position
        x = x if self.projection is None else affine(x, self.projection)
        x = x * math.sqrt(self.input_size) + apply_dropout(sines(position, x), self.dropout, self.training)
        all_pad = join_padding(past_pad, pad, length, x)
        # Without padding and memory, torch's attention applies the causal mask itself, which is faster.
        is_plain = self.causal and all_pad is None and not length
        hidden = None if is_plain else mask(steps, length, all_pad, x, causal=self.causal)
        visible = None if hidden is None else ~hidden
        states = []
        for layer, past, layer_source in zip(self.layers, pasts, sources, strict=True):
            x, layer_state = layer(x, past, visible, is_plain, pad, layer_source)
            states.append(layer_state)
        x = x if self.norm is None else self.norm(x)
        count = (0 if count is None else count) + (
            x.new_full((1, batch), steps, dtype=torch.long) if pad is None else (~pad).sum(0, keepdim=True)
        )
        if pad is not None and all_pad is not None:
            x = x.masked_fill(pad[:, :, None], 0.0)
            for i, (k, v, *c) in enumerate(states):
                (k, v), ordered_pad = move_padding_first([k, v], all_pad)
                states[i] = (k, v, *c)
            all_pad = ordered_pad
        memory = [(self.keep_last(k), self.keep_last(v), *c) for k, v, *c in states]
        return x, [*memory, count, None if all_pad is None else self.keep_last(all_pad)]

    def step(self, x: Tensor, state: State | None = None, source: Source | None = None) -> tuple[Tensor, State]:
        """One step: h (B, output_size) and the state, of x (B, input_size).

        T steps give the same result as one causal call with T steps, if memory_length covers them.
        """
        self.check_step(x, cast(Any, self.layers[0]).norm.weight)
        h, state = self(x[None], state, None, source)
        return h[0], state

    def check_state(self, state: Any, batch: int) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """Check a state; return the tensors of each layer, the numbers of steps, and the padding."""
        if state is None:
            return [()] * self.num_layers, None, None
        is_own = isinstance(state, Sequence) and len(state) == self.num_layers + 2 and isinstance(state[-2], Tensor)
        if not is_own or any(not isinstance(part, tuple) or len(part) != self.parts for part in state[:-2]):
            name = type(self).__name__
            raise TypeError(f"the state must be one that a {name} of {self.num_layers} layers returned, or None")
        if state[-2].shape != (1, batch):
            raise ValueError(f"the state has {state[-2].numel()} sequences, but x has {batch}")
        return list(state[:-2]), state[-2], state[-1]


class FeedForward(nn.Module):
    """W_2 ReLU(W_1 x + b_1) + b_2 for each step, without a state."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.dropout = dropout

    def forward(self, x: Tensor, state: tuple[()], pad: Tensor | None) -> tuple[Tensor, tuple[()]]:
        return affine(apply_dropout(F.relu(affine(x, self.inner)), self.dropout, self.training), self.outer), ()


class TransformerLayer(nn.Module):
    """Self-attention, attention to a source if there is one, and a feed-forward, each with a residual connection.

    The sizes and options are those of the stack.
    """

    def __init__(self, stack: Transformer) -> None:
        super().__init__()
        hidden_size = stack.output_size
        self.num_heads = stack.num_heads
        self.dropout = stack.dropout
        self.attn_dropout = stack.attn_dropout
        self.norm_first = stack.norm_first
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size)
        if stack.source_size is not None:
            self.source_query = nn.Linear(hidden_size, hidden_size)
            self.source_key_value = nn.Linear(stack.source_size, 2 * hidden_size)
            self.source_output = nn.Linear(hidden_size, hidden_size)
            self.source_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = stack.feed_forward()
        self.norm = nn.LayerNorm(hidden_size)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, N, hidden_size) of a source."""
        k, v = affine(source, self.source_key_value).chunk(2, dim=-1)
        return k, v

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, ...],
        visible: Tensor | None,
        is_causal: bool,
        pad: Tensor | None,
        source: LayerSource | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h (T, B, hidden_size), and the layer's state: keys and values of all steps, and the feed-forward's state.

        past: the state before x, or (); visible (B or 1, 1, T or 1, S): which steps are seen, None for all of them, or
        for the earlier ones if is_causal.
        """
        p = self.attn_dropout if self.training else 0.0
        y = self.attention_norm(x) if self.norm_first else x
        q, k, v = affine(y, self.query_key_value).chunk(3, dim=-1)
        if past:
            k, v = (torch.cat([a.to(b.dtype), b]) for a, b in zip(past[:2], (k, v), strict=True))
        a = attend(q, k, v, self.num_heads, visible, p, causal=is_causal)
        x = self.add_and_norm(x, affine(a, self.output), self.attention_norm)
        if source is not None:
            y = self.source_norm(x) if self.norm_first else x
            a = attend_source(affine(y, self.source_query), *source, self.num_heads, p)
            x = self.add_and_norm(x, affine(a, self.source_output), self.source_norm)
        y = self.norm(x) if self.norm_first else x
        z, state = self.feed_forward(y, past[2:], pad)
        return self.add_and_norm(x, z, self.norm), (k, v, *state)

    def add_and_norm(self, x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x + apply_dropout(y, self.dropout, self.training)
        return x if self.norm_first else norm(x)
