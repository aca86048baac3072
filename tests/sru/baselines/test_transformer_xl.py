"""Transformer-XL: relative attention by its definition, memory, steps, and what is refused."""

import copy
import math

import pytest
import torch

from sru import TransformerXL
from sru.baselines.attention_stack import mask
from sru.baselines.transformer_xl import attend, positions


def xl(**options):
    """A small network in float64 whose attention counts: with the initial deviation of 0.02 it hardly does."""
    network = TransformerXL(**({"input_size": 6, "hidden_size": 8, "num_layers": 3, "num_heads": 2} | options))
    network = network.double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def sequence(steps, batch=2, size=6):
    return torch.randn(steps, batch, size, dtype=torch.float64)


def definition(q, k, v, weight, bias_u, bias_v, bidirectional=False):
    """Section 3.3 of the paper, one score at a time; q, k, v (T or S, B, H, d), weight (H, d, n)."""
    n, d, past = weight.shape[2], q.shape[3], len(k) - len(q)
    frequencies = [10000 ** (-2 * m / n) for m in range(n // 2)]
    rows = []
    for i in range(len(q)):
        for b in range(q.shape[1]):
            for head in range(q.shape[2]):
                scores = []
                for j in range(len(k) if bidirectional else past + i + 1):
                    angles = [(past + i - j) * frequency for frequency in frequencies]
                    r = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=q.dtype)
                    content = (q[i, b, head] + bias_u[head]) @ k[j, b, head]
                    position = (q[i, b, head] + bias_v[head]) @ (weight[head] @ r)
                    scores.append((content + position) / math.sqrt(d))
                p = torch.stack(scores).softmax(0)
                rows.append(sum(p[j] * v[j, b, head] for j in range(len(scores))))
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("steps", "past"), [(1, 0), (1, 5), (4, 0), (4, 3), (3, 7)])
def test_attention_and_its_gradients_are_the_definitions(steps, past, bidirectional):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    total = past + steps
    q, k, v = draw(steps, 2, 3, 4), draw(total, 2, 3, 4), draw(total, 2, 3, 4)
    shared = draw(3, 4, 6), draw(3, 4), draw(3, 4)
    inputs = (q, k, v, *shared)
    r = positions(total, torch.empty(1, 1, 6, dtype=torch.float64), steps if bidirectional else 1)
    hidden = mask(steps, past, None, q, causal=not bidirectional)
    found, expected = attend(q, k, v, r, *shared, hidden), definition(*inputs, bidirectional)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    grads = (torch.autograd.grad(a, inputs, weight) for a in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_stack_is_the_papers_by_hand():
    network, x = xl(num_layers=2, inner_size=5), sequence(4)
    h = x @ network.projection.weight.t()
    for layer in network.layers:

        def heads(a):
            return a.unflatten(2, (2, 4))

        k, v = (h @ layer.key_value.weight.t()).chunk(2, 2)
        weight = layer.position.weight.view(2, 4, 8)
        a = definition(*map(heads, (h @ layer.query.weight.t(), k, v)), weight, network.u, network.v)
        y = layer.attention_norm(h + a.flatten(2) @ layer.output.weight.t())
        h = layer.norm(y + layer.outer(layer.inner(y).relu()))
    torch.testing.assert_close(network(x)[0], h, rtol=0, atol=1e-10)


def test_a_step_sees_nothing_that_comes_later():
    network, x = xl(), sequence(9)
    _, state = network(sequence(4))
    later = x.clone()
    later[5:] += 1
    for before in (None, state):
        full, changed = network(x, before)[0], network(later, before)[0]
        assert torch.equal(changed[:5], full[:5])
        assert (changed[5:] != full[5:]).any(dim=-1).all()


def test_a_bidirectional_step_sees_all_of_its_segment_and_the_memory():
    network, x = xl(num_layers=1, bidirectional=True), sequence(5)
    _, memory = network(sequence(3))
    full = network(x, memory)[0]
    for i in range(5):
        other = x.clone()
        other[i] += 1
        assert (network(other, memory)[0] != full).any(dim=-1).all()
    memory[0][0] += 1
    assert (network(x, memory)[0] != full).any(dim=-1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_no_step_is_masked_completely(causal):
    """What it gives then, 0 or no number, depends on torch's version and the device."""
    pad = torch.arange(5)[:, None] >= torch.tensor([5, 2, 0])
    hidden = mask(3, 2, pad, sequence(3, 3), causal=causal).expand(3, 1, 3, 5)
    assert not hidden.all(-1).any()
    assert hidden[1, 0, 0].tolist() == [False, False, True, True, True]
    assert not hidden[2].any()


@pytest.mark.parametrize("cuts", [[5, 1, 6], [1] * 12, [0, 11, 1]], ids=str)
@pytest.mark.parametrize("limit", [None, 12])
def test_segments_with_memory_are_one_sequence(cuts, limit):
    network, x = xl(memory_length=limit), sequence(12)
    expected, last = network(x)
    state, parts = None, []
    for part in x.split(cuts):
        h, state = network(part, state)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-10)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_segment_sees_bounded_memory_and_all_of_itself():
    network, x = xl(memory_length=4), sequence(7)
    state = None
    for part in x.split([3, 4]):
        _, state = network(part, state)
        assert [a.shape for a in state] == [(min(4, 3 if len(part) == 3 else 7), 2, 8)] * 3
    for a, b in zip(state, network(x)[1], strict=True):  # the memory of 3 steps was whole
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    one = xl(num_layers=1, memory_length=4)
    h, memory = one(x)
    torch.testing.assert_close(one(x[:1], memory)[0], one(torch.cat([x[3:], x[:1]]))[0][-1:], rtol=0, atol=1e-10)
    forgetful = xl(memory_length=0)
    h, state = forgetful(x)
    assert [len(a) for a in state] == [0] * 3
    assert torch.equal(forgetful(x, state)[0], h)


@pytest.mark.parametrize("limit", [None, 0, 3, 20])
def test_steps_are_segments_of_one_step(limit):
    network, x = xl(memory_length=limit), sequence(9)
    memory = state = None
    for i, x_t in enumerate(x):
        before = state
        h, memory = network(x_t[None], memory)
        h_t, state = network.step(x_t, state)
        torch.testing.assert_close(h_t, h[0], rtol=0, atol=1e-10)
        assert torch.equal(network.step(x_t, before)[0], h_t)  # a state can be gone on from twice
        assert all(len(a) == min(i + 1, 9 if limit is None else limit) for pair in state for a in pair)


@pytest.mark.parametrize("limit", [None, 9])
def test_steps_are_one_call(limit):
    network, x = xl(memory_length=limit), sequence(9)
    state, outputs = None, []
    for x_t in x:
        h, state = network.step(x_t, state)
        outputs.append(h)
    torch.testing.assert_close(torch.stack(outputs), network(x)[0], rtol=0, atol=1e-10)


def test_steps_go_on_from_a_call():
    network, x = xl(), sequence(9)
    expected = network(x)[0]
    _, state = network(x[:5])
    for i in range(5, 9):
        h, state = network.step(x[i], state)
        torch.testing.assert_close(h, expected[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("limit", [None, 3])
def test_steps_go_on_from_a_padded_batch(limit):
    network, x = xl(memory_length=limit), sequence(9)
    _, state = network(x[:5], None, torch.arange(5)[:, None] >= torch.tensor([5, 2]))
    _, alone = network(x[:2, 1:])
    for x_t in x[5:]:
        h, state = network.step(x_t, state)
        expected, alone = network.step(x_t[1:], alone)
        torch.testing.assert_close(h[1:], expected, rtol=0, atol=1e-10)


def test_gradients_flow_through_memory_and_agree_with_finite_differences():
    network = xl(num_layers=1)
    x, memory = sequence(3).requires_grad_(), sequence(2, size=8).requires_grad_()
    parameters = dict(network.named_parameters())

    def run(x, memory, *values):
        h, (state,) = torch.func.functional_call(network, dict(zip(parameters, values, strict=True)), (x, [memory]))
        return h, state

    assert torch.autograd.gradcheck(run, [x, memory, *parameters.values()])


def test_x_is_projected_only_if_its_size_differs():
    assert TransformerXL(8, 8, num_heads=2).projection is None
    network = TransformerXL(512, 512, 12, inner_size=2048)
    # Of a layer: query, key, value, position and output; feed-forward; two norms. Beside them u and v.
    layer = 5 * 512**2 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    assert sum(p.numel() for p in network.parameters()) == 12 * layer + 2 * 512


def test_a_copy_and_a_state_dict_are_the_network():
    network, x = xl(), sequence(5)
    other = xl()
    other.load_state_dict(network.state_dict())
    for same in (copy.deepcopy(network), other):
        assert torch.equal(same(x)[0], network(x)[0])


def test_the_initialisation_is_drawn_again():
    network = TransformerXL(6, 64)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(5.0)
    network.reset_parameters()
    assert all(0.015 < p.std() < 0.025 for p in network.parameters() if p.dim() == 2)
    assert {p.unique().item() for p in network.parameters() if p.dim() == 1} == {0.0, 1.0}


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"attn_dropout": 0.5}], ids=str)
def test_dropout_is_for_training_only(options):
    network, x = xl(**options), sequence(5)
    assert torch.equal(network(x)[0], network(x)[0])
    network.train()
    assert not torch.equal(network(x)[0], network(x)[0])


@pytest.mark.parametrize("input_size", [6, 8])
def test_autocast_runs_in_bfloat16(input_size):
    network, x = xl(input_size=input_size).float(), torch.randn(5, 2, input_size)
    expected = network(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        h, state = network(x[:3])
        h_next, state = network(x[3:4], state)
        h_last, _ = network.step(x[4], state)
    h = torch.cat([h, h_next, h_last[None]]).float()
    assert 0 < (h - expected).abs().max() < 0.1
    network(x, state)  # and on without it
    h.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_bfloat16_counts_beyond_256_steps():
    r = positions(1000, torch.empty(1, 1, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(r, positions(1000, torch.empty(1, 1, 8)).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 6), (3, 0, 6), (1, 1, 6)])
def test_no_steps_and_no_sequences(shape, bidirectional):
    network = TransformerXL(6, 8, num_heads=2, bidirectional=bidirectional)
    h, state = network(torch.randn(shape))
    h, state = network(torch.randn(shape), state)
    h.sum().backward()
    assert h.shape == (*shape[:2], 8)
    assert [a.shape for a in state] == [(2 * shape[0], shape[1], 8)] * 2
    if not bidirectional:
        h, _ = network.step(torch.randn(shape[1:]), state)
        assert h.shape == (shape[1], 8)


def test_it_compiles_in_one_graph():
    network, x = xl(), sequence(5)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], network(x)[0])
    pad = torch.arange(5)[:, None] >= torch.tensor([5, 2])
    torch.testing.assert_close(compiled(x, None, pad)[0], network(x, None, pad)[0])


BAD = {
    "heads": (
        {"num_heads": 3},
        r"hidden_size = 8 cannot be shared among num_heads = 3: choose num_heads from 1, 2, 4, 8",
    ),
    "layers": ({"num_layers": 0}, "num_layers must be a whole number of at least 1, not 0"),
    "inner": ({"inner_size": 0}, "inner_size must be a whole number of at least 1, not 0"),
    "size": ({"hidden_size": 8.0}, "hidden_size must be a whole number of at least 1, not 8.0"),
    "dropout": ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
    "attn_dropout": ({"attn_dropout": -0.1}, r"attn_dropout must lie in \[0, 1\), not -0.1"),
    "direction": ({"bidirectional": "no"}, "bidirectional must be True or False, not 'no'"),
    "memory": ({"memory_length": -1}, "memory_length must be a whole number of at least 0, not -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        TransformerXL(**({"input_size": 6, "hidden_size": 8} | options))


def test_a_bad_argument_is_named():
    network, x = TransformerXL(6, 8, num_heads=2), torch.randn(5, 2, 6)
    memory, pairs = network(x)[1], network.step(x[0])[1]
    for call, message in [
        (lambda: network(x[0]), r"x must be \(T, B, 6\), time first, not \(2, 6\)"),
        (lambda: network(x[..., :5]), r"x must be \(T, B, 6\), time first, not \(5, 2, 5\)"),
        (lambda: network.step(x), r"x must be \(B, 6\), not \(5, 2, 6\)"),
        (lambda: network(x, memory[:1]), "one item for each of 2 layers, not 1"),
        (lambda: network(x[:, :1], memory), r"state of layer 0 must be \(5, 1, 8\) for this x, not \(5, 2, 8\)"),
        (lambda: network(x, [memory[0], x]), r"state of layer 1 must be \(5, 2, 8\) for this x, not \(5, 2, 6\)"),
        (lambda: network(x, [memory[0], memory[1][1:]]), r"layer 1 must be \(5, 2, 8\) for this x, not \(4, 2, 8\)"),
        (lambda: network(x, [memory[0], memory[1][0]]), r"layer 1 must be \(5, 2, 8\) for this x, not \(2, 8\)"),
        (
            lambda: network(x, [*memory, x[:2, :, 0] > 0]),
            r"the state's padding must be \(5, 2\) of bool for this x, not \(2, 2\)",
        ),
        (
            lambda: xl(bidirectional=True).step(x[0]),
            "a bidirectional TransformerXL needs the whole sequence: it has no",
        ),
        (lambda: network(x, memory[0][:1]), "the list, one item for each of 2 layers, not Tensor"),
        (lambda: network.step(x[0, :1], pairs), r"state of layer 0 must be \(1, 1, 8\) for this x, not \(1, 2, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in [
        (lambda: network(x.double()), "x is torch.float64, the layer torch.float32"),
        (lambda: network(None), "x must be a tensor, not NoneType"),
        (lambda: network(x, pairs), "each item of the state must be as a call, not step, returned it"),
        (lambda: network.step(x[0], [memory[0], pairs[0]]), "each item of the state must be as a call or step"),
        (lambda: network(x, [a.long() for a in memory]), "each item of the state must be as a call, not step"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()
