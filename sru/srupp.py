"""SRU++: a stack of SRU layers with attention in place of matrices (Lei, EMNLP 2021; section 2 of the paper)."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sru.attention import Attention, Projection, Source, SourceAttention, SourceReader, mask_scores
from sru.checks import check_flags, check_optional_sizes, check_probabilities, check_sizes, refuse
from sru.layer import SRU
from sru.padding import Lengths, clear_padding, join_padding, move_padding_first

REPLACED = {"transform_module", "custom_m", "projection_size", "n_proj"}  # arguments of SRU that attention replaces
EncoderState = tuple[Tensor, list[Tensor], Tensor | None]  # c, memory, padding


class SRUpp(SourceReader, SRU):
    """A stack of SRU++ layers, with the call of the official package.

    `h, c, extra = srupp(x, c0, mask_pad, attn_mask, memory)` with x, h, c and c0 as in SRU; extra["saved_inputs"] are
    the inputs of all layers, to be passed as memory with the next segment.

    Args:
        proj_size: features of queries, keys and values, all heads together.
        attn_dropout: dropout probability of the attention weights.
        num_heads: heads of the attention; they divide proj_size among them.
        attn_layer_norm: normalise q + alpha * a.
        attention_every_n_layers: every n-th layer attends.
        attention_last_n_layers: only those among the last n layers attend; -1 for no such limit.
        attention_layers: indices of the layers that attend, from 0; replaces the two options above.
        causal: without an attn_mask, a step sees itself, earlier steps and memory; False: all steps.
        memory_length: how many earlier steps `step` sees; None for all.
        source_size: features of a source that every layer attends to; None for a stack without a source.
        input_size, hidden_size, num_layers, ..., dtype, options: as in SRU.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        num_heads: int = 1,
        attn_layer_norm: bool = True,
        attention_every_n_layers: int = 1,
        attention_last_n_layers: int = -1,
        attention_layers: Sequence[int] | None = None,
        causal: bool = False,
        memory_length: int | None = None,
        source_size: int | None = None,
        bidirectional: bool = False,
        proj_input_to_hidden_first: bool = False,
        has_skip_term: bool = True,
        highway_bias: float = -2.0,
        rescale: bool | str = False,
        weight_c_init: float | None = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        check_sizes(1, input_size=input_size, hidden_size=hidden_size, proj_size=proj_size, num_layers=num_layers)
        check_sizes(1, num_heads=num_heads, attention_every_n_layers=attention_every_n_layers)
        check_sizes(-1, attention_last_n_layers=attention_last_n_layers)
        check_probabilities(dropout=dropout, attn_dropout=attn_dropout)
        check_flags(attn_layer_norm=attn_layer_norm, causal=causal, bidirectional=bidirectional)
        check_optional_sizes(0, memory_length=memory_length)
        check_optional_sizes(1, source_size=source_size)
        if proj_size % num_heads:
            raise ValueError(f"proj_size = {proj_size} cannot be shared among num_heads = {num_heads}")
        for name in options.keys() & REPLACED:
            raise TypeError(f"SRUpp has no {name}: attention through proj_size features replaces its matrices")
        if causal and bidirectional:
            raise ValueError("causal and bidirectional contradict each other")
        last = num_layers if attention_last_n_layers == -1 else attention_last_n_layers
        every = range(attention_every_n_layers - 1, num_layers, attention_every_n_layers)
        attending = {i for i in every if i >= num_layers - last}
        if attention_layers is not None:
            attending = set(attention_layers)
            if not attending <= set(range(num_layers)):
                raise ValueError(f"attention_layers must lie in 0 to {num_layers - 1}, not {list(attention_layers)}")
        size = hidden_size * (2 if bidirectional else 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {"num_heads": num_heads, "attn_dropout": attn_dropout}
        modules: list[nn.Module] = []
        for i in range(num_layers):
            features = input_size if i == 0 and not proj_input_to_hidden_first else size
            matrices = 4 if has_skip_term and features != size else 3
            source = None if source_size is None else SourceAttention(source_size, proj_size, **heads, **factory)
            shared = factory | {"matrices": matrices, "dropout": dropout, "layer_norm": bool(attn_layer_norm)}
            if i in attending:
                modules.append(Attention(features, size * matrices, proj_size, source=source, **shared, **heads))
            else:
                modules.append(Projection(features, size * matrices, proj_size, source=source, **shared))
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            dropout=dropout,
            transform_module=modules,
            bidirectional=bidirectional,
            proj_input_to_hidden_first=proj_input_to_hidden_first,
            has_skip_term=has_skip_term,
            highway_bias=highway_bias,
            rescale=rescale,
            weight_c_init=weight_c_init,
            layer_norm=layer_norm,
            **factory,
            **options,
        )
        self.proj_size = proj_size
        self.causal = causal
        self.memory_length = memory_length
        self.source_size = source_size

    @property
    def reach(self) -> int | None:
        """How many earlier steps `step` sees; None for all."""
        return self.memory_length

    def forward(  # type: ignore[override]
        self,
        x: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: Sequence[Tensor] | None = None,
        memory_mask_pad: Tensor | None = None,
        lengths: Lengths | None = None,
        source: Source | None = None,
        **unknown: Any,
    ) -> tuple[Tensor | PackedSequence, Tensor, dict[str, list[Tensor]]]:
        """Run the stack: h, in the form of x, the last states, and {"saved_inputs": the inputs of all layers}.

        attn_mask (T, S) or (B, T, S) with S = M + T: numbers to add to the scores, or bool, True where a step must not
        look. memory: for each layer (M, B, features), time first in every layout, like saved_inputs. memory_mask_pad
        (M, B): True where memory is padding. source: returned by `read`, for N = B sequences or fewer: sequence i uses
        source i // (B / N).
        """
        for name in unknown:
            refuse(name, self.forward)
        if isinstance(x, PackedSequence) and (attn_mask is not None or memory is not None):
            raise ValueError("a PackedSequence cannot have attn_mask or memory, because it reorders the sequences")
        if memory is not None and (
            not isinstance(memory, Sequence)
            or len(memory) != self.num_layers
            or not all(isinstance(a, Tensor) and a.is_floating_point() for a in memory)
        ):
            raise TypeError(f"memory must be a list of {self.num_layers} floating-point tensors, like saved_inputs")
        if memory_mask_pad is not None and memory is None:
            raise ValueError("memory_mask_pad needs memory: pass both")
        sources = self.check_source(source, self.num_layers)
        saved: list[Tensor] = []
        masks: list[Tensor | None] = []  # one for all layers, made at the first

        def context(i: int, features: Tensor, pad: Tensor | None) -> tuple[Any, ...]:
            saved.append(features)
            past = None
            if memory is not None:
                past, expected = memory[i], (*memory[0].shape[:1], *features.shape[1:])
                if past.shape != expected:
                    raise ValueError(f"memory of layer {i} must be {expected}, not {tuple(past.shape)}")
                norm = self[i].layer_norm
                if norm is not None and not self[i].normalize_after:
                    past = norm(past.to(norm.weight.dtype))
            if not masks:
                length = 0 if past is None else past.shape[0]
                options = {"attn_mask": attn_mask, "pad": pad, "memory_pad": memory_mask_pad}
                masks.append(mask_scores(features, length, causal=self.causal, **options))
            return past, masks[0], self.causal, None, sources[i]

        h, c = self.run_any_layout(x, c0, mask_pad, lengths, context)
        return h, c, {"saved_inputs": saved}

    def readers(self) -> Iterable[SourceAttention]:
        for i in range(self.num_layers):
            yield cast(SourceAttention, cast(Projection, self[i].transform_module).source)

    def step(self, x: Tensor, state: Any = None, source: Source | None = None) -> tuple[Tensor, Any]:
        """One step: h (B, output_size) and the state, of x (B, input_size) and a source returned by `read`.

        The state is (c, keys and values of each layer that attends). A step sees itself and the last `memory_length`
        steps, so its cost does not grow. T steps give the same result as one causal call with T steps, if
        memory_length covers them.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional SRUpp needs the whole sequence: it has no step")
        if x.dim() != 2:
            raise ValueError(f"x must be (B, {self.input_size}), not {tuple(x.shape)}")
        state = (None, [()] * self.num_layers) if state is None else state
        if not isinstance(state, tuple) or len(state) != 2 or len(state[1]) != self.num_layers:
            raise TypeError("the state must be the one that step returned: (c, keys and values of each layer)")
        c0, caches = state[0], [list(pair) for pair in state[1]]
        sources = self.check_source(source, self.num_layers)
        h, c = self.run(x[None], c0, None, lambda i, *_: (None, None, False, caches[i], sources[i]))
        return h[0], (c, [tuple(last_steps(a[:0], a, self.reach) for a in cache) for cache in caches])

    def reset_parameters(self) -> None:
        """Draw the initialisation again, also that of the attention."""
        super().reset_parameters()
        for i in range(self.num_layers):
            cast(Projection, self[i].transform_module).reset_parameters()


class SRUppEncoder(SRUpp):
    """SRU++ with the call of the other encoders: `h, state = encoder(x, state, mask_pad)`.

    A step sees itself, earlier steps of the segment, and the memory: the inputs of each layer at the last
    `memory_length` steps before the segment, padding excluded. When bidirectional it sees the whole segment. The state
    is (c, memory, padding); passing it to the next call continues the sequence.

    Args:
        proj_size: as in SRUpp; None for a quarter of hidden_size, the published ratio.
        causal: as in SRUpp; None for the opposite of bidirectional.
        memory_length: steps of memory; None for all.
        eval_memory_length: the same in evaluation, where the published models use more; None for memory_length.
        source_size, options: as in SRUpp.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int | None = None,
        num_layers: int = 2,
        *,
        causal: bool | None = None,
        bidirectional: bool = False,
        memory_length: int | None = None,
        eval_memory_length: int | None = None,
        source_size: int | None = None,
        **options: Any,
    ) -> None:
        proj_size = max(1, hidden_size // 4) if proj_size is None else proj_size
        super().__init__(
            input_size,
            hidden_size,
            proj_size,
            num_layers,
            causal=not bidirectional if causal is None else causal,
            bidirectional=bidirectional,
            memory_length=memory_length,
            source_size=source_size,
            **options,
        )
        check_optional_sizes(0, eval_memory_length=eval_memory_length)
        self.eval_memory_length = memory_length if eval_memory_length is None else eval_memory_length

    @property
    def reach(self) -> int | None:
        return self.memory_length if self.training else self.eval_memory_length

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        state: EncoderState | None = None,
        mask_pad: Tensor | None = None,
        source: Source | None = None,
    ) -> tuple[Tensor, EncoderState]:
        """h (T, B, output_size) of x (T, B, input_size) and a source returned by `read`, and the state."""
        if not isinstance(x, Tensor) or x.dim() != 3 or self.batch_first:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be (T, B, {self.input_size}), time first, not {found}; SRUpp takes other layouts")
        if state is not None and not (isinstance(state, tuple) and len(state) == 3):
            raise TypeError("the state must be the one that SRUppEncoder returned: (c, memory, padding)")
        c0, memory, past_pad = (None, None, None) if state is None else state
        if mask_pad is not None:
            x, mask_pad = clear_padding(x, mask_pad)
        h, c, extra = super().forward(x, c0, mask_pad, memory=memory, memory_mask_pad=past_pad, source=source)
        assert isinstance(h, Tensor)
        inputs = extra["saved_inputs"]
        memory = [now[:0] for now in inputs] if memory is None else memory
        pad = join_padding(past_pad, mask_pad, len(memory[0]), x)
        if mask_pad is not None and pad is not None:
            inputs = [torch.cat([past.to(now.dtype), now]) for past, now in zip(memory, inputs, strict=True)]
            inputs, pad = move_padding_first(inputs, pad)
            memory = [now[:0] for now in inputs]
        inputs = [last_steps(past, now, self.reach) for past, now in zip(memory, inputs, strict=True)]
        return h, (c, inputs, None if pad is None else last_steps(pad[:0], pad, self.reach))


def last_steps(past: Tensor, now: Tensor, length: int | None) -> Tensor:
    """The last `length` steps of past and now together, None for all; a view if none of the past is among them."""
    first = 0 if length is None else max(0, len(past) + len(now) - length)
    return now[first - len(past) :] if first >= len(past) else torch.cat([past[first:].to(now.dtype), now])
