"""Transformer-XL, the baseline of language modelling (Dai et al., ACL 2019; section 3 of the paper)."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.baselines.attention_stack import AttentionStack, mask, sines
from sru.checks import check_optional_sizes
from sru.dropout import dropout as apply_dropout
from sru.kernels.linear import affine, is_plain, linear
from sru.padding import clear_padding, join_padding, move_padding_first

Pair = tuple[Tensor, Tensor]  # keys and values, each (S, B, hidden_size)


class TransformerXL(AttentionStack):
    """A Transformer with relative positions and memory: `h, state = encoder(x, state, mask_pad)`.

    A step sees itself, earlier steps of the segment, and the memory: the inputs of each layer, (M, B, hidden_size), at
    the last `memory_length` steps before the segment. When bidirectional it sees the whole segment. The memory is the
    state, one tensor for each layer; passing it to the next call continues the sequence. The caller detaches it, as the
    paper does.

    Padding is not seen, and its h is 0. In the memory it comes before the real steps, so that their distances stay
    right, and the state has one more tensor, (M, B), True where memory is padding.

    Layer norm follows each sum, and all layers share u and v, as in the published models of enwik8 and WikiText-103.
    Dropout applies to the positions, to the outputs of attention and feed-forward, and inside the feed-forward; the
    task applies it to the embeddings and the last h.

    Args:
        hidden_size: features of every layer, all heads together; x of another size is projected first.
        num_heads: heads of the attention; they divide hidden_size among them.
        inner_size: features inside the feed-forward; None for 4 * hidden_size.
        bidirectional: a step also sees later steps of the segment.
        attn_dropout: dropout probability of the attention weights.
        memory_length: how many steps before the segment, or before a step of `step`, are visible; None for all.
        eval_memory_length: the same in evaluation, where the published models use more; None for memory_length.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        memory_length: int | None = None,
        eval_memory_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, num_layers, memory_length=memory_length, **options)
        check_optional_sizes(0, eval_memory_length=eval_memory_length)
        if eval_memory_length is not None:
            self.eval_memory_length = eval_memory_length
        self.u = nn.Parameter(torch.empty(self.num_heads, hidden_size // self.num_heads))
        self.v = nn.Parameter(torch.empty(self.num_heads, hidden_size // self.num_heads))
        self.layers = nn.ModuleList(TransformerXLLayer(self) for _ in range(num_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices, u and v from N(0, 0.02 ** 2); layer norms start at 1, biases at 0."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(
        self, x: Tensor, state: Sequence[Tensor] | None = None, mask_pad: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """h (T, B, output_size) of x (T, B, input_size), and the state."""
        self.check_x(x, self.u)
        pad = None
        if mask_pad is not None:
            x, pad = clear_padding(x, mask_pad)
        pasts, past_pad = self.check_state(state, x.shape[1])
        h, inputs, _, all_pad = self.run(x, pasts, past_pad, pad)
        if state is not None:
            inputs = [torch.cat([past.to(now.dtype), now]) for past, now in zip(state, inputs, strict=False)]
        if pad is not None and all_pad is not None:
            h = h.masked_fill(pad[:, :, None], 0.0)
            inputs, all_pad = move_padding_first(inputs, all_pad)
        return h, [self.keep_last(a) for a in (inputs if all_pad is None else [*inputs, all_pad])]

    def step(self, x: Tensor, state: Sequence[Tensor | Pair] | None = None) -> tuple[Tensor, list[Pair | Tensor]]:
        """One step: h (B, output_size) and the state, of x (B, input_size).

        The state is the keys and values of each layer, so that steps do not project the memory again. A step sees
        itself and the last `memory_length` steps. The first step may take the state of a call: read the start of a text
        in one call and continue it step by step.
        """
        self.check_step(x, self.u)
        h, _, pairs, all_pad = self.run(x[None], *self.check_state(state, x.shape[0], is_step=True))
        last: list[Pair | Tensor] = [(self.keep_last(k), self.keep_last(v)) for k, v in pairs]
        return h[0], last if all_pad is None else [*last, self.keep_last(all_pad)]

    def run(
        self, x: Tensor, pasts: Sequence[Pair | None], past_pad: Tensor | None, pad: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], list[Pair], Tensor | None]:
        """h, the inputs of all layers, their keys and values for all S steps, and the padding (S, B) or None."""
        x = x if self.projection is None else affine(x, self.projection)
        steps, length = len(x), 0 if pasts[0] is None else len(pasts[0][0])
        all_pad = join_padding(past_pad, pad, length, x)
        hidden = mask(steps, length, all_pad, x, causal=not self.bidirectional)
        r = positions(length + steps, x, max(1, steps) if self.bidirectional else 1)
        r = apply_dropout(r, self.dropout, self.training)
        inputs, pairs = [], []
        for layer, past in zip(self.layers, pasts, strict=True):
            inputs.append(x)
            x, pair = layer(x, past, r, self.u, self.v, hidden)
            pairs.append(pair)
        return x, inputs, pairs, all_pad

    def check_state(self, state: Any, batch: int, *, is_step: bool = False) -> tuple[list[Pair | None], Tensor | None]:
        """Check a state of `forward` or, in a step, of `step` too; return each layer's keys and values, and padding."""
        if state is None:
            return [None] * self.num_layers, None
        pad = None
        if isinstance(state, Sequence) and len(state) == self.num_layers + 1 and isinstance(state[-1], Tensor):
            *state, pad = state
        source = "a call or step" if is_step else "a call, not step,"
        if not isinstance(state, Sequence) or len(state) != self.num_layers:
            found = len(state) if isinstance(state, Sequence) else type(state).__name__
            raise ValueError(f"the state must be the list, one item for each of {self.num_layers} layers, not {found}")
        parts: list[Any] = [tuple(part) if is_step and isinstance(part, Sequence) else (part,) for part in state]
        tensors = [a for part in parts for a in part]
        if len(tensors) not in (len(parts), 2 * len(parts)) or not all(
            isinstance(a, Tensor) and a.is_floating_point() for a in tensors
        ):
            raise TypeError(f"each item of the state must be as {source} returned it")
        expected = (*tensors[0].shape[:1], batch, self.output_size)
        for i, part in enumerate(parts):
            for a in part:
                if a.shape != expected:
                    raise ValueError(f"the state of layer {i} must be {expected} for this x, not {tuple(a.shape)}")
        if pad is not None and (pad.dtype != torch.bool or pad.shape != expected[:2]):
            raise ValueError(f"the state's padding must be {expected[:2]} of bool for this x, not {tuple(pad.shape)}")
        if len(tensors) > len(parts):
            return parts, pad
        layers = [cast(TransformerXLLayer, layer) for layer in self.layers]
        return [layer.keys_and_values(a.to(self.u.dtype)) for layer, a in zip(layers, tensors, strict=True)], pad


class TransformerXLLayer(nn.Module):
    """Attention over memory and x, and a feed-forward, each with a residual connection and layer norm."""

    def __init__(self, stack: TransformerXL) -> None:
        super().__init__()
        hidden_size, inner_size = stack.output_size, stack.inner_size
        self.num_heads = stack.num_heads
        self.dropout = stack.dropout
        self.attn_dropout = stack.attn_dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # W_{k,E} and W_v
        self.position = nn.Linear(hidden_size, hidden_size, bias=False)  # W_{k,R}
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def keys_and_values(self, x: Tensor) -> Pair:
        """Keys and values, each (S, B, hidden_size)."""
        k, v = affine(x, self.key_value).chunk(2, dim=-1)
        return k, v

    def forward(
        self, x: Tensor, past: Pair | None, r: Tensor, bias_u: Tensor, bias_v: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Pair]:
        """h (T, B, hidden_size), and the keys and values of the past and x (S, B, hidden_size).

        r: from `positions`; bias_u, bias_v (num_heads, d): the paper's u and v; hidden: from `mask`.
        """
        k, v = self.keys_and_values(x)
        if past is not None:
            k, v = (torch.cat([a.to(b.dtype), b]) for a, b in zip(past, (k, v), strict=True))
        q, keys, values = (a.unflatten(2, (self.num_heads, -1)) for a in (affine(x, self.query), k, v))
        weight = None
        if is_plain(self.position, nn.Linear):
            weight = self.position.weight.unflatten(0, (self.num_heads, -1))
        else:
            r = self.position(r).unflatten(1, (self.num_heads, -1))
        p = self.attn_dropout if self.training else 0.0
        a = attend(q, keys, values, r, weight, bias_u.to(q.dtype), bias_v.to(q.dtype), hidden, p)
        y = self.attention_norm(x + self.drop(affine(a.flatten(2), self.output)))
        z = affine(self.drop(F.relu(affine(y, self.inner))), self.outer)
        return self.norm(y + self.drop(z)), (k, v)

    def drop(self, a: Tensor) -> Tensor:
        return apply_dropout(a, self.dropout, self.training)


def positions(total: int, x: Tensor, ahead: int = 1) -> Tensor:
    """R (total + ahead, n) for x of n features: sines and cosines of the distances total - 1, ..., 0, ..., -ahead.

    The last one is always hidden: it makes each row of scores one longer, as `attend` needs.
    """
    return sines(torch.arange(total - 1, -1 - ahead, -1, device=x.device), x)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    weight: Tensor | None,
    bias_u: Tensor,
    bias_v: Tensor,
    hidden: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with relative positions (section 3.3), (T, B, H, d). Step i of T weights step j of S by

        softmax over visible j of ((q_i + u) k_j + (q_i + v) W_{k,R} R_{i + S - T - j}) / sqrt(d)

    q (T, B, H, d); k, v (S, B, H, d); r from `positions`: S + 1 rows if causal, else S + T; weight (H, d, n): W_{k,R},
    or None if r (S + 1 or S + T, H, d) is projected already; bias_u, bias_v (H, d); hidden from `mask`.
    """
    steps, total, row = len(q), len(k), len(r) - 1
    query = (q + bias_v) / math.sqrt(q.shape[-1])
    if weight is None:
        scores = torch.einsum("tbhd,shd->bhts", query, r)
    elif steps == 1:  # projecting one query by W_{k,R} is cheaper than projecting all positions
        scores = torch.einsum("tbhn,sn->bhts", torch.einsum("tbhd,hdn->tbhn", query, weight), r)
    else:
        scores = torch.einsum("tbhd,shd->bhts", query, linear(r, weight.flatten(0, 1)).unflatten(1, weight.shape[:2]))
    # Row i starts at distance S - 1 but should start at i + S - T, which is T - 1 - i places later. Reading the same
    # memory with rows that are one place shorter shifts each row by one more place: a view without a copy.
    scores = scores.flatten(2)[..., steps - 1 : steps - 1 + steps * row].unflatten(2, (steps, row))[..., :total]
    scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
    q, k, v = (a.permute(1, 2, 0, 3) for a in (q + bias_u, k, v))
    return F.scaled_dot_product_attention(q, k, v, scores, dropout).permute(2, 0, 1, 3)
