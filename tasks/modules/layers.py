"""Layers that the tasks share: word embeddings, a fast dropout, and linear layers with a faster matrix product."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


def check_deviation(value: float | None) -> None:
    """Refuse a standard deviation of embeddings that is not a number above 0."""
    if value is not None and (isinstance(value, bool) or not 0 < value < math.inf):
        raise ValueError(f"task.embedding_deviation={value} must be a number above 0, for example 1.0, or null")


def word_embedding(
    vocab_size: int, vectors: Tensor | None, pad: int | None, size: int, deviation: float | None = None
) -> nn.Embedding:
    """Fixed word vectors or, without any, trainable embeddings of `size` features.

    deviation: root mean square of the features at the start; None leaves vectors as they are and draws trainable
        embeddings within plus or minus 0.25.
    """
    check_deviation(deviation)
    if vectors is not None:  # as published, padding has a fixed vector too
        if deviation is not None:
            vectors = vectors * (deviation / vectors.square().mean().sqrt())
        return nn.Embedding.from_pretrained(vectors, freeze=True)
    embedding = nn.Embedding(vocab_size, size, padding_idx=pad)
    # As in Kim (2014). torch's N(0, 1) is seven times as wide: with dropout 0.5 its noise dominates the first epochs,
    # more in the SRU, whose highway passes its input on, than in the LSTM.
    with torch.no_grad():
        bound = 0.25 if deviation is None else deviation * 3**0.5
        embedding.weight.uniform_(-bound, bound)[pad] = 0
    return embedding


class Dropout(nn.Module):
    """torch.nn.Dropout, but ten times as fast at drawing masks on a CPU."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.p == 0 or torch.compiler.is_compiling():
            return nn.functional.dropout(x, self.p, self.training)
        # 16 random bits per number, four numbers per draw, from numpy's generator, seeded by torch's.
        seed = int(torch.empty((), dtype=torch.int64).random_())
        bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
        threshold = min(round(self.p * 2**16), 2**16 - 1)
        mask = (bits >= threshold).astype(np.float32).reshape(x.shape)
        return x * torch.from_numpy(mask).to(x.dtype).div_(1 - threshold / 2**16)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module only multiplies by its weight and adds its bias.

    Not with a hook, a parametrisation, an adapter or a quantised weight; these need the call itself.
    """
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    shared = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return type(module) is nn.Linear and not any((*own, *shared)) and "forward" not in module.__dict__


def apply_linear(module: nn.Module, x: Tensor, linear: Callable[..., Tensor]) -> Tensor:
    """module(x), computed by `linear` if the module is a plain torch.nn.Linear."""
    return linear(x, module.weight, module.bias) if is_plain(module) else module(x)
