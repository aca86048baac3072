"""How the official package lays out a state dict: versions of 2017, 2.x and 3.0.0.dev, turned into ours.

Its matrix (input_size, D * k), transposed from 3.0 on, holds the k numbers of a column together; ours (k * D,
input_size) is k blocks of rows. Its weight_c is our v. Everything else differs in name only. The cell of 2017 has no
weight_c and no scale_x: its alpha is 1.
"""

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What the entries of a layer must fit: its sizes and options, as `sru.SRUCell` names them.

    weight_shape is None for a layer with a transform_module of its own.
    """

    output_size: int
    matrices: int
    projection_size: int
    weight_shape: torch.Size | None
    has_vc_term: bool


def from_official_matrix(matrix: Tensor, k: int) -> Tensor:
    """Our weight (k * D, n) of the official (D * k, n)."""
    return matrix.unflatten(0, (-1, k)).transpose(0, 1).flatten(0, 1)


def to_official_matrix(weight: Tensor, k: int) -> Tensor:
    """The official (D * k, n) of our weight (k * D, n)."""
    return weight.unflatten(0, (k, -1)).transpose(0, 1).flatten(0, 1)


def read_official_names(state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Rename the layers of a stack in place."""
    refuse_too_old(state, prefix)
    old = f"{prefix}rnn_lst."
    names = [key for key in state if key.startswith(old)]
    if names and any(key.startswith(f"{prefix}layers.") for key in state):
        raise ValueError(f"the state dict has layers by both names, {old}* and {prefix}layers.*: leave one out")
    for key in names:
        state[f"{prefix}layers.{key.removeprefix(old)}"] = state.pop(key)


def refuse_too_old(state: Mapping[str, Tensor], prefix: str) -> None:
    """ValueError for a stack of a version that kept its layer norms apart."""
    if any(key.startswith(f"{prefix}ln_lst.") for key in state):
        raise ValueError("a state dict of version 2.1.7 or earlier with layer norm: its layers cannot be told apart")


def read_official_cell(cell: Shape, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Turn one layer's official entries into ours, in place; what is ours already stays as it is.

    ValueError: the entries belong to a layer with other options, which are named.
    """
    where = prefix[:-1] or "the layer"
    own = [key for key in state if key.startswith(prefix) and "." not in key.removeprefix(prefix)]
    for key in own:
        if not isinstance(state[key], Tensor):
            raise ValueError(f"{key} must be a tensor, not {type(state[key]).__name__}")
    if f"{prefix}gain" in state:
        raise ValueError(f"{where} has weight normalisation, which ended with version 2.1.7: it cannot be converted")
    if {f"{prefix}v", f"{prefix}weight_c"} <= state.keys():
        raise ValueError(
            f"{where} has both v, which is ours, and weight_c, which is the official package's: leave one out"
        )
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
        raise ValueError(f"{where} has no weight: if it was made with a module of its own, give ours transform_module=")
    size = 0 if projection is None else projection.shape[0]
    if size != cell.projection_size:
        raise ValueError(
            f"{where} has projection_size={size}, ours {cell.projection_size}. Version 2.x ignores a projection that "
            "is not smaller than both sides: give SRU a sequence of sizes, with 0 for a layer without one"
        )
    if matrix.shape[0] != cell.matrices * cell.output_size:
        raise ValueError(
            f"{where} maps to {matrix.shape[0]} columns, ours to {cell.matrices} * {cell.output_size}: check "
            "hidden_size, bidirectional and has_skip_term"
        )
    state[f"{prefix}weight"] = from_official_matrix(matrix, cell.matrices)
    if projection is not None:
        state[f"{prefix}weight_proj"] = projection


def is_of_2017(cell: Shape, state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a layer's entries are those of the official code of September 2017: `weight` and `bias`, no weight_c.

    ValueError: they are, or are the parameters alone of a layer of ours without v, and no shape tells which.
    """
    weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
    if weight is None or bias is None or weight.dim() != 2 or bias.dim() != 1 or cell.weight_shape is None:
        return False
    if {f"{prefix}weight_c", f"{prefix}v"} & state.keys():
        return False
    if f"{prefix}scale_x" in state:
        if weight.shape == cell.weight_shape[::-1] != cell.weight_shape:
            raise ValueError(
                f"{prefix[:-1] or 'the layer'} has weight and scale_x, as of 2.x, but no weight_c: it is not whole"
            )
        return False
    if weight.shape == cell.weight_shape == cell.weight_shape[::-1]:
        raise ValueError(
            f"{prefix}weight {tuple(weight.shape)} without weight_c, v and scale_x may be of 2017 or ours: add "
            f"{prefix}weight_c (2 * D zeros) if it is of 2017, or {prefix}v (2 * D zeros) if it is ours"
        )
    return weight.shape != cell.weight_shape
