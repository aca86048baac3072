"""The SRU recurrence in plain torch: the equations, to be read beside the paper (EMNLP 2018, section 2)."""

import torch
from torch import Tensor

ACTIVATIONS = {"identity": lambda c: c, "tanh": torch.tanh, "relu": torch.relu}


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
    """As `sru.kernels.recurrence`, differentiable by autograd as often as wanted."""
    v, b = v.reshape(2, -1), b.reshape(2, -1)
    if bidirectional:
        halves = []
        for half, reverse in zip(torch.arange(u.shape[3], device=u.device).chunk(2), (False, True), strict=True):
            order = (lambda a: a.flip(0)) if reverse else (lambda a: a)
            h, c = recurrence(
                order(u[..., half]),
                None if x is None else order(x[..., half]),
                v[:, half].flatten(),
                b[:, half].flatten(),
                c0[:, half],
                mask=None if mask is None else mask[:, half],
                pad=None if pad is None else order(pad),
                scale=scale,
                zoneout=zoneout,
                activation=activation,
                bidirectional=False,
            )
            halves.append((order(h), c))
        return torch.cat([h for h, _ in halves], dim=-1), torch.cat([c for _, c in halves], dim=-1)

    dtype = u.dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    u, v, b, c0 = u.to(wide), v.to(wide), b.to(wide), c0.to(wide)
    x, mask, scale = (None if a is None else a.to(wide) for a in (x, mask, scale))
    # Taken apart once: the gradient of an index would be as large as u at every step.
    u0, u1, u2, *u3 = (part.unbind() for part in u.unbind(2))
    skip = u3[0] if u3 else x.unbind() if x is not None else ()
    c, outputs = c0, []
    for t in range(u.shape[0]):
        f = zoneout + (1 - zoneout) * torch.sigmoid(u1[t] + v[0] * c + b[0])
        r = torch.sigmoid(u2[t] + v[1] * c + b[1])
        state = f * c + (1 - f) * u0[t]
        carried = torch.zeros_like(state) if not skip else skip[t] if scale is None else scale * skip[t]
        change = (ACTIVATIONS[activation](state) - carried) * r
        h = carried + (change if mask is None else mask * change)
        if pad is not None:
            at_pad = pad[t, :, None]
            state = torch.where(at_pad, c, state)
            h = torch.where(at_pad, torch.zeros_like(h), h)
        c = state
        outputs.append(h)
    h = torch.stack(outputs) if outputs else u[:, :, 0].clone()
    return h.to(dtype), c.clone() if c is c0 else c
