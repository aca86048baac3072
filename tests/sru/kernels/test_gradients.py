"""Every gradient of the layer, and the gradient's gradient, against finite differences."""

import itertools

import pytest
import torch

from sru import SRU

OPTIONS = {
    "plain": {},
    "same_size": {"input_size": 3},
    "bidirectional": {"bidirectional": True},
    "tanh": {"activation": "tanh"},
    "relu": {"activation": "relu"},
    "no_skip": {"has_skip_term": False},
    "project_skip": {"input_size": 3, "project_skip": True},
    "no_vc": {"has_vc_term": False},
    "projection": {"projection_size": 2},
    "norm": {"layer_norm": True},
    "norm_after": {"layer_norm": True, "normalize_after": True},
    "input_to_hidden": {"proj_input_to_hidden_first": True},
    "zoneout": {"zoneout": 0.3},
    "highway": {"highway_bias": -2.0, "rescale": True},
}


@pytest.mark.parametrize(("name", "backend"), list(itertools.product(OPTIONS, ["cpu", "reference"])))
def test_every_gradient_agrees_with_finite_differences(name, backend):
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
