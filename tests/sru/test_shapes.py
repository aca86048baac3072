"""Inputs and states of the SRU in every layout: a drop-in for torch.nn.LSTM."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from sru import SRU, SRUCell

BOTH_WAYS = pytest.mark.parametrize("bidirectional", [False, True])
LENGTHS = [5, 7, 0, 1]


def network(**options) -> SRU:
    return SRU(4, 6, 3, **options).double().eval()


def sequences(lengths=LENGTHS):
    return [torch.randn(length, 4, dtype=torch.float64) for length in lengths]


@BOTH_WAYS
def test_batch_first_is_the_same_sequence(bidirectional):
    plain, first = (network(bidirectional=bidirectional, batch_first=flag) for flag in (False, True))
    first.load_state_dict(plain.state_dict())
    x, pad = torch.randn(5, 3, 4, dtype=torch.float64), torch.rand(5, 3) < 0.3
    h, c = plain(x, mask_pad=pad)
    h_first, c_first = first(x.transpose(0, 1), mask_pad=pad.t())
    torch.testing.assert_close(h_first.transpose(0, 1), h)
    torch.testing.assert_close(c_first, c)


@BOTH_WAYS
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("compatible", [False, True])
def test_a_sequence_needs_no_batch(bidirectional, batch_first, compatible):
    stack = network(bidirectional=bidirectional, batch_first=batch_first, nn_rnn_compatible_return=compatible)
    x = torch.randn(5, 4, dtype=torch.float64)
    h, c = stack(x)
    batched, last = stack(x[None] if batch_first else x[:, None])
    assert torch.equal(h, batched.squeeze(0 if batch_first else 1))
    assert torch.equal(c, last[:, 0])
    again, _ = stack(x, c)
    assert torch.equal(again, stack(x[None] if batch_first else x[:, None], last)[0].squeeze(0 if batch_first else 1))


@BOTH_WAYS
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_packed_sequence_gives_what_each_sequence_gives_alone(bidirectional, enforce_sorted, batch_first):
    stack = network(bidirectional=bidirectional, batch_first=batch_first)
    items = sequences([7, 5, 1] if enforce_sorted else [5, 7, 1])
    c0 = torch.randn(3, 3, stack.output_size, dtype=torch.float64)
    packed = pack_sequence(items, enforce_sorted=enforce_sorted)
    h, c = stack(packed, c0)
    assert torch.equal(h.batch_sizes, packed.batch_sizes)
    padded, lengths = pad_packed_sequence(h)
    assert lengths.tolist() == [len(item) for item in items]
    for b, item in enumerate(items):
        alone, last = stack(item, c0[:, b])
        torch.testing.assert_close(padded[: len(item), b], alone)
        torch.testing.assert_close(c[:, b], last)


def test_a_packed_sequence_is_handled_as_torch_handles_it():
    """The last output of a sequence is where the LSTM of torch has it, and the state in the same order."""
    lstm, stack = nn.LSTM(4, 6).double(), SRU(4, 6, 1, has_skip_term=False).double()
    with torch.no_grad():  # an open reset gate, so that h is c
        stack[0].v.chunk(2)[1].zero_()
        stack[0].bias.chunk(2)[1].fill_(1e3)
    packed = pack_padded_sequence(torch.randn(7, 3, 4, dtype=torch.float64), [2, 7, 4], enforce_sorted=False)
    for network in (lstm, stack):
        h, state = network(packed)
        padded, lengths = pad_packed_sequence(h)
        last = state[0] if network is lstm else state
        for b, length in enumerate(lengths):
            torch.testing.assert_close(last[0, b], padded[length - 1, b])


@BOTH_WAYS
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "normalize_after": True}])
def test_padding_equals_each_sequence_alone(bidirectional, options):
    stack = network(bidirectional=bidirectional, **options)
    items = sequences()
    x = torch.full((8, 4, 4), 9.0, dtype=torch.float64)
    for b, item in enumerate(items):
        x[: len(item), b] = item
    x.requires_grad_()
    c0 = torch.randn(3, 4, stack.output_size, dtype=torch.float64)
    h, c = stack(x, c0, lengths=LENGTHS)
    for b, item in enumerate(items):
        alone, last = stack(item, c0[:, b])
        torch.testing.assert_close(h[: len(item), b], alone)
        torch.testing.assert_close(c[:, b], last)
        assert h[len(item) :, b].eq(0).all()
    (h.sum() + c.sum()).backward()
    assert x.grad.isfinite().all()
    assert x.grad[:, 2].eq(0).all()
    assert torch.equal(c[:, 2], c0[:, 2])  # nothing but padding


def test_a_mask_of_numbers_is_a_mask():
    stack, x = network(), torch.randn(5, 2, 4, dtype=torch.float64)
    pad = torch.tensor([[0, 1]] * 5)
    expected = stack(x, mask_pad=pad.bool())[0]
    assert torch.equal(stack(x, mask_pad=pad)[0], expected)
    assert torch.equal(stack(x, mask_pad=pad.double())[0], expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 3, 4), (5, 0, 4), (5, 1, 4), (0, 0, 4)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "layer_norm": True}, {"zoneout": 0.1, "dropout": 0.2}])
def test_no_steps_and_no_sequences(shape, options):
    stack = SRU(4, 6, 3, **options)
    x = torch.randn(shape, requires_grad=True)
    h, c = stack(x)
    assert h.shape == (*shape[:2], stack.output_size)
    assert c.shape == (3, shape[1], stack.output_size)
    (h.sum() + c.sum()).backward()
    assert x.grad.shape == shape


def test_an_input_may_lie_in_memory_in_any_way():
    stack = network()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = stack(x)[0]
    for view in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, x], dim=-1)[..., 0],
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ):
        assert not view.is_contiguous()
        torch.testing.assert_close(stack(view)[0], expected)


@BOTH_WAYS
@pytest.mark.parametrize("compatible", [False, True])
def test_the_returned_state_can_be_passed_back(bidirectional, compatible):
    stack = network(bidirectional=bidirectional, nn_rnn_compatible_return=compatible)
    x = torch.randn(9, 2, 4, dtype=torch.float64)
    h, c = stack(x)
    shape = (6, 2, 6) if compatible and bidirectional else (3, 2, stack.output_size)
    assert c.shape == shape
    # In both layouts a state means the same to the network.
    other = network(bidirectional=bidirectional)
    other.load_state_dict(stack.state_dict())
    plain = c.view(3, -1, 2, 6).transpose(1, 2).reshape(3, 2, -1) if compatible and bidirectional else c
    torch.testing.assert_close(stack(x, c)[0], other(x, plain)[0])
    if not bidirectional:
        first, state = stack(x[:4])
        torch.testing.assert_close(torch.cat([first, stack(x[4:], state)[0]]), h)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"zoneout": 0.2}, {"proj_input_to_hidden_first": True}])
def test_steps_one_by_one_are_one_call(batch_first, options):
    stack = network(batch_first=batch_first, **options)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    whole, last = stack(x.transpose(0, 1) if batch_first else x)
    state, outputs = None, []
    for x_t in x:
        h, state = stack.step(x_t, state)
        outputs.append(h)
    torch.testing.assert_close(torch.stack(outputs, dim=1 if batch_first else 0), whole)
    torch.testing.assert_close(state, last)
    alone, single = stack.step(x[0, 0])
    torch.testing.assert_close(alone, outputs[0][0])
    assert single.shape == (3, 6)


def test_hooks_run_once():
    cell, calls = SRUCell(4, 4), []
    cell.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    cell(torch.zeros(2, 4))
    assert len(calls) == 1


def test_a_cell_takes_one_step_too():
    cell = SRUCell(4, 6)
    x = torch.randn(3, 2, 4)
    h, c = cell(x[0])
    assert h.shape == c.shape == (2, 6)
    torch.testing.assert_close(cell(x[1:], c)[0], cell(x)[0][1:])


@pytest.mark.parametrize(
    ("options", "state", "error", "message"),
    [
        ({}, torch.zeros(3, 6), ValueError, r"\(num_layers, B, output_size\) = \(3, 2, 6\), not \(3, 6\)"),
        ({}, torch.zeros(2, 3, 6), ValueError, r"not \(2, 3, 6\)"),
        ({}, (torch.zeros(3, 2, 6),) * 2, TypeError, "not tuple: the state of an SRU is c alone"),
        ({}, 0.0, TypeError, "not float"),
        ({}, torch.zeros(3, 2, 6, dtype=torch.float64), TypeError, "must be torch.float32 .* not torch.float64"),
        ({}, torch.zeros(3, 2, 6, device="meta"), ValueError, "c0 is on meta, x on cpu"),
        ({"bidirectional": True}, torch.zeros(6, 2, 6), ValueError, r"= \(3, 2, 12\), not \(6, 2, 6\)"),
        (
            {"bidirectional": True, "nn_rnn_compatible_return": True},
            torch.zeros(3, 2, 12),
            ValueError,
            r"\(num_layers \* directions, B, hidden_size\) = \(6, 2, 6\), not \(3, 2, 12\)",
        ),
    ],
)
def test_a_state_of_the_wrong_shape_is_refused_with_the_right_shape(options, state, error, message):
    stack = SRU(4, 6, 3, **options)
    with pytest.raises(error, match=message):
        stack(torch.zeros(5, 2, 4), state)
    for lengths in ([5, 4], [4, 5]):
        with pytest.raises(error, match=message):
            stack(pack_padded_sequence(torch.zeros(5, 2, 4), lengths, enforce_sorted=False), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s(x, lengths=[1, 2]), "lengths must be 3 integers"),
        (lambda s, x: s(x, lengths=[1, 2, 6]), "lengths must be from 0 to 5"),
        (lambda s, x: s(x, lengths=[-1, 2, 5]), "lengths must be from 0 to 5"),
        (lambda s, x: s(x, lengths=[1.0, 2.0, 3.0]), "integers"),
        (lambda s, x: s(x, lengths=[True, True, False]), "integers"),
        (lambda s, x: SRU(4, 4, proj_input_to_hidden_first=True)(pack_padded_sequence(x[..., 1:], [5, 4, 3])), "not 3"),
        (lambda s, x: s(x, lengths=[1, 2, 3], mask_pad=torch.zeros(5, 3)), "either lengths or mask_pad"),
        (lambda s, x: s(x, mask_pad=torch.zeros(3, 5)), r"mask_pad must be \(T, B\) = \(5, 3\), not \(3, 5\)"),
        (lambda s, x: s(x, mask_pad=torch.zeros(5, 3, device="meta")), "mask_pad is on meta, x on cpu"),
        (lambda s, x: s(pack_padded_sequence(x, [5, 4, 3]), lengths=[5, 4, 3]), "has its own lengths"),
        (lambda s, x: s(x.transpose(0, 2)), "input_size = 4 features, not 5"),
        (lambda s, x: SRU(4, 4, bidirectional=True).step(x[0]), "it has no step"),
        (lambda s, x: s.step(x), r"\(B, 4\) or \(4,\)"),
    ],
)
def test_a_wrong_call_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(SRU(4, 4), torch.zeros(5, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s([[0.0]]), "x must be a tensor, not list"),
        (lambda s, x: s[0](None), "x must be a tensor, not NoneType"),
        (lambda s, x: s(x, mask_pad=[[True]]), "mask_pad must be a tensor"),
        (lambda s, x: s(x.long()), "x is torch.int64"),
    ],
)
def test_an_input_that_is_not_a_tensor_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(SRU(4, 4), torch.zeros(5, 3, 4))


def test_no_sequences_have_no_lengths():
    assert SRU(4, 4)(torch.zeros(5, 0, 4), lengths=[])[0].shape == (5, 0, 4)
