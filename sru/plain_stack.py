"""Run a stack of plain SRU layers as one function, by sru/kernels/stack.py."""

from typing import cast

import torch
from torch import Tensor, nn

from sru.cell import PROJECT, SRUCell, sequence_mask
from sru.checks import state_dtype
from sru.kernels import ACTIVATIONS, stack
from sru.kernels.linear import is_plain

PlainLayer = tuple[SRUCell, tuple[Tensor, Tensor, Tensor, Tensor]]


def find_layers(
    modules: nn.ModuleList, count: int, x: Tensor, c0: Tensor | None, output_size: int, bidirectional: bool
) -> list[PlainLayer] | None:
    """The layers and their tensors if all of them are equal plain layers without hooks; else None."""
    layers: list[PlainLayer] = []
    tensors = [c0]
    size = x.shape[2]
    for layer in cast(dict[str, SRUCell], modules._modules).values():
        if not is_plain(layer, SRUCell) or (own := plain_tensors(layer, size, output_size)) is None:
            return None
        layers.append((layer, own))
        if layer.activation != layers[0][0].activation or layer.bidirectional != bidirectional:
            return None
        tensors += own
        size = output_size
    return layers if len(layers) == count and stack.takes(x, *tensors) else None


def run(
    layers: list[PlainLayer], x: Tensor, c0: Tensor | None, mask_pad: Tensor | None, output_size: int
) -> tuple[Tensor, Tensor]:
    """h (T, B, D) of the last layer and the last states (L, B, D), from x (T, B, n) and c0 (L, B, D)."""
    if c0 is None:
        c0 = x.new_zeros(len(layers), x.shape[1], output_size, dtype=state_dtype(x))
    pad = mask_pad if mask_pad is None or mask_pad.dtype == torch.bool else mask_pad != 0
    descriptions = []
    for i, (layer, (weight, v, bias, alpha)) in enumerate(layers):
        has_highway = layer.has_skip_term and not layer.has_projected_skip
        masks: tuple[Tensor | None, Tensor | None] = None, None
        if layer.training and (layer.rnn_dropout or layer.dropout):
            inputs = c0.new_empty(x.shape[1], layer.input_size)
            masks = sequence_mask(layer.rnn_dropout, inputs), sequence_mask(layer.dropout, c0[i])
        descriptions.append(stack.Layer(weight, v, bias, alpha if has_highway else None, *masks))
    first = layers[0][0]
    return stack.run(x, c0, pad, descriptions, first.activation, first.bidirectional)


def plain_tensors(cell: SRUCell, input_size: int, output_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """weight, v, bias and alpha if the layer is only a matrix product and the recurrence, of these sizes."""
    # Not by nn.Module.__getattr__, which takes as long as everything else here.
    own, state = cell._parameters, cell._buffers
    weight, bias, alpha = own.get("weight"), own.get("bias"), state.get("scale_x")
    v = own.get("v", state.get("v"))
    if weight is None or v is None or bias is None or alpha is None:
        return None
    plain = (
        own.get("weight_proj") is None
        and cell.__dict__.get("layer_norm", cell) is None  # a module is stored elsewhere
        and not cell.zoneout
        and cell.backend in ("auto", "cpu")
        and cell.activation in ACTIVATIONS
        and (cell.has_skip_term or not cell.has_projected_skip)
        and cell.input_size == input_size
        # The kernels read memory by address and rely on these shapes.
        and weight.shape == (cell.matrices * output_size, input_size)
        and v.shape == bias.shape == (2 * output_size,)
        and alpha.shape == (1,)
        and not alpha.requires_grad
        and weight.layout == torch.strided
        and cell._compiled_call_impl is None
        and "project" not in cell.__dict__
        and SRUCell.project is PROJECT
    )
    return (weight, v, bias, alpha) if plain else None
