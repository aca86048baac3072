"""The official package's state dicts: those of 2017, 2.x and 3.0.0.dev read, 2.6.0 and 3.0.0.dev written.

Its matrix (input_size, D * k), transposed from 3.0 on, holds the k numbers of a column together; ours (k * D,
input_size) is k blocks of rows. Its weight_c is our v. All else differs in name only. The cell of 2017 has no weight_c,
and no scale_x: its alpha is 1.
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sru.cell import SRUCell
    from sru.layer import SRU

VERSIONS = ("2.6.0", "3.0.0.dev")


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


def read_official_cell(cell: "SRUCell", state: MutableMapping[str, Tensor], prefix: str) -> None:
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
    if cell.transform_module is not None:
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


def is_of_2017(cell: "SRUCell", state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a layer's entries are those of the official code of September 2017: `weight` and `bias`, no weight_c.

    ValueError: they are, or are the parameters alone of a layer of ours without v, and no shape tells which.
    """
    weight, bias = state.get(f"{prefix}weight"), state.get(f"{prefix}bias")
    if weight is None or bias is None or weight.dim() != 2 or bias.dim() != 1 or cell.weight is None:
        return False
    if {f"{prefix}weight_c", f"{prefix}v"} & state.keys():
        return False
    if f"{prefix}scale_x" in state:
        if weight.shape == cell.weight.t().shape != cell.weight.shape:
            raise ValueError(
                f"{prefix[:-1] or 'the layer'} has weight and scale_x, as of 2.x, but no weight_c: it is not whole"
            )
        return False
    if weight.shape == cell.weight.shape == cell.weight.t().shape:
        raise ValueError(
            f"{prefix}weight {tuple(weight.shape)} without weight_c, v and scale_x may be of 2017 or ours: add "
            f"{prefix}weight_c (2 * D zeros) if it is of 2017, or {prefix}v (2 * D zeros) if it is ours"
        )
    return weight.shape != cell.weight.shape


def to_official(sru: "SRU", version: str = "3.0.0.dev") -> dict[str, Tensor]:
    """The state dict that the official SRU of a version, 2.6.0 or 3.0.0.dev, loads.

    ValueError: the network has what that version has not. TypeError: it is no SRU.
    """
    from sru.layer import SRU  # which imports this file
    from sru.srupp import SRUpp

    if not isinstance(sru, SRU):
        modules = sru.named_modules() if isinstance(sru, nn.Module) else ()
        paths = [re.sub(r"\.(\d+)", r"[\1]", f"model.{name}") for name, module in modules if isinstance(module, SRU)]
        hint = f": pass {' or '.join(paths)}" if paths else ""
        raise TypeError(f"to_official takes an SRU, not {type(sru).__name__}{hint}")
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, not {version!r}")
    if version.startswith("2") and isinstance(sru, SRUpp):
        raise ValueError(f"version {version} has no SRU++: write 3.0.0.dev")
    state: dict[str, Tensor] = {}
    if sru.input_to_hidden is not None:
        state["input_to_hidden.weight"] = sru.input_to_hidden.weight.detach()
    for i in range(sru.num_layers):
        for key, value in cell_to_official(sru[i], version).items():
            state[f"rnn_lst.{i}.{key}"] = value
    return state


def cell_to_official(cell: "SRUCell", version: str) -> dict[str, Tensor]:
    """As `to_official`, of one layer."""
    if cell.activation == "relu" or cell.zoneout:
        raise ValueError(f"version {version} has no relu and no zoneout")
    state = {
        "weight_c": cell.v.detach().flatten(),
        "bias": cell.bias.detach().flatten(),
        "scale_x": cell.scale_x,
    }
    old = version.startswith("2")
    if cell.weight is None:
        assert cell.transform_module is not None
        name = "custom_m" if old else "transform_module"
        state |= {f"{name}.{key}": value for key, value in cell.transform_module.state_dict().items()}
    else:
        matrix = to_official_matrix(cell.weight.detach(), cell.matrices)
        projection = cell.weight_proj
        if projection is None:
            state |= {"weight": matrix.t().contiguous()} if old else {"transform_module.weight": matrix}
        elif old:
            if cell.projection_size >= min(cell.input_size, cell.output_size):
                raise ValueError(f"version {version} ignores projection_size={cell.projection_size}: it is too large")
            state |= {"weight_proj": projection.detach().t().contiguous(), "weight": matrix.t().contiguous()}
        else:
            state |= {"transform_module.0.weight": projection.detach(), "transform_module.1.weight": matrix}
    if cell.layer_norm is not None:
        state |= {f"layer_norm.{key}": value for key, value in cell.layer_norm.state_dict().items()}
    return {key: value.clone() for key, value in state.items()}
