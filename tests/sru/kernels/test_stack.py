"""A stack that runs at once gives what its layers give one by one."""

import pytest
import torch

import sru.layer
from sru import SRU, plain_stack
from sru.kernels import cpu_step, stack

OPTIONS = {
    "plain": {},
    "as wide as its input": {"input_size": 12},
    "tanh": {"activation": "tanh", "highway_bias": -2.0},
    "relu, no highway": {"activation": "relu", "has_skip_term": False},
    "no v": {"has_vc_term": False, "project_skip": True},
    "both ways": {"bidirectional": True, "dropout": 0.3},
    "masks for the matrices": {"rnn_dropout": 0.4, "dropout": 0.3},
    "one layer": {"num_layers": 1, "rescale": False},
}


def network(options: dict, dtype: torch.dtype = torch.float64) -> SRU:
    torch.manual_seed(0)
    sizes = {"input_size": 7, "hidden_size": 12, "num_layers": 3} | options
    return SRU(**sizes, dtype=dtype)


def inputs(net: SRU, steps: int = 5, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = net[0].bias.dtype
    x = torch.randn(steps, batch, net.input_size, dtype=dtype, requires_grad=True)
    return x, torch.randn(net.num_layers, batch, net.output_size, dtype=dtype, requires_grad=True)


@pytest.fixture
def one_by_one(monkeypatch):
    """A function that has the layers of stacks called, or not."""
    sound = plain_stack.find_layers

    def switch(to: bool) -> None:
        monkeypatch.setattr(plain_stack, "find_layers", (lambda *_: None) if to else sound)

    return switch


def results(net, x, c0, pad=None, seed=1):
    torch.manual_seed(seed)
    h, c = net(x, c0, pad)
    weight = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    tensors = [a for a in (x, c0, *net.parameters()) if a is not None and a.requires_grad]
    return [h, c, *torch.autograd.grad((h * weight).sum() + (c**2).sum(), tensors)]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_equal_those_of_the_layers(name, padded, one_by_one):
    net = network(OPTIONS[name])
    x, c0 = inputs(net)
    pad = torch.arange(5)[:, None] >= torch.tensor([5, 2, 0]) if padded else None
    found = results(net, x, c0, pad)
    assert stack_made(net(x)[0])
    one_by_one(True)
    assert not stack_made(net(x)[0])
    for got, expected in zip(found, results(net, x, c0, pad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def stack_made(h: torch.Tensor) -> bool:
    return h.grad_fn.name() == "_StackBackward"


def test_gradients_of_a_stack_agree_with_finite_differences():
    net = network({})
    x, c0 = inputs(net)
    torch.autograd.gradcheck(lambda x, c0, *_: net(x, c0), (x, c0, *net.parameters()))
    torch.autograd.gradgradcheck(lambda x, c0, *_: net(x, c0), (x, c0, *net.parameters()), fast_mode=True)


def test_many_gradients_at_once_are_one_after_another():
    net = network({})
    x, c0 = inputs(net)
    h, _ = net(x, c0)
    assert stack_made(h)
    tensors, grads = [x, c0, *net.parameters()], torch.randn(2, *h.shape, dtype=h.dtype)
    together = torch.autograd.grad(h, tensors, grads, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for a, b in zip(together, torch.autograd.grad(h, tensors, grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("frozen", ["layers.0.weight", "layers.1.weight", "layers.2.bias", "layers.0"])
def test_frozen_parameters_get_no_gradient(frozen, one_by_one):
    net = network({})
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x, c0 = (a.detach() for a in inputs(net))
    found = results(net, x, c0)
    one_by_one(True)
    for got, expected in zip(found, results(net, x, c0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (5, 0), (1, 1), (1, 9)])
def test_empty_and_single_steps_equal_those_of_the_layers(steps, batch, one_by_one):
    net = network({})
    found = results(net, *inputs(net, steps, batch))
    one_by_one(True)
    torch.manual_seed(0)
    net = network({})
    for got, expected in zip(found, results(net, *inputs(net, steps, batch)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_hooks_and_subclasses_of_layers_are_called():
    net = network({})
    seen = []
    handle = net[1].register_forward_hook(lambda *_: seen.append(1))
    net(inputs(net)[0])
    handle.remove()
    net(inputs(net)[0])
    assert seen == [1]

    class Loud(sru.SRUCell):
        def forward(self, *args, **options):
            seen.append(2)
            return super().forward(*args, **options)

    net.layers[0] = Loud(7, 12, dtype=torch.float64)
    net(inputs(net)[0])
    assert seen == [1, 2]


def test_a_weight_changed_before_backward_is_refused():
    net = network({})
    h, _ = net(inputs(net)[0])
    with torch.no_grad():
        net[1].weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 2, cpu_step.MAX_SEQUENCES, cpu_step.MAX_SEQUENCES + 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_step_of_few_sequences_equals_the_ordinary_call(name, batch, dtype, monkeypatch):
    net = network(OPTIONS[name], dtype).eval()
    calls, sound = [], cpu_step.run
    monkeypatch.setattr(cpu_step, "run", lambda *args: calls.append((found := sound(*args)) is not None) or found)
    x, c0 = inputs(net, steps=1, batch=batch)
    with torch.no_grad():
        found = net(x, c0)
        assert calls == [batch <= cpu_step.MAX_SEQUENCES]
        monkeypatch.setattr(cpu_step, "MAX_SEQUENCES", 0)
        for got, expected in zip(found, net(x, c0), strict=True):
            torch.testing.assert_close(got, expected)


def test_one_step_uses_new_weights_views_and_the_given_state():
    net = network({"input_size": 12}, torch.float32).eval()
    with torch.no_grad():
        wide = torch.randn(1, 2, 24)
        c0 = torch.randn(3, 24, 2).transpose(1, 2)[:, :, ::2]
        before = c0.clone()
        h, c = net(wide[:, :, ::2], c0)
        assert torch.equal(c0, before)
        for p in net.parameters():
            p.mul_(0.5)
        other, _ = net(wide[:, :, ::2], c0)
        assert not torch.allclose(h, other)
        long, last = net(torch.cat([wide[:, :, ::2]] * 2), c0)
        _, c = net(wide[:, :, ::2], c0)
        h, c = net(wide[:, :, ::2], c)
    torch.testing.assert_close(h[0], long[1])
    torch.testing.assert_close(c, last)


def test_steps_in_many_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    net = network({"input_size": 12}, torch.float32).eval()
    xs = torch.randn(64, 1, 1, 12)

    def run(x):
        with torch.no_grad():
            return net(x)[0]

    expected = [run(x) for x in xs]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(run, xs), expected, strict=True):
            assert torch.equal(got, wanted)


def test_gradients_under_masks_have_gradients():
    net = network({"rnn_dropout": 0.4, "dropout": 0.3})

    def same_masks(x, c0, *_):
        torch.manual_seed(5)
        return net(x, c0)

    torch.autograd.gradgradcheck(same_masks, (*inputs(net), *net.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_under_autocast_products_are_in_bfloat16_and_the_rest_is_float32(name, one_by_one):
    net = network(OPTIONS[name] | {"dropout": 0.0, "rnn_dropout": 0.0}, torch.float32)
    x, c0 = inputs(net)
    found, exact = [], results(net.double(), x.double(), c0.double())
    net.float()
    for switch in (False, True):
        one_by_one(switch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(results(net, x, c0))
            assert ("_Stack" in net(x)[0].grad_fn.next_functions[0][0].name()) is not switch
    assert [a.dtype for a in found[0]] == [a.dtype for a in found[1]]

    def error(results):
        return sum(((a.double() - b).norm() / b.norm()) ** 2 for a, b in zip(results, exact, strict=True))

    assert error(found[0]) < 1e-3 * len(exact)
    assert error(found[0]) < 1.5 * error(found[1])


def test_under_autocast_bfloat16_input_has_second_derivatives():
    net = network({}, torch.float32)
    x, c0 = inputs(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, c = net(x.bfloat16(), c0)
        (first,) = torch.autograd.grad(h.float().sum() + c.sum(), x, create_graph=True)
    assert h.dtype == torch.bfloat16
    assert first.dtype == c.dtype == torch.float32
    (second,) = torch.autograd.grad(first.square().sum(), net[0].weight)
    net.double()
    x, c0 = x.detach().double().requires_grad_(), c0.double()
    h, c = net(x, c0)
    (exact,) = torch.autograd.grad(h.sum() + c.sum(), x, create_graph=True)
    (right,) = torch.autograd.grad(exact.square().sum(), net[0].weight)
    assert (second.double() - right).abs().max() < 0.1 * right.abs().max()


def test_mixed_precision_input_runs_layer_by_layer():
    net = network({}, torch.float32)
    x = torch.randn(4, 2, 7)
    parameters = [p for layer in net.layers for p in (layer.weight, layer.v, layer.bias, layer.scale_x)]
    assert stack.takes(x, *parameters)
    for dtype, is_taken in ((torch.bfloat16, True), (torch.float16, False)):
        with torch.autocast("cpu", dtype=dtype):
            assert stack.takes(x, *parameters) is is_taken
            assert stack.takes(x.to(dtype), *parameters) is is_taken
    for other in (x.double(), x.half(), x.bfloat16(), x.to("meta")):
        assert not stack.takes(other, *parameters)


def by_the_layers(net: SRU) -> bool:
    x = torch.zeros(1, 1, net.input_size, dtype=net[0].bias.dtype)
    return plain_stack.find_layers(net.layers, net.num_layers, x, None, net.output_size, net.bidirectional) is None


@torch.no_grad()
def test_a_stack_changed_by_hand_runs_layer_by_layer():
    def append(net):
        net.layers.append(sru.SRUCell(12, 12, dtype=torch.float64))

    def delete(net):
        del net.layers[2]

    def turn(net):
        net.layers[1] = sru.SRUCell(24, 24, dtype=torch.float64)

    def replace(name, shape):
        return lambda net: setattr(net[1], name, torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)))

    changes = [
        append,
        delete,
        replace("weight", (12, 12)),
        replace("weight", (48, 12)),
        replace("weight", (36, 16)),
        replace("v", (1,)),
        lambda net: setattr(net[0], "has_skip_term", False),
        lambda net: setattr(net[1], "activation", "tanh"),
        lambda net: setattr(net[1], "bidirectional", True),
        lambda net: setattr(net[1], "input_size", 5),
        lambda net: setattr(net[1], "scale_x", torch.ones(12, dtype=torch.float64)),
        lambda net: setattr(net[1], "scale_x", torch.ones(1)),
        lambda net: setattr(net[1], "scale_x", torch.ones(1, device="meta", dtype=torch.float64)),
        lambda net: setattr(net[1], "project", net[1].project),
        lambda net: net[1].compile(backend="eager"),
        lambda net: setattr(
            net[1], "weight", torch.nn.Parameter(net[1].weight.detach().to_sparse_csr(), requires_grad=False)
        ),
    ]
    for change in changes:
        net = network({})
        assert not by_the_layers(net)
        change(net)
        assert by_the_layers(net)
    both = network({"bidirectional": True})
    turn(both)
    assert by_the_layers(both)


def test_a_weight_without_memory_is_refused():
    net = network({"input_size": 12}, torch.float32).eval()
    net[1].weight.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
        net(torch.randn(1, 1, 12))


def test_a_gradient_under_vmap():
    net = network({})
    x, _ = inputs(net)
    h, _ = net(x)
    grads = torch.randn(4, *h.shape, dtype=h.dtype)
    together = torch.func.vmap(lambda grad: torch.autograd.grad(h, x, grad, retain_graph=True)[0])(grads)
    for grad, found in zip(grads, together, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(h, x, grad, retain_graph=True)[0])


def test_a_matrix_before_the_layers_determines_their_input():
    net = network({"proj_input_to_hidden_first": True})
    x = torch.randn(1, 2, 7, dtype=torch.float64)
    assert stack_made(net(x)[0])
    net = network({"proj_input_to_hidden_first": True, "input_size": 12}, torch.float32).eval()
    net.input_to_hidden = torch.nn.Linear(12, 8)
    with torch.no_grad(), pytest.raises(ValueError, match="x must be"):
        net(torch.randn(1, 2, 12))
