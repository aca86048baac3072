"""Checks of arguments and inputs, with error messages that name the wrong value and the right ones."""

import difflib
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

# Hints for arguments of torch.nn.LSTM, and for those that the official package removed.
HINTS = {
    "use_relu": "the official package dropped it after version 2.1.8; choose activation='relu'",
    "use_selu": "the official package dropped it after version 2.1.8; choose activation='relu' or 'tanh'",
    "weight_norm": "the official package dropped it after version 2.1.7; choose layer_norm=True",
    "use_weight_norm": "the official package dropped it after version 2.1.7; choose layer_norm=True",
    "proj_size": "there is no equivalent of LSTM's narrower h; projection_size narrows the matrices instead",
    "bias": "each gate always has a bias, and the candidate never has one: leave bias out",
    "hx": "the state is called c0 here; it is c alone, not (h, c)",
    "nonlinearity": "choose activation='identity', 'tanh' or 'relu'",
}


def check_sizes(least: int, **sizes: Any) -> None:
    """Raise ValueError for a value that is not a whole number of at least `least`."""
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_optional_sizes(least: int, **sizes: Any) -> None:
    """Do the same, but accept None."""
    check_sizes(least, **{name: value for name, value in sizes.items() if value is not None})


def check_flags(**flags: Any) -> None:
    """Raise ValueError for a value that is not a bool; 0 and 1 are accepted, as in the official package."""
    for name, value in flags.items():
        if not isinstance(value, numbers.Integral) or value not in (0, 1):
            raise ValueError(f"{name} must be True or False, not {value!r}")


def check_rescale(value: Any) -> None:
    """Raise ValueError for a scaling correction that is neither a bool nor "dropout"."""
    if value != "dropout" and (not isinstance(value, numbers.Integral) or value not in (0, 1)):
        raise ValueError(f'rescale must be True, False or "dropout", not {value!r}')


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raise ValueError if the features cannot be divided among the heads."""
    if hidden_size % num_heads:
        fitting = [n for n in range(1, min(hidden_size, 32) + 1) if hidden_size % n == 0]
        raise ValueError(
            f"hidden_size = {hidden_size} cannot be shared among num_heads = {num_heads}: "
            f"choose num_heads from {', '.join(map(str, fitting))}"
        )


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_probabilities(**probabilities: Any) -> None:
    """Raise ValueError for a value outside [0, 1)."""
    for name, value in probabilities.items():
        if not is_real(value) or not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), not {value!r}")


def check_biases(**biases: Any) -> None:
    """Raise ValueError for a gate's bias beyond plus or minus 80, where a sigmoid is 0 or 1 in float32."""
    for name, value in biases.items():
        if not is_real(value) or not -80 <= value <= 80:
            raise ValueError(f"{name} must be a number from -80 to 80, not {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the state for an input x: float32 at least."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def check_input(x: Any, parameter: Tensor) -> None:
    """Raise TypeError unless x is a tensor in the dtype of the parameters, or autocast can convert it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.dtype != parameter.dtype:
        castable = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
        if not (castable and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"x is {x.dtype}, the layer {parameter.dtype}: convert one of them with .to()")


def check_mask(mask_pad: Any, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    """Check the type, shape and device of a mask for x."""
    if not isinstance(mask_pad, Tensor):
        raise TypeError(f"mask_pad must be a tensor {meaning}, not {type(mask_pad).__name__}")
    if mask_pad.shape != shape:
        raise ValueError(f"mask_pad must be {meaning} = {tuple(shape)}, not {tuple(mask_pad.shape)}")
    if mask_pad.device != x.device:
        raise ValueError(f"mask_pad is on {mask_pad.device}, x on {x.device}; move it with mask_pad.to(x.device)")


def check_state(c0: Any, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    """Check the type, shape, dtype and device of a state for x."""
    if not isinstance(c0, Tensor):
        hint = ": the state of an SRU is c alone, not (h, c)" if isinstance(c0, tuple | list) else ""
        raise TypeError(f"c0 must be a tensor {meaning}, not {type(c0).__name__}{hint}")
    if c0.shape != shape:
        raise ValueError(f"c0 must be {meaning} = {tuple(shape)}, not {tuple(c0.shape)}")
    if c0.dtype not in (x.dtype, state_dtype(x)):
        raise TypeError(f"c0 must be {state_dtype(x)} for x of {x.dtype}, not {c0.dtype}")
    if c0.device != x.device:
        raise ValueError(f"c0 is on {c0.device}, x on {x.device}; move it with c0.to(x.device)")


def refuse(name: str, owner: Callable[..., Any]) -> NoReturn:
    """Raise TypeError for an argument that a class or method does not have, with a hint at the right one."""
    owners: list[Any] = [owner]
    if inspect.isclass(owner):  # a class with **options passes them to its base class
        owners = [each for each in owner.__mro__ if "__init__" in vars(each) and each.__module__.startswith("sru.")]
    parameters = [p for each in owners for p in inspect.signature(each).parameters.values()]
    names = list(dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_KEYWORD))
    close = difflib.get_close_matches(name, names, 1)
    hint = HINTS.get(name) or (f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}")
    raise TypeError(f"{owner.__qualname__} has no argument {name}: {hint}")
