"""Padding: each sequence of a batch gives the same result as alone."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sru import CNN, GRU, LSTM, QRNN, SRU, SRUppEncoder, Transformer, TransformerSRU, TransformerXL
from sru.padding import reverse

ENCODERS = {
    "sru": partial(SRU, 5, 6),
    "srupp": partial(SRUppEncoder, 5, 6, 4),
    "srupp_short_memory": partial(SRUppEncoder, 5, 6, 4, memory_length=2, attention_layers=[1]),
    "lstm": partial(LSTM, 5, 6),
    "lstm_one_layer": partial(LSTM, 5, 6, 1),
    "gru": partial(GRU, 5, 6, 3),
    "qrnn": partial(QRNN, 5, 6),
    "qrnn_highway": partial(QRNN, 5, 6, highway=True),
    "cnn": partial(CNN, 5, num_filters=4),
    "cnn_one_step": partial(CNN, 5, num_filters=4, widths=(1,)),
    "transformer": partial(Transformer, 5, 6, num_heads=2),
    "transformer_norm_last": partial(Transformer, 5, 6, num_heads=3, norm_first=False),
    "transformer_short_memory": partial(Transformer, 5, 6, num_heads=2, memory_length=2),
    "transformer_sru": partial(TransformerSRU, 5, 6, num_heads=2),
    "transformer_xl": partial(TransformerXL, 5, 6, num_heads=2),
    "transformer_xl_short_memory": partial(TransformerXL, 5, 6, num_heads=2, memory_length=2),
}
EVERY = pytest.mark.parametrize("name", ENCODERS)
BOTH_WAYS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
LENGTHS = [3, 7, 0, 1, 5]


def network(name, bidirectional, **options):
    """A small network in float64, whose attention counts."""
    made = ENCODERS[name](bidirectional=bidirectional, **options).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def padding(lengths):
    return torch.arange(max(lengths))[:, None] >= torch.tensor(lengths)


def assert_a_batch_is_its_sequences(encoder, started):
    """h, what a later segment gets of the state, and all gradients; `started`: a segment has gone before."""
    pad, n = padding(LENGTHS), len(LENGTHS)
    before, x, after = (torch.randn(steps, n, 5, dtype=torch.float64) for steps in (3, 7, 4))
    x[pad] = 1e30
    weights = [torch.randn(steps, n, encoder.output_size, dtype=torch.float64) for steps in (7, 4)]

    def run(one, length, mask):
        parts = [a[:, one].requires_grad_() for a in (before, x[:length], after)]
        state = encoder(parts[0])[1] if started else None
        h, state = encoder(parts[1], state, mask) if length else (parts[1].new_zeros(0, 1, encoder.output_size), state)
        later, _ = encoder(parts[2], state)
        encoder.zero_grad()
        ((h * weights[0][:length, one]).sum() + (later * weights[1][:, one]).sum()).backward()
        return h, later, [a.grad for a in parts], [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    h, later, grads, parameter_grads = run(slice(None), 7, pad)
    assert h.shape == (7, n, encoder.output_size)
    assert not h[pad].any()
    assert not grads[1][pad].any()
    sums = 0
    for b, length in enumerate(LENGTHS):
        one = slice(b, b + 1)
        alone, then, single, more = run(one, length, None)
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
        close(h[:length, one], alone)
        close(later[:, one], then)
        if started:
            close(grads[0][:, one], single[0])
        if length:
            close(grads[1][:length, one], single[1])
        close(grads[2][:, one], single[2])
        sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
    for found, expected in zip(parameter_grads, sums, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("started", [False, True], ids=["from the start", "later"])
@BOTH_WAYS
@EVERY
def test_a_padded_batch_gives_what_each_sequence_gives_alone(name, bidirectional, started):
    assert_a_batch_is_its_sequences(network(name, bidirectional), started)


@pytest.mark.parametrize("name", [name for name in ENCODERS if "short" not in name])
def test_padded_segments_one_after_the_other_are_the_sequences(name):
    encoder, state = network(name, False), None
    found, sequences = ([[] for _ in range(3)] for _ in range(2))
    for lengths in ([3, 0, 2], [0, 4, 1], [2, 2, 0], [1, 1, 1]):
        x = torch.randn(max(lengths), 3, 5, dtype=torch.float64)
        h, state = encoder(x, state, padding(lengths))
        for b, length in enumerate(lengths):
            found[b].append(h[:length, b])
            sequences[b].append(x[:length, b])
    for parts, sequence in zip(found, sequences, strict=True):
        torch.testing.assert_close(torch.cat(parts), encoder(torch.cat(sequence)[:, None])[0][:, 0])


@pytest.mark.parametrize("started", [False, True], ids=["from the start", "later"])
@BOTH_WAYS
@pytest.mark.parametrize("name", ["lstm", "lstm_one_layer", "gru"])
def test_packed_sequences_as_on_a_gpu_give_the_same(monkeypatch, name, bidirectional, started):
    encoder = network(name, bidirectional)
    monkeypatch.setattr(encoder, "run_padded", encoder.run_packed)
    assert_a_batch_is_its_sequences(encoder, started)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@BOTH_WAYS
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_torchs_packed_sequences_agree(name, bidirectional, dtype):
    encoder, x = network(name, bidirectional).to(dtype), torch.randn(20, 3, 5, dtype=dtype)
    lengths = [20, 13, 1]
    packed, expected = encoder.rnn(pack_padded_sequence(x, lengths))
    h, state = encoder(x, None, padding(lengths))
    torch.testing.assert_close(h, pad_packed_sequence(packed)[0])
    torch.testing.assert_close(state, expected)
    assert [a.shape for a in state] == [a.shape for a in encoder(x)[1]]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "value"), [*((n, 1e30) for n in ENCODERS), *((n, float("nan")) for n in ENCODERS if n != "sru")]
)
def test_values_in_the_padding_are_not_read(name, value, bidirectional):
    encoder, x, pad = network(name, bidirectional).float(), torch.randn(7, 5, 5), padding(LENGTHS)
    found = []
    for number in (0.0, value):
        encoder.zero_grad()
        x = x.masked_fill(pad[:, :, None], number).requires_grad_()
        h, _ = encoder(x, None, pad)
        h.square().sum().backward()
        found.append([h, *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@BOTH_WAYS
@EVERY
def test_a_batch_without_padding_needs_no_mask(name, bidirectional):
    encoder, x = network(name, bidirectional), torch.randn(6, 2, 5, dtype=torch.float64)
    expected = encoder(x)[0]
    for dtype in (torch.bool, torch.int64):
        h, state = encoder(x, None, torch.zeros(6, 2, dtype=dtype))
        torch.testing.assert_close(h, expected)
        torch.testing.assert_close(encoder(x, state)[0], encoder(x, encoder(x)[1])[0])


@BOTH_WAYS
@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith(("cnn", "lstm_one"))])
def test_dropout_keeps_padding_at_zero(name, bidirectional):
    encoder, pad = network(name, bidirectional, dropout=0.5).train(), padding(LENGTHS)
    x = torch.randn(7, 5, 5, dtype=torch.float64, requires_grad=True)
    h, _ = encoder(x, None, pad)
    h.sum().backward()
    assert not h[pad].any()
    assert x.grad.isfinite().all()
    assert not torch.equal(encoder(x, None, pad)[0], h)
    torch.testing.assert_close(encoder.eval()(x, None, pad)[0], encoder(x, None, pad)[0], rtol=0, atol=0)


@pytest.mark.parametrize("cls", [LSTM, GRU])
def test_dropout_of_a_padded_batch_falls_between_the_layers(cls):
    encoder, pad = cls(5, 6, 2, dropout=0.5, bidirectional=True).double(), padding([9, 6])
    second = cls(12, 6, 1, bidirectional=True).double()
    for own, theirs in zip(second.rnn.all_weights, encoder.rnn.all_weights[2:], strict=True):
        for a, b in zip(own, theirs, strict=True):
            a.data = b.data
    first = cls(5, 6, 1, bidirectional=True).double()
    first.rnn.load_state_dict({k: v for k, v in encoder.rnn.state_dict().items() if "_l0" in k})
    x = torch.randn(9, 2, 5, dtype=torch.float64)
    torch.manual_seed(5)
    h, _ = encoder(x, None, pad)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(first(x, None, pad)[0], 0.5)
    torch.testing.assert_close(h, second(dropped, None, pad)[0])


@BOTH_WAYS
@EVERY
def test_a_batch_of_padding_alone_or_of_nothing(name, bidirectional):
    encoder = network(name, bidirectional)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    h, state = encoder(x, None, torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(encoder(x, state)[0], encoder(x)[0])
    h.sum().backward()
    assert not h.any()
    assert not x.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())
    shapes = [(3, 0)] if name.startswith(("lstm", "gru")) else [(3, 0), (0, 2)]  # torch's take no sequence of no steps
    for shape in shapes:
        h, _ = encoder(x.new_zeros(*shape, 5), None, torch.zeros(shape, dtype=torch.bool))
        assert h.shape == (*shape, encoder.output_size)


def test_backwards_twice_is_the_sequence():
    x, lengths = torch.randn(7, 5, 2), torch.tensor(LENGTHS)
    once = reverse(x, lengths)
    assert torch.equal(once[:3, 0], x[:3, 0].flip(0))
    assert torch.equal(once[3:, 0], x[3:, 0])
    assert torch.equal(reverse(once, lengths), x)
    assert torch.equal(reverse(x, None), x.flip(0))


@BOTH_WAYS
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("sru", "srupp", "srupp_short_memory")])
def test_autocast_runs_in_bfloat16(name, bidirectional):
    encoder, x, pad = network(name, bidirectional).float(), torch.randn(7, 5, 5), padding(LENGTHS)
    expected, _ = encoder(x, None, pad)
    with torch.autocast("cpu", torch.bfloat16):
        h, state = encoder(x, None, pad)
        encoder(x, state, pad)
    assert (h - expected).abs().max() < 0.3
    h.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@EVERY
def test_a_bad_mask_is_refused(name):
    encoder, x = network(name, True), torch.randn(3, 2, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask_pad must be \(T, B\) = \(3, 2\), not \(2, 3\)"):
        encoder(x, None, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask_pad must be a tensor \(T, B\), not list"):
        encoder(x, None, [3, 2])
    if not name.startswith(("sru", "qrnn", "transformer")):
        with pytest.raises(ValueError, match="padding before a real step: pad sequences at their end"):
            encoder(x, None, torch.tensor([[True, False], [False, False], [False, False]]))
