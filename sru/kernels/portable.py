"""The SRU recurrence for exported programs: torch's operators only, for any number of steps.

The loop carries the state alone; the outputs of all steps are computed at once.
"""

import torch
from torch import Tensor

from sru.kernels.reference import FUNCTIONS, Arguments, run_both_directions, widen


def recurrence(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`."""
    if arguments.halves == 2:
        return run_both_directions(recurrence, arguments)
    u, x, v, b, c0, mask, scale = widen(arguments)
    candidate, forget, reset = u[:, :, 0], u[:, :, 1] + b[0], u[:, :, 2] + b[1]
    pad = None if arguments.pad is None else arguments.pad[:, :, None]
    if pad is not None:  # a forget gate of 1 and a candidate of 0 keep the state
        candidate, forget = candidate.masked_fill(pad, 0.0), forget.masked_fill(pad, 1e4)
    before, c, c_last = run_states(candidate, forget, v[0], c0, arguments.zoneout)
    r = torch.sigmoid(reset + v[1] * before)
    y = FUNCTIONS[arguments.activation](c)
    skip = u[:, :, 3] if u.shape[2] == 4 else torch.zeros_like(y) if x is None else x
    skip = skip if scale is None else scale * skip
    change = r * (y - skip)
    h = skip + (change if mask is None else mask * change)
    h = h if pad is None else h.masked_fill(pad, 0.0)
    return h.to(arguments.u.dtype), c_last


def run_states(
    candidate: Tensor, forget: Tensor, v: Tensor, c0: Tensor, zoneout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The states before and after every step (T, B, D), and the last one (B, D)."""
    from torch._higher_order_ops.scan import scan

    def step(c: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        candidate, forget = inputs
        f = zoneout + (1 - zoneout) * torch.sigmoid(forget + v * c)
        c = f * c + (1 - f) * candidate
        return c, c.clone()

    c_last, c = scan(step, c0.clone(), (candidate, forget))
    # Not c[:-1], which would give the exported program a second symbolic number of steps.
    return torch.cat([c0[None], c])[:-1], c, c_last
