"""The SRU recurrence by torch's own loop: what an exported program holds, so that it runs without this library.

The loop carries the state alone; the outputs are made for all steps at once.
"""

import torch
from torch import Tensor

from sru.kernels.reference import ACTIVATIONS


def recurrence(
    u: Tensor,
    x: Tensor | None,
    v: Tensor,
    b: Tensor,
    c0: Tensor,
    *,
    mask: Tensor | None,
    pad: Tensor | None,
    scale: Tensor | None,
    zoneout: float,
    activation: str,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """As `sru.kernels.recurrence`, with any number of steps left open."""
    dtype = u.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    u, c0 = u.to(wide), c0.to(wide)
    v, b = v.to(wide).view(2, -1), b.to(wide).view(2, -1)
    candidate, forget, reset = u[:, :, 0], u[:, :, 1] + b[0], u[:, :, 2] + b[1]
    if pad is not None:
        # At a padded step the forget gate is 1, so that the state stays, and there is nothing to add.
        candidate = candidate.masked_fill(pad[:, :, None], 0.0)
        forget = forget.masked_fill(pad[:, :, None], 1e4)
    if bidirectional:
        forward, backward = torch.arange(u.shape[3], device=u.device).chunk(2)
        ends = [
            states(candidate[..., half], forget[..., half], v[0, half], c0[:, half], zoneout, reverse)
            for half, reverse in ((forward, False), (backward, True))
        ]
        before, c = (torch.cat(parts, dim=-1) for parts in zip(*((e[0], e[1]) for e in ends), strict=True))
        c_last = torch.cat([e[2] for e in ends], dim=-1)
    else:
        before, c, c_last = states(candidate, forget, v[0], c0, zoneout, False)
    r = torch.sigmoid(reset + v[1] * before)
    y = ACTIVATIONS[activation](c)
    skip = u[:, :, 3] if u.shape[2] == 4 else torch.zeros_like(y) if x is None else x.to(wide)
    skip = skip if scale is None else scale.to(wide) * skip
    change = r * (y - skip)
    h = skip + (change if mask is None else mask.to(wide) * change)
    if pad is not None:
        h = h.masked_fill(pad[:, :, None], 0.0)
    return h.to(dtype), c_last


def states(candidate: Tensor, forget: Tensor, v: Tensor, c0: Tensor, zoneout: float, reverse: bool):
    """The states before and after every step (T, B, D), and the last one (B, D)."""
    try:
        from torch._higher_order_ops.scan import scan
    except ImportError as error:
        raise ImportError("this torch has no scan: export with backend='reference', for one number of steps") from error

    def step(c: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        candidate, forget = inputs
        f = zoneout + (1 - zoneout) * torch.sigmoid(forget + v * c)
        c = f * c + (1 - f) * candidate
        return c, c.clone()

    if reverse:
        candidate, forget = candidate.flip(0), forget.flip(0)
    c_last, c = scan(step, c0.clone(), (candidate, forget))
    # Not c[:-1], whose number of steps would be another unknown of an exported program.
    before = torch.cat([c0[None], c])[:-1]
    return (before.flip(0), c.flip(0), c_last) if reverse else (before, c, c_last)
