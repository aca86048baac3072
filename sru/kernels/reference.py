"""The SRU recurrence in plain torch: the equations as in the paper (EMNLP 2018, section 2)."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda c: c,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
FUNCTIONS = tuple(ACTIVATIONS.values())
# The process that imported sru. Here and not in cpu.py, which a forked child may be the first to import: a child must
# not wait for the threads of its parent.
PROCESS = os.getpid()


class Arguments(NamedTuple):
    """The arguments of `sru.kernels.recurrence` in the form that every backend takes.

    v and b are (2 * D,). scale holds one number, None for 1; without a highway there is no skip to scale. activation is
    an index into ACTIVATIONS. halves is 2 when bidirectional, else 1.
    """

    u: Tensor
    x: Tensor | None
    v: Tensor
    b: Tensor
    c0: Tensor
    mask: Tensor | None
    pad: Tensor | None
    scale: Tensor | None
    zoneout: float
    activation: int
    halves: int


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def recurrence(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`; has derivatives of any order."""
    if arguments.halves == 2:
        return run_both_directions(recurrence, arguments)
    u, x, v, b, c0, mask, scale = widen(arguments)
    pad, zoneout, g = arguments.pad, arguments.zoneout, FUNCTIONS[arguments.activation]
    # Unbound once: the gradient of indexing would be as large as u at every step.
    u0, u1, u2, *u3 = (part.unbind() for part in u.unbind(2))
    skip = u3[0] if u3 else x.unbind() if x is not None else ()
    c, outputs = c0, []
    for t in range(u.shape[0]):
        f = zoneout + (1 - zoneout) * torch.sigmoid(u1[t] + v[0] * c + b[0])
        r = torch.sigmoid(u2[t] + v[1] * c + b[1])
        state = f * c + (1 - f) * u0[t]
        carried = torch.zeros_like(state) if not skip else skip[t] if scale is None else scale * skip[t]
        change = (g(state) - carried) * r
        h = carried + (change if mask is None else mask * change)
        if pad is not None:
            at_pad = pad[t, :, None]
            state = torch.where(at_pad, c, state)
            h = torch.where(at_pad, torch.zeros_like(h), h)
        c = state
        outputs.append(h)
    h = torch.stack(outputs) if outputs else u[:, :, 0].clone()
    return h.to(arguments.u.dtype), c.clone() if c is c0 else c


def widen(arguments: Arguments) -> list[Any]:
    """u, x, v, b, c0, mask and scale in the dtype of the state, v and b as (2, D)."""
    u, x, v, b, c0, mask, _, scale, *_ = arguments
    wide = torch.float32 if u.dtype in (torch.float16, torch.bfloat16) else u.dtype
    return [None if a is None else a.to(wide) for a in (u, x, v.view(2, -1), b.view(2, -1), c0, mask, scale)]


def run_both_directions(
    run: Callable[[Arguments], tuple[Tensor, Tensor]], arguments: Arguments
) -> tuple[Tensor, Tensor]:
    """Run the first half of the columns forward and the second half backward, each by `run`."""
    u, x, v, b, c0, mask, pad, *_ = arguments
    results = []
    for half, reverse in zip(torch.arange(u.shape[3], device=u.device).chunk(2), (False, True), strict=True):
        order: Callable[[Tensor], Tensor] = (lambda a: a.flip(0)) if reverse else (lambda a: a)
        h, c = run(
            Arguments(
                order(u[..., half]),
                None if x is None else order(x[..., half]),
                v.view(2, -1)[:, half].flatten(),
                b.view(2, -1)[:, half].flatten(),
                c0[:, half],
                None if mask is None else mask[:, half],
                None if pad is None else order(pad),
                arguments.scale,
                arguments.zoneout,
                arguments.activation,
                halves=1,
            )
        )
        results.append((order(h), c))
    return torch.cat([h for h, _ in results], dim=-1), torch.cat([c for _, c in results], dim=-1)
