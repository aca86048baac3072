"""Padding in a batch of sequences: what is read instead of it, and sequences read from their ends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sru.checks import check_mask
from sru.kernels.dispatch import has_numbers


def clear(x: Tensor, mask_pad: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, B, n) with zeros where it is padding, and mask_pad (T, B) as bool; refuse what is no mask beside x.

    Zeros, as 0 * inf is no number: whatever stands in the padding, a gradient of 0 there stays 0.
    """
    check_mask(mask_pad, x.shape[:2], "(T, B)", x)
    pad = mask_pad != 0
    return x.masked_fill(pad[:, :, None], 0.0), pad


def lengths_of(pad: Tensor) -> Tensor:
    """The lengths (B,) of sequences that begin at step 0, of pad (T, B); compiled code does not check that they do."""
    if has_numbers(pad) and (pad[:-1] > pad[1:]).any():
        raise ValueError("mask_pad has padding before a real step: pad sequences at their end")
    return (~pad).sum(0)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, n) with each sequence read from its end, and its padding where it was; twice gives x."""
    if lengths is None:
        return x.flip(0)
    steps, batch, _ = x.shape
    t = torch.arange(steps, device=x.device)[:, None]
    t = torch.where(t < lengths, lengths - 1 - t, t)
    # Whole rows: a gather of single numbers is slower, and so is its gradient.
    return x.flatten(0, 1).index_select(0, (t * batch + torch.arange(batch, device=x.device)).flatten()).view_as(x)


def join(past: Tensor | None, now: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """Which of `length` = M steps of memory and T of x (T, B, n) are padding (M + T, B); None where none can be."""
    if past is None and now is None:
        return None
    none = x.new_zeros(length + len(x), x.shape[1], dtype=torch.bool)
    return torch.cat([none[:length] if past is None else past != 0, none[length:] if now is None else now != 0])


def padding_first(memory: Sequence[Tensor], pad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tensors (S, B, n), and pad (S, B), with the real steps last: these are what a bounded memory is to keep."""
    order = (~pad).to(torch.uint8).argsort(dim=0, stable=True)
    return [a.gather(0, order[:, :, None].expand_as(a)) for a in memory], pad.gather(0, order)
