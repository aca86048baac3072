"""The stack of SRU layers, in the shapes of torch.nn.LSTM."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from sru import plain_stack
from sru.cell import SRUCell
from sru.checks import check_flags, check_input, check_mask, check_sizes, check_state, refuse, state_dtype
from sru.kernels.linear import affine
from sru.official_format import read_official_names, translate_options
from sru.padding import Lengths, mask_lengths

# The papers' settings: SRU(n, d, num_layers, **presets["deep"]).
presets: dict[str, dict[str, Any]] = {
    # SRU (2018), section 4.1.
    "classification": {"dropout": 0.5},
    # SRU (2018), section 4.4: the highway starts open; a projection makes wide layers affordable.
    "language_modelling": {"dropout": 0.2, "highway_bias": -3.0, "projection_size": 512},
    # Ten layers or more: layer norm, and a highway that starts open.
    "deep": {"dropout": 0.1, "highway_bias": -2.0, "layer_norm": True},
    # SRU (2017), section 4.5, with the bias and dropout of pytorch-kaldi's recipes.
    "speech": {"dropout": 0.1, "rnn_dropout": 0.1, "highway_bias": -1.0, "projection_size": 256},
}

# context(i, x, mask_pad): the arguments of layer i's transform_module after the layer's input x.
Context = Callable[[int, Tensor, Tensor | None], tuple[Any, ...]]


class SRU(nn.Module):
    """A stack of SRU layers.

    `h, c = sru(x, c0)` with x (T, B, input_size), h (T, B, output_size) and c, c0 (num_layers, B, output_size), where
    output_size is hidden_size, or twice that when bidirectional (forward half first). Passing c as the next c0
    continues the sequence. x may also be (T, input_size), without a batch, or a PackedSequence.

    Args:
        input_size: features of x.
        hidden_size: features of one direction of a layer.
        num_layers: layers of the stack.
        dropout: as in SRUCell, on every layer but the last.
        batch_first: x and h are (B, T, ...) and mask_pad is (B, T); the state is not affected.
        nn_rnn_compatible_return: c0 and c are (num_layers * directions, B, hidden_size), as in torch.nn.LSTM.
        proj_input_to_hidden_first: a matrix first projects x to output_size features.
        projection_size: as in SRUCell: one for all layers, or a sequence with one for each layer.
        transform_module: as in SRUCell: a sequence with one for each layer (None for a layer with matrices), or a
            module that every layer gets a copy of.
        rnn_dropout, bidirectional, activation, ..., dtype, official: as in SRUCell, but without n_proj.
    """

    # Accepted besides the arguments below; see sru/official_format.py.
    official_options = ("use_tanh", "v1", "custom_m", "amp_recurrence_fp16")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
        nn_rnn_compatible_return: bool = False,
        proj_input_to_hidden_first: bool = False,
        projection_size: int | Sequence[int] = 0,
        transform_module: nn.Module | Sequence[nn.Module | None] | None = None,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        activation: str = "identity",
        layer_norm: bool = False,
        normalize_after: bool = False,
        highway_bias: float = 0.0,
        forget_bias: float = 0.0,
        has_skip_term: bool = True,
        project_skip: bool = False,
        rescale: bool | str = True,
        has_vc_term: bool = True,
        weight_c_init: float | None = None,
        zoneout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **official: Any,
    ) -> None:
        super().__init__()
        check_sizes(1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_flags(batch_first=batch_first, nn_rnn_compatible_return=nn_rnn_compatible_return)
        check_flags(proj_input_to_hidden_first=proj_input_to_hidden_first)
        if "n_proj" in official:
            raise TypeError("SRU has no n_proj: it is called projection_size (n_proj in SRUCell)")
        activation, has_vc_term, projection_size, modules = translate_options(
            type(self), official, activation, has_vc_term, projection_size, transform_module
        )
        self.bidirectional = bool(bidirectional)
        self.dropout = dropout
        self.num_directions = 2 if self.bidirectional else 1
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.output_size = hidden_size * self.num_directions
        self.batch_first = batch_first
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        self.input_to_hidden = (
            nn.Linear(input_size, self.output_size, bias=False, device=device, dtype=dtype)
            if proj_input_to_hidden_first
            else None
        )
        if not isinstance(modules, Sequence | nn.ModuleList):
            modules = [modules] + [copy.deepcopy(modules) for _ in range(num_layers - 1)]
        sizes = projection_size if isinstance(projection_size, Sequence) else [projection_size] * num_layers
        for name, values in {"transform_module": modules, "projection_size": sizes}.items():
            if len(values) != num_layers:
                raise ValueError(f"{name} must have one entry for each of {num_layers} layers, not {len(values)}")
        self.layers = nn.ModuleList(
            SRUCell(
                input_size if i == 0 and not proj_input_to_hidden_first else self.output_size,
                hidden_size,
                dropout=dropout if i < num_layers - 1 else 0.0,
                projection_size=sizes[i],
                transform_module=modules[i],
                rnn_dropout=rnn_dropout,
                bidirectional=bidirectional,
                activation=activation,
                layer_norm=layer_norm,
                normalize_after=normalize_after,
                highway_bias=highway_bias,
                forget_bias=forget_bias,
                has_skip_term=has_skip_term,
                project_skip=project_skip,
                rescale=rescale,
                has_vc_term=has_vc_term,
                weight_c_init=weight_c_init,
                zoneout=zoneout,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for i in range(num_layers)
        )

    def forward(
        self,
        x: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        lengths: Lengths | None = None,
        **unknown: Any,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the stack: h, in the form of x, and the last states.

        mask_pad (T, B) is True where a step is padding: there h is 0 and the state does not change. Padding may be on
        either side. lengths (B,), or a number without a batch, says the same for sequences that start at step 0.
        Compiled code does not check lengths.
        """
        for name in unknown:
            refuse(name, self.forward)
        return self.run_any_layout(x, c0, mask_pad, lengths)

    def run_any_layout(
        self,
        x: Tensor | PackedSequence,
        c0: Tensor | None,
        mask_pad: Tensor | None,
        lengths: Lengths | None,
        context: Context | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Convert the arguments of `forward` to those of `run`, and the results back."""
        if isinstance(x, PackedSequence):
            if mask_pad is not None or lengths is not None:
                raise ValueError("a PackedSequence has its own lengths: leave out mask_pad and lengths")
            return self.run_packed(x, c0, context)
        check_input(x, self[0].bias)
        single = x.dim() == 2
        if x.dim() not in (2, 3):
            raise ValueError(f"x must be {self.layout()}, or (T, {self.input_size}) for one, not {tuple(x.shape)}")
        if mask_pad is not None:
            order = "(T,)" if single else "(B, T)" if self.batch_first else "(T, B)"
            check_mask(mask_pad, x.shape[:-1], order, x)
        if single:
            x, mask_pad = x[:, None], None if mask_pad is None else mask_pad[:, None]
            lengths = None if lengths is None else torch.as_tensor(lengths, device=x.device).reshape(-1)
            c0 = c0[:, None] if isinstance(c0, Tensor) and c0.dim() == 2 else c0
        elif self.batch_first:
            x, mask_pad = x.transpose(0, 1), None if mask_pad is None else mask_pad.transpose(0, 1)
        if lengths is not None:
            if mask_pad is not None:
                raise ValueError("pass either lengths or mask_pad, not both")
            mask_pad = mask_lengths(lengths, x)
        h, c = self.run(x, c0, mask_pad, context)
        if single:
            return h[:, 0], c[:, 0]
        return h.transpose(0, 1) if self.batch_first else h, c

    def run(
        self,
        x: Tensor,
        c0: Tensor | None,
        mask_pad: Tensor | None,
        context: Context | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the stack over x (T, B, input_size), with the state in the layout of the caller."""
        if x.shape[2] != self.input_size:
            raise ValueError(f"x must have input_size = {self.input_size} features, not {x.shape[2]}: {self.layout()}")
        if c0 is not None:
            self.check_state(c0, x)
            c0 = c0.unflatten(0, (self.num_layers, -1)).transpose(1, 2).flatten(2) if self.is_split() else c0
        if self.input_to_hidden is not None:
            x = affine(x, self.input_to_hidden)
        layers = None
        if context is None:
            layers = plain_stack.find_layers(self.layers, self.num_layers, x, c0, self.output_size, self.bidirectional)
        if layers is not None:
            x, c = plain_stack.run(layers, x, c0, mask_pad, self.output_size)
        else:
            states = []
            for i, layer in enumerate(self.layers):
                more = () if context is None else context(i, x, mask_pad)
                x, c = layer(x, None if c0 is None else c0[i].to(state_dtype(x)), mask_pad, context=more)
                states.append(c)
            c = torch.stack(states)
        if self.is_split():
            c = c.unflatten(2, (self.num_directions, self.hidden_size)).transpose(1, 2).flatten(0, 1)
        return x, c

    def check_state(self, c0: Tensor, x: Tensor) -> None:
        """Check a state in the layout of the caller against x (T, B, input_size)."""
        meaning = "(num_layers, B, output_size)"
        shape = (self.num_layers, x.shape[1], self.output_size)
        if self.nn_rnn_compatible_return:
            meaning = "(num_layers * directions, B, hidden_size)"
            shape = (self.num_layers * self.num_directions, x.shape[1], self.hidden_size)
        check_state(c0, shape, meaning, x)

    def run_packed(
        self,
        x: PackedSequence,
        c0: Tensor | None,
        context: Context | None = None,
    ) -> tuple[PackedSequence, Tensor]:
        """Run the stack over a PackedSequence; the state has the order of the sequences before packing."""
        check_input(x.data, self[0].bias)
        padded, lengths = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        if c0 is not None and x.sorted_indices is not None:
            self.check_state(c0, padded)
            c0 = c0.index_select(1, x.sorted_indices)
        h, c = self.run(padded, c0, mask_lengths(lengths, padded), context)
        packed = pack_padded_sequence(h, lengths)
        if x.unsorted_indices is not None:
            c = c.index_select(1, x.unsorted_indices)
        return PackedSequence(packed.data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), c

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step: h (B, output_size) and the state, of x (B, input_size) or, without a batch, (input_size,).

        T steps give the same result as one call with T steps.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional SRU needs the whole sequence: it has no step")
        if x.dim() not in (1, 2):
            raise ValueError(f"x must be (B, {self.input_size}) or ({self.input_size},), not {tuple(x.shape)}")
        sequence = x[:, None] if self.batch_first and x.dim() == 2 else x[None]
        h, c = self(sequence, state)
        return h.squeeze(1 if self.batch_first and x.dim() == 2 else 0), c

    def layout(self) -> str:
        return f"({'B, T' if self.batch_first else 'T, B'}, {self.input_size})"

    def is_split(self) -> bool:
        """Whether the caller's state has an entry for each direction."""
        return self.nn_rnn_compatible_return and self.bidirectional

    def reset_parameters(self) -> None:
        """Draw the initialisation again."""
        if self.input_to_hidden is not None:
            self.input_to_hidden.reset_parameters()
        for i in range(self.num_layers):
            self[i].reset_parameters()

    def flatten_parameters(self) -> None:
        """Do nothing; some code calls this method of torch.nn.LSTM on any recurrent network."""

    def __getitem__(self, i: int) -> SRUCell:
        """Layer i of the stack."""
        return cast(SRUCell, self.layers[i])

    @property
    def rnn_lst(self) -> nn.ModuleList:
        """The layers, under their official name."""
        return self.layers

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        read_official_names(state_dict, prefix)
        start = f"{prefix}layers."
        count = len({key.removeprefix(start).partition(".")[0] for key in state_dict if key.startswith(start)})
        if count not in (0, self.num_layers):  # reported as a key, since torch always passes strict=True
            keys = unexpected_keys if count > self.num_layers else missing_keys
            keys.append(f"{prefix}num_layers (in the file: {count}, here: {self.num_layers})")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        names = ("batch_first", "nn_rnn_compatible_return")
        return ", ".join(f"{name}=True" for name in names if getattr(self, name))
