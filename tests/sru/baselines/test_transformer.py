"""The Transformer as encoder and decoder: against torch's layers, step by step, by its state, with SRU inside."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sru import SRU, SRUppEncoder, Transformer, TransformerSRU
from sru.attention import attend_source
from sru.baselines.attention_stack import sines
from sru.dropout import dropout

DECODERS = {
    "transformer": partial(Transformer, 5, 6, num_heads=2, source_size=7),
    "transformer_norm_last": partial(Transformer, 5, 6, num_heads=3, source_size=7, norm_first=False),
    "transformer_sru": partial(TransformerSRU, 5, 6, num_heads=2, source_size=7),
    "srupp": partial(SRUppEncoder, 5, 6, 4, source_size=7),
    "srupp_k2": partial(SRUppEncoder, 5, 6, 4, source_size=7, num_heads=2, attention_every_n_layers=2),
}
EVERY = pytest.mark.parametrize("name", DECODERS)


def decoder(name, **options):
    """A small decoder in float64, all of whose parts count."""
    made = DECODERS[name](**options).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def rand(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def padding(*lengths):
    return torch.arange(max(lengths))[:, None] >= torch.tensor(lengths)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_layer_is_torchs_layer(norm_first, is_decoder):
    ours = Transformer(
        8, 8, 1, num_heads=2, inner_size=12, norm_first=norm_first, source_size=8 if is_decoder else None
    )
    layer = ours.double().layers[0]
    kind = nn.TransformerDecoderLayer if is_decoder else nn.TransformerEncoderLayer
    theirs = kind(8, 2, 12, dropout=0.0, norm_first=norm_first, dtype=torch.float64)
    names = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "output.",
        "linear1.": "feed_forward.inner.",
        "linear2.": "feed_forward.outer.",
        "norm1.": "attention_norm.",
        "norm2.": "source_norm." if is_decoder else "norm.",
        "norm3.": "norm.",
        "multihead_attn.out_proj.": "source_output.",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        value = value + 0.3 * rand(*value.shape)  # biases and norms too
        for start, own in names.items():
            if name.startswith(start):
                state[own + name.removeprefix(start)] = value
        if name.startswith("multihead_attn.in_proj_"):
            kind = name.removeprefix("multihead_attn.in_proj_")
            state[f"source_query.{kind}"], state[f"source_key_value.{kind}"] = value[:8], value[8:]
        theirs.state_dict()[name].copy_(value)
    layer.load_state_dict(state)
    x, source, pad, source_pad = rand(5, 3, 8), rand(4, 3, 8), padding(5, 2, 3), padding(4, 1, 3)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.bool)
    if is_decoder:
        expected = theirs(x, source, causal, memory_key_padding_mask=source_pad.t())
        h, _ = layer(x, (), None, True, None, (*layer.read(source), source_pad))
        torch.testing.assert_close(h, expected)
    else:
        expected = theirs.train()(x, src_key_padding_mask=pad.t())  # in eval it takes a path that drops the padding
        h, _ = layer(x, (), ~pad.t()[:, None, None], False, pad, None)
        torch.testing.assert_close(h[~pad], expected[~pad])


def test_the_feed_forward_is_an_sru_and_a_matrix():
    encoder = TransformerSRU(6, 6, 1, num_heads=2, inner_size=9).double().eval()
    layer = encoder.layers[0]
    x, c0 = rand(4, 2, 6), rand(1, 2, 9)
    z, (c,) = layer.feed_forward(x, (c0,), None)
    sru = SRU(6, 9, 1, has_skip_term=False, dtype=torch.float64)
    sru.load_state_dict({f"layers.0.{name}": value for name, value in layer.feed_forward.cell.state_dict().items()})
    h, expected = sru(x, c0)
    torch.testing.assert_close(z, h @ layer.feed_forward.outer.weight.t() + layer.feed_forward.outer.bias)
    torch.testing.assert_close(c, expected)
    assert layer.feed_forward.cell.weight.shape == (3 * 9, 6)


def test_sines_of_hand_worked_numbers():
    found = sines(torch.tensor([[0, 1], [100, 3]]), torch.zeros(2, 2, 4, dtype=torch.float64))
    assert found[0, 0].tolist() == [0, 0, 1, 1]
    assert found[0, 1].tolist() == pytest.approx([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)])
    assert found[1, 0].tolist() == pytest.approx([math.sin(100), math.sin(1), math.cos(100), math.cos(1)])
    assert sines(torch.tensor([[300]]), torch.zeros(1, 1, 3).bfloat16()).shape == (1, 1, 3)


@EVERY
def test_step_by_step_is_one_call(name):
    made, x, source, pad = decoder(name), rand(6, 2, 5), rand(4, 2, 7), padding(4, 2)
    seen = made.read(source, pad)
    h, _ = made(x, None, None, seen)
    state, steps = None, []
    for now in x:
        y, state = made.step(now, state, seen)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps), h)


@EVERY
def test_values_in_the_padding_of_a_source_are_not_read(name):
    made, x, source, pad = decoder(name), rand(3, 2, 5), rand(4, 2, 7), padding(4, 2)
    expected, _ = made(x, None, None, made.read(source, pad))
    source[pad] = math.nan
    torch.testing.assert_close(made(x, None, None, made.read(source, pad))[0], expected)
    torch.testing.assert_close(made(x, None, None, made.read(source, pad.long()))[0], expected)


@EVERY
def test_several_sequences_look_into_one_source(name):
    made, x, source, pad = decoder(name), rand(3, 6, 5), rand(4, 2, 7), padding(2, 4)
    h, _ = made(x, None, None, made.read(source, pad))
    for i in range(6):
        one = source[: 4 if i // 3 else 2, i // 3, None]
        torch.testing.assert_close(made(x[:, i, None], None, None, made.read(one))[0][:, 0], h[:, i])


@EVERY
def test_gradients_reach_the_source_and_every_weight(name):
    made = decoder(name).requires_grad_(False)
    x, source = rand(3, 2, 5, requires_grad=True), rand(3, 2, 7, requires_grad=True)
    parameters = dict(made.named_parameters())

    def run(x, source, *values):
        def call(module, x, source):
            return module(x, None, None, module.read(source, padding(3, 1)))[0]

        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(Caller(made, call), {f"module.{k}": v for k, v in state.items()}, (x, source))

    values = [value.detach().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, source, *values), atol=1e-6, nondet_tol=1e-12, fast_mode=True)


class Caller(nn.Module):
    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs):
        return self.call(self.module, *inputs)


def test_an_empty_source_adds_nothing():
    q, k = rand(2, 4, 6), rand(3, 2, 6)
    a = attend_source(q, k, k, torch.tensor([[True, False]] * 3), 2)
    assert not a[:, :2].any()
    torch.testing.assert_close(a[:, 2:], attend_source(q[:, 2:], k[:, 1:], k[:, 1:], None, 2))
    assert attend_source(q[:0], k, k, None, 2).shape == (0, 4, 6)
    assert attend_source(q[:, :0], k[:, :0], k[:, :0], None, 2).shape == (2, 0, 6)


def test_attention_to_a_source_is_a_softmax_of_products():
    q, k, v = rand(2, 1, 4), rand(3, 1, 4), rand(3, 1, 4)
    weights = (q[:, 0] @ k[:, 0].t() / 2).softmax(1)
    torch.testing.assert_close(attend_source(q, k, v, None, 1)[:, 0], weights @ v[:, 0])


def test_srupp_adds_the_attention_to_the_source():
    """One layer by the formulas of sru/attention.py."""
    made, x, source = decoder("srupp", num_layers=1), rand(3, 1, 5), rand(4, 1, 7)
    module = made[0].transform_module
    q = x[:, 0] @ module.linear1.weight.t()
    k, v = (q @ module.linear2.weight.t()).chunk(2, dim=1)
    scores = (q @ k.t() / 2).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -math.inf)
    p = source[:, 0] @ module.source.linear1.weight.t()
    source_k, source_v = (p @ module.source.linear2.weight.t()).chunk(2, dim=1)
    seen = (q @ source_k.t() / 2).softmax(1) @ source_v
    y = module.layer_norm(q + module.alpha * scores.softmax(1) @ v + module.source.beta * seen)
    u = (y @ module.linear3.weight.t()).view(3, 1, 6, 4).transpose(2, 3)  # the columns of a feature lie together
    found = module(x, None, None, True, None, (*made.read(source)[1][0], None))
    torch.testing.assert_close(found, u)


@pytest.mark.parametrize("memory_length", [0, 2, 5])
def test_a_bounded_memory_sees_the_last_steps(memory_length):
    encoder = Transformer(5, 6, 1, num_heads=2, memory_length=memory_length).double().eval()
    x, state, found = rand(9, 1, 5), None, []
    for now in x:
        h, state = encoder.step(now, state)
        found.append(h)
    whole = Transformer(5, 6, 1, num_heads=2).double().eval()
    whole.load_state_dict(encoder.state_dict())
    for t in range(9):
        first = max(0, t - memory_length)
        # A first step gives the numbers of steps that the kept ones had.
        start = whole(x[:first])[1] if first else None
        if start is not None:
            start = [(k[:0], v[:0]) for k, v in start[:1]] + start[1:]
        torch.testing.assert_close(whole(x[first : t + 1], start)[0][-1], found[t])


def test_positions_continue_after_padding():
    encoder = Transformer(5, 6, num_heads=2).double().eval()
    x = rand(6, 2, 5)
    _, state = encoder(x[:4], None, padding(4, 2))
    h, state = encoder(x[4:], state)
    assert state[-2].tolist() == [[6, 4]]
    expected, _ = encoder(torch.cat([x[:2, 1:], x[4:, 1:]]))
    torch.testing.assert_close(h[:, 1:], expected[2:])


def test_a_bidirectional_transformer_has_no_step():
    with pytest.raises(ValueError, match="a bidirectional Transformer needs the whole sequence"):
        Transformer(5, 6, num_heads=2, bidirectional=True).step(torch.randn(2, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "hidden_size = 6 cannot be shared among num_heads = 4: choose num_heads from 1, 2, 3, 6"),
        ({"num_heads": 2, "source_size": 0}, "source_size must be a whole number of at least 1"),
        ({"num_heads": 2, "memory_length": -1}, "memory_length must be a whole number of at least 0"),
        ({"num_heads": 2, "dropout": 1.0}, "dropout"),
        ({"num_heads": 2, "causal": True, "bidirectional": True}, "causal and bidirectional contradict each other"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(5, 6, **options)


@pytest.mark.parametrize("name", ["transformer", "srupp"])
def test_a_missing_or_needless_source_is_refused(name):
    made, x = decoder(name), rand(3, 2, 5)
    with pytest.raises(ValueError, match="a source is missing: pass the result of read"):
        made(x)
    with pytest.raises(ValueError, match="a source of 3 sequences does not fit the 2 sequences of x"):
        made(x, None, None, made.read(rand(4, 3, 7)))
    with pytest.raises(ValueError, match=r"source must be \(S, B, 7\), time first, not \(4, 2, 5\)"):
        made.read(rand(4, 2, 5))
    with pytest.raises(ValueError, match="the source was read by 3 layers, but this stack has 2"):
        made(x, None, None, decoder(name, num_layers=3).read(rand(4, 2, 7)))
    plain = decoder(name, source_size=None)
    with pytest.raises(ValueError, match="attends to no source: build it with source_size"):
        plain.read(rand(4, 2, 7))
    with pytest.raises(ValueError, match="this stack has no source_size, so it takes no source"):
        plain(x, None, None, made.read(rand(4, 2, 7)))


def test_another_networks_state_is_refused():
    encoder, x = Transformer(5, 6, num_heads=2), torch.randn(3, 2, 5)
    with pytest.raises(TypeError, match="the state must be one that a Transformer of 2 layers returned"):
        encoder(x, SRU(5, 6)(x)[1])
    with_sru = TransformerSRU(5, 6, num_heads=2)
    with pytest.raises(TypeError, match="the state must be one that a TransformerSRU of 2 layers returned"):
        with_sru(x, encoder(x)[1])
    with pytest.raises(TypeError, match="the state must be one that a Transformer of 2 layers returned"):
        encoder(x, with_sru(x)[1])
    with pytest.raises(ValueError, match="the state has 2 sequences, but x has 1"):
        encoder(x[:, :1], encoder(x)[1])
    with pytest.raises(ValueError, match=r"x must be \(T, B, 5\), time first, not \(3, 2, 4\)"):
        encoder(x[..., :4])


def test_rescale_without_a_highway_is_refused():
    with pytest.raises(ValueError, match="rescale=False has no highway to scale; type has_skip_term=true"):
        TransformerSRU(5, 6, num_heads=2, rescale=False)
    made = [TransformerSRU(5, 6, num_heads=2, has_skip_term=True, rescale=rescale) for rescale in (True, False)]
    assert [encoder.layers[0].feed_forward.cell.alpha for encoder in made] == [pytest.approx(math.sqrt(3)), 1]


@pytest.mark.gpu
@EVERY
def test_a_gpu_gives_the_same(name):
    made, x, source = decoder(name).float(), torch.randn(6, 4, 5), torch.randn(3, 2, 7)
    expected, _ = made(x, None, None, made.read(source, padding(3, 2)))
    made = made.cuda()
    seen = made.read(source.cuda(), padding(3, 2).cuda())
    h, _ = made(x.cuda(), None, None, seen)
    torch.testing.assert_close(h.cpu(), expected, rtol=1e-3, atol=1e-3)
    state, steps = None, []
    for now in x.cuda():
        y, state = made.step(now, state, seen)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps), h, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_given_share(p):
    x = torch.ones(501, 201, requires_grad=True)
    y = dropout(x, p, True)
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.01)
    assert y.unique().tolist() == [0, pytest.approx(1 / (1 - p), rel=1e-3)]
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(1)
    one = dropout(x, p, True)
    torch.manual_seed(1)
    assert torch.equal(one, dropout(x, p, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dropout_at_the_edges_of_its_arguments(dtype):
    x = torch.randn(7, 3, dtype=dtype)
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert dropout(x, 0.5, True).dtype == dtype
    assert dropout(x[:0], 0.5, True).shape == (0, 3)
    assert dropout(x, 0.9999999, True).isfinite().all()
    assert not dropout(x, 1.0, True).any()
    with pytest.raises(ValueError, match="dropout"):
        dropout(x, 1.5, True)
    together = torch.func.vmap(lambda row: dropout(row, 0.5, True), randomness="different")
    assert together(x).shape == (7, 3)
