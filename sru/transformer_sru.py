"""The Transformer with an SRU in its feed-forward (SRU 2018, section 4.3)."""

from typing import Any

from torch import Tensor, nn

from sru.baselines.transformer import Transformer
from sru.cell import SRUCell
from sru.checks import state_dtype
from sru.kernels.linear import affine


class TransformerSRU(Transformer):
    """A Transformer with the feed-forward W_2 SRU(x) in place of W_2 ReLU(W_1 x), in encoder and decoder.

    The SRU runs from the first step to the last, also when the attention is bidirectional. By default it has no
    highway: a projected highway would need a fourth matrix, which the published sizes exclude.

    Args:
        sru_dropout: dropout of the SRU's output, one mask for all steps; None for `dropout`.
        has_skip_term, rescale, has_vc_term, highway_bias, forget_bias: as in SRUCell, for the SRU.
        num_heads, inner_size, dropout, ..., memory_length: as in Transformer.
    """

    parts = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        sru_dropout: float | None = None,
        has_skip_term: bool = False,
        rescale: bool | str = True,
        has_vc_term: bool = True,
        highway_bias: float = 0.0,
        forget_bias: float = 0.0,
        source_size: int | None = None,
        memory_length: int | None = None,
        **options: Any,
    ) -> None:
        if not rescale and not has_skip_term:
            raise ValueError("rescale=False has no highway to scale; type has_skip_term=true, or leave out rescale")
        self.sru_options = {
            "dropout": dropout if sru_dropout is None else sru_dropout,
            "has_skip_term": has_skip_term,
            "rescale": rescale,
            "has_vc_term": has_vc_term,
            "highway_bias": highway_bias,
            "forget_bias": forget_bias,
        }
        options |= {"dropout": dropout, "source_size": source_size, "memory_length": memory_length}
        super().__init__(input_size, hidden_size, num_layers, **options)

    def feed_forward(self) -> nn.Module:
        return RecurrentFeedForward(self.output_size, self.inner_size, **self.sru_options)


class RecurrentFeedForward(nn.Module):
    """W_2 SRU(x) + b_2; the state is (c,) with c (1, B, inner_size)."""

    def __init__(self, hidden_size: int, inner_size: int, **options: Any) -> None:
        super().__init__()
        self.cell = SRUCell(hidden_size, inner_size, **options)
        self.outer = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor, state: tuple[Tensor, ...], pad: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        h, c = self.cell(x, state[0][0].to(state_dtype(x)) if state else None, pad)
        return affine(h, self.outer), (c[None],)
