"""Attention, and a layer of SRU++ that has it in the place of matrices (Lei, EMNLP 2021; section 2 of the paper)."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.dropout import dropout as dropped
from sru.kernels.linear import affine, is_plain, linear
from sru.padding import clear

# What a stack looks up in a source: its padding (S, B), if any, and keys and values (S, B, n) of each layer.
Source = tuple[Tensor | None, list[tuple[Tensor, Tensor]]]


class LooksIntoSource:
    """What a decoder's stack has in common: its layers look into a source of `source_size` features, or into none."""

    source_size: int | None

    def readers(self) -> Iterable[Any]:
        """What makes a layer's keys and values of a source, by `read`."""
        raise NotImplementedError

    def read(self, source: Tensor, pad: Tensor | None = None) -> Source:
        """What the layers look up in source (S, B, source_size), of which pad (S, B) says what is padding."""
        if self.source_size is None:
            raise ValueError(f"this {type(self).__name__} attends to no source: build it with source_size")
        if not isinstance(source, Tensor) or source.dim() != 3 or source.shape[2] != self.source_size:
            found = tuple(source.shape) if isinstance(source, Tensor) else type(source).__name__
            raise ValueError(f"source must be (S, B, {self.source_size}), time first, not {found}")
        if pad is not None:
            source, pad = clear(source, pad)
        return pad, [reader.read(source) for reader in self.readers()]

    def check_source(self, source: Source | None, num_layers: int) -> list[tuple[Tensor, Tensor, Tensor | None] | None]:
        """Keys, values and padding of the source for each layer; ValueError for one too many or too few."""
        if (source is None) != (self.source_size is None):
            raise ValueError(f"a source is {'missing: give what read returned' if source is None else 'not for this'}")
        if source is not None and len(source[1]) != num_layers:
            raise ValueError(f"the source was read by {len(source[1])} layers, and this has {num_layers}")
        return [None] * num_layers if source is None else [(*pair, source[0]) for pair in source[1]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None, p: float = 0.0, *, causal: bool = False
) -> Tensor:
    """softmax(q k' / sqrt(d)) v (T, B, n) of q (T, B, n), k and v (S, B, n), shared among heads of d features.

    mask (B or 1, 1, T or 1, S): True where a step is seen, or numbers that are added to the scores.
    """
    dtype = q.dtype
    # On a CPU torch's backward in bfloat16 takes four times as long as in float32 with short sequences, and no less
    # with long ones (bench/NOTES.md).
    widens = q.device.type == "cpu" and torch.promote_types(dtype, torch.float32) != dtype
    q, k, v = (
        a.to(torch.float32 if widens else a.dtype).unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for a in (q, k, v)
    )
    mask = mask.float() if widens and mask is not None and mask.is_floating_point() else mask
    with torch.autocast(q.device.type, enabled=False) if widens else contextlib.nullcontext():
        a = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal)
    return a.permute(2, 0, 1, 3).flatten(2).to(dtype)


def attend_source(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, num_heads: int, p: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(d)) v (T, B, n) of q (T, B, n) and a source's k and v (S, N, n); 0 where a source is empty.

    Each N-th part of the B sequences, the hypotheses of a sentence say, looks into one source: nothing is repeated.
    """
    batch, sources = q.shape[1], k.shape[1]
    if batch % max(1, sources) or (pad is not None and pad.shape != k.shape[:2]):
        raise ValueError(f"a source of {sources} sequences does not go with {batch} of x")
    nothing = None if pad is None else pad.all(0)
    # A softmax over nothing is NaN: such a source is seen, and then forgotten.
    seen = None if pad is None or nothing is None else (~pad | nothing).t()[:, None, None]
    group = batch // sources if sources else 1
    q = (
        q.unflatten(1, (sources, group)).transpose(1, 2).flatten(0, 1)
    )  # all that look into a source, one behind the other
    a = attend(q, k, v, num_heads, seen, p)
    a = a if nothing is None else a.masked_fill(nothing[:, None], 0.0)
    return a.unflatten(0, (-1, group)).transpose(1, 2).flatten(1, 2)


class SourceAttention(nn.Module):
    """What a layer of a decoder sees of a source, to be added to what it normalises. With s a step of the source:

        p = W_p s,   k = W_k p,   v = W_v p,   b = beta * softmax(q k' / sqrt(d)) v

    It is factorised as the attention to the layer's own steps is, whose q it shares; beta is learnt and starts at 1.
    The paper does not say how its translator sees the source; so its published sizes come out (conf/experiment).
    """

    def __init__(
        self, source_size: int, proj_size: int, *, num_heads: int = 1, attn_dropout: float = 0.0, **factory: Any
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(source_size, proj_size, bias=False, **factory)
        self.linear2 = nn.Linear(proj_size, 2 * proj_size, bias=False, **factory)
        self.beta = nn.Parameter(torch.empty(1, **factory))
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Xavier's initialisation; beta is 1."""
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)
        nn.init.ones_(self.beta)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, B, proj_size) of a source."""
        k, v = affine(affine(source, self.linear1), self.linear2).chunk(2, dim=-1)
        return k, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
        p = self.attn_dropout if self.training else 0.0
        return self.beta * attend_source(q, k, v, pad, self.num_heads, p)


class Projection(nn.Module):
    """The matrices of a layer that does not attend: x to proj_size features, layer norm, and to all columns.

    source: what sees a source, if the layer does.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        proj_size: int,
        *,
        matrices: int,
        dropout: float = 0.0,
        layer_norm: bool = True,
        source: SourceAttention | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.source = source
        self.matrices = matrices  # the columns of the last matrix that belong to one column of the layer
        self.linear1 = nn.Linear(input_size, proj_size, bias=False, **factory)
        self.linear2 = nn.Linear(proj_size, output_size, bias=False, **factory)
        self.layer_norm = nn.LayerNorm(proj_size, **factory) if layer_norm else None
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the released code's initialisation: Xavier's, smaller where dropout makes what is kept larger."""
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight, gain=math.sqrt(1 - self.dropout))
        for module in (self.layer_norm, self.source):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: "Cache | None" = None,
        source: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """(T, B, matrices, columns) of x (T, B, n).

        What attends also sees memory (M, B, n) or, in a step, a cache; mask (B or 1, 1, T, M + T) is added to the
        scores; without a mask, `causal` hides what comes after a step. source: keys, values and padding of a source.
        """
        q = affine(x, self.linear1)
        return self.finish(q, q, source, self.linear2)

    def finish(self, q: Tensor, y: Tensor, source: Any, last: nn.Module) -> Tensor:
        """A source, layer norm, dropout and the last matrix: (T, B, matrices, columns)."""
        y = y if self.source is None else y + self.source(q, *source)
        y = y if self.layer_norm is None else self.layer_norm(y)
        y = dropped(y, self.dropout, self.training)
        # Either the rows of the weight are put in the recurrence's order, or the columns of what it gives.
        if is_plain(last, nn.Linear) and last.bias is None:
            weight = last.weight.unflatten(0, (-1, self.matrices)).transpose(0, 1)
            if torch.compiler.is_compiling() or y.shape[0] * y.shape[1] >= weight.shape[1]:
                return linear(y, weight.flatten(0, 1)).unflatten(2, weight.shape[:2])
        return affine(y, last).unflatten(2, (-1, self.matrices)).transpose(2, 3)


class Attention(Projection):
    """The matrices of a layer that attends. With memory and x one after the other, and d features a head:

        q = W_q x,   k = W_k q,   v = W_v q,   a = softmax(q k' / sqrt(d)) v
        u = W_o dropout(norm(q + alpha * a))        with a number alpha that is learnt and starts at 0

    linear1 holds W_q, linear2 W_k and W_v, linear3 W_o.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        proj_size: int,
        *,
        num_heads: int = 1,
        attn_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(input_size, 2 * proj_size, proj_size, **options)
        factory = {key: options[key] for key in ("device", "dtype") if key in options}
        self.linear3 = nn.Linear(proj_size, output_size, bias=False, **factory)
        self.alpha = nn.Parameter(torch.empty(1, **factory))
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As of the other layers; alpha is 0."""
        super().reset_parameters()
        if hasattr(self, "linear3"):  # not while the first half is built
            nn.init.xavier_uniform_(self.linear2.weight)
            nn.init.xavier_uniform_(self.linear3.weight, gain=math.sqrt(1 - self.dropout))
            nn.init.zeros_(self.alpha)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: "Cache | None" = None,
        source: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        q = seen = affine(x, self.linear1)
        if memory is not None:
            seen = torch.cat([affine(memory.to(x.dtype), self.linear1), q])
        k, v = affine(seen, self.linear2).chunk(2, dim=-1)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.finish(q, q + self.alpha * self.attend(q, k, v, mask, causal), source, self.linear3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """What steps q (T, B, proj_size) see of k and v (S, B, proj_size); 0 where that is nothing."""
        p = self.attn_dropout if self.training else 0.0
        nothing = None
        if mask is not None:
            # A softmax over nothing is NaN: such a step sees all, and then forgets it.
            nothing = (mask == -math.inf).all(-1, keepdim=True)
            mask = mask.masked_fill(nothing, 0.0).to(q.dtype)
        a = attend(q, k, v, self.num_heads, mask, p, causal=causal and mask is None)
        return a if nothing is None else a.masked_fill(nothing.permute(2, 0, 1, 3).flatten(2), 0.0)


class Cache:
    """Keys and values (S, B, proj_size) of the steps that the next one of a layer sees: at most the last `limit`."""

    def __init__(self, limit: int | None, k: Tensor | None = None, v: Tensor | None = None) -> None:
        self.limit, self.k, self.v = limit, k, v

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a step sees, itself included, which the cache then holds."""
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k]), torch.cat([self.v, v])
        first = 0 if self.limit is None else max(0, k.shape[0] - self.limit)
        self.k, self.v = k[first:], v[first:]
        return k, v
