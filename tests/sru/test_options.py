"""What each option of the SRU does, and what is refused."""

import inspect
import re

import pytest
import torch
from torch import nn

from sru import SRU, SRUCell, official_format, presets


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
def test_a_module_replaces_the_matrices(sizes):
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


def test_every_layer_gets_its_own_module():
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
    kept = c == c0
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(c.mean(0), cell.eval()(x, c0)[1][0], rtol=0.03, atol=0.01)


def test_weight_c_init_bounds_v():
    assert SRUCell(4, 500, weight_c_init=0.1).v.abs().max().item() == pytest.approx(0.1, rel=0.02)


def test_dropout_without_gradients_is_monte_carlo_dropout():
    stack, x = SRU(4, 6, 3, dropout=0.5), torch.randn(5, 2, 4)
    with torch.no_grad():
        assert not torch.equal(stack(x)[0], stack(x)[0])
        assert torch.equal(stack.eval()(x)[0], stack(x)[0])


PRESETS = {  # the papers' settings, written out
    "classification": {"dropout": 0.5},
    "language_modelling": {"dropout": 0.2, "highway_bias": -3.0, "projection_size": 512},
    "deep": {"dropout": 0.1, "highway_bias": -2.0, "layer_norm": True},
    "speech": {"dropout": 0.1, "rnn_dropout": 0.1, "highway_bias": -1.0, "projection_size": 256},
}


@pytest.mark.parametrize("name", sorted(presets.keys() | PRESETS))
def test_a_preset_is_a_set_of_options(name):
    x, networks = torch.randn(4, 2, 8), []
    for options in (presets[name], PRESETS[name]):
        torch.manual_seed(1)
        networks.append(SRU(8, 8, 3, **options))
    one, two = networks
    for mine, expected in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, expected)
    for train in (True, False):
        found = []
        for network in networks:
            torch.manual_seed(2)
            found.append(network.train(train)(x)[0])
        assert torch.equal(*found)
        assert found[0].isfinite().all()
    # What the bias is for: a highway that is open, or half open, at the start.
    bias = PRESETS[name].get("highway_bias", 0.0)
    assert all(torch.equal(layer.bias[8:], torch.full((8,), bias)) and bias <= 0 for layer in one.layers)


def test_the_official_names_of_our_options():
    cell = SRUCell(8, 8, use_tanh=True, v1=True, n_proj=3, amp_recurrence_fp16=True)
    assert (cell.activation, cell.has_vc_term, cell.projection_size) == ("tanh", False, 3)
    stack = SRU(8, 8, 2, bidirectional=True, layer_norm=True)
    assert (stack.num_directions, stack.output_size, len(stack.rnn_lst)) == (2, 16, 2)
    assert stack.flatten_parameters() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_relu": True}, "SRU has no argument use_relu: the official package dropped it after version 2.1.8"),
        ({"proj_size": 2}, "projection_size narrows the matrices"),
        ({"bias": True}, "SRU has no argument bias: .* always has a bias, .*: leave bias out"),
        ({"num_layer": 2}, "SRU has no argument num_layer: did you mean num_layers?"),
        ({"weight_norm": True}, "after version 2.1.7"),
        ({"n_proj": 3}, "it is called projection_size"),
        ({"bidirectonal": True}, "did you mean bidirectional?"),
        ({"whatever": 1}, "it takes input_size, hidden_size"),
    ],
)
def test_an_unknown_argument_is_refused_with_a_hint(options, message):
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        SRU(4, 4, **options)


@pytest.mark.parametrize("network", [SRU(4, 4), SRUCell(4, 4)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hx": torch.zeros(2, 4)}, "has no argument hx: the state is called c0 here; it is c alone, not (h, c)"),
        ({"mask_pads": None}, "has no argument mask_pads: did you mean mask_pad?"),
        ({"training": True}, "has no argument training: it takes x, c0, mask_pad"),
    ],
)
def test_an_unknown_argument_of_a_call_is_refused_with_a_hint(network, arguments, message):
    with pytest.raises(TypeError, match=re.escape(f"{type(network).__name__}.forward {message}")):
        network(torch.zeros(3, 2, 4), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_module": [None]}, "transform_module must have one entry for each of 2 layers, not 1"),
        ({"projection_size": [1, 2, 3]}, "projection_size must have one entry for each of 2 layers, not 3"),
        ({"projection_size": 2, "transform_module": nn.Identity()}, "exclude each other"),
        ({"custom_m": nn.Identity(), "transform_module": nn.Identity()}, "pass one of them"),
        ({"use_tanh": True, "activation": "relu"}, "contradict each other"),
        ({"projection_size": -1}, "projection_size must be a whole number of at least 0, not -1"),
        ({"rnn_dropout": 1.0}, r"rnn_dropout must lie in \[0, 1\), not 1.0"),
        ({"zoneout": -0.1}, "zoneout must lie"),
        ({"activation": "selu"}, "activation must be one of identity, tanh, relu, not 'selu'"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"hidden_size": 2.5}, "hidden_size must be a whole number of at least 1, not 2.5"),
        ({"hidden_size": True}, "not True"),
        ({"num_layers": "2"}, "num_layers must be a whole number"),
        ({"projection_size": None}, "projection_size must be a whole number of at least 0, not None"),
        ({"bidirectional": "no"}, "bidirectional must be True or False, not 'no'"),
        ({"batch_first": "False"}, "batch_first must be True or False"),
        ({"highway_bias": float("nan")}, "highway_bias must be a number from -80 to 80, not nan"),
        ({"highway_bias": 1000.0}, "highway_bias must be"),
        ({"dropout": "0.5"}, r"dropout must lie in \[0, 1\), not '0.5'"),
        ({"weight_c_init": -1.0}, "weight_c_init must be None or at least 0"),
        ({"dtype": torch.int64}, "dtype must be a floating-point type"),
    ],
)
def test_a_wrong_option_is_refused_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        SRU(**{"input_size": 4, "hidden_size": 4, "num_layers": 2} | options)


def test_a_transform_module_must_be_a_module():
    with pytest.raises(TypeError, match=r"transform_module must be a torch.nn.Module, not <class"):
        SRU(4, 4, 2, transform_module=nn.Linear)


def test_the_printed_layer_is_valid_python():
    cell = SRUCell(4, 6, bidirectional=True, highway_bias=-2.0, projection_size=3, activation="tanh")
    text = str(cell)
    assert text == "SRUCell(4, 6, bidirectional=True, projection_size=3, activation='tanh', highway_bias=-2.0)"
    assert str(eval(text)) == text


def test_the_signature_of_the_stack_names_every_option():
    names = set(inspect.signature(SRU).parameters)
    assert {"dropout", "bidirectional", "highway_bias", "batch_first", "projection_size"} <= names
    assert set(inspect.signature(SRUCell).parameters) <= names


def test_parameters_have_the_given_device_and_dtype():
    stack = SRU(4, 6, 2, proj_input_to_hidden_first=True, layer_norm=True, v1=True, device="meta", dtype=torch.float64)
    tensors = [*stack.parameters(), *stack.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.float64)}
    filled = SRU(4, 6, 2, proj_input_to_hidden_first=True, layer_norm=True, v1=True, dtype=torch.float64)
    stack.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.equal(stack(x)[0], filled(x)[0])


def test_an_input_of_another_dtype_is_refused():
    for options in ({}, {"proj_input_to_hidden_first": True}):
        with pytest.raises(TypeError, match=r"x is torch.float64, the layer torch.float32"):
            SRU(4, 4, **options)(torch.zeros(3, 2, 4, dtype=torch.float64))


def test_alpha_is_the_value_of_the_buffer():
    """Whoever writes the buffer: DDP's broadcast, an average of models, another network's parameters."""
    x = torch.randn(5, 2, 4)
    deep, plain = SRU(4, 4, 1, highway_bias=-3.0), SRU(4, 4, 1)
    found, _ = torch.func.functional_call(plain, deep.state_dict(), (x,))
    torch.testing.assert_close(found, deep(x)[0])
    torch.testing.assert_close(plain[0].alpha, SRU(4, 4, 1)[0].alpha)
    with torch.no_grad():
        for mine, theirs in zip(plain.state_dict().values(), deep.state_dict().values(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(plain(x)[0], deep(x)[0])
    average = torch.optim.swa_utils.AveragedModel(SRU(4, 4, 1), use_buffers=True)
    average.update_parameters(deep)
    torch.testing.assert_close(average(x)[0], deep(x)[0])


def test_a_file_with_a_state_in_the_gates_does_not_fit_a_cell_without():
    with pytest.raises(ValueError, match="has_vc_term=True"):
        SRU(4, 4, 1, v1=True).load_state_dict(SRU(4, 4, 1).state_dict())


@pytest.mark.parametrize(("value", "message"), [([float("nan")], "positive number"), ([1.0, 1.0], "size mismatch")])
def test_an_invalid_alpha_is_refused(value, message):
    state = SRU(4, 4, 1).state_dict() | {"layers.0.scale_x": torch.tensor(value)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        SRU(4, 4, 1).load_state_dict(state)


def test_a_half_precision_file_keeps_alpha():
    stack = SRU(4, 4, 2)
    stack.load_state_dict(SRU(4, 4, 2).half().state_dict())
    assert stack[0].alpha == SRU(4, 4)[0].alpha


def test_reset_parameters_draws_again():
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


def test_the_stack_lists_the_official_options_that_it_accepts():
    assert {*SRU.official_options} == official_format.OPTIONS.keys() - {"n_proj"}
