"""Attention, and the layer of SRU++ that has it in place of matrices (Lei, EMNLP 2021; section 2 of the paper)."""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.checks import check_mask
from sru.dropout import dropout
from sru.kernels.linear import affine, is_plain, linear
from sru.padding import clear_padding, join_padding

# A source as a stack reads it: its padding (S, N) or None, and keys and values (S, N, n) for each layer.
Source = tuple[Tensor | None, list[tuple[Tensor, Tensor]]]
LayerSource = tuple[Tensor, Tensor, Tensor | None]  # keys, values and padding for one layer


class SourceReader:
    """The part of a stack that reads a source of `source_size` features, if it has one."""

    source_size: int | None

    def readers(self) -> Iterable[Any]:
        """The modules whose `read` makes each layer's keys and values."""
        raise NotImplementedError

    def read(self, source: Tensor, pad: Tensor | None = None) -> Source:
        """Prepare a source (S, N, source_size) with padding (S, N) for the calls of this stack."""
        if self.source_size is None:
            raise ValueError(f"this {type(self).__name__} attends to no source: build it with source_size")
        if not isinstance(source, Tensor) or source.dim() != 3 or source.shape[2] != self.source_size:
            found = tuple(source.shape) if isinstance(source, Tensor) else type(source).__name__
            raise ValueError(f"source must be (S, B, {self.source_size}), time first, not {found}")
        if pad is not None:
            source, pad = clear_padding(source, pad)
        return pad, [reader.read(source) for reader in self.readers()]

    def check_source(self, source: Source | None, num_layers: int) -> list[LayerSource | None]:
        """The source for each layer; ValueError if it is missing, not wanted, or has another number of layers."""
        if source is None and self.source_size is not None:
            raise ValueError("a source is missing: pass the result of read")
        if source is None:
            return [None] * num_layers
        if self.source_size is None:
            raise ValueError("this stack has no source_size, so it takes no source")
        if len(source[1]) != num_layers:
            raise ValueError(f"the source was read by {len(source[1])} layers, but this stack has {num_layers}")
        return [(*pair, source[0]) for pair in source[1]]


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None, p: float = 0.0, *, causal: bool = False
) -> Tensor:
    """softmax(q k' / sqrt(d)) v (T, B, n) for q (T, B, n) and k, v (S, B, n), with heads of d features.

    mask (B or 1, 1, T or 1, S): True where a step is visible, or numbers to add to the scores.
    """
    dtype = q.dtype
    # On a CPU, torch's backward in bfloat16 takes up to four times as long as in float32 (bench/NOTES.md).
    widens = q.device.type == "cpu" and torch.promote_types(dtype, torch.float32) != dtype
    q, k, v = (
        a.to(torch.float32 if widens else a.dtype).unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for a in (q, k, v)
    )
    mask = mask.float() if widens and mask is not None and mask.is_floating_point() else mask
    with torch.autocast(q.device.type, enabled=False) if widens else contextlib.nullcontext():
        a = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=causal)
    return a.permute(2, 0, 1, 3).flatten(2).to(dtype)


def mask_scores(
    x: Tensor,
    length: int,
    *,
    attn_mask: Tensor | None,
    causal: bool,
    pad: Tensor | None,
    memory_pad: Tensor | None,
) -> Tensor | None:
    """The mask (B or 1, 1, T, S) added to the scores of x (T, B, n) after `length` steps of memory; None for no mask.

    attn_mask (T, S) or (B, T, S): numbers, or True where a step must not look; without one, `causal` hides later steps.
    pad (T, B), memory_pad (M, B): True at padding.
    """
    steps, batch = x.shape[:2]
    total = length + steps
    mask = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor) or not (attn_mask.is_floating_point() or attn_mask.dtype == torch.bool):
            found = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
            raise TypeError(f"attn_mask must be bool, True where a step must not look, or floating-point, not {found}")
        if attn_mask.shape not in ((steps, total), (batch, steps, total)):
            expected = f"({steps}, {total}) or ({batch}, {steps}, {total})"
            raise ValueError(f"attn_mask must be {expected}, memory's steps first, not {tuple(attn_mask.shape)}")
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(attn_mask, -math.inf)
        mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask[:, None]
    elif causal and (length or pad is not None):
        mask = x.new_full((steps, total), -math.inf).triu(length + 1)[None, None]
    if memory_pad is not None:
        check_mask(memory_pad, (length, batch), "(M, B)", x)
    padding = join_padding(memory_pad, pad, length, x)
    if padding is None:
        return mask
    mask = x.new_zeros(1, 1, steps, total) if mask is None else mask
    return mask.masked_fill(padding.t()[:, None, None], -math.inf)


def attend_source(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, num_heads: int, p: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(d)) v (T, B, n) for q (T, B, n) and a source's k, v (S, N, n); 0 where a source is empty.

    B / N neighbouring sequences, for example hypotheses of one sentence, attend to each source without copies of it.
    """
    batch, sources = q.shape[1], k.shape[1]
    if batch % max(1, sources) or (pad is not None and pad.shape != k.shape[:2]):
        raise ValueError(f"a source of {sources} sequences does not fit the {batch} sequences of x")
    empty = None if pad is None else pad.all(0)
    # A softmax over nothing is NaN, so an empty source is unmasked here and its result replaced by 0 below.
    visible = None if pad is None or empty is None else (~pad | empty).t()[:, None, None]
    group = batch // sources if sources else 1
    # The sequences of a group one after the other, as steps of one long sequence.
    q = q.unflatten(1, (sources, group)).transpose(1, 2).flatten(0, 1)
    a = attend(q, k, v, num_heads, visible, p)
    a = a if empty is None else a.masked_fill(empty[:, None], 0.0)
    grouped: Tensor = a.unflatten(0, (-1, group)).transpose(1, 2)
    return grouped.flatten(1, 2)


class SourceAttention(nn.Module):
    """Attention of a decoder's layer to a source, added before the layer norm. With s a step of the source:

        p = W_p s,   k = W_k p,   v = W_v p,   b = beta * softmax(q k' / sqrt(d)) v

    It is factorised like self-attention and shares its q; beta is learnt and starts at 1. The paper does not describe
    how its translation model attends to the source; this form reproduces the published sizes (conf/experiment).
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
        """Draw Xavier's initialisation; set beta to 1."""
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)
        nn.init.ones_(self.beta)

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, N, proj_size) of a source."""
        k, v = affine(affine(source, self.linear1), self.linear2).chunk(2, dim=-1)
        return k, v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
        p = self.attn_dropout if self.training else 0.0
        return self.beta * attend_source(q, k, v, pad, self.num_heads, p)


class Projection(nn.Module):
    """The matrices of a layer without self-attention: x to proj_size features, layer norm, then to all columns.

    matrices: values for each column of the layer; source: the attention to a source, if there is one.
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
        self.matrices = matrices
        self.linear1 = nn.Linear(input_size, proj_size, bias=False, **factory)
        self.linear2 = nn.Linear(proj_size, output_size, bias=False, **factory)
        self.layer_norm = nn.LayerNorm(proj_size, **factory) if layer_norm else None
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the released code's initialisation: Xavier's, with a smaller gain after dropout."""
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
        cache: list[Tensor] | None = None,
        source: LayerSource | None = None,
    ) -> Tensor:
        """(T, B, matrices, columns) from x (T, B, n).

        Self-attention also sees memory (M, B, n) or, in a step, the keys and values in `cache`, to which it adds those
        of x; mask (B or 1, 1, T, M + T) is added to the scores; without a mask, `causal` hides later steps.
        """
        q = affine(x, self.linear1)
        y, last = self.add_attention(q, memory, mask, causal, cache)
        if self.source is not None and source is not None:
            y = y + self.source(q, *source)
        y = y if self.layer_norm is None else self.layer_norm(y)
        y = dropout(y, self.dropout, self.training)
        # The recurrence needs another order of columns: reorder the weight, or the product where that is smaller.
        if is_plain(last, nn.Linear) and last.bias is None:
            weight = last.weight.unflatten(0, (-1, self.matrices)).transpose(0, 1)
            if torch.compiler.is_compiling() or y.shape[0] * y.shape[1] >= weight.shape[1]:
                u: Tensor = linear(y, weight.flatten(0, 1)).unflatten(2, weight.shape[:2])
                return u
        u = affine(y, last).unflatten(2, (-1, self.matrices)).transpose(2, 3)
        return u

    def add_attention(
        self, q: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, cache: list[Tensor] | None
    ) -> tuple[Tensor, nn.Module]:
        """q with self-attention added, if there is any, and the last matrix."""
        return q, self.linear2


class Attention(Projection):
    """The matrices of a layer with self-attention. With memory and x concatenated, and d features in a head:

        q = W_q x,   k = W_k q,   v = W_v q,   a = softmax(q k' / sqrt(d)) v
        u = W_o dropout(norm(q + alpha * a))        with a learnt scalar alpha that starts at 0

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
        """Draw the same initialisation; set alpha to 0."""
        super().reset_parameters()
        if hasattr(self, "linear3"):  # not yet when the base class calls this
            nn.init.xavier_uniform_(self.linear2.weight)
            nn.init.xavier_uniform_(self.linear3.weight, gain=math.sqrt(1 - self.dropout))
            nn.init.zeros_(self.alpha)

    def add_attention(
        self, q: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool, cache: list[Tensor] | None
    ) -> tuple[Tensor, nn.Module]:
        context = q
        if memory is not None:
            context = torch.cat([affine(memory.to(q.dtype), self.linear1), q])
        k, v = affine(context, self.linear2).chunk(2, dim=-1)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k]), torch.cat([cache[1], v])
            cache[:] = k, v
        p = self.attn_dropout if self.training else 0.0
        blind = None
        if mask is not None:
            # A softmax over nothing is NaN: a step that sees nothing is unmasked, and its result replaced by 0 below.
            blind = (mask == -math.inf).all(-1, keepdim=True)
            mask = mask.masked_fill(blind, 0.0).to(q.dtype)
        a = attend(q, k, v, self.num_heads, mask, p, causal=causal and mask is None)
        a = a if blind is None else a.masked_fill(blind.permute(2, 0, 1, 3).flatten(2), 0.0)
        return q + self.alpha * a, self.linear3
