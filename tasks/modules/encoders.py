"""Encoders as the tasks use them: options of their factories, their direction, and operations on their states.

A state is a tensor, None, or tuples and lists of states. A list holds the memory that an attention looks back on.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor


def takes_option(encoder: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(encoder).parameters


def remove_memory_limits(encoder: Callable[..., Any]) -> Callable[..., Any]:
    """The factory of an encoder whose attention, if it has one, looks back on the whole sequence."""
    limits = [name for name in ("memory_length", "eval_memory_length") if takes_option(encoder, name)]
    return partial(encoder, **dict.fromkeys(limits))


def sees_future(encoder: Any) -> bool:
    """Whether a step's output depends on later steps."""
    return getattr(encoder, "bidirectional", False) or not getattr(encoder, "causal", True)


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with `function` applied to each tensor."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(map_state(function, part) for part in state) if isinstance(state, tuple | list) else state


def detach(state: Any) -> Any:
    """A state without its gradient."""

    def detach_tensor(tensor: Tensor) -> Tensor:
        # A view of a few steps would keep in memory, and save, the whole tensor behind it.
        is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.detach().clone() if is_view else tensor.detach()

    return map_state(detach_tensor, state)


def select_rows(state: Any, rows: Tensor) -> Any:
    """The state of these sequences; dimension 1 of its tensors is the batch."""
    return map_state(lambda tensor: tensor.index_select(1, rows), state)


def has_memory(state: Any) -> bool:
    """Whether a state contains the memory of an attention."""
    return isinstance(state, list) or (isinstance(state, tuple) and any(isinstance(part, list) for part in state))
