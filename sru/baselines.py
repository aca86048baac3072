"""The encoders that the papers compare with, behind the SRU's call: h, state = encoder(x, state)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sru.cell import sequence_mask
from sru.kernels import recurrence
from sru.kernels.linear import linear


class _Encoder(nn.Module):
    """What goes on one step at a time: a sequence of one."""

    bidirectional = False

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """h (B, output_size) and the state, of x (B, input_size): T steps give what one call of T steps gives."""
        if self.bidirectional:
            raise ValueError(f"a bidirectional {type(self).__name__} needs the whole sequence: it has no step")
        if x.dim() != 2:
            raise ValueError(f"x must be (B, input_size), one step of a sequence, not {tuple(x.shape)}")
        h, state = self(x[None], state)
        return h[0], state


class _Recurrent(_Encoder):
    """A recurrent network of torch under the shared names; dropout lies between the layers."""

    network: Callable[..., nn.RNNBase]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.output_size = hidden_size * (2 if bidirectional else 1)
        # torch warns about dropout that a single layer has no use for.
        dropout = dropout if num_layers > 1 else 0.0
        self.rnn = self.network(input_size, hidden_size, num_layers, dropout=dropout, bidirectional=bidirectional)

    def forward(self, x, state=None):
        """h (T, B, output_size) of x (T, B, input_size), and torch's own state."""
        return self.rnn(x, state)


class LSTM(_Recurrent):
    """torch.nn.LSTM; its state is the pair (h, c)."""

    network = nn.LSTM


class GRU(_Recurrent):
    """torch.nn.GRU; its state is h."""

    network = nn.GRU


class QRNNLayer(nn.Module):
    """One quasi-recurrent layer of window 1 with fo-pooling (Bradbury et al., 2017).

    z = tanh(W_z x), f and o = sigmoid(W x), c_t = f c_{t-1} + (1 - f) z, h = o c, or with the highway
    h = o c + (1 - o) x, where a fourth matrix projects an x of another size.
    """

    v: Tensor  # zeros: no state in the gates

    def __init__(self, input_size: int, hidden_size: int, *, dropout: float = 0.0, highway: bool = False) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.dropout = dropout
        self.highway = highway
        self.has_projected_skip = highway and input_size != hidden_size
        self.linear = nn.Linear(input_size, (4 if self.has_projected_skip else 3) * hidden_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(3, hidden_size))
        self.register_buffer("v", torch.zeros(2, hidden_size), persistent=False)

    def forward(self, x: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (T, B, hidden_size) and the last state (B, hidden_size)."""
        z, gates = linear(x, self.linear.weight).unflatten(2, (-1, self.hidden_size)).tensor_split([1], dim=2)
        u = torch.cat([torch.tanh(z + self.bias[0]), gates], dim=2)
        if c0 is None:
            c0 = x.new_zeros(x.shape[1], self.hidden_size)
        skip = x if self.highway and not self.has_projected_skip else None
        mask = sequence_mask(self.dropout, c0) if self.training else None
        scale = 1.0 if self.highway else 0.0
        return recurrence(u, skip, self.v, self.bias[1:], c0, mask=mask, scale=scale)


class QRNN(_Encoder):
    """A stack of quasi-recurrent layers of window 1; state (num_layers, B, hidden_size).

    Args:
        dropout: on every layer but the last, one mask for all steps of a sequence.
        highway: the row "+highway" of the 2018 paper's tables.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 2, *, dropout: float = 0.0, highway: bool = False
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, not {num_layers}")
        self.output_size = hidden_size
        self.layers = nn.ModuleList(
            QRNNLayer(
                input_size if i == 0 else hidden_size,
                hidden_size,
                dropout=dropout if i < num_layers - 1 else 0.0,
                highway=highway,
            )
            for i in range(num_layers)
        )

    def forward(self, x: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (T, B, output_size) and the last state of every layer."""
        states = []
        for i, layer in enumerate(self.layers):
            x, c = layer(x, None if c0 is None else c0[i])
            states.append(c)
        return x, torch.stack(states)


class CNN(_Encoder):
    """Convolutions of several widths under a max over time (Kim, 2014).

    The maximum is a running one: h_t holds the strongest response of every filter to x_1 .. x_t, so h_T is Kim's
    feature vector and the network keeps the contract of a recurrent one. The state is the last inputs (max(widths) - 1,
    B, input_size) and the running maximum (B, output_size).

    Args:
        input_size: features of x.
        num_filters: filters of each width.
        widths: steps that a filter sees.
    """

    def __init__(self, input_size: int, *, num_filters: int = 100, widths: tuple[int, ...] = (3, 4, 5)) -> None:
        super().__init__()
        self.input_size = input_size
        self.output_size = num_filters * len(widths)
        self.history = max(widths) - 1
        self.convolutions = nn.ModuleList(nn.Conv1d(input_size, num_filters, width) for width in widths)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h (T, B, output_size) and the state; before the first step lie zeros."""
        steps, batch, _ = x.shape
        if state is None:
            # A rectified response is never below 0, so 0 starts the maximum.
            state = x.new_zeros(self.history, batch, self.input_size), x.new_zeros(batch, self.output_size)
        tail, peak = state
        x = torch.cat([tail, x])
        responses = [self.respond(cast(nn.Conv1d, convolution), x, steps) for convolution in self.convolutions]
        h = F.relu(torch.cat(responses, dim=2))
        h = torch.cat([peak[None], h]).cummax(dim=0).values[1:]
        return h, (x[steps:], h[-1] if steps else peak)

    def respond(self, convolution: nn.Conv1d, x: Tensor, steps: int) -> Tensor:
        """A convolution over time as one matrix product and a sum of shifts, which needs no transposed copy of x."""
        width = convolution.kernel_size[0]
        taps = linear(x[self.history + 1 - width :], convolution.weight.permute(2, 0, 1).flatten(0, 1))
        taps = taps.unflatten(2, (width, convolution.out_channels)).unbind(2)
        return sum(tap[i : i + steps] for i, tap in enumerate(taps)) + convolution.bias
