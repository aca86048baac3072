"""The Transformer, as encoder and as decoder (Vaswani et al., 2017)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.attention import LooksIntoSource, Source, attend, attend_source
from sru.baselines.transformer_xl import mask
from sru.cell import SRUCell
from sru.checks import check_flags, check_heads, check_input, check_probabilities, check_sizes, state_dtype
from sru.dropout import dropout as dropped
from sru.kernels.linear import affine
from sru.padding import clear, join, padding_first

State = list[Any]


class Transformer(LooksIntoSource, nn.Module):
    """A stack of attention and feed-forward layers, by the call `h, state = transformer(x, state, mask_pad, source)`.

    It is an encoder or, with `source_size`, a decoder, whose every layer attends to the steps of a source too: `read`
    makes keys and values of them once. x, times the square root of its size, is summed with sines and cosines of the
    steps' numbers, which a later call of the same sequence goes on with.

    A step sees itself and what came before it, of earlier calls the last `memory_length` steps; when bidirectional it
    sees all of this call too. The state is the keys and values of each layer, how many steps each sequence had, and
    which of the kept ones were padding; its gradient is the caller's to stop. Padding is not seen, and its h is 0.

    Args:
        hidden_size: features of every layer, all heads together; x of another size is projected first.
        num_heads: heads of an attention, among which hidden_size is shared.
        inner_size: features inside the feed-forward; None for 4 * hidden_size.
        dropout: on the numbers of the steps, on what each part adds, and inside the feed-forward.
        attn_dropout: probability of dropping a step from what another attends to.
        bidirectional: a step sees what comes after it in the same call.
        causal: the opposite, said where that matters; None for the opposite of bidirectional.
        norm_first: normalise the input of each part and at the end once more; False: each sum, as in 2017.
        source_size: features of the source's steps; None for a stack without a source.
        memory_length: how many steps of earlier calls a step sees; None for all.
    """

    parts = 2  # of a layer's state

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        num_heads: int = 8,
        inner_size: int | None = None,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        bidirectional: bool = False,
        causal: bool | None = None,
        norm_first: bool = True,
        source_size: int | None = None,
        memory_length: int | None = None,
    ) -> None:
        super().__init__()
        inner_size = 4 * hidden_size if inner_size is None else inner_size
        check_sizes(1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_sizes(1, num_heads=num_heads, inner_size=inner_size)
        check_probabilities(dropout=dropout, attn_dropout=attn_dropout)
        check_flags(bidirectional=bidirectional, norm_first=norm_first)
        check_heads(hidden_size, num_heads)
        if causal is not None:
            check_flags(causal=causal)
            if causal and bidirectional:
                raise ValueError("causal and bidirectional contradict each other")
        if source_size is not None:
            check_sizes(1, source_size=source_size)
        if memory_length is not None:
            check_sizes(0, memory_length=memory_length)
        self.input_size = input_size
        self.output_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.causal = not bidirectional if causal is None else causal
        self.bidirectional = not self.causal
        self.source_size = source_size
        self.memory_length = memory_length
        self.projection = nn.Linear(input_size, hidden_size, bias=False) if input_size != hidden_size else None
        self.layers = nn.ModuleList(
            TransformerLayer(
                hidden_size,
                num_heads,
                self.feed_forward(hidden_size, inner_size),
                source_size,
                dropout=dropout,
                attn_dropout=attn_dropout,
                norm_first=norm_first,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size) if norm_first else None
        self.reset_parameters()

    def feed_forward(self, hidden_size: int, inner_size: int) -> nn.Module:
        """What a layer does with each step after it has attended."""
        return FeedForward(hidden_size, inner_size, self.dropout)

    def reset_parameters(self) -> None:
        """Draw matrices by Glorot's rule and an SRU by its own; norms start at 1, biases at 0."""
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

        source: of `read`, for B sequences, or for a part of them: then sequence i has source i // (B / sources).
        """
        check_input(x, cast(Any, self.layers[0]).norm.weight)  # what replaces a matrix may hold any type
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x must be (T, B, {self.input_size}), time first, not {tuple(x.shape)}")
        sources = self.check_source(source, self.num_layers)
        steps, batch = x.shape[:2]
        pad = None
        if mask_pad is not None:
            x, pad = clear(x, mask_pad)
        pasts, count, past_pad = self.check_state(state, batch)
        length = 0 if state is None else len(pasts[0][0])
        number = torch.arange(steps, device=x.device)[:, None] if pad is None else (~pad).cumsum(0) - 1
        number = number if count is None else count + number
        x = x if self.projection is None else affine(x, self.projection)
        x = x * math.sqrt(self.input_size) + dropped(sines(number, x), self.dropout, self.training)
        seen = join(past_pad, pad, length, x)
        # Without padding or a past torch's attention hides what comes later itself, and faster.
        is_plain = self.causal and seen is None and not length
        hidden = None if is_plain else mask(steps, length, seen, x, causal=self.causal)
        shown = None if hidden is None else ~hidden
        found = []
        for layer, past, of_source in zip(self.layers, pasts, sources, strict=True):
            x, now = layer(x, past, shown, is_plain, pad, of_source)
            found.append(now)
        x = x if self.norm is None else self.norm(x)
        count = (0 if count is None else count) + (
            x.new_full((1, batch), steps, dtype=torch.long) if pad is None else (~pad).sum(0, keepdim=True)
        )
        if pad is not None and seen is not None:
            x = x.masked_fill(pad[:, :, None], 0.0)
            for i, (k, v, *c) in enumerate(found):
                (k, v), later = padding_first([k, v], seen)
                found[i] = (k, v, *c)
            seen = later
        kept = [(self.keep_last(k), self.keep_last(v), *c) for k, v, *c in found]
        return x, [*kept, count, None if seen is None else self.keep_last(seen)]

    def step(self, x: Tensor, state: State | None = None, source: Source | None = None) -> tuple[Tensor, State]:
        """One step: h (B, output_size) and the state, of x (B, input_size).

        As many steps as the sequence is long give what one causal call gives, if memory_length spans it.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional Transformer needs the whole sequence: it has no step")
        if x.dim() != 2:
            raise ValueError(f"x must be (B, {self.input_size}), not {tuple(x.shape)}")
        h, state = self(x[None], state, None, source)
        return h[0], state

    def keep_last(self, a: Tensor) -> Tensor:
        """The steps of a (S, B, ...) that are kept."""
        return a if self.memory_length is None else a[max(0, len(a) - self.memory_length) :]

    def check_state(self, state: Any, batch: int) -> tuple[list[Any], Tensor | None, Tensor | None]:
        """Keys, values and what else each layer has, the numbers of steps, and the padding; refuse another's state."""
        if state is None:
            return [()] * self.num_layers, None, None
        is_own = isinstance(state, Sequence) and len(state) == self.num_layers + 2 and isinstance(state[-2], Tensor)
        if not is_own or any(not isinstance(part, tuple) or len(part) != self.parts for part in state[:-2]):
            name = type(self).__name__
            raise TypeError(f"the state is what a {name} of {self.num_layers} layers returned, or None")
        if state[-2].shape != (1, batch):
            raise ValueError(f"the state is of {state[-2].numel()} sequences, beside {batch} of x")
        return list(state[:-2]), state[-2], state[-1]


class FeedForward(nn.Module):
    """W_2 ReLU(W_1 x + b_1) + b_2 of each step; without a state."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.dropout = dropout

    def forward(self, x: Tensor, state: tuple[()], pad: Tensor | None) -> tuple[Tensor, tuple[()]]:
        return affine(dropped(F.relu(affine(x, self.inner)), self.dropout, self.training), self.outer), ()


class TransformerLayer(nn.Module):
    """Attention to the steps, attention to a source if there is one, and a feed-forward: each added to what it got."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        feed_forward: nn.Module,
        source_size: int | None,
        *,
        dropout: float,
        attn_dropout: float,
        norm_first: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attn_dropout = attn_dropout
        self.norm_first = norm_first
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size)
        if source_size is not None:
            self.source_query = nn.Linear(hidden_size, hidden_size)
            self.source_key_value = nn.Linear(source_size, 2 * hidden_size)
            self.source_output = nn.Linear(hidden_size, hidden_size)
            self.source_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = feed_forward
        self.norm = nn.LayerNorm(hidden_size)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, B, hidden_size) of a source."""
        k, v = affine(source, self.source_key_value).chunk(2, dim=-1)
        return k, v

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, ...],
        shown: Tensor | None,
        is_causal: bool,
        pad: Tensor | None,
        of_source: tuple[Tensor, Tensor, Tensor | None] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h (T, B, hidden_size), and what comes after: keys and values of all steps, and the feed-forward's state.

        past: the same of what came before, or nothing; shown (B or 1, 1, T or 1, S): which steps are seen, None for all
        or where is_causal says it. of_source: keys and values of `read`, and their padding.
        """
        p = self.attn_dropout if self.training else 0.0
        y = self.attention_norm(x) if self.norm_first else x
        q, k, v = affine(y, self.query_key_value).chunk(3, dim=-1)
        if past:
            k, v = (torch.cat([a.to(b.dtype), b]) for a, b in zip(past[:2], (k, v), strict=True))
        a = attend(q, k, v, self.num_heads, shown, p, causal=is_causal)
        x = self.add_and_norm(x, affine(a, self.output), self.attention_norm)
        if of_source is not None:
            y = self.source_norm(x) if self.norm_first else x
            a = attend_source(affine(y, self.source_query), *of_source, self.num_heads, p)
            x = self.add_and_norm(x, affine(a, self.source_output), self.source_norm)
        y = self.norm(x) if self.norm_first else x
        z, state = self.feed_forward(y, past[2:], pad)
        return self.add_and_norm(x, z, self.norm), (k, v, *state)

    def add_and_norm(self, x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x + dropped(y, self.dropout, self.training)
        return x if self.norm_first else norm(x)


def sines(number: Tensor, x: Tensor) -> Tensor:
    """Sines and cosines (T, B, n), in the dtype of x (..., n), of the steps' numbers (T, B)."""
    n = x.shape[-1]
    factory: dict[str, Any] = {"device": x.device, "dtype": state_dtype(x)}  # bfloat16 would count to 256
    angles = number[..., None].to(factory["dtype"]) * 10000 ** (-torch.arange(0, n, 2, **factory) / n)
    return torch.cat([angles.sin(), angles.cos()], dim=2)[..., :n].to(x.dtype)
