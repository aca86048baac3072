"""Parts of a network that are not plain matrices any more: hooks, adapters, parametrisations, quantised weights.

Whoever puts something of the kind into a network must see it at work, and not the bare weight.
"""

import copy

import pytest
import torch
from conftest import options
from hydra.utils import instantiate
from torch import nn
from torch.nn.utils import parametrizations, prune

from sru import SRU, SRUpp, Transformer, TransformerSRU
from sru.baselines.recurrent import CNN, QRNN
from sru.baselines.transformer_xl import TransformerXL

NETWORKS = {
    "SRU": lambda: SRU(8, 6, 2, proj_input_to_hidden_first=True),
    "SRU with modules": lambda: SRU(8, 8, 2, transform_module=nn.Linear(8, 24, bias=False)),
    "SRUpp": lambda: SRUpp(8, 8, 4, 2),
    "SRUpp without attention": lambda: SRUpp(8, 8, 4, 2, attention_layers=[1]),
    "Transformer": lambda: Transformer(8, 6, 1, num_heads=2),
    "TransformerSRU": lambda: TransformerSRU(8, 6, 1, num_heads=2),
    "TransformerXL": lambda: TransformerXL(8, 6, 1, num_heads=2),
    "QRNN": lambda: QRNN(8, 8, 2),
    "CNN": lambda: CNN(8, num_filters=2, widths=(1, 3)),
}
SHAPES = {"a sequence": (5, 2, 8), "long": (70, 2, 8)}


def drawn(name):
    """A network in which every part has an effect: SRU++ begins with attention that counts for nothing."""
    network = NETWORKS[name]().double().eval()
    for parameter in network.parameters():
        if parameter.numel() == 1:
            nn.init.ones_(parameter)
    return network


def children(network, kinds=(nn.Linear, nn.Conv1d)):
    """(parent, name, child) of every matrix in a network."""
    return [
        (parent, name, child)
        for parent in list(network.modules())
        for name, child in parent.named_children()
        if isinstance(child, kinds)
    ]


class Adapter(nn.Module):
    """As adapters are built: the base's own attributes shine through, the forward pass adds to its output."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_hook_is_called_and_its_result_used(name, shape):
    network = drawn(name)
    x = torch.randn(shape, dtype=torch.float64)
    plain, called = network(x)[0], []
    for _, _, child in children(network):
        child.register_forward_hook(lambda module, inputs, output: called.append(module))
    torch.testing.assert_close(network(x)[0], plain)
    assert {id(module) for module in called} == {id(child) for _, _, child in children(network)}
    for _, _, child in children(network):
        before = network(x)[0]
        child.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))
        assert not torch.allclose(network(x)[0], before)


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_of_all_modules_are_called(name):
    network, called = NETWORKS[name]().eval(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        network(torch.randn(5, 2, 8))
    finally:
        handle.remove()
    assert {id(child) for _, _, child in children(network)} <= {id(module) for module in called}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_an_adapter_equals_its_merged_weight(name, shape):
    network = drawn(name)
    merged = copy.deepcopy(network)
    for (parent, child_name, child), (_, _, other) in zip(
        children(network, nn.Linear), children(merged, nn.Linear), strict=True
    ):
        adapter = Adapter(child).double()
        setattr(parent, child_name, adapter)
        with torch.no_grad():
            other.weight += adapter.up @ adapter.down
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(network(x)[0], merged(x)[0])
    network(x)[0].square().sum().backward()
    for module in network.modules():
        if isinstance(module, Adapter):
            assert module.up.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_parametrised_and_pruned_weights_are_used(name):
    network = drawn(name)
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    expected = network(x)[0]
    normed, pruned, emptied = (copy.deepcopy(network) for _ in range(3))
    for _, _, child in children(normed):
        parametrizations.weight_norm(child)
    torch.testing.assert_close(normed(x)[0], expected)
    for (_, _, child), (_, _, other) in zip(children(pruned), children(emptied), strict=True):
        prune.l1_unstructured(child, "weight", amount=0.5)
        with torch.no_grad():
            other.weight *= child.weight_mask
            child.weight_orig += 0.1 * (1 - child.weight_mask)  # what is masked does not count
    torch.testing.assert_close(pruned(x)[0], emptied(x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "CNN"])
def test_quantised_weights_are_near_the_exact_ones(name):
    network = NETWORKS[name]().eval()
    x = torch.randn(5, 2, 8)
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
    assert not children(quantised, nn.Linear) or name == "Transformer"
    exact, found = network(x)[0], quantised(x)[0]
    assert not torch.equal(found, exact)
    assert (found - exact).abs().max() < 0.2 * exact.abs().max()


def test_a_compiled_network_calls_a_hook():
    network = SRUpp(8, 8, 4, 1).eval()
    plain = network(torch.ones(5, 2, 8))[0]
    network[0].transform_module.linear1.register_forward_hook(lambda module, inputs, output: output + torch.arange(4))
    compiled = torch.compile(network, backend="aot_eager")
    found = compiled(torch.ones(5, 2, 8))[0]
    torch.testing.assert_close(found, network(torch.ones(5, 2, 8))[0])
    assert not torch.allclose(found, plain)


SMALL = {"squad": ["data=squad_sample"], "hybrid": [], "translation": [], "lm": [], "speech": [], "classification": []}


@pytest.mark.parametrize("task", [name for name in options("task") if name in SMALL])
def test_every_matrix_of_a_task_is_called(task, configure):
    cfg = configure(f"task={task}", *SMALL[task], "depth=1", "width=8", "model=srupp")
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    module = instantiate(cfg.task)(encoder=instantiate(cfg.model), **data.model_kwargs)
    matrices, called = [child for _, _, child in children(module, nn.Linear)], []
    for matrix in matrices:
        matrix.register_forward_hook(lambda module, *_: called.append(module))
    loss, *_ = module.loss(next(iter(data.train_dataloader())))
    assert torch.isfinite(loss)
    assert {id(matrix) for matrix in matrices} == {id(matrix) for matrix in called}


@pytest.mark.parametrize("attends", [[0, 1], [1]])
def test_a_matrix_with_a_bias_in_the_place_of_one_without_counts_at_any_length(attends):
    network = SRUpp(8, 8, 8, 2, causal=True, attention_layers=attends).double().eval()
    modules = [layer.transform_module for layer in network.layers]
    for module in modules:
        name = "linear3" if hasattr(module, "linear3") else "linear2"
        setattr(module, name, nn.Linear(8, 24).double())
    x = torch.randn(40, 2, 8, dtype=torch.float64)
    short = network(x[:2])[0]
    torch.testing.assert_close(network(x)[0][:2], short)


def test_a_forward_that_is_replaced_for_all_matrices_is_called(monkeypatch):
    network, calls, plain = SRUpp(8, 8, 4, 1).eval(), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or plain(self, x))
    network(torch.randn(5, 2, 8))
    assert len(calls) == 3


class Compressed(torch.Tensor):
    """A weight that only `linear` can read, as those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *others = args
            return func(x, weight.as_subclass(torch.Tensor), *others, **(kwargs or {}))
        if func in (torch.Tensor.view, torch.Tensor.unflatten, torch.Tensor.flatten, torch.Tensor.t):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["SRU", "SRUpp", "Transformer", "TransformerXL"])
def test_a_weight_in_a_special_format_is_left_to_torch(name):
    network = drawn(name).float().requires_grad_(False)
    x = torch.randn(40, 2, 8)
    expected = network(x)[0]
    for _, _, child in children(network, nn.Linear):
        child._parameters["weight"] = child.weight.as_subclass(Compressed)
    torch.testing.assert_close(network(x)[0].as_subclass(torch.Tensor), expected)


def test_a_convolution_of_other_options_is_called():
    network = drawn("CNN")
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    expected = network(x)[0]
    with torch.no_grad():
        for convolution in network.convolutions:
            convolution.bias.zero_()
    without = network(x)[0]
    for i, convolution in enumerate(list(network.convolutions)):
        network.convolutions[i] = nn.Conv1d(8, 2, convolution.kernel_size, bias=False).double()
        network.convolutions[i].weight = convolution.weight
    torch.testing.assert_close(network(x)[0], without)
    assert not torch.allclose(expected, without)


def test_a_transformer_asks_no_adapter_for_its_type():
    network = drawn("Transformer").float()
    x = torch.randn(5, 2, 8)
    expected = network(x)[0]
    for parent, name, child in children(network, nn.Linear):
        adapter = Adapter(child)
        adapter.down, adapter.up = (nn.Parameter(torch.zeros_like(a)) for a in (adapter.down, adapter.up))
        setattr(parent, name, adapter)
        adapter.register_parameter("code", nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False))
        adapter._parameters = {"code": adapter._parameters.pop("code")} | adapter._parameters
    assert next(network.parameters()).dtype == torch.int8
    torch.testing.assert_close(network(x)[0], expected)
