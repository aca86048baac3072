"""State dicts for the official package, versions 2.6.0 and 3.0.0.dev. sru/official_format.py reads its files."""

import re

from torch import Tensor, nn

from sru.cell import SRUCell
from sru.layer import SRU
from sru.official_format import to_official_matrix
from sru.srupp import SRUpp

VERSIONS = ("2.6.0", "3.0.0.dev")


def to_official(sru: SRU, version: str = "3.0.0.dev") -> dict[str, Tensor]:
    """A state dict for the official SRU of version 2.6.0 or 3.0.0.dev.

    ValueError: that version lacks an option of the network. TypeError: the network is not an SRU.
    """
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


def cell_to_official(cell: SRUCell, version: str) -> dict[str, Tensor]:
    """The same for one layer."""
    if cell.activation == "relu" or cell.zoneout:
        raise ValueError(f"version {version} has no relu and no zoneout")
    state = {
        "weight_c": cell.v.detach().flatten(),
        "bias": cell.bias.detach().flatten(),
        "scale_x": cell.scale_x,
    }
    old = version.startswith("2")
    if cell.transform_module is not None:
        name = "custom_m" if old else "transform_module"
        state |= {f"{name}.{key}": value for key, value in cell.transform_module.state_dict().items()}
    elif cell.weight is not None:
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
