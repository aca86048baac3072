"""The SRU as a drop-in for torch.nn.LSTM and for the official package: inputs, states, options, and what is refused."""

import inspect
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from sru import SRU, SRUCell, presets

BOTH_WAYS = pytest.mark.parametrize("bidirectional", [False, True])
LENGTHS = [5, 7, 0, 1]


def network(**options) -> SRU:
    return SRU(4, 6, 3, **options).double().eval()


def sequences(lengths=LENGTHS):
    return [torch.randn(length, 4, dtype=torch.float64) for length in lengths]


# Inputs


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


@BOTH_WAYS
def test_a_packed_sequence_is_handled_as_torch_handles_it(bidirectional):
    """The LSTM of torch says which sequence a state belongs to."""
    lstm = nn.LSTM(4, 6, bidirectional=bidirectional).double()
    stack = SRU(4, 6, 1, bidirectional=bidirectional, nn_rnn_compatible_return=True).double()
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 7, 4]), enforce_sorted=False)
    (theirs, (_, their_c)), (ours, our_c) = lstm(packed), stack(packed)
    assert torch.equal(theirs.batch_sizes, ours.batch_sizes)
    assert torch.equal(theirs.unsorted_indices, ours.unsorted_indices)
    assert their_c.shape == our_c.shape
    assert ours.data.shape == theirs.data.shape


@BOTH_WAYS
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"layer_norm": True, "normalize_after": True}])
def test_padding_equals_each_sequence_alone(bidirectional, options):
    stack = network(bidirectional=bidirectional, **options)
    items = sequences()
    x = torch.full((8, 4, 4), torch.nan, dtype=torch.float64).nan_to_num(9.0)
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


# States


@BOTH_WAYS
@pytest.mark.parametrize("compatible", [False, True])
def test_what_comes_out_goes_back_in(bidirectional, compatible):
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
        ({}, (torch.zeros(3, 2, 6),) * 2, TypeError, "not a tuple: an SRU carries c alone"),
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
def test_a_state_that_does_not_fit_is_refused_with_the_right_one(options, state, error, message):
    with pytest.raises(error, match=message):
        SRU(4, 6, 3, **options)(torch.zeros(5, 2, 4), state)


# Options


def test_projection_is_a_matrix_before_the_others():
    torch.manual_seed(0)
    narrow, wide = SRUCell(8, 6, projection_size=3).double(), SRUCell(8, 6).double()
    with torch.no_grad():
        wide.weight.copy_(narrow.weight @ narrow.weight_proj)
        wide.v.copy_(narrow.v)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(narrow(x)[0], wide(x)[0])
    assert [layer.projection_size for layer in SRU(8, 6, 2, projection_size=[0, 3]).layers] == [0, 3]


@pytest.mark.parametrize("sizes", [(4, 6), (6, 6)])
def test_a_module_takes_the_place_of_the_matrices(sizes):
    cell = SRUCell(*sizes).double()
    module = nn.Linear(sizes[0], cell.matrices * 6, bias=False).double()
    with torch.no_grad():  # column by column
        module.weight.copy_(cell.weight.view(cell.matrices, 6, -1).transpose(0, 1).flatten(0, 1))
    other = SRUCell(*sizes, transform_module=module).double()
    other.v, other.bias = cell.v, cell.bias
    x = torch.randn(5, 2, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(other(x)[0], cell(x)[0])
    other(x)[0].sum().backward()
    assert module.weight.grad.abs().sum() > 0


def test_modules_are_one_a_layer():
    first, second = nn.Linear(4, 24), nn.Linear(6, 18)
    stack = SRU(4, 6, 2, transform_module=[first, second])
    assert stack[0].transform_module is first
    assert stack[1].transform_module is second
    assert SRU(4, 6, 2, transform_module=(None, second))[0].weight.shape == (24, 4)
    shared = SRU(6, 6, 2, custom_m=second)
    assert shared[0].transform_module is second
    assert shared[1].transform_module is not second


def test_a_module_with_a_wrong_output_is_named():
    with pytest.raises(ValueError, match=r"transform_module must return a tensor \(5, 2, 24\) .* not \(5, 2, 7\)"):
        SRUCell(4, 6, transform_module=nn.Linear(4, 7))(torch.zeros(5, 2, 4))
    with pytest.raises(ValueError, match="not tuple"):
        SRUCell(4, 6, transform_module=nn.LSTM(4, 24))(torch.zeros(5, 2, 4))


def test_layer_norm_comes_before_the_matrices_or_after_the_layer():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    plain = SRUCell(6, 6, rescale=False).double()
    before = SRUCell(6, 6, rescale=False, layer_norm=True).double()
    after = SRUCell(6, 6, rescale=False, layer_norm=True, normalize_after=True).double()
    for cell in (before, after):
        cell.weight, cell.v, cell.bias = plain.weight, plain.v, plain.bias
    torch.testing.assert_close(after(x)[0], nn.functional.layer_norm(plain(x)[0], (6,)))
    # The highway goes past the norm: with closed reset gates the input comes out as it was.
    before.bias = nn.Parameter(torch.tensor([[0.0] * 6, [-1e3] * 6], dtype=torch.float64))
    torch.testing.assert_close(before(x)[0], x)


@pytest.mark.parametrize(("activation", "g"), [("tanh", torch.tanh), ("relu", torch.relu), ("identity", lambda c: c)])
def test_the_activation_shapes_the_output_alone(activation, g):
    cell = SRUCell(4, 6, activation=activation, has_skip_term=False).double()
    cell.bias = nn.Parameter(torch.tensor([[0.0] * 6, [1e3] * 6], dtype=torch.float64))  # open reset gates
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    h, c = cell(x)
    torch.testing.assert_close(h[-1], g(c))


def test_variational_dropout_masks_the_matrices_input_and_not_the_highway():
    torch.manual_seed(0)
    cell = SRUCell(64, 64, rnn_dropout=0.5, rescale=False)
    cell.bias = nn.Parameter(torch.tensor([[0.0] * 64, [-1e3] * 64]))
    x = torch.randn(7, 3, 64)
    torch.testing.assert_close(cell(x)[0], x)
    seen = []
    cell = SRUCell(64, 64, rnn_dropout=0.5, transform_module=nn.Linear(64, 192))
    cell.transform_module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] / x))
    cell(x)
    assert torch.equal(seen[0][0].round(), seen[0].round().amax(0))  # one mask for all steps
    assert set(seen[0].round().unique().tolist()) == {0.0, 2.0}
    cell.eval()(x)
    torch.testing.assert_close(seen[1], torch.ones_like(x))


def test_zoneout_keeps_states_at_random_in_training_and_in_the_mean_in_evaluation():
    torch.manual_seed(0)
    cell = SRUCell(3, 4, zoneout=0.3, has_vc_term=False).double()
    x = torch.randn(1, 1, 3, dtype=torch.float64).expand(1, 100_000, 3)
    c0 = torch.randn(1, 4, dtype=torch.float64).expand(100_000, 4)
    _, c = cell(x, c0)
    kept = (c - c0).abs() < 1e-12
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(c.mean(0), cell.eval()(x, c0)[1][0], rtol=0.03, atol=0.01)


def test_weight_c_init_bounds_v():
    assert SRUCell(4, 500, weight_c_init=0.1).v.abs().max().item() == pytest.approx(0.1, rel=0.02)


def test_dropout_without_gradients_is_monte_carlo_dropout():
    stack, x = SRU(4, 6, 3, dropout=0.5), torch.randn(5, 2, 4)
    with torch.no_grad():
        assert not torch.equal(stack(x)[0], stack(x)[0])
        assert torch.equal(stack.eval()(x)[0], stack(x)[0])


@pytest.mark.parametrize("name", presets)
def test_a_preset_is_a_set_of_options(name):
    h, _ = SRU(8, 8, 3, **presets[name])(torch.randn(4, 2, 8))
    assert h.isfinite().all()


def test_the_official_names_of_our_options():
    cell = SRUCell(8, 8, use_tanh=True, v1=True, n_proj=3, amp_recurrence_fp16=True)
    assert (cell.activation, cell.has_vc_term, cell.projection_size) == ("tanh", False, 3)
    stack = SRU(8, 8, 2, bidirectional=True, layer_norm=True)
    assert (stack.num_directions, stack.output_size, len(stack.rnn_lst)) == (2, 16, 2)
    assert stack.flatten_parameters() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_relu": True}, "SRU has no use_relu: the official package dropped it after version 2.1.8"),
        ({"proj_size": 2}, "projection_size narrows the matrices"),
        ({"num_layer": 2}, "SRU has no argument num_layer: did you mean num_layers?"),
        ({"weight_norm": True}, "after version 2.1.7"),
        ({"n_proj": 3}, "it is called projection_size"),
        ({"bidirectonal": True}, "did you mean bidirectional?"),
        ({"whatever": 1}, "it takes input_size, hidden_size"),
    ],
)
def test_an_unknown_argument_is_answered(options, message):
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        SRU(4, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_module": [None]}, "transform_module must have one entry for each of 2 layers, not 1"),
        ({"projection_size": [1, 2, 3]}, "projection_size must have one entry for each of 2 layers, not 3"),
        ({"projection_size": 2, "transform_module": nn.Identity()}, "exclude each other"),
        ({"custom_m": nn.Identity(), "transform_module": nn.Identity()}, "give one of them"),
        ({"use_tanh": True, "activation": "relu"}, "contradict each other"),
        ({"rnn_dropout": 1.0}, r"rnn_dropout must lie in \[0, 1\), not 1.0"),
        ({"zoneout": -0.1}, "zoneout must lie"),
        ({"activation": "selu"}, "activation must be one of identity, tanh, relu, not 'selu'"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_a_wrong_option_is_refused_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        SRU(4, 4, 2, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s(x, lengths=[1, 2]), "lengths must be 3 integers"),
        (lambda s, x: s(x, lengths=[1, 2, 6]), "lengths must lie in 0 to 5"),
        (lambda s, x: s(x, lengths=[-1, 2, 5]), "lengths must lie in 0 to 5"),
        (lambda s, x: s(x, lengths=[1.0, 2.0, 3.0]), "integers"),
        (lambda s, x: s(x, lengths=[1, 2, 3], mask_pad=torch.zeros(5, 3)), "either lengths or mask_pad"),
        (lambda s, x: s(x, mask_pad=torch.zeros(3, 5)), r"mask_pad must be \(T, B\)"),
        (lambda s, x: s(pack_padded_sequence(x, [5, 4, 3]), lengths=[5, 4, 3]), "knows its lengths"),
        (lambda s, x: s(x.transpose(0, 2)), "input_size = 4 features, not 5"),
        (lambda s, x: SRU(4, 4, bidirectional=True).step(x[0]), "it has no step"),
        (lambda s, x: s.step(x), r"\(B, 4\) or \(4,\)"),
    ],
)
def test_a_wrong_call_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(SRU(4, 4), torch.zeros(5, 3, 4))


def test_what_is_printed_can_be_typed():
    cell = SRUCell(4, 6, bidirectional=True, highway_bias=-2.0, projection_size=3, activation="tanh")
    text = str(cell)
    assert text == "SRUCell(4, 6, bidirectional=True, projection_size=3, activation='tanh', highway_bias=-2.0)"
    assert str(eval(text)) == text


def test_the_signature_of_the_stack_names_every_option():
    names = set(inspect.signature(SRU).parameters)
    assert {"dropout", "bidirectional", "highway_bias", "batch_first", "projection_size"} <= names
    assert set(inspect.signature(SRUCell).parameters) - names == {"unknown", "n_proj"}


def test_parameters_are_made_where_and_as_they_are_wanted():
    stack = SRU(4, 6, 2, proj_input_to_hidden_first=True, layer_norm=True, v1=True, device="meta", dtype=torch.float64)
    tensors = [*stack.parameters(), *stack.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.float64)}
    filled = SRU(4, 6, 2, proj_input_to_hidden_first=True, layer_norm=True, v1=True, dtype=torch.float64)
    stack.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.equal(stack(x)[0], filled(x)[0])


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"x is torch.float64, the layer torch.float32"):
        SRU(4, 4)(torch.zeros(3, 2, 4, dtype=torch.float64))


def test_a_half_precision_file_keeps_alpha():
    stack = SRU(4, 4, 2)
    stack.load_state_dict(SRU(4, 4, 2).half().state_dict())
    assert stack[0].alpha == SRU(4, 4)[0].alpha


def test_resetting_draws_again():
    with torch.device("meta"):
        empty = SRU(4, 4, 1, v1=True).to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty[0].scale_x, torch.tensor([empty[0].alpha]))
    assert empty[0].v.eq(0).all()
    stack = SRU(4, 6, 2, proj_input_to_hidden_first=True, layer_norm=True, projection_size=2)
    before = {name: parameter.clone() for name, parameter in stack.named_parameters()}
    stack.reset_parameters()
    same = {name for name, parameter in stack.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {f"layers.{i}.{name}" for i in (0, 1) for name in ("bias", "layer_norm.weight", "layer_norm.bias")}


# Numbers


OPTIONS = {
    "plain": {},
    "same_size": {"input_size": 3},
    "bidirectional": {"bidirectional": True},
    "tanh": {"activation": "tanh"},
    "relu": {"activation": "relu"},
    "no_skip": {"has_skip_term": False},
    "no_vc": {"has_vc_term": False},
    "projection": {"projection_size": 2},
    "norm": {"layer_norm": True},
    "norm_after": {"layer_norm": True, "normalize_after": True},
    "input_to_hidden": {"proj_input_to_hidden_first": True},
    "zoneout": {"zoneout": 0.3},
    "highway": {"highway_bias": -2.0, "rescale": True},
}


@pytest.mark.parametrize(("name", "backend"), list(itertools.product(OPTIONS, ["cpu", "reference"])))
def test_every_gradient_is_the_slope(name, backend):
    options = {"input_size": 2} | OPTIONS[name]
    stack = SRU(hidden_size=3, num_layers=2, backend=backend, **options).double().eval()
    x = torch.randn(4, 2, options["input_size"], dtype=torch.float64, requires_grad=True)
    c0 = torch.randn(2, 2, stack.output_size, dtype=torch.float64, requires_grad=True)
    pad = torch.tensor([[0, 1], [0, 0], [0, 0], [1, 0]]).bool()
    names, values = zip(*stack.named_parameters(), strict=True)

    def call(x, c0, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x, c0, pad))

    assert torch.autograd.gradcheck(call, (x, c0, *values))


@pytest.mark.parametrize("name", ["plain", "same_size", "bidirectional", "tanh", "no_skip", "zoneout"])
def test_the_gradient_has_a_gradient(name):
    options = {"input_size": 2} | OPTIONS[name]
    stack = SRU(hidden_size=3, num_layers=1, **options).double().eval()
    x = torch.randn(3, 2, options["input_size"], dtype=torch.float64, requires_grad=True)
    pad = torch.tensor([[0, 1], [0, 0], [1, 0]]).bool()
    assert torch.autograd.gradgradcheck(lambda x: stack(x, mask_pad=pad), x)
    # A penalty on the gradient, where nothing that flows back into the recurrence asks for a gradient itself.
    found = []
    for backend in ("cpu", "reference"):
        stack[0].backend = backend
        (grad,) = torch.autograd.grad(stack(x)[0].sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, *stack.parameters()), materialize_grads=True))
    torch.testing.assert_close(*found)


def test_a_run_repeats_to_the_bit():
    stack, x = SRU(32, 64, 2, bidirectional=True), torch.randn(70, 9, 32)

    def run():
        stack.zero_grad()
        h, c = stack(x)
        (h.sum() + c.sum()).backward()
        return [h, c, *(p.grad.clone() for p in stack.parameters())]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_memory_is_flat_over_a_thousand_steps(grad):
    code = f"""
import resource, torch
from sru import SRU
stack, x = SRU(64, 64, 2), torch.randn(8, 64)
def run(n):
    state = None
    for _ in range(n):
        with torch.set_grad_enabled({grad}):
            h, state = stack.step(x, state)
            if {grad}:
                h.sum().backward()
                state = state.detach()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(100)
print(run(1000) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096  # KiB


def test_eight_threads_at_once_get_the_bits_of_one():
    stack, x = SRU(32, 64, 2), torch.randn(40, 8, 32)
    parameters = list(stack.parameters())

    def run(_=None):
        h, c = stack(x)
        return [h, c, *torch.autograd.grad(h.sum() + c.sum(), parameters)]

    expected = run()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(run, range(32)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Encoded(torch.utils.data.Dataset):
    """Items that a worker computes with a network of its parent."""

    def __init__(self, network):
        self.network = network

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return self.network(torch.full((20, 4, 8), float(i)))[0]


def test_a_forked_loader_worker_computes_what_its_parent_does():
    network = SRU(8, 16, 2)
    items = Encoded(network)
    expected = [items[i] for i in range(4)]  # the parent has computed, with its threads, before the fork
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, value in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, value)
