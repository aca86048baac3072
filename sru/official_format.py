"""Options and state dicts of the official package (versions of 2017, 2.x and 3.0.0.dev), translated into ours.

Its matrix (input_size, D * k), transposed since 3.0, interleaves the k values of a column; ours (k * D, input_size) is
k blocks of rows. Its weight_c is our v. Everything else differs in name only. The cell of 2017 has no weight_c and no
scale_x: its alpha is 1.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sru.checks import check_flags, check_sizes, refuse, state_dtype
from sru.kernels.dispatch import HALVES, has_numbers

# Official names of options, with their defaults. amp_recurrence_fp16 has no effect: our state is float32 at least.
OPTIONS: dict[str, Any] = {
    "use_tanh": False,
    "v1": False,
    "n_proj": 0,
    "custom_m": None,
    "amp_recurrence_fp16": False,
}


def translate_options(
    owner: type,
    official: dict[str, Any],
    activation: str,
    has_vc_term: bool,
    projection_size: Any,
    transform_module: Any,
) -> tuple[str, bool, Any, Any]:
    """Our activation, has_vc_term, projection_size and transform_module after applying official options.

    ValueError: two options contradict each other. TypeError: `owner` has no option of that name.
    """
    for name in official:
        if name not in OPTIONS:
            refuse(name, owner)
    use_tanh, v1, n_proj, custom_m, _ = (OPTIONS | official).values()
    check_flags(use_tanh=use_tanh, v1=v1)
    check_sizes(0, n_proj=n_proj)
    if use_tanh and activation not in ("identity", "tanh"):
        raise ValueError(f"use_tanh=True and activation={activation!r} contradict each other")
    if custom_m is not None and transform_module is not None:
        raise ValueError("custom_m is another name of transform_module: pass one of them")
    return (
        "tanh" if use_tanh else activation,
        has_vc_term and not v1,
        n_proj if projection_size == 0 else projection_size,
        custom_m if transform_module is None else transform_module,
    )


class Shape(NamedTuple):
    """The options of a layer that its entries must match, named as in `sru.SRUCell`.

    weight_shape is None for a layer with a transform_module of its own.
    """

    output_size: int
    matrices: int
    projection_size: int
    weight_shape: torch.Size | None
    has_vc_term: bool


def from_official_matrix(matrix: Tensor, k: int) -> Tensor:
    """Our weight (k * D, n) from the official (D * k, n)."""
    blocks: Tensor = matrix.unflatten(0, (-1, k)).transpose(0, 1)
    return blocks.flatten(0, 1)


def to_official_matrix(weight: Tensor, k: int) -> Tensor:
    """The official (D * k, n) from our weight (k * D, n)."""
    columns: Tensor = weight.unflatten(0, (k, -1)).transpose(0, 1)
    return columns.flatten(0, 1)


def read_official_names(state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Rename the layers of a stack in place."""
    refuse_too_old(state, prefix)
    old = f"{prefix}rnn_lst."
    names = [key for key in state if key.startswith(old)]
    if names and any(key.startswith(f"{prefix}layers.") for key in state):
        raise ValueError(f"the state dict names layers in two ways, {old}* and {prefix}layers.*: remove one set")
    for key in names:
        state[f"{prefix}layers.{key.removeprefix(old)}"] = state.pop(key)


def refuse_too_old(state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError for a version that stored layer norms outside the layers."""
    if any(key.startswith(f"{prefix}ln_lst.") for key in state):
        raise ValueError("this state dict is from version 2.1.7 or earlier with layer norm: it cannot be converted")


def read_official_cell(cell: Shape, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Translate one layer's official entries into ours, in place; entries in our format stay unchanged.

    ValueError: the entries belong to a layer with other options; the message names them.
    """
    where = prefix[:-1] or "the layer"
    own = [key for key in state if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
    for key in own:
        if not isinstance(state[key], Tensor):
            raise ValueError(f"{key} must be a tensor, not {type(state[key]).__name__}")
    if f"{prefix}gain" in state:
        raise ValueError(f"{where} has weight normalisation (version 2.1.7 or earlier): it cannot be converted")
    if {f"{prefix}v", f"{prefix}weight_c"} <= state.keys():
        raise ValueError(f"{where} has both v (our name) and weight_c (the official name): remove one of them")
    if is_of_2017(cell, state, prefix):
        bias = state[f"{prefix}bias"]
        state[f"{prefix}weight_c"], state[f"{prefix}scale_x"] = torch.zeros_like(bias), torch.ones_like(bias[:1])
    if f"{prefix}weight_c" not in state:
        return
    v, size = state.pop(f"{prefix}weight_c"), 2 * cell.output_size
    if v.numel() != size or (f"{prefix}bias" in state and state[f"{prefix}bias"].numel() != size):
        raise ValueError(
            f"{where} has {v.numel() // 2} columns in the file and {cell.output_size} here: check hidden_size and "
            "bidirectional"
        )
    state[f"{prefix}v"] = v
    if not cell.has_vc_term and v.count_nonzero():
        raise ValueError(f"{where} has a weight_c that is not 0: build ours with has_vc_term=True (v1=False)")
    if cell.weight_shape is None:
        for key in [key for key in state if key.startswith(f"{prefix}custom_m.")]:
            state[f"{prefix}transform_module.{key.removeprefix(f'{prefix}custom_m.')}"] = state.pop(key)
        return
    projection: Tensor | None = None
    if f"{prefix}weight" in state:
        matrix = state.pop(f"{prefix}weight").t()
        if f"{prefix}weight_proj" in state:
            projection = state.pop(f"{prefix}weight_proj").t()
    elif f"{prefix}transform_module.weight" in state:
        matrix = state.pop(f"{prefix}transform_module.weight")
    elif f"{prefix}transform_module.1.weight" in state:
        matrix = state.pop(f"{prefix}transform_module.1.weight")
        projection = state.pop(f"{prefix}transform_module.0.weight")
    else:
        raise ValueError(f"{where} has no weight: if it has a module in place of matrices, pass transform_module=")
    size = 0 if projection is None else projection.shape[0]
    if size != cell.projection_size:
        raise ValueError(
            f"{where} has projection_size={size} in the file and {cell.projection_size} here. Version 2.x ignores a "
            "projection unless it is smaller than input and output: pass SRU a sequence of sizes, 0 for no projection"
        )
    if matrix.shape[0] != cell.matrices * cell.output_size:
        raise ValueError(
            f"{where} maps to {matrix.shape[0]} columns in the file and {cell.matrices} * {cell.output_size} here: "
            "check hidden_size, bidirectional and has_skip_term"
        )
    state[f"{prefix}weight"] = from_official_matrix(matrix, cell.matrices)
    if projection is not None:
        state[f"{prefix}weight_proj"] = projection


def is_of_2017(cell: Shape, state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a layer's entries are from the official code of September 2017: `weight` and `bias`, no weight_c.

    ValueError: they may also be the parameters of one of our layers without v; the shapes are the same.
    """
    weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
    if weight is None or bias is None or weight.dim() != 2 or bias.dim() != 1 or cell.weight_shape is None:
        return False
    if {f"{prefix}weight_c", f"{prefix}v"} & state.keys():
        return False
    if f"{prefix}scale_x" in state:
        if weight.shape == cell.weight_shape[::-1] != cell.weight_shape:
            raise ValueError(f"{prefix[:-1] or 'the layer'} has weight and scale_x, as in 2.x, but weight_c is missing")
        return False
    if weight.shape == cell.weight_shape == cell.weight_shape[::-1]:
        raise ValueError(
            f"{prefix}weight {tuple(weight.shape)} without weight_c, v and scale_x may be from 2017 or from this "
            f"project: add {prefix}weight_c (2 * D zeros) for 2017, or {prefix}v (2 * D zeros) for this project"
        )
    return weight.shape != cell.weight_shape


def complete_entries(
    cell: Shape, own_alpha: Tensor, initial_alpha: float, state: MutableMapping[str, Tensor], prefix: str
) -> None:
    """Complete and check a layer's entries in our format, in place, given its own scale_x and the initial value of it.

    ValueError: the file's scale_x is not a positive number, or it has a v that the layer lacks.
    """
    for name in ("bias", "v"):  # a file of 0.1.0 has a row for each gate
        if (a := state.get(f"{prefix}{name}")) is not None and a.shape == (2, cell.output_size):
            state[f"{prefix}{name}"] = a.flatten()
    v = state.get(f"{prefix}v")
    if not cell.has_vc_term and v is not None and has_numbers(v) and v.any():
        raise ValueError(f"{prefix[:-1] or 'the layer'} has a v that is not 0: build it with has_vc_term=True")
    alpha = state.get(f"{prefix}scale_x")
    if alpha is None:  # the file holds parameters only
        alpha = own_alpha
        if alpha.is_meta and (bias := state.get(f"{prefix}bias")) is not None:
            alpha = torch.full((1,), initial_alpha, dtype=state_dtype(bias), device=bias.device)
    state[f"{prefix}scale_x"] = alpha = alpha.reshape(1) if alpha.dim() == 0 else alpha
    if alpha.shape == (1,) and has_numbers(alpha):
        if not 0 < alpha.item() < math.inf:
            raise ValueError(f"{prefix}scale_x must be a positive number, not {alpha.item()}")
        exact = torch.full_like(alpha, initial_alpha, dtype=state_dtype(alpha))
        if alpha.dtype in HALVES and torch.equal(exact.to(alpha.dtype), alpha):
            state[f"{prefix}scale_x"] = exact  # the file holds the same alpha, rounded to half precision
