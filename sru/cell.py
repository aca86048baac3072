"""One SRU layer over a whole sequence (Lei et al., EMNLP 2018; sections 2 and 3 of the paper)."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from sru.checks import (
    check_biases,
    check_choice,
    check_flags,
    check_input,
    check_mask,
    check_probabilities,
    check_rescale,
    check_sizes,
    check_state,
    refuse,
    state_dtype,
)
from sru.kernels import ACTIVATIONS, BACKENDS, recurrence
from sru.kernels.dispatch import HALVES
from sru.kernels.linear import FORWARD, linear
from sru.official_format import Shape, complete_entries, read_official_cell, translate_options


def sequence_mask(p: float, like: Tensor) -> Tensor | None:
    """A dropout mask (B, D) for all steps of a sequence, scaled by 1 / (1 - p); None when p is 0."""
    check_probabilities(dropout=p)
    return None if p == 0 else torch.rand_like(like).lt_(1 - p).div_(1 - p)


class SRUCell(nn.Module):
    """One SRU layer over a whole sequence.

    With x (T, B, input_size) and D = hidden_size, or twice that when bidirectional:

        f_t = sigmoid(W_f x_t + v_f * c_{t-1} + b_f)
        r_t = sigmoid(W_r x_t + v_r * c_{t-1} + b_r)
        c_t = f_t * c_{t-1} + (1 - f_t) * (W x_t)
        h_t = r_t * g(c_t) + (1 - r_t) * x_t * alpha

    If input_size differs from D, alpha is 1 and a fourth matrix projects x_t in the last line, as in the released code.

    Args:
        input_size: features of x.
        hidden_size: features of one direction.
        dropout: probability of dropping r_t * (g(c_t) - x_t * alpha), which the layer adds to the highway; one mask
            (B, D) for all steps of a sequence.
        rnn_dropout: probability of dropping an input of the matrices, but not of the highway; one mask for all steps.
        bidirectional: a second set of columns runs from the last step to the first.
        projection_size: output size of an extra matrix before the others, which saves parameters; 0 for none.
        activation: g, one of identity, tanh, relu.
        layer_norm: normalise the input of the matrices, or with `normalize_after` the output of the layer.
        highway_bias: initial bias b_r of the reset gate; negative values pass more of x (-3 for deep language models).
        forget_bias: initial bias b_f of the forget gate. The published 0 halves c at every step; 2 remembers for about
            eight steps, which trains better when embeddings start at random (docs/tasks/classification.md).
        has_skip_term: False removes the highway: h_t = r_t * g(c_t).
        project_skip: project the highway by a fourth matrix even if the sizes are equal (speech networks of 2017).
        rescale: the scaling correction alpha = sqrt(1 + 2 exp(highway_bias)), which keeps the variance if there is no
            dropout; False sets alpha to 1 (section 3.2); "dropout" keeps it with dropout, see `initial_alpha`.
        has_vc_term: False removes v * c_{t-1} from both gates, as in the cell of 2017.
        weight_c_init: v starts uniformly within plus or minus this; None for the published square root of 3/2.
        zoneout: probability that a state keeps its value at a step; in evaluation, the mean over these draws.
        transform_module: replaces the matrices: maps (T, B, input_size) to (T, B, D * k), with the k values of a column
            (4 with a projected highway, else 3) adjacent: candidate, forget, reset, highway. Or to (T, B, k, D), the
            layout of the recurrence.
        backend: auto, cpu, cuda or reference; see sru.kernels.recurrence.
        device, dtype: of the parameters.
        official: use_tanh, v1, n_proj and custom_m, the official names of activation="tanh", has_vc_term=False,
            projection_size and transform_module; amp_recurrence_fp16 is accepted without effect.
    """

    weight: nn.Parameter | None
    weight_proj: nn.Parameter | None
    scale_x: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dropout: float = 0.0,
        rnn_dropout: float = 0.0,
        bidirectional: bool = False,
        projection_size: int = 0,
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
        transform_module: nn.Module | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **official: Any,
    ) -> None:
        super().__init__()
        check_flags(bidirectional=bidirectional, layer_norm=layer_norm, normalize_after=normalize_after)
        check_flags(project_skip=project_skip, has_skip_term=has_skip_term, has_vc_term=has_vc_term)
        check_rescale(rescale)
        check_sizes(1, input_size=input_size, hidden_size=hidden_size)
        check_sizes(0, projection_size=projection_size)
        activation, has_vc_term, projection_size, transform_module = translate_options(
            type(self), official, activation, has_vc_term, projection_size, transform_module
        )
        check_probabilities(dropout=dropout, rnn_dropout=rnn_dropout, zoneout=zoneout)
        check_biases(highway_bias=highway_bias, forget_bias=forget_bias)
        if weight_c_init is not None and not 0 <= weight_c_init < math.inf:
            raise ValueError(f"weight_c_init must be None or at least 0, not {weight_c_init}")
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        if transform_module is not None and not isinstance(transform_module, nn.Module):
            raise TypeError(f"transform_module must be a torch.nn.Module, not {transform_module!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, not {dtype}")
        if project_skip and not has_skip_term:
            raise ValueError("project_skip=True has no highway to project: leave out has_skip_term=False")
        if transform_module is not None and projection_size:
            raise ValueError("projection_size and transform_module exclude each other; project within the module")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * (2 if bidirectional else 1)
        self.dropout = dropout
        self.rnn_dropout = rnn_dropout
        self.bidirectional = bidirectional
        self.projection_size = projection_size
        self.activation = activation
        self.normalize_after = normalize_after
        self.highway_bias = highway_bias
        self.forget_bias = forget_bias
        self.has_skip_term = has_skip_term
        self.project_skip = project_skip
        self.rescale = rescale
        self.has_vc_term = has_vc_term
        self.weight_c_init = weight_c_init
        self.zoneout = zoneout
        self.backend = backend
        self.has_projected_skip = has_skip_term and (project_skip or input_size != self.output_size)
        self.matrices = 4 if self.has_projected_skip else 3
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_size = self.output_size if normalize_after else input_size
        self.layer_norm = nn.LayerNorm(norm_size, **factory) if layer_norm else None
        self.transform_module = transform_module
        self.register_parameter("weight", None)
        self.register_parameter("weight_proj", None)
        if transform_module is None:
            # Rows: candidate, forget, reset [, skip], so that one product gives u (T, B, K, D).
            columns = projection_size or input_size
            self.weight = nn.Parameter(torch.empty(self.matrices * self.output_size, columns, **factory))
            if projection_size:
                self.weight_proj = nn.Parameter(torch.empty(projection_size, input_size, **factory))
        # Forget gate, then reset gate. One-dimensional: some code recognises biases by their dimension.
        self.bias = nn.Parameter(torch.empty(2 * self.output_size, **factory))
        v = torch.empty(2 * self.output_size, **factory)
        if self.has_vc_term:
            self.v = nn.Parameter(v)
        else:
            self.register_buffer("v", v)
        # alpha is in the state dict, as in the official package, because a file may come from a layer with another
        # alpha. The kernels read this buffer, so it does not matter who wrote it.
        self.register_buffer("scale_x", torch.empty(1, device=device, dtype=state_dtype(self.bias)))
        self.reset_parameters()

    @property
    def alpha(self) -> float:
        """The scaling correction, which is not learnt: the value of scale_x, or its initial value on meta."""
        return self.initial_alpha() if self.scale_x.is_meta else self.scale_x.item()

    def initial_alpha(self) -> float:
        """The initial scale_x, rounded to float32 as in the official package, in any dtype of the layer.

        With r = sigmoid(highway_bias), q = 1 - p the probability that dropout keeps a value, m its mask (0 or 1 / q)
        and X = alpha x, h = X + m r (c - X). For x and c of mean 0 that do not depend on each other

            Var[h] = alpha^2 (1 - 2 r + r^2 / q) Var[x] + r^2 / q Var[c],

        and the initial weights make Var[c] = q Var[x]. Var[h] = Var[x] gives the alpha below; the published one is that
        of p = 0, where (1 - r^2) / (1 - r)^2 = 1 + 2 exp(highway_bias).
        """
        if not self.rescale:
            return 1.0
        if self.rescale == "dropout" and self.dropout:
            r, rest = (1 / (1 + math.exp(-sign * self.highway_bias)) for sign in (1, -1))  # 1 - r would round to 0
            ratio = self.dropout / (1 - self.dropout)  # 1 / q - 1
            return float(np.float32(math.sqrt(rest * (1 + r) / (rest * rest + r * r * ratio))))
        return float(np.float32(math.sqrt(1 + 2 * math.exp(self.highway_bias))))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, base = self.scale_x, cast(Any, super())
        base._apply(fn, recurse)
        if before.is_meta and not self.scale_x.is_meta:  # after to_empty; a file may lack it
            self.scale_x.fill_(self.initial_alpha())
        if self.scale_x.dtype in HALVES:  # alpha stays in the dtype of the state, so that .half() is reversible
            self.scale_x = before.to(self.scale_x.device, state_dtype(self.scale_x))
        return self

    def make_buffers_writable(self) -> None:
        """Copy buffers made under torch.inference_mode: torch does not allow writing to them outside it."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled():
                self._buffers[name] = buffer.clone()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the published initialisation: weights of variance 1 / input_size (section 3.2)."""
        self.make_buffers_writable()
        if self.weight is not None:
            bound = math.sqrt(3 / self.weight.shape[1])
            self.weight.uniform_(-bound, bound)
            candidate, gates, skip = self.weight.tensor_split([self.output_size, 3 * self.output_size])
            # Dropout scales the values that it keeps by 1 / (1 - p).
            candidate.mul_(math.sqrt(1 - self.dropout))
            if self.has_projected_skip:
                skip.mul_(self.initial_alpha())
            if self.has_vc_term:
                # W x and v * c contribute half of a gate's variance each.
                gates.mul_(math.sqrt(0.5))
        if self.weight_proj is not None:
            bound = math.sqrt(3 / self.input_size)
            self.weight_proj.uniform_(-bound, bound)
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()
        self.scale_x.fill_(self.initial_alpha())
        forget, reset = self.bias.chunk(2)
        forget.fill_(self.forget_bias)
        reset.fill_(self.highway_bias)
        bound = math.sqrt(1.5) if self.weight_c_init is None else self.weight_c_init
        if self.has_vc_term:
            self.v.uniform_(-bound, bound)
        else:
            self.v.zero_()

    def forward(
        self,
        x: Tensor,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        *,
        context: tuple[Any, ...] = (),
        **unknown: Any,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer: h (T, B, D) and the last state (B, D).

        x (T, B, input_size), or (B, input_size) for a single step; c0 (B, D), zeros when None; mask_pad (T, B), True
        (or not 0) where a step is padding: there the state does not change and h is 0; context: further arguments of
        the transform_module.
        """
        for name in unknown:
            refuse(name, self.forward)
        check_input(x, self.bias)
        if x.dim() == 2:
            h, c = self.forward(x[None], c0, None if mask_pad is None else mask_pad[None], context=context)
            return h[0], c
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(
                f"x must be (T, B, {self.input_size}), or (B, {self.input_size}) for one step, not {tuple(x.shape)}"
            )
        if mask_pad is not None:
            check_mask(mask_pad, x.shape[:2], "(T, B)", x)
            mask_pad = mask_pad if mask_pad.dtype == torch.bool else mask_pad != 0
        shape = x.shape[1], self.output_size
        if c0 is None:
            c0 = x.new_zeros(shape, dtype=state_dtype(x))
        check_state(c0, shape, "(B, output_size)", x)
        u = self.project(x, *context)
        # A projected skip has alpha in its initial weights.
        scale = 0.0 if not self.has_skip_term else 1.0 if self.has_projected_skip else self.scale_x
        if self.training and self.zoneout:
            # A forget gate of 1 and a candidate of 0 keep the state exactly.
            kept = torch.rand(u[:, :, :1].shape, device=u.device) < self.zoneout
            candidate, forget = u[:, :, :1].masked_fill(kept, 0.0), u[:, :, 1:2].masked_fill(kept, 1e4)
            u = torch.cat([candidate, forget, u[:, :, 2:]], dim=2)
        h, c = recurrence(
            u,
            x if self.has_skip_term and not self.has_projected_skip else None,
            self.v,
            self.bias,
            c0,
            mask=sequence_mask(self.dropout, c0) if self.training else None,
            pad=mask_pad,
            scale=scale,
            zoneout=0.0 if self.training else self.zoneout,
            activation=self.activation,
            bidirectional=self.bidirectional,
            backend=self.backend,
        )
        if self.layer_norm is not None and self.normalize_after:
            h = self.layer_norm(h)
            if mask_pad is not None:
                h = h.masked_fill(mask_pad[:, :, None], 0.0)
        return h, c

    def project(self, x: Tensor, *context: Any) -> Tensor:
        """u (T, B, K, D) of x: layer norm, input dropout and the matrices."""
        if self.layer_norm is not None and not self.normalize_after:
            x = self.layer_norm(x)
        mask = sequence_mask(self.rnn_dropout, x.new_empty(x.shape[1:])) if self.training else None
        x = x if mask is None else x * mask
        if self.weight is not None:
            if self.weight_proj is not None:
                x = linear(x, self.weight_proj)
            u: Tensor = linear(x, self.weight).unflatten(2, (self.matrices, self.output_size))
            return u
        assert self.transform_module is not None
        u = self.transform_module(x, *context)
        shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        if shape == (*x.shape[:2], self.matrices, self.output_size):
            return u
        expected = (*x.shape[:2], self.output_size * self.matrices)
        if shape != expected:
            raise ValueError(f"transform_module must return a tensor {expected} for x {tuple(x.shape)}, not {shape}")
        u = u.unflatten(2, (self.output_size, self.matrices)).transpose(2, 3)
        return u

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight_shape = None if self.weight is None else self.weight.shape
        shape = Shape(self.output_size, self.matrices, self.projection_size, weight_shape, self.has_vc_term)
        read_official_cell(shape, state_dict, prefix)
        complete_entries(shape, self.scale_x, self.initial_alpha(), state_dict, prefix)
        self.make_buffers_writable()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale_x.dtype in HALVES:  # after load_state_dict(assign=True)
            self.scale_x = self.scale_x.to(state_dtype(self.scale_x))

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, parameter in inspect.signature(SRUCell).parameters.items():
            value = getattr(self, name, parameter.default)
            # Modules print themselves.
            if parameter.kind is parameter.KEYWORD_ONLY and not isinstance(value, nn.Module | None):
                parts += [f"{name}={value!r}"] if value != parameter.default else []
        return ", ".join(parts)


# The original methods: a layer in which a library has replaced one of them must be called.
FORWARD[SRUCell], PROJECT = SRUCell.forward, SRUCell.project
