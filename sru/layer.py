"""The SRU layer and its stack (Lei et al., EMNLP 2018; sections 2 and 3 of the paper)."""

import math

import torch
from torch import Tensor, nn

from sru.kernels import recurrence
from sru.kernels.linear import linear


def sequence_mask(p: float, like: Tensor) -> Tensor | None:
    """A dropout mask (B, D) that every step of a sequence shares, scaled by 1 / (1 - p); None when p is 0."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout must lie in [0, 1), not {p}")
    return None if p == 0 else torch.empty_like(like).bernoulli_(1 - p).div_(1 - p)


class SRUCell(nn.Module):
    """One SRU layer over a whole sequence.

    With x (T, B, input_size) and D = hidden_size, or twice that when bidirectional:

        f_t = sigmoid(W_f x_t + v_f * c_{t-1} + b_f)
        r_t = sigmoid(W_r x_t + v_r * c_{t-1} + b_r)
        c_t = f_t * c_{t-1} + (1 - f_t) * (W x_t)
        h_t = r_t * c_t + (1 - r_t) * x_t * alpha

    Where input_size differs from D, a fourth matrix projects x_t for the last line, as the released code does.

    Args:
        input_size: features of x.
        hidden_size: features of one direction.
        dropout: probability of dropping r_t * (c_t - x_t * alpha), what the layer adds to its highway; one mask (B, D)
            for all steps of a sequence.
        bidirectional: a second set of columns runs from the last step to the first.
        highway_bias: the reset gate's bias b_r at the start; negative values let more of x through (-3 for deep
            language models).
        forget_bias: the forget gate's bias b_f at the start. The published 0 halves c at every step; 2 remembers for
            about eight, which trains better where embeddings start at random (README, results).
        has_skip_term: False removes the highway: h_t = r_t * c_t.
        rescale: the scaling correction alpha = sqrt(1 + 2 exp(highway_bias)); False sets alpha to 1 (section 3.2).
        has_vc_term: False removes v * c_{t-1} from both gates, which is the cell of 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        highway_bias: float = 0.0,
        forget_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = True,
        has_vc_term: bool = True,
    ) -> None:
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"input_size and hidden_size must be at least 1, not {input_size} and {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = hidden_size * (2 if bidirectional else 1)
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.highway_bias = highway_bias
        self.forget_bias = forget_bias
        self.has_skip_term = has_skip_term
        self.rescale = rescale
        self.has_vc_term = has_vc_term
        self.has_projected_skip = has_skip_term and input_size != self.output_size
        matrices = 4 if self.has_projected_skip else 3
        # Rows: candidate, forget, reset [, skip], so that one product gives u (T, B, K, D).
        self.weight = nn.Parameter(torch.empty(matrices * self.output_size, input_size))
        self.bias = nn.Parameter(torch.empty(2, self.output_size))
        v = torch.empty(2, self.output_size)
        if has_vc_term:
            self.v = nn.Parameter(v)
        else:
            self.register_buffer("v", v, persistent=False)
        self.reset_parameters()

    @property
    def alpha(self) -> float:
        """The scaling correction: what x is multiplied with to keep its variance through the highway."""
        return math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale else 1.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the published initialisation: weights of variance 1 / input_size (section 3.2)."""
        bound = math.sqrt(3 / self.input_size)
        self.weight.uniform_(-bound, bound)
        candidate, gates, skip = self.weight.tensor_split([self.output_size, 3 * self.output_size])
        # Dropout makes what reaches the output 1 / (1 - p) as large.
        candidate.mul_(math.sqrt(1 - self.dropout))
        if self.has_projected_skip:
            skip.mul_(self.alpha)
        self.bias[0].fill_(self.forget_bias)
        self.bias[1].fill_(self.highway_bias)
        if self.has_vc_term:
            # W x and v * c share a gate's variance.
            gates.mul_(math.sqrt(0.5))
            self.v.uniform_(-math.sqrt(1.5), math.sqrt(1.5))
        else:
            self.v.zero_()

    def forward(self, x: Tensor, c0: Tensor | None = None, mask_pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the layer: h (T, B, D) and the last state (B, D).

        x (T, B, input_size); c0 (B, D), zeros when None; mask_pad (T, B), True where a step is padding: there the state
        is carried on and h is 0.
        """
        if x.dim() != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x must be (T, B, {self.input_size}), not {tuple(x.shape)}")
        u = linear(x, self.weight).unflatten(2, (self.weight.shape[0] // self.output_size, self.output_size))
        if c0 is None:
            c0 = x.new_zeros(x.shape[1], self.output_size)
        # A projected skip has alpha in its initial weights.
        scale = 0.0 if not self.has_skip_term else 1.0 if self.has_projected_skip else self.alpha
        return recurrence(
            u,
            x if self.has_skip_term and not self.has_projected_skip else None,
            self.v,
            self.bias,
            c0,
            mask=sequence_mask(self.dropout, c0) if self.training else None,
            pad=mask_pad,
            scale=scale,
            bidirectional=self.bidirectional,
        )

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "dropout": 0.0,
            "bidirectional": False,
            "highway_bias": 0.0,
            "forget_bias": 0.0,
            "has_skip_term": True,
            "rescale": True,
            "has_vc_term": True,
        }
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


class SRU(nn.Module):
    """A stack of SRU layers; the only state that is carried from step to step is c.

    `h, c = sru(x, c0)` with x (T, B, input_size), h (T, B, output_size) and c, c0 (num_layers, B, output_size), where
    output_size is hidden_size, or twice that when bidirectional (forward half first). Feeding c back as c0 continues
    the sequence.

    Args:
        input_size: features of x.
        hidden_size: features of one direction of a layer.
        num_layers: layers of the stack.
        dropout: as in SRUCell, on every layer but the last.
        bidirectional, highway_bias, forget_bias, has_skip_term, rescale, has_vc_term: as in SRUCell.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        highway_bias: float = 0.0,
        forget_bias: float = 0.0,
        has_skip_term: bool = True,
        rescale: bool = True,
        has_vc_term: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        self.output_size = hidden_size * (2 if bidirectional else 1)
        self.layers = nn.ModuleList(
            SRUCell(
                input_size if i == 0 else self.output_size,
                hidden_size,
                dropout=dropout if i < num_layers - 1 else 0.0,
                bidirectional=bidirectional,
                highway_bias=highway_bias,
                forget_bias=forget_bias,
                has_skip_term=has_skip_term,
                rescale=rescale,
                has_vc_term=has_vc_term,
            )
            for i in range(num_layers)
        )

    def forward(self, x: Tensor, c0: Tensor | None = None, mask_pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the stack; mask_pad (T, B) is True where a step is padding, whose output is 0."""
        shape = (len(self.layers), x.shape[1], self.output_size) if x.dim() == 3 else None
        if c0 is not None and shape is not None and c0.shape != shape:
            raise ValueError(f"c0 must be (num_layers, B, output_size) = {shape}, not {tuple(c0.shape)}")
        states = []
        for i, layer in enumerate(self.layers):
            x, c = layer(x, None if c0 is None else c0[i], mask_pad)
            states.append(c)
        return x, torch.stack(states)
