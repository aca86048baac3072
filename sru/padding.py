"""Padding in a batch of sequences: clear it, count it, and reverse sequences without it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sru.checks import check_mask
from sru.kernels.dispatch import has_numbers

Lengths = Tensor | Sequence[int] | int


def clear_padding(x: Tensor, mask_pad: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, B, n) with zeros at padding, and mask_pad (T, B) as bool.

    Without the zeros, inf or NaN at padding would make a gradient of 0 there NaN.
    """
    check_mask(mask_pad, x.shape[:2], "(T, B)", x)
    pad = mask_pad != 0
    return x.masked_fill(pad[:, :, None], 0.0), pad


def mask_lengths(lengths: Lengths, x: Tensor) -> Tensor:
    """mask_pad (T, B) of the sequences in x (T, B, n) with these lengths, padded at their end."""
    steps, batch = x.shape[:2]
    lengths = torch.as_tensor(lengths, device=x.device)
    lengths = lengths.long() if lengths.numel() == 0 else lengths  # an empty list becomes a float tensor
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be {batch} integers, one for each sequence, not {lengths.tolist()}")
    if has_numbers(lengths) and batch and not 0 <= lengths.min() <= lengths.max() <= steps:
        raise ValueError(f"lengths must be from 0 to {steps}, the steps of x, not {lengths.tolist()}")
    return torch.arange(steps, device=x.device)[:, None] >= lengths


def count_steps(pad: Tensor) -> Tensor:
    """The lengths (B,) of sequences padded at their end, from pad (T, B); compiled code does not check where it is."""
    if has_numbers(pad) and (pad[:-1] > pad[1:]).any():
        raise ValueError("mask_pad has padding before a real step: pad sequences at their end")
    return (~pad).sum(0)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, n) with the steps of each sequence in reverse order; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    steps, batch, _ = x.shape
    t = torch.arange(steps, device=x.device)[:, None]
    t = torch.where(t < lengths, lengths - 1 - t, t)
    # index_select copies whole rows; gather, which copies single numbers, is slower, and so is its gradient.
    return x.flatten(0, 1).index_select(0, (t * batch + torch.arange(batch, device=x.device)).flatten()).view_as(x)


def join_padding(past: Tensor | None, now: Tensor | None, length: int, x: Tensor) -> Tensor | None:
    """The padding (M + T, B) of `length` = M steps of memory and T steps of x (T, B, n); None if there is none."""
    if past is None and now is None:
        return None
    none = x.new_zeros(length + len(x), x.shape[1], dtype=torch.bool)
    return torch.cat([none[:length] if past is None else past != 0, none[length:] if now is None else now != 0])


def move_padding_first(memory: Sequence[Tensor], pad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tensors (S, B, n) and pad (S, B) with real steps last, so that a bounded memory keeps them."""
    order = (~pad).to(torch.uint8).argsort(dim=0, stable=True)
    return [a.gather(0, order[:, :, None].expand_as(a)) for a in memory], pad.gather(0, order)
