"""Transformer-XL, the baseline of language modelling (Dai et al., ACL 2019; section 3 of the paper)."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.checks import check_flags, check_heads, check_input, check_probabilities, check_sizes, state_dtype
from sru.dropout import dropout as dropped
from sru.kernels.linear import affine, is_plain, linear
from sru.padding import clear, join, padding_first

Pair = tuple[Tensor, Tensor]  # keys and values, each (S, B, hidden_size)


class TransformerXL(nn.Module):
    """A Transformer with relative positions and memory, by the call `h, state = encoder(x, state, mask_pad)`.

    A step sees itself, what came before it in the segment, and the memory: the inputs of each layer, (M, B,
    hidden_size), at the last `memory_length` steps before the segment. When bidirectional it sees all of the segment.
    The memory is the state, one tensor a layer; feeding it back goes on with the sequence. Its gradient is the caller's
    to stop, as that of any state: the paper stops it.

    Padding is not seen, and its h is 0. In the memory it lies before the real steps, whose distances from what comes
    then are their own, and the state has one tensor more, (M, B), True where memory is padding.

    Layers are normed after their sums, and u and v are shared by all layers, as in the published models of enwik8 and
    WikiText-103. Dropout falls on the positions and on what the attention and the feed-forward add, and inside the
    latter; that on the embeddings and on the last h is left to the task.

    Args:
        hidden_size: features of every layer, all heads together; x of another size is projected first.
        num_heads: heads of the attention, among which hidden_size is shared.
        inner_size: features inside the feed-forward; None for 4 * hidden_size.
        bidirectional: a step sees what comes after it in the segment too.
        attn_dropout: probability of dropping a step from what another attends to.
        memory_length: how many steps before a segment it sees, and before a step of `step`; None for all.
        eval_memory_length: the same in evaluation, where the published models look back further; None for as many.
    """

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
        memory_length: int | None = None,
        eval_memory_length: int | None = None,
    ) -> None:
        super().__init__()
        inner_size = 4 * hidden_size if inner_size is None else inner_size
        check_sizes(1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_sizes(1, num_heads=num_heads, inner_size=inner_size)
        check_probabilities(dropout=dropout, attn_dropout=attn_dropout)
        check_flags(bidirectional=bidirectional)
        for length in (memory_length, eval_memory_length):
            if length is not None:
                check_sizes(0, memory_length=length)
        check_heads(hidden_size, num_heads)
        self.input_size = input_size
        self.output_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.memory_length = memory_length
        self.eval_memory_length = memory_length if eval_memory_length is None else eval_memory_length
        self.projection = nn.Linear(input_size, hidden_size, bias=False) if input_size != hidden_size else None
        self.u = nn.Parameter(torch.empty(num_heads, hidden_size // num_heads))
        self.v = nn.Parameter(torch.empty(num_heads, hidden_size // num_heads))
        self.layers = nn.ModuleList(
            TransformerXLLayer(hidden_size, num_heads, inner_size, dropout=dropout, attn_dropout=attn_dropout)
            for _ in range(num_layers)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices, u and v from a normal distribution of deviation 0.02; norms start at 1, biases at 0."""
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
        self.check_x(x, 3, f"(T, B, {self.input_size}), time first")
        pad = None
        if mask_pad is not None:
            x, pad = clear(x, mask_pad)
        pasts, past_pad = self.pasts(state, x.shape[1])
        h, inputs, _, unseen = self.run(x, pasts, past_pad, pad)
        if state is not None:
            inputs = [torch.cat([past.to(now.dtype), now]) for past, now in zip(state, inputs, strict=False)]
        if pad is not None and unseen is not None:
            h = h.masked_fill(pad[:, :, None], 0.0)
            inputs, unseen = padding_first(inputs, unseen)
        return h, [self.keep_last(a) for a in (inputs if unseen is None else [*inputs, unseen])]

    def step(self, x: Tensor, state: Sequence[Tensor | Pair] | None = None) -> tuple[Tensor, list[Pair | Tensor]]:
        """One step: h (B, output_size) and the state, of x (B, input_size).

        The state is a pair of keys and values for each layer, so that memory is not multiplied again. A step sees
        itself and the last `memory_length` steps. The first one may take the state of a call: what a text begins with
        is read at once, and gone on with step by step.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional TransformerXL needs the whole sequence: it has no step")
        self.check_x(x, 2, f"(B, {self.input_size})")
        h, _, pairs, unseen = self.run(x[None], *self.pasts(state, x.shape[0], is_step=True))
        last: list[Pair | Tensor] = [(self.keep_last(k), self.keep_last(v)) for k, v in pairs]
        return h[0], last if unseen is None else [*last, self.keep_last(unseen)]

    def run(
        self, x: Tensor, pasts: Sequence[Pair | None], past_pad: Tensor | None, pad: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], list[Pair], Tensor | None]:
        """h, the inputs of all layers, what each has seen, and which of these S steps were padding (S, B), if any."""
        x = x if self.projection is None else affine(x, self.projection)
        steps, length = len(x), 0 if pasts[0] is None else len(pasts[0][0])
        unseen = join(past_pad, pad, length, x)
        hidden = mask(steps, length, unseen, x, causal=not self.bidirectional)
        r = positions(length + steps, x, max(1, steps) if self.bidirectional else 1)
        r = dropped(r, self.dropout, self.training)
        inputs, pairs = [], []
        for layer, past in zip(self.layers, pasts, strict=True):
            inputs.append(x)
            x, pair = layer(x, past, r, self.u, self.v, hidden)
            pairs.append(pair)
        return x, inputs, pairs, unseen

    def keep_last(self, a: Tensor) -> Tensor:
        """The steps of a (S, B, ...) that are kept."""
        length = self.memory_length if self.training else self.eval_memory_length
        return a if length is None else a[max(0, len(a) - length) :]

    def check_x(self, x: Any, dims: int, meaning: str) -> None:
        """Refuse what is no input of `dims` dimensions."""
        check_input(x, self.u)
        if x.dim() != dims or x.shape[-1] != self.input_size:
            raise ValueError(f"x must be {meaning}, not {tuple(x.shape)}")

    def pasts(self, state: Any, batch: int, *, is_step: bool = False) -> tuple[list[Pair | None], Tensor | None]:
        """Keys and values of each layer before x, and which of the steps are padding, if any.

        Refuse what forward, or either method for a step, did not return.
        """
        if state is None:
            return [None] * self.num_layers, None
        pad = None
        if isinstance(state, Sequence) and len(state) == self.num_layers + 1:
            last = state[-1]
            if isinstance(last, Tensor) and last.dtype == torch.bool:
                state, pad = state[:-1], last

        def is_memory(a: Any) -> bool:
            return isinstance(a, Tensor) and a.is_floating_point()

        def is_pair(a: Any) -> bool:
            return isinstance(a, Sequence) and len(a) == 2 and all(map(is_memory, a))

        is_memories = isinstance(state, Sequence) and all(map(is_memory, state))
        if not is_memories and not (is_step and isinstance(state, Sequence) and all(map(is_pair, state))):
            found = type(state).__name__
            if isinstance(state, Sequence):
                found += f" of {', '.join(sorted({type(a).__name__ for a in state}))}"
            source = "a call or step" if is_step else "a call, not step,"
            raise TypeError(f"the state must be the list, one item a layer, that {source} returned, not {found}")
        if len(state) != self.num_layers:
            raise ValueError(f"the state must have one item for each of {self.num_layers} layers, not {len(state)}")
        steps: int | str = "M"
        for i, past in enumerate(state):
            for a in [past] if is_memories else past:
                if a.dim() != 3 or (a.shape[0] if steps == "M" else steps, batch, self.output_size) != a.shape:
                    expected = f"({steps}, {batch}, {self.output_size})"
                    raise ValueError(f"the state of layer {i} must be {expected} beside x, not {tuple(a.shape)}")
                steps = a.shape[0]
        if pad is not None and pad.shape != (steps, batch):
            raise ValueError(f"the state's padding must be ({steps}, {batch}) beside x, not {tuple(pad.shape)}")
        if not is_memories:
            return list(state), pad
        layers = [cast(TransformerXLLayer, layer) for layer in self.layers]
        return [layer.keys_and_values(a.to(self.u.dtype)) for layer, a in zip(layers, state, strict=True)], pad


class TransformerXLLayer(nn.Module):
    """Attention over memory and x, and a feed-forward of two matrices, each summed with what it got and normed."""

    def __init__(
        self, hidden_size: int, num_heads: int, inner_size: int, *, dropout: float = 0.0, attn_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attn_dropout = attn_dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)  # W_{k,E} and W_v
        self.position = nn.Linear(hidden_size, hidden_size, bias=False)  # W_{k,R}
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def keys_and_values(self, x: Tensor) -> Pair:
        """Two of (S, B, hidden_size)."""
        k, v = affine(x, self.key_value).chunk(2, dim=-1)
        return k, v

    def forward(
        self, x: Tensor, past: Pair | None, r: Tensor, bias_u: Tensor, bias_v: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Pair]:
        """h (T, B, hidden_size), and the keys and values (S, B, hidden_size), of what came before x and of x.

        r: of `positions`; bias_u, bias_v (num_heads, d): the paper's u and v; hidden: of `mask`.
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
        return dropped(a, self.dropout, self.training)


def mask(steps: int, past: int, pad: Tensor | None, x: Tensor, *, causal: bool) -> Tensor | None:
    """What is hidden (B or 1, 1, T or 1, S) from T steps after `past` others; pad (S, B): which are padding."""
    hidden = None if pad is None else pad.t()[:, None, None]
    if causal and steps > 1:
        later = torch.ones(steps, past + steps, dtype=torch.bool, device=x.device).triu(past + 1)[None, None]
        hidden = later if hidden is None else hidden | later
    if pad is None or hidden is None:
        return hidden
    return hidden & ~hidden.all(-1, keepdim=True)  # a softmax over nothing is NaN: padding that sees nothing sees all


def positions(total: int, x: Tensor, ahead: int = 1) -> Tensor:
    """R (total + ahead, n) for x of n features: sines and cosines of the distances total - 1, ..., 0, ..., -ahead.

    The last one is never seen: it makes rows of scores one longer than what `attend` takes of them.
    """
    n = x.shape[-1]
    factory: dict[str, Any] = {"device": x.device, "dtype": state_dtype(x)}  # bfloat16 would count to 256
    distances = torch.arange(total - 1, -1 - ahead, -1, **factory)
    angles = distances[:, None] * 10000 ** (-torch.arange(0, n, 2, **factory) / n)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :n].to(x.dtype)


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
    """Attention with relative positions (section 3.3), (T, B, H, d): step i of T sees the j of S that are not hidden by

        softmax over j of ((q_i + u) k_j + (q_i + v) W_{k,R} R_{i + S - T - j}) / sqrt(d)

    q (T, B, H, d); k, v (S, B, H, d); r: of `positions`, S + 1 for j <= i + S - T, S + T for all; weight (H, d, n):
    W_{k,R}, or None where r (S + 1 or S + T, H, d) is projected already; bias_u, bias_v (H, d); hidden: of `mask`.
    """
    steps, total, row = len(q), len(k), len(r) - 1
    query = (q + bias_v) / math.sqrt(q.shape[-1])
    if weight is None:
        scores = torch.einsum("tbhd,shd->bhts", query, r)
    elif steps == 1:  # one query is cheaper to multiply by W_{k,R} than all positions are
        scores = torch.einsum("tbhn,sn->bhts", torch.einsum("tbhd,hdn->tbhn", query, weight), r)
    else:
        scores = torch.einsum("tbhd,shd->bhts", query, linear(r, weight.flatten(0, 1)).unflatten(1, weight.shape[:2]))
    # Row i has the distances from S - 1 on, but its own start at i + S - T, T - 1 - i numbers later. One number less
    # in each row than in the one before is what shorter rows see in a memory with rows of one more: a view, no copy.
    scores = scores.flatten(2)[..., steps - 1 : steps - 1 + steps * row].unflatten(2, (steps, row))[..., :total]
    scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
    q, k, v = (a.permute(1, 2, 0, 3) for a in (q + bias_u, k, v))
    return F.scaled_dot_product_attention(q, k, v, scores, dropout).permute(2, 0, 1, 3)
