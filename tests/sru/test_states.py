"""Every way to load parameters and every way to call a layer give the same output and gradient.

The scaling corrections and biases differ from those that the constructor would make.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.flop_counter import FlopCounterMode

from scripts import convert as script
from sru import SRU, SRUCell, SRUpp, convert

SIZES = 4, 4, 2  # equal sizes: the highway is scaled by alpha, no matrix projects it
ALPHAS = 0.7, 2.3  # of the two layers; no bias gives the first


def trained(seed=0, **options):
    """A network whose every number differs from what its constructor makes."""
    torch.manual_seed(seed)
    network = SRU(*SIZES, **options).double()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.normal_()
        for layer, alpha in zip(network.layers, ALPHAS, strict=True):
            layer.scale_x.fill_(alpha + 0.1 * seed)
    return network.eval()


def by_hand(state, x):
    """The paper's equations from a state dict of ours."""
    h = x
    for i in range(SIZES[2]):
        weight, v, b, alpha = (state[f"layers.{i}.{name}"] for name in ("weight", "v", "bias", "scale_x"))
        candidate, forget, reset = weight.chunk(3)
        (v_f, v_r), (b_f, b_r) = v.chunk(2), b.chunk(2)
        c, outputs = torch.zeros(x.shape[1], SIZES[1], dtype=x.dtype), []
        for h_t in h:
            f = torch.sigmoid(h_t @ forget.T + v_f * c + b_f)
            r = torch.sigmoid(h_t @ reset.T + v_r * c + b_r)
            c = f * c + (1 - f) * (h_t @ candidate.T)
            outputs.append(r * c + (1 - r) * alpha * h_t)
        h = torch.stack(outputs)
    return h


def loaded(state, **options):
    network = SRU(*SIZES).double().eval()
    network.load_state_dict(state, **options)
    return network


def through_the_script(state, tmp_path):
    torch.save(convert.to_official(loaded(state), "3.0.0.dev"), tmp_path / "in.pt")
    script.main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    return loaded(torch.load(tmp_path / "out.pt", weights_only=True))


def without_memory(state):
    with torch.device("meta"):
        network = SRU(*SIZES, dtype=torch.float64).eval()
    network = network.to_empty(device="cpu")
    network.load_state_dict(state)
    return network


def set_by_hand(state):
    network = loaded(state | {"layers.0.scale_x": torch.ones(1), "layers.1.scale_x": torch.ones(1)})
    network[0].scale_x = state["layers.0.scale_x"].clone()  # another tensor
    with torch.no_grad():
        network[1].scale_x.copy_(state["layers.1.scale_x"])  # the same one
    return network


def averaged(state):
    network = torch.optim.swa_utils.AveragedModel(SRU(*SIZES).double(), use_buffers=True)
    network.update_parameters(loaded(state))
    return network.module.eval()


# What brings a state, of the state dict.
STATES = {
    "load": loaded,
    "not strict": lambda state: loaded(state, strict=False),
    "assigned": lambda state: loaded(state, assign=True),
    "official 2.6.0": lambda state: loaded(convert.to_official(loaded(state), "2.6.0")),
    "official 3.0": lambda state: loaded(convert.to_official(loaded(state), "3.0.0.dev")),
    "script": through_the_script,
    "rows of gates": lambda state: loaded(
        {key: a.view(2, -1) if key.rpartition(".")[2] in ("v", "bias") else a for key, a in state.items()}
    ),
    "by hand": set_by_hand,
    "averaged": averaged,
    "copied": lambda state: copy.deepcopy(loaded(state)),
    "pickled": lambda state: pickle.loads(pickle.dumps(loaded(state))),
    "from meta": without_memory,
    "shared": lambda state: loaded(state).to("cpu").share_memory(),
}


def compiled(network, x, backend):
    torch._dynamo.reset()
    return torch.compile(network, backend=backend)(x)[0]


def exported(network, x):
    program = torch.export.export(network, (x,))
    return program.module()(x)[0]


def transposed_by_vmap(network, x):
    return torch.vmap(lambda sequence: network(sequence)[0], in_dims=1, out_dims=1)(x)


def among_others(network, x):
    """One of an ensemble whose members differ, under vmap."""
    members = [trained(1), network, trained(2)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def call(parameters, buffers):
        return functional_call(skeleton, (parameters, buffers), (x,))[0]

    outputs = torch.vmap(call)(parameters, buffers)
    for found, member in zip(outputs, members, strict=True):
        torch.testing.assert_close(found, member(x)[0])
    return outputs[1]


def counted(network, x):
    with FlopCounterMode(display=False):
        return network(x)[0]


def traced(network, x):
    # Checking the trace traces again, and optimising it makes a graph of gradients: torch never frees 10 MB a call.
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):
        warnings.simplefilter("ignore")
        return torch.jit.trace(network, (x,), check_trace=False)(x)[0]


def without_gradients(network, x):
    with torch.no_grad():
        return network(x)[0]


def in_inference(network, x):
    with torch.inference_mode():
        return network(x)[0]


# What runs a network.
WAYS = {
    "eager": lambda network, x: network(x)[0],
    "no_grad": without_gradients,
    "inference_mode": in_inference,
    "step by step": lambda network, x: by_steps(network, x),
    "compiled": lambda network, x: compiled(network, x, "aot_eager"),
    "exported": exported,
    "traced": traced,
    "vmap": transposed_by_vmap,
    "ensemble": among_others,
    "func.vjp": lambda network, x: torch.func.vjp(lambda y: network(y)[0], x)[0],
    "func.jvp": lambda network, x: torch.func.jvp(lambda y: network(y)[0], (x,), (x,))[0],
    "functional_call": lambda network, x: functional_call(trained(1), network.state_dict(), (x,))[0],
    "flop counter": counted,
    "reference": lambda network, x: with_backend(network, "reference")(x)[0],
}


def by_steps(network, x):
    state, outputs = None, []
    for x_t in x:
        h, state = network.step(x_t, state)
        outputs.append(h)
    return torch.stack(outputs)


def with_backend(network, backend):
    for layer in network.layers:
        layer.backend = backend
    return network


# Exporting takes seconds and does not depend on how the state came in: four ways to bring one are enough every time.
EXPORTED = "load", "by hand", "pickled", "from meta"
PAIRS = [
    pytest.param(bring, way, marks=[pytest.mark.slow] if way == "exported" and bring not in EXPORTED else [])
    for bring in STATES
    for way in WAYS
]


@pytest.mark.parametrize(("bring", "way"), PAIRS)
def test_every_way_to_call_a_layer_uses_the_loaded_numbers(bring, way, tmp_path):
    state = trained().state_dict()
    x = torch.randn(5, 3, SIZES[0], dtype=torch.float64)
    network = STATES[bring](state, tmp_path) if bring == "script" else STATES[bring](state)
    torch.testing.assert_close(WAYS[way](network, x).detach(), by_hand(state, x), rtol=0, atol=1e-12)


GRADIENTS = {
    "compiled": lambda network, x: torch.autograd.grad(compiled(network, x, "aot_eager").square().sum(), x)[0],
    "func.grad": lambda network, x: torch.func.grad(lambda y: network(y)[0].square().sum())(x),
    "vmap": lambda network, x: torch.autograd.grad(transposed_by_vmap(network, x).square().sum(), x)[0],
    "flop counter": lambda network, x: torch.autograd.grad(counted(network, x).square().sum(), x)[0],
    "reference": lambda network, x: torch.autograd.grad(with_backend(network, "reference")(x)[0].square().sum(), x)[0],
}


@pytest.mark.parametrize("way", GRADIENTS)
def test_every_gradient_uses_the_loaded_numbers(way):
    state = trained().state_dict()
    x = torch.randn(5, 3, SIZES[0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(by_hand(state, x).square().sum(), x)
    torch.testing.assert_close(GRADIENTS[way](loaded(state), x), expected, rtol=0, atol=1e-11)


def to_onnx(network, x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def to_machine_code(network, x, tmp_path):
    """AOTInductor; it takes the equations, for one number of steps (docs/layer.md)."""
    program = torch.export.export(with_backend(network, "reference"), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
    return torch._inductor.aoti_load_package(path)(x)[0]


SLOW_WAYS = {
    "inductor": lambda network, x, tmp_path: compiled(network, x, "inductor"),
    "ONNX": to_onnx,
    "AOTInductor": to_machine_code,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", SLOW_WAYS)
def test_compiled_and_exported_layers_use_the_loaded_numbers(way, tmp_path):
    state = {key: value.float() for key, value in trained().state_dict().items()}
    x = torch.randn(5, 3, SIZES[0])
    network = loaded(state).float()
    torch.testing.assert_close(SLOW_WAYS[way](network, x, tmp_path).detach(), by_hand(state, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alpha_is_as_wide_as_the_state(dtype):
    """A layer of half precision, and back, has the alpha that it had; so has one that was built in half precision."""
    alpha = SRU(*SIZES)[0].alpha
    assert SRU(*SIZES).to(dtype).float()[0].alpha == alpha
    assert SRU(*SIZES, dtype=dtype)[0].alpha == alpha
    other = SRU(*SIZES, rescale=False).to(dtype)
    rounded = {key: value.to(dtype) for key, value in SRU(*SIZES).state_dict().items()}  # of an official layer's file
    other.load_state_dict(rounded)
    assert other[0].alpha == pytest.approx(alpha, rel=1e-2)
    other.load_state_dict(rounded, assign=True)
    assert other[0].scale_x.dtype == torch.float32
    assert other(torch.randn(3, 2, 4, dtype=dtype))[0].dtype == dtype


def test_only_matrices_have_two_dimensions():
    from sru.baselines.recurrent import QRNN

    for network in (SRU(4, 6, 2, highway_bias=-3.0), SRU(4, 6, 2, bidirectional=True), SRUpp(4, 4, 2), QRNN(4, 6)):
        shapes = {name: parameter.dim() for name, parameter in network.named_parameters()}
        assert {name for name, n in shapes.items() if n > 1} == {name for name in shapes if name.endswith("weight")} - {
            name for name in shapes if "norm" in name
        }


def test_weight_decay_by_dimension_applies_to_matrices_only():
    network = SRU(4, 4, 2, highway_bias=-3.0)
    matrices = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": matrices, "weight_decay": 1.0}, {"params": others}], lr=0.5)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    weight = network[0].weight.detach().clone()
    optimizer.step()
    assert network[0].bias.tolist() == [0.0] * 4 + [-3.0] * 4
    assert torch.equal(network[0].weight, weight / 2)


def of_2017(network):
    """A state dict as the official code of September 2017 wrote it: weight and bias of each layer."""
    state = convert.to_official(network, "2.6.0")
    return {key: value for key, value in state.items() if key.rpartition(".")[2] in ("weight", "bias")}


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"hidden_size": 6}, {"input_size": 6, "hidden_size": 3, "bidirectional": True}],
    ids=str,
)
def test_a_file_of_2017_loads_with_an_alpha_of_1(options, tmp_path, capsys):
    torch.manual_seed(0)
    arguments = {"input_size": 4, "hidden_size": 4, "num_layers": 2} | options
    old = SRU(**arguments, v1=True, rescale=False).double()
    for layer in old.layers:
        nn.init.normal_(layer.bias)
    state = of_2017(old)
    x = torch.randn(5, 3, arguments["input_size"], dtype=torch.float64)
    for more in ({}, {"v1": True}):
        network = SRU(**arguments, **more).double()
        network.load_state_dict(state)
        torch.testing.assert_close(network(x), old(x), rtol=0, atol=0)
    torch.save({"model": state}, tmp_path / "in.pt")
    script.main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    told = capsys.readouterr().out
    assert "model: 2017 -> ours" in told
    calls = [line.strip() for line in told.splitlines() if line.strip().startswith("SRU(")]
    made = eval(calls[-1] if arguments.get("bidirectional") else calls[0], {"SRU": SRU}).double()
    made.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["model"])
    torch.testing.assert_close(made(x), old(x), rtol=0, atol=0)
    assert made[1].alpha == 1
    assert not made[0].has_vc_term


def test_a_matrix_of_2017_or_ours_is_refused_as_ambiguous():
    cell = SRUCell(12, 3, v1=True)  # four matrices of 3 rows: as many as there are columns
    state = {"weight": torch.zeros(12, 12), "bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"may be from 2017 or from this project: add weight_c \(2 \* D zeros\)"):
        cell.load_state_dict(state)
    cell.load_state_dict(state | {"weight_c": torch.zeros(6)})


@pytest.mark.parametrize("alpha", [1.0, 1.0486, 3**0.5, 1.0 + 2**-12], ids=str)
def test_the_constructor_that_the_script_prints_has_the_files_alpha(alpha, tmp_path, capsys):
    state = trained().state_dict()
    state |= {key: torch.full_like(value, alpha).float() for key, value in state.items() if key.endswith("scale_x")}
    torch.save(convert.to_official(loaded(state), "2.6.0"), tmp_path / "in.pt")
    script.main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    call = next(line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("SRU("))
    assert eval(call, {"SRU": SRU})[0].alpha == pytest.approx(alpha, rel=1e-6)


def test_another_alpha_of_a_half_precision_file_is_kept():
    small = convert.to_official(SRU(4, 4, 2, highway_bias=-5.0), "2.6.0")
    for dtype in (torch.bfloat16, torch.float16):
        network = SRU(4, 4, 2, rescale=False)
        network.load_state_dict({key: value.to(dtype) for key, value in small.items()})
        assert network[0].alpha == small["rnn_lst.0.scale_x"].to(dtype).item() > 1


def test_a_file_with_parameters_only_keeps_a_valid_alpha():
    parameters = {key: value for key, value in SRU(*SIZES).state_dict().items() if not key.endswith("scale_x")}
    for assign in (False, True):
        with torch.device("meta"):
            empty = SRU(*SIZES)
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(parameters, assign=assign)
        assert [layer.alpha for layer in empty.layers] == [SRU(*SIZES)[0].alpha] * 2
    kept = SRU(*SIZES, rescale=False)
    kept.load_state_dict(parameters)
    assert kept[0].alpha == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ours, theirs: ours | theirs, r"in two ways, rnn_lst\.\* and layers\.\*"),
        (lambda ours, theirs: ours | {"layers.0.weight_c": torch.zeros(8)}, "layers.0 has both v \\(our name"),
        (
            lambda ours, theirs: {k: v for k, v in theirs.items() if k != "rnn_lst.0.weight_c"},
            "but weight_c is missing",
        ),
        (
            lambda ours, theirs: theirs | {"rnn_lst.0.gain": torch.ones(4)},
            "weight normalisation \\(version 2.1.7 or earlier",
        ),
        (lambda ours, theirs: ours | {"layers.1.scale_x": 1.0}, "layers.1.scale_x must be a tensor, not float"),
        (lambda ours, theirs: {k: v for k, v in theirs.items() if k != "rnn_lst.1.weight"}, "layers.1 has no weight"),
    ],
)
def test_a_mixed_or_broken_file_is_refused_with_the_key(change, message):
    ours = trained().state_dict()
    with pytest.raises(ValueError, match=message):
        loaded(change(dict(ours), convert.to_official(loaded(ours), "2.6.0")))


def test_a_script_keeps_the_dtype_of_a_half_file(tmp_path):
    state = {key: value.half() for key, value in convert.to_official(loaded(trained().state_dict()), "2.6.0").items()}
    torch.save(state, tmp_path / "in.pt")
    script.main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    script.main([str(tmp_path / "out.pt"), str(tmp_path / "back.pt"), "--to", "2.6.0"])
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
