"""SRU++: the official numbers, memory, masks and steps."""

import pytest
import torch
from conftest import GOLDEN, all_recordings

from sru import SRUpp, SRUppEncoder, convert

FILES = {path.stem: path for folder in GOLDEN for path in sorted(folder.glob("srupp_*.pt"))}


def recording(name):
    """What was recorded, and a network with its parameters."""
    recorded = torch.load(FILES[name], weights_only=True)
    network = SRUpp(**{k: v for k, v in recorded["config"].items() if k not in ("cls", "package")}).double()
    network.load_state_dict(recorded["state_dict"])
    return recorded, network


def test_all_recordings_are_checked():
    assert "srupp_memory_heads" in FILES
    all_recordings()
    assert len(FILES) == 4


@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients_are_the_official_ones(name):
    recorded, network = recording(name)
    x, c0 = (recorded[key].requires_grad_() for key in ("x", "c0"))
    h, c, extra = network(x, c0, *(recorded.get(key) for key in ("mask_pad", "attn_mask", "memory")))
    assert [a.shape[:2] for a in extra["saved_inputs"]] == [x.shape[:2]] * network.num_layers
    assert torch.equal(extra["saved_inputs"][0], x)
    torch.testing.assert_close(h, recorded["h"], rtol=0, atol=1e-10)
    torch.testing.assert_close(c, recorded["c"], rtol=0, atol=1e-10)
    ((h * recorded["weight_h"]).sum() + (c * recorded["weight_c"]).sum()).backward()
    torch.testing.assert_close(x.grad, recorded["grad_x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(c0.grad, recorded["grad_c0"], rtol=0, atol=1e-10)
    for parameter in network.parameters():
        parameter.data = parameter.grad
    grads = convert.to_official(network)
    assert set(recorded["grads"]) <= set(grads)
    for key, grad in recorded["grads"].items():
        torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", FILES)
def test_a_state_dict_survives_the_way_there_and_back(name):
    recorded, network = recording(name)
    written = convert.to_official(network)
    assert set(written) == set(recorded["state_dict"])
    for key, value in recorded["state_dict"].items():
        assert torch.equal(written[key], value), key
    with pytest.raises(ValueError, match=r"2\.6\.0 has no SRU\+\+"):
        convert.to_official(network, "2.6.0")


def pp(cls=SRUpp, **options):
    """A small network in float64 whose attention counts."""
    network = cls(6, 8, 4, **({"num_layers": 3} | options)).double().eval()
    for parameter in network.parameters():
        if parameter.shape == (1,):
            torch.nn.init.constant_(parameter, 0.7)
    return network


def test_attention_starts_without_effect_and_learns():
    network = SRUpp(6, 8, 4)
    x = torch.randn(5, 2, 6)
    assert torch.equal(network(x)[0], network(x, attn_mask=torch.eye(5) < 1)[0])
    network(x)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert network[0].transform_module.alpha.grad.abs() > 0


def test_a_causal_step_sees_nothing_that_comes_later():
    network, x = pp(causal=True), torch.randn(9, 2, 6, dtype=torch.float64)
    full = network(x)[0]
    later = x.clone()
    later[5:] += 1
    assert torch.equal(network(later)[0][:5], full[:5])
    assert not torch.allclose(pp()(later)[0][:5], pp()(x)[0][:5])
    torch.testing.assert_close(full, network(x, attn_mask=torch.ones(9, 9).triu(1).bool())[0])


@pytest.mark.parametrize(
    "options", [{}, {"num_heads": 2}, {"attention_every_n_layers": 2}, {"layer_norm": True}], ids=str
)
def test_segments_with_memory_are_one_sequence(options):
    network, x = pp(SRUppEncoder, **options), torch.randn(12, 2, 6, dtype=torch.float64)
    expected, (c, *_) = network(x)
    state, parts = None, []
    for part in x.split([5, 1, 6]):
        h, state = network(part, state)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts), expected)
    torch.testing.assert_close(state[0], c)


def test_both_directions_see_all_steps_by_default():
    assert pp(SRUppEncoder).causal
    network, x = pp(SRUppEncoder, bidirectional=True), torch.randn(5, 2, 6, dtype=torch.float64)
    assert not network.causal
    assert network(x)[0].shape == (5, 2, network.output_size) == (5, 2, 16)
    torch.testing.assert_close(network(x)[0], network(x, None, torch.zeros(5, 2, dtype=torch.bool))[0])
    with pytest.raises(ValueError, match="contradict"):
        pp(SRUppEncoder, bidirectional=True, causal=True)


def test_memory_is_bounded():
    network, x = pp(SRUppEncoder, memory_length=4), torch.randn(3, 2, 6, dtype=torch.float64)
    state, lengths = None, []
    for _ in range(3):
        _, state = network(x, state)
        lengths.append([len(a) for a in state[1]])
    assert lengths == [[3] * 3, [4] * 3, [4] * 3]


def test_padding_is_not_remembered():
    network = pp(SRUppEncoder)
    first, second = torch.randn(2, 5, 1, 6, dtype=torch.float64)
    expected, _ = network(second, network(first[:3])[1])
    pad = torch.arange(5)[:, None] >= 3
    for mask in (None, torch.zeros(5, 1, dtype=torch.bool)):
        h, state = network(second, network(first, None, pad)[1], mask)
        torch.testing.assert_close(h, expected)
        assert [len(a) for a in state[1]] == [10] * 3
        assert state[2].flatten().tolist() == [True] * 2 + [False] * 8


def test_the_initialisation_is_drawn_again():
    network = SRUpp(6, 8, 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(5.0)
    network.reset_parameters()
    assert all((p != 5).any() for p in network.parameters())
    assert network[0].transform_module.alpha == 0


@pytest.mark.parametrize("limit", [None, 0, 3, 20])
def test_steps_are_one_call_that_looks_back_as_far(limit):
    network, x = pp(memory_length=limit, num_heads=2), torch.randn(9, 2, 6, dtype=torch.float64)
    hidden = torch.ones(9, 9).triu(1).bool()
    if limit is not None:
        hidden |= torch.ones(9, 9).tril(-limit - 1).bool()
    expected, c, _ = network(x, attn_mask=hidden)
    state, outputs = None, []
    for i, x_t in enumerate(x):
        before = state
        h, state = network.step(x_t, state)
        outputs.append(h)
        if before is not None:  # a state can be gone on from twice
            assert torch.equal(network.step(x_t, before)[0], h)
        assert all(len(k) == min(i + 1, 9 if limit is None else limit) for k, _ in state[1])
    torch.testing.assert_close(torch.stack(outputs), expected)
    torch.testing.assert_close(state[0], c)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["left", "right", "packed", "lengths"])
def test_padding_equals_each_sequence_alone(form, bidirectional):
    network = pp(bidirectional=bidirectional, causal=not bidirectional)
    lengths = [7, 4, 1]
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    pad = torch.arange(7)[:, None] >= torch.tensor(lengths)
    pad = pad.flip(0) if form == "left" else pad
    x[pad] = 1e30
    if form == "packed":
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
        h, c, _ = network(packed)
        h, _ = torch.nn.utils.rnn.pad_packed_sequence(h)
    elif form == "lengths":
        h, c, _ = network(x, lengths=lengths)
    else:
        h, c, _ = network(x, mask_pad=pad)
    assert not h[pad].any()
    for i, n in enumerate(lengths):
        real = slice(7 - n, 7) if form == "left" else slice(0, n)
        alone, c_alone, _ = network(x[real, i : i + 1])
        torch.testing.assert_close(h[real, i : i + 1], alone)
        torch.testing.assert_close(c[:, i : i + 1], c_alone)


def test_a_step_that_sees_nothing_is_not_nan():
    network, x = pp(), torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    pad = torch.zeros(5, 2, dtype=torch.bool)
    pad[:, 1] = True
    blind = torch.zeros(5, 5, dtype=torch.bool)
    blind[2] = True
    for options in ({"mask_pad": pad}, {"attn_mask": blind}):
        h, c, _ = network(x, **options)
        (h.sum() + c.sum()).backward()
        assert h.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "attending"),
    [
        ({}, [0, 1, 2, 3]),
        ({"attention_every_n_layers": 2}, [1, 3]),
        ({"attention_last_n_layers": 1}, [3]),
        ({"attention_last_n_layers": 0}, []),
        ({"attention_layers": [0, 2]}, [0, 2]),
    ],
    ids=str,
)
def test_the_chosen_layers_attend(options, attending):
    network = SRUpp(6, 8, 4, 4, **options)
    assert [i for i in range(4) if hasattr(network[i].transform_module, "alpha")] == attending
    assert network(torch.randn(3, 2, 6))[0].shape == (3, 2, 8)


def test_the_papers_models_have_the_published_sizes():
    """Tables 2 and 3 (2021), with 205 bytes embedded and predicted."""
    sizes = {(1920, 480): 42.35, (3072, 768): 107.57, (4096, 1024): 190.61, (6016, 752): 194.99}
    for (d, proj), published in sizes.items():
        with torch.device("meta"):
            stack = SRUpp(d, d, proj, 10)
        embedding, output = 205 * d, 205 * d + 205
        found = sum(p.numel() for p in stack.parameters()) + embedding + output
        assert round(found / 1e6, 2) == published


BAD = {
    "heads": ({"num_heads": 3}, ValueError, "proj_size = 4 cannot be shared among num_heads = 3"),
    "layers": ({"attention_layers": [0, 7]}, ValueError, r"must lie in 0 to 1, not \[0, 7\]"),
    "direction": ({"causal": True, "bidirectional": True}, ValueError, "contradict"),
    "projection": ({"projection_size": 3}, TypeError, "SRUpp has no projection_size"),
    "dropout": ({"attn_dropout": 1.5}, ValueError, r"attn_dropout must lie in \[0, 1\), not 1.5"),
    "unknown": ({"num_head": 2}, TypeError, "did you mean num_heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        SRUpp(6, 8, 4, **options)


def test_a_bad_argument_is_named():
    network, x = SRUpp(6, 8, 4), torch.randn(5, 2, 6)
    for arguments, message in [
        ({"attn_mask": torch.zeros(5, 4)}, r"attn_mask must be \(5, 5\) or \(2, 5, 5\), memory's steps first"),
        ({"memory": [x, x]}, r"memory of layer 1 must be \(5, 2, 8\), not \(5, 2, 6\)"),
        ({"memory_mask_pad": x}, "memory_mask_pad needs memory"),
        ({"memory": [x, torch.zeros(3, 2, 8)]}, r"memory of layer 1 must be \(5, 2, 8\), not \(3, 2, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            network(x, **arguments)
    for arguments, message in [
        ({"attn_msk": None}, "did you mean attn_mask"),
        ({"attn_mask": torch.zeros(5, 5).int()}, "attn_mask must be bool.*not torch.int32"),
        ({"memory": [x]}, "memory must be a list of 2 floating-point tensors"),
        ({"memory": [None, x]}, "memory must be a list of 2 floating-point tensors"),
        ({"memory": [x.long(), x.long()]}, "memory must be a list of 2 floating-point tensors"),
    ]:
        with pytest.raises(TypeError, match=message):
            network(x, **arguments)
    with pytest.raises(TypeError, match="the one that step returned"):
        network.step(x[0], torch.zeros(2, 2, 8))
    encoder = SRUppEncoder(6, 8, 4)
    with pytest.raises(TypeError, match="the one that SRUppEncoder returned"):
        encoder(x, torch.zeros(2, 2, 8))
    with pytest.raises(ValueError, match=r"x must be \(T, B, 6\), time first"):
        encoder(x[0])


def test_dropout_is_for_training_only():
    network, x = pp(dropout=0.5, attn_dropout=0.5), torch.randn(5, 2, 6, dtype=torch.float64)
    assert torch.equal(network(x)[0], network(x)[0])
    network.train()
    assert not torch.equal(network(x)[0], network(x)[0])


def test_no_steps_and_no_sequences():
    for shape in ((0, 2, 6), (3, 0, 6)):
        h, c, _ = SRUpp(6, 8, 4)(torch.randn(shape), attn_mask=torch.zeros(shape[0], shape[0]))
        assert h.shape == (*shape[:2], 8)
        assert c.shape == (2, shape[1], 8)


def test_it_compiles_in_one_graph():
    network, x = pp(causal=True), torch.randn(5, 2, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], network(x)[0])


def test_gradients_agree_with_finite_differences():
    network = pp(num_layers=2, causal=True)
    x, memory = torch.randn(3, 2, 6, dtype=torch.float64), [torch.randn(2, 2, n, dtype=torch.float64) for n in (6, 8)]

    def run(x, *memory):
        h, c, _ = network(x, memory=memory)
        return h, c

    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in (x, *memory)])
