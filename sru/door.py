"""What the layer and the stack refuse, and what they answer."""

import difflib
import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor

# Arguments of the official package that it dropped itself, and of torch.nn.LSTM, that a caller may still give.
ANSWERS = {
    "use_relu": "the official package dropped it after version 2.1.8; choose activation='relu'",
    "use_selu": "the official package dropped it after version 2.1.8; choose activation='relu' or 'tanh'",
    "weight_norm": "the official package dropped it after version 2.1.7; choose layer_norm=True",
    "use_weight_norm": "the official package dropped it after version 2.1.7; choose layer_norm=True",
    "proj_size": "LSTM's narrower h has no counterpart; projection_size narrows the matrices instead",
    "bias": "the gates always have a bias, and the candidate never has one",
    "nonlinearity": "choose activation='identity', 'tanh' or 'relu'",
}


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the state beside an input x: float32 at least."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def check_input(x: Tensor, parameter: Tensor) -> None:
    """TypeError for an input of another dtype than the parameters, unless autocast is there to see to it."""
    if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x is {x.dtype}, the layer {parameter.dtype}: convert one of them with .to()")


def check_state(c0: Any, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    """Refuse what is no state of x: its type, shape, dtype and device, each by name."""
    if isinstance(c0, (tuple, list)):
        raise TypeError(f"c0 must be a tensor {meaning}, not a {type(c0).__name__}: an SRU carries c alone, no (h, c)")
    if not isinstance(c0, Tensor):
        raise TypeError(f"c0 must be a tensor {meaning}, not {type(c0).__name__}")
    if c0.shape != shape:
        raise ValueError(f"c0 must be {meaning} = {tuple(shape)}, not {tuple(c0.shape)}")
    if c0.dtype not in (x.dtype, state_dtype(x)):
        raise TypeError(f"c0 must be {state_dtype(x)} beside x of {x.dtype}, not {c0.dtype}")
    if c0.device != x.device:
        raise ValueError(f"c0 is on {c0.device}, x on {x.device}; move it with c0.to(x.device)")


def refuse(name: str, owner: type) -> NoReturn:
    """TypeError for an argument that the class has not, with what to type instead."""
    if name in ANSWERS:
        raise TypeError(f"{owner.__name__} has no {name}: {ANSWERS[name]}")
    names = [n for n, p in inspect.signature(owner).parameters.items() if p.kind is not p.VAR_KEYWORD]
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}"
    raise TypeError(f"{owner.__name__} has no argument {name}: {hint}")
