"""LSTM, GRU, QRNN and CNN, the papers' baselines, with the call of the SRU: h, state = encoder(x, state, mask_pad).

mask_pad (T, B) is True at padding, which must be at the end of a sequence: there h is 0, and nothing depends on x. When
bidirectional, h has the forward half first.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sru.cell import sequence_mask
from sru.checks import check_flags, check_sizes
from sru.kernels import recurrence
from sru.kernels.linear import affine, is_plain, linear
from sru.padding import clear_padding, count_steps, reverse

States = tuple[Tensor, ...]  # h and c, or h alone


class _Encoder(nn.Module):
    """Steps for all encoders: a step is a sequence of length 1."""

    bidirectional = False

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """h (B, output_size) and the state, of x (B, input_size); T steps give the same as one call with T steps."""
        if self.bidirectional:
            raise ValueError(f"a bidirectional {type(self).__name__} needs the whole sequence: it has no step")
        if x.dim() != 2:
            raise ValueError(f"x must be (B, input_size), one step of a sequence, not {tuple(x.shape)}")
        h, state = self(x[None], state)
        return h[0], state


class _Recurrent(_Encoder):
    """A recurrent network of torch; dropout applies between the layers."""

    network: Callable[..., nn.RNNBase]
    layer: Callable[..., tuple[Tensor, ...]]  # torch's function for one layer in one direction
    hold: tuple[float, ...]  # added to each gate at padding, so that the state does not change

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
        check_flags(bidirectional=bidirectional)
        self.bidirectional = bidirectional
        self.output_size = hidden_size * (2 if bidirectional else 1)
        # torch warns about dropout with a single layer.
        dropout = dropout if num_layers > 1 else 0.0
        self.rnn = self.network(input_size, hidden_size, num_layers, dropout=dropout, bidirectional=bidirectional)

    def forward(self, x: Tensor, state: Any = None, mask_pad: Tensor | None = None) -> tuple[Tensor, Any]:
        """h (T, B, output_size) of x (T, B, input_size), and torch's own state."""
        if mask_pad is None:
            h, state = self.rnn(x, state)
            return h, state
        x, pad = clear_padding(x, mask_pad)
        lengths = count_steps(pad)
        is_pair = isinstance(self.rnn, nn.LSTM)
        if state is None:
            zeros = x.new_zeros(len(self.rnn.all_weights), x.shape[1], self.rnn.hidden_size)
            state = (zeros, zeros) if is_pair else zeros
        self.rnn.check_forward_args(x, state, None)
        # cuDNN supports packed sequences. On a CPU they take twice the time, because oneDNN does not.
        run = self.run_packed if x.is_cuda else self.run_padded
        h, last = run(x, state if is_pair else (state,), pad, lengths)
        return h.masked_fill(pad[:, :, None], 0.0), last if is_pair else last[0]

    def run_packed(self, x: Tensor, state: Sequence[Tensor], pad: Tensor, lengths: Tensor) -> tuple[Tensor, States]:
        """Run packed sequences, which need at least one step: results for empty sequences are replaced."""
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
        packed, last = self.rnn(packed, tuple(state) if len(state) > 1 else state[0])
        h, _ = pad_packed_sequence(packed, total_length=len(x))
        last = last if len(state) > 1 else (last,)
        empty = (lengths == 0)[:, None]
        return h, tuple(torch.where(empty, before, after) for before, after in zip(state, last, strict=True))

    def run_padded(self, x: Tensor, state: Sequence[Tensor], pad: Tensor, lengths: Tensor) -> tuple[Tensor, States]:
        """Run layer by layer, each direction over sequences that start at step 0.

        An extra input, 1 at padding, closes the gates there, so that the last state is the one of the last real step.
        """
        directions = 2 if self.bidirectional else 1
        ends = (lengths - 1).clamp(min=0)[None, :, None].expand(1, -1, self.rnn.hidden_size)
        states = []
        for i in range(self.rnn.num_layers):
            if i:
                x = F.dropout(x, self.rnn.dropout, self.training)
            x = torch.cat([x, pad[:, :, None].to(x.dtype)], dim=2)
            halves = []
            for j in range(i * directions, (i + 1) * directions):
                order = (lambda a: reverse(a, lengths)) if j % directions else (lambda a: a)
                weight, *others = self.rnn.all_weights[j]
                hold = weight.new_tensor(self.hold).repeat_interleave(self.rnn.hidden_size)
                weights = [torch.cat([weight, hold[:, None]], dim=1), *others]
                before = tuple(a[j : j + 1] for a in state)
                # Biases, one layer, no dropout, training, one direction, time first.
                options = True, 1, 0.0, self.training, False, False
                h, _, *c = self.layer(order(x), before if len(before) > 1 else before[0], weights, *options)
                states.append((torch.where((lengths == 0)[:, None], before[0], h.gather(0, ends)), *c))
                halves.append(order(h))
            x = torch.cat(halves, dim=2)
        return x, tuple(torch.cat(parts) for parts in zip(*states, strict=True))


class LSTM(_Recurrent):
    """torch.nn.LSTM; its state is the pair (h, c)."""

    network = nn.LSTM
    layer = torch._VF.lstm
    hold = -1e4, 1e4, 0.0, 0.0  # input, forget, candidate, output


class GRU(_Recurrent):
    """torch.nn.GRU; its state is h."""

    network = nn.GRU
    layer = torch._VF.gru
    hold = 0.0, 1e4, 0.0  # reset, update, candidate


class QRNNLayer(nn.Module):
    """One quasi-recurrent layer of window 1 with fo-pooling (Bradbury et al., 2017).

    z = tanh(W_z x), f and o = sigmoid(W x), c_t = f c_{t-1} + (1 - f) z, and h = o c, or with the highway
    h = o c + (1 - o) x, where a fourth matrix projects x if its size differs from that of h. When bidirectional, a
    second set of columns runs from the last step to the first.
    """

    v: Tensor  # zeros: no state in the gates

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dropout: float = 0.0,
        highway: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.output_size = size = hidden_size * (2 if bidirectional else 1)
        self.dropout = dropout
        self.highway = highway
        self.bidirectional = bidirectional
        self.has_projected_skip = highway and input_size != size
        self.linear = nn.Linear(input_size, (4 if self.has_projected_skip else 3) * size, bias=False)
        self.bias = nn.Parameter(torch.zeros(3 * size))
        self.register_buffer("v", torch.zeros(2 * size), persistent=False)

    def forward(self, x: Tensor, c0: Tensor | None = None, pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (T, B, output_size) and the last state (B, output_size); pad (T, B) of bool."""
        z, gates = affine(x, self.linear).unflatten(2, (-1, self.output_size)).tensor_split([1], dim=2)
        bias, gate_biases = self.bias.tensor_split([self.output_size])
        u = torch.cat([torch.tanh(z + bias), gates], dim=2)
        c0 = x.new_zeros(x.shape[1], self.output_size) if c0 is None else c0
        skip = x if self.highway and not self.has_projected_skip else None
        mask = sequence_mask(self.dropout, c0) if self.training else None
        scale = 1.0 if self.highway else 0.0
        options: dict[str, Any] = {"mask": mask, "pad": pad, "scale": scale, "bidirectional": self.bidirectional}
        return recurrence(u, skip, self.v, gate_biases, c0, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if bias is not None and bias.shape == (3, self.output_size):  # files of earlier versions
            state_dict[f"{prefix}bias"] = bias.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)


class QRNN(_Encoder):
    """A stack of quasi-recurrent layers of window 1; state (num_layers, B, output_size).

    Args:
        dropout: on every layer but the last, one mask for all steps of a sequence.
        highway: the row "+highway" of the 2018 paper's tables.
        bidirectional: every layer reads both directions, and the next layer gets both.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.0,
        highway: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(1, num_layers=num_layers)
        check_flags(bidirectional=bidirectional)
        self.bidirectional = bidirectional
        self.output_size = hidden_size * (2 if bidirectional else 1)
        self.layers = nn.ModuleList(
            QRNNLayer(
                input_size if i == 0 else self.output_size,
                hidden_size,
                dropout=dropout if i < num_layers - 1 else 0.0,
                highway=highway,
                bidirectional=bidirectional,
            )
            for i in range(num_layers)
        )

    def forward(self, x: Tensor, c0: Tensor | None = None, mask_pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (T, B, output_size) and the last state of every layer."""
        if mask_pad is not None:
            x, mask_pad = clear_padding(x, mask_pad)
        states = []
        for i, layer in enumerate(self.layers):
            x, c = layer(x, None if c0 is None else c0[i], mask_pad)
            states.append(c)
        return x, torch.stack(states)


class CNN(_Encoder):
    """Convolutions of several widths and a max over time (Kim, 2014).

    It is a running maximum: h_t holds the strongest response of every filter to x_1 .. x_t, so h_T is Kim's feature
    vector, and the network can be used like a recurrent one. The state is the last inputs (max(widths) - 1, B,
    input_size) and the running maximum (1, B, output_size). When bidirectional, as many further filters read from the
    end, and the state has the last inputs of both directions side by side.

    Args:
        input_size: features of x.
        num_filters: filters of each width, and of each direction.
        widths: numbers of steps that filters cover.
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_filters: int = 100,
        widths: tuple[int, ...] = (3, 4, 5),
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        check_flags(bidirectional=bidirectional)
        self.bidirectional = bidirectional
        self.directions = 2 if bidirectional else 1
        self.input_size = input_size
        self.output_size = num_filters * len(widths) * self.directions
        self.history = max(widths) - 1
        self.convolutions = nn.ModuleList(
            nn.Conv1d(input_size, num_filters, width) for _ in range(self.directions) for width in widths
        )

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, mask_pad: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h (T, B, output_size) and the state; zeros precede the first step."""
        batch = x.shape[1]
        pad = lengths = None
        if mask_pad is not None:
            x, pad = clear_padding(x, mask_pad)
            lengths = count_steps(pad)
        if state is None:
            # A rectified response is never below 0, so the maximum starts at 0.
            tail = x.new_zeros(self.history, batch, self.directions * self.input_size)
            state = tail, x.new_zeros(1, batch, self.output_size)
        tails, peaks = state[0].chunk(self.directions, dim=2), state[1].chunk(self.directions, dim=2)
        results = []
        for i in range(self.directions):
            h, *last = self.read(i, reverse(x, lengths) if i else x, tails[i], peaks[i], pad, lengths)
            results.append((reverse(h, lengths) if i else h, *last))
        h, tail, peak = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
        return h, (tail, peak)

    def read(
        self, direction: int, x: Tensor, tail: Tensor, peak: Tensor, pad: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The running maximum (T, B, n) of one direction over x in its order, the last inputs, and the last maximum."""
        steps = len(x)
        number = len(self.convolutions) // self.directions
        x = torch.cat([tail, x])
        convolutions = self.convolutions[direction * number : (direction + 1) * number]
        responses = [self.respond(cast(nn.Conv1d, convolution), x, steps) for convolution in convolutions]
        h = F.relu(torch.cat(responses, dim=2))
        if pad is not None:
            h = h.masked_fill(pad[:, :, None], 0.0)  # does not change the maximum
        h = torch.cat([peak, h]).cummax(dim=0).values[1:]
        peak = h[-1:] if steps else peak
        if pad is None or lengths is None:
            return h, x[steps:], peak
        last = torch.arange(self.history, device=x.device)[:, None] + lengths
        return h.masked_fill(pad[:, :, None], 0.0), x.gather(0, last[:, :, None].expand(-1, -1, x.shape[2])), peak

    def respond(self, convolution: nn.Conv1d, x: Tensor, steps: int) -> Tensor:
        """A convolution over time as one matrix product and a sum of shifts, without a transposed copy of x."""
        width = convolution.kernel_size[0]
        x = x[self.history + 1 - width :]
        options = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        is_usual = options == ((1,), (0,), (1,), 1) and convolution.bias is not None
        if steps and not (is_usual and is_plain(convolution, nn.Conv1d)):
            return cast(Tensor, convolution(x.permute(1, 2, 0))).permute(2, 0, 1)
        products = linear(x, convolution.weight.permute(2, 0, 1).flatten(0, 1))
        taps = products.unflatten(2, (width, convolution.out_channels)).unbind(2)
        return cast(Tensor, sum(tap[i : i + steps] for i, tap in enumerate(taps)) + convolution.bias)
