"""The layer within torch: compiled, transformed, exported, copied, in every dtype."""

import copy
import io
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from sru import SRU
from sru.kernels import recurrence

HALF = [torch.bfloat16, torch.float16]
EVERY_OPTION = {"bidirectional": True, "layer_norm": True, "projection_size": 3, "activation": "tanh", "zoneout": 0.2}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def gradients(call, stack, x):
    """What call(x) gives, and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    stack.zero_grad()
    h, c = call(x)
    (h.sum() + c.square().sum()).backward()
    return [h, c, x.grad, *(p.grad for p in stack.parameters())]


# torch.compile


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every_option"])
def test_compiled_in_one_graph_it_trains_alike(options):
    stack, x = SRU(4, 6, 2, **options).eval(), torch.randn(7, 3, 4)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    for expected, found in zip(gradients(stack, stack, x), gradients(compiled, stack, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch's inductor needs a C++ compiler")
def test_compiled_by_inductor_it_trains_and_infers_alike():
    stack, x = SRU(4, 6, 2), torch.randn(7, 3, 4)
    compiled = torch.compile(stack, fullgraph=True)
    for expected, found in zip(gradients(stack, stack, x), gradients(compiled, stack, x), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stack(x))


def test_compiled_it_takes_lengths_dropout_and_packed_states():
    stack = SRU(4, 6, 2, dropout=0.3, rnn_dropout=0.2, nn_rnn_compatible_return=True, bidirectional=True).train()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    x, lengths = torch.randn(7, 3, 4), torch.tensor([7, 3, 0])
    h, c = compiled(x, lengths=lengths)
    h, c = compiled(x, c, lengths=lengths)
    assert h[:, 2].eq(0).all()
    h.sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_a_compiled_network_takes_any_number_of_steps_without_compiling_again():
    stack = SRU(4, 6, 2)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(stack, fullgraph=True, backend=counter, dynamic=True)
    for steps, batch in ((5, 2), (9, 3), (130, 40)):
        x = torch.randn(steps, batch, 4)
        torch.testing.assert_close(compiled(x), stack(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operators_keep_torchs_rules(projected, padded):
    u = torch.randn(4, 2, 4 if projected else 3, 6, requires_grad=True)
    x = None if projected else torch.randn(4, 2, 6, requires_grad=True)
    v, b = (torch.randn(12, requires_grad=True) for _ in "vb")
    c0 = torch.randn(2, 6, requires_grad=True)
    pad = torch.rand(4, 2) < 0.3 if padded else None
    mask = torch.rand(2, 6) if padded else None
    scale = torch.tensor([1.3]) if padded else None
    torch.library.opcheck(
        torch.ops.sru.recurrence.default, (u, x, v, b, c0, mask, pad, scale, 0.1, 1, 1, True), raise_exception=True
    )
    detached = [a if a is None else a.detach() for a in (u, x, v, b, c0)]
    torch.library.opcheck(
        torch.ops.sru.recurrence_backward.default,
        (torch.randn(4, 2, 6), torch.randn(2, 6), *detached, mask, pad, scale, torch.randn(4, 2, 6), 0.1, 1, 1),
        raise_exception=True,
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_gives_no_second_gradient_rather_than_a_wrong_one(backend):
    compiled = torch.compile(SRU(4, 4, 1), backend=backend)
    x = torch.randn(5, 2, 4, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(compiled(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    with pytest.raises(RuntimeError, match=r"reference|double backward"):
        penalty()


# torch.func


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_derivatives_are_the_references(compiled):
    x, stack = torch.randn(5, 2, 4), SRU(4, 4, 1)

    def push(stack):
        return torch.func.jvp(lambda x: stack(x)[0], (x,), (torch.ones_like(x),))[1]

    reference = copy.deepcopy(stack)
    reference[0].backend = "reference"
    found = torch.compile(push, backend="aot_eager")(stack) if compiled else push(stack)
    torch.testing.assert_close(found, push(reference))
    stack.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        h, _ = stack(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(h).tangent, found)


def test_compiled_functional_gradients_are_the_ordinary_ones():
    stack, x = SRU(4, 4, 1), torch.randn(5, 2, 4)
    gradient = grad(lambda x: stack(x)[0].square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))


def test_functional_gradients_are_the_ordinary_ones():
    stack, x = SRU(4, 6, 2).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    parameters = dict(stack.named_parameters())

    def loss(parameters, x):
        return functional_call(stack, parameters, (x,))[0].square().sum()

    found = grad(loss)(parameters, x)
    loss(parameters, x).backward()
    for name, parameter in stack.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    # Of every example by itself, and of an ensemble.
    xs = torch.randn(4, 5, 3, 4, dtype=torch.float64)
    singly = vmap(grad(loss), (None, 0))(parameters, xs)
    ensemble = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in parameters.items()}
    members = vmap(loss, (0, None))(ensemble, x)
    for i in range(4):
        for name, value in grad(loss)(parameters, xs[i]).items():
            torch.testing.assert_close(singly[name][i], value)
    torch.testing.assert_close(members[1], loss({name: 2 * p for name, p in parameters.items()}, x))


def test_functional_second_derivatives_raise_an_error():
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def loss(stack, x):
        return stack(x)[0].square().sum()

    stack = SRU(4, 4, 1).double()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad(lambda x: grad(lambda x: loss(stack, x))(x).square().sum())(x)
    stack[0].backend = "reference"
    found = grad(lambda x: grad(lambda x: loss(stack, x))(x).square().sum())(x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(stack, x), x, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(first.square().sum(), x)[0])


def test_many_gradients_at_once_are_one_after_another():
    cell, x = SRU(3, 3, 1).double(), torch.randn(2, 2, 3, dtype=torch.float64)
    at_once = torch.autograd.functional.jacobian(lambda x: cell(x)[0], x, vectorize=True)
    torch.testing.assert_close(at_once, torch.autograd.functional.jacobian(lambda x: cell(x)[0], x))
    x.requires_grad_()
    grads = torch.randn(4, 2, 2, 3, dtype=torch.float64)
    h, _ = cell(x)
    (batched,) = torch.autograd.grad(h, x, grads, is_grads_batched=True, retain_graph=True)
    for found, grad_of_h in zip(batched, grads, strict=True):
        torch.testing.assert_close(found, *torch.autograd.grad(h, x, grad_of_h, retain_graph=True))


# What stands for tensors, or watches what is done with them: nothing there has an address.


@pytest.mark.parametrize("train", [False, True])
def test_tensors_without_numbers_get_shapes(train):
    stack = SRU(4, 6, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(train):
        h, c = stack(mode.from_tensor(torch.randn(5, 2, 4)))
        assert (h.shape, c.shape) == ((5, 2, 6), (2, 2, 6))
        if train:
            h.sum().backward()


def test_a_recorded_graph_computes():
    stack, x = SRU(40, 40, 1), torch.randn(50, 2, 40)
    graph = make_fx(lambda x: stack(x)[0])(x)
    other = torch.randn(50, 2, 40)
    torch.testing.assert_close(graph(other), stack(other)[0])


def test_a_tensor_subclass_of_two_tensors_is_computed_twice():
    u, v, b, c0 = (torch.randn(s) for s in ((5, 2, 4, 6), (2, 6), (2, 6), (2, 6)))
    two = TwoTensor(u, 2 * u)
    h, _ = recurrence(two, None, *(TwoTensor(a, a) for a in (v, b, c0)))
    for part, given in ((h.a, u), (h.b, 2 * u)):
        torch.testing.assert_close(part, recurrence(given, None, v, b, c0)[0])


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        SRU(32, 64, 1)(torch.randn(10, 8, 32))
    assert counter.get_total_flops() == 2 * 80 * 32 * 4 * 64


# Export


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), EVERY_OPTION | {"zoneout": 0.0}],
    ids=["plain", "every_option"],
)
def test_an_exported_program_runs_without_this_library(tmp_path, options):
    stack = SRU(4, 6, 2, **options).eval()
    x, state = torch.randn(5, 2, 4), torch.randn(2, 2, stack.output_size)
    dynamic = {
        "x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
        "c0": {1: Dim.DYNAMIC},
        "mask_pad": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC},
    }
    pad = torch.zeros(5, 2, dtype=torch.bool)
    with torch.no_grad():
        program = torch.export.export(stack, (x, state, pad), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "sru.pt2")
    inputs = [
        (torch.randn(steps, 3, 4), torch.randn(2, 3, stack.output_size), torch.rand(steps, 3) < 0.2)
        for steps in (1, 2, 70)
    ]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch
sys.modules["sru"] = None
program = torch.export.load("sru.pt2").module()
torch.save([program(*each) for each in torch.load("inputs.pt")], "outputs.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    for each, outputs in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(outputs, stack(*each), rtol=1e-4, atol=1e-5)


def test_an_exported_program_carries_the_state_past_large_numbers():
    stack, x = SRU(4, 4, 1).eval(), torch.randn(5, 2, 4)
    pad = torch.zeros(5, 2, dtype=torch.bool)
    pad[2:4] = True
    x = x.masked_fill(pad[:, :, None], 1e7)
    with torch.no_grad():
        program = torch.export.export(stack, (x, None, pad)).module()
        torch.testing.assert_close(program(x, None, pad), stack(x, mask_pad=pad), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_gives_the_same_numbers_for_any_length(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    stack = SRU(4, 6, 2, layer_norm=True).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            stack,
            (torch.randn(5, 2, 4), torch.randn(2, 2, 6)),
            dynamo=True,
            dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "c0": {1: Dim.DYNAMIC}},
            verbose=False,
        )
    program.save(tmp_path / "sru.onnx")
    session = runtime.InferenceSession(tmp_path / "sru.onnx")
    x, state = torch.randn(9, 3, 4), torch.randn(2, 3, 6)
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, (x.numpy(), state.numpy()), strict=True)))
    for found, value in zip(outputs, stack(x, state), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_network_runs_for_the_length_that_it_was_traced_with():
    stack, x = SRU(4, 6, 2), torch.randn(5, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(stack, (x,))(x), stack(x))


# Copies


def test_copies_and_pickles_are_complete():
    stack, x = SRU(4, 6, 2, **EVERY_OPTION).eval(), torch.randn(5, 2, 4)
    file = io.BytesIO()
    torch.save(stack.state_dict(), file)
    file.seek(0)
    loaded = SRU(4, 6, 2, **EVERY_OPTION).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)), loaded):
        torch.testing.assert_close(other(x), stack(x), rtol=0, atol=0)


def test_on_the_meta_device_it_has_shapes_and_no_numbers():
    with torch.device("meta"):
        stack = SRU(4, 6, 2, dropout=0.1)
    h, c = stack(torch.empty(500, 2, 4, device="meta"))
    assert (h.shape, c.shape, h.device.type) == ((500, 2, 6), (2, 2, 6), "meta")
    h.sum().backward()
    assert stack[0].weight.grad.shape == (24, 4)
    stack.to_empty(device="cpu").reset_parameters()
    original = SRU(4, 6, 2)
    stack.load_state_dict(original.state_dict())
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(stack.eval()(x), original.eval()(x))
    with torch.device("meta"):
        late = SRU(4, 6, 2)
        late.load_state_dict(original.state_dict(), assign=True)
    torch.testing.assert_close(late.eval()(x), original(x))
    h, _ = SRU(4, 6, device="meta")(x.to("meta"), lengths=[3, 4])
    assert h.shape == (5, 2, 6)


# Dtypes


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "layer_norm": True, "zoneout": 0.1}])
def test_half_precision_keeps_its_state_in_float32(dtype, options):
    stack = SRU(16, 32, 2, **options).eval()
    x = torch.randn(40, 3, 16)
    expected = stack(x)
    half = copy.deepcopy(stack).to(dtype)
    h, c = half(x.to(dtype))
    assert (h.dtype, c.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(h.float(), expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(c, expected[1], rtol=0.05, atol=0.05)
    for state in (c, c.to(dtype)):  # what came out, and what a caller may have made
        assert half(x.to(dtype), state)[1].dtype == torch.float32
    (h.sum() + c.sum()).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_is_near_float32(dtype):
    stack = SRU(16, 32, 3, bidirectional=True)
    x = torch.randn(40, 3, 16, requires_grad=True)
    expected = stack(x)
    with torch.autocast("cpu", dtype=dtype):
        h, c = stack(x)
        h, c = stack(x, c)
        h, c = stack(x)
    assert c.dtype == torch.float32
    torch.testing.assert_close(h.float(), expected[0], rtol=0.05, atol=0.05)
    h.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in stack.parameters())


def test_float64_stays_float64():
    h, c = SRU(4, 6, 2).double()(torch.randn(5, 2, 4, dtype=torch.float64))
    assert h.dtype == c.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_half_precision_are_those_of_float32(dtype, backend):
    arguments = [torch.randn(s) for s in ((30, 2, 3, 8), (30, 2, 8), (2, 8), (2, 8), (2, 8))]
    arguments = [a.to(dtype) for a in arguments]
    grads = torch.randn(30, 2, 8).to(dtype), torch.randn(2, 8)
    found = []
    for cast in (lambda a: a, torch.Tensor.float):
        inputs = [cast(a).detach().requires_grad_() for a in arguments]
        h, c = recurrence(*inputs, backend=backend)
        found.append(torch.autograd.grad((h, c), inputs, (grads[0].to(h.dtype), grads[1])))
    for half, single in zip(*found, strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half, single.to(dtype))


def test_the_official_packages_operators_may_be_loaded_too():
    """It registers sru_cpu and sru_cuda."""
    code = (
        "import torch; torch.library.Library('sru_cpu', 'DEF'); torch.library.Library('sru_cuda', 'DEF'); import sru;"
        "sru.SRU(2, 2)(torch.zeros(2, 1, 2))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def within(call):
    with torch.inference_mode():
        return call()


INFERENCE = {
    "built": lambda build: within(build),
    "moved": lambda build: (lambda network: within(lambda: network.double().float()))(build()),
    "rounded": lambda build: (lambda network: within(lambda: network.bfloat16().float()))(build()),
    "called": lambda build: (lambda network: (within(lambda: network(torch.randn(5, 2, 4))), network)[1])(build()),
    "copied": lambda build: (lambda network: within(lambda: copy.deepcopy(network)))(build()),
    "loaded": lambda build: (
        lambda network: (within(lambda: network.load_state_dict(network.state_dict())), network)[1]
    )(build()),
}


@pytest.mark.parametrize("options", [{}, {"v1": True, "bidirectional": True}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("bring", INFERENCE)
def test_a_network_of_inference_mode_is_called_within_it_and_outside(bring, options):
    """Outside without gradients: of numbers that inference mode made, torch takes none, for nn.LSTM neither."""
    network = INFERENCE[bring](lambda: SRU(4, 4, 2, **options))
    other = SRU(4, 4, 2, **options)
    other.load_state_dict({name: value.clone() for name, value in network.state_dict().items()})
    x = torch.randn(5, 2, 4)
    outputs = [within(lambda: network(x))]
    with torch.no_grad():
        outputs += [network(x), network(within(lambda: x.clone())), network(x, within(lambda: outputs[0][1] * 0))]
    for found in outputs:
        torch.testing.assert_close(found, other(x))


@pytest.mark.parametrize("options", [{}, {"v1": True}], ids=str)
@pytest.mark.parametrize("bring", ["moved", "rounded", "called", "loaded"])
def test_a_network_that_was_moved_in_inference_mode_loads_outside(bring, options):
    network, other = INFERENCE[bring](lambda: SRU(4, 4, 2, **options)), SRU(4, 4, 2, **options, rescale=False)
    network.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(torch.ones(5, 2, 4)), other(torch.ones(5, 2, 4)))


def test_a_network_called_in_inference_mode_trains_afterwards():
    network = SRU(4, 4, 2)
    within(lambda: network(torch.randn(5, 2, 4)))
    network(torch.randn(5, 2, 4))[0].sum().backward()
    assert all(p.grad is not None for p in network.parameters())
