"""The SRU layer, its stack and the baselines behind the same call."""

import math

import pytest
import torch

from sru import CNN, GRU, LSTM, QRNN, SRU, SRUCell

ENCODERS = {
    "sru": lambda: SRU(5, 7, 3),
    "sru_no_highway": lambda: SRU(5, 7, 2, has_skip_term=False),
    "sru_no_vc": lambda: SRU(5, 7, 2, has_vc_term=False),
    "sru_same_size": lambda: SRU(5, 5, 2, highway_bias=-2.0),
    "lstm": lambda: LSTM(5, 7, 2),
    "gru": lambda: GRU(5, 7, 2),
    "qrnn": lambda: QRNN(5, 7, 2),
    "qrnn_highway": lambda: QRNN(5, 7, 2, highway=True),
    "cnn": lambda: CNN(5, num_filters=4),
}


def by_hand(cell: SRUCell, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations, one number at a time."""
    size = cell.output_size
    rows = [cell.weight[i * size : (i + 1) * size] for i in range(cell.weight.shape[0] // size)]
    c, outputs = torch.zeros(x.shape[1], size, dtype=x.dtype), []
    v, b = cell.v.view(2, size), cell.bias.view(2, size)
    for x_t in x:
        f = torch.sigmoid(x_t @ rows[1].T + v[0] * c + b[0])
        r = torch.sigmoid(x_t @ rows[2].T + v[1] * c + b[1])
        c = f * c + (1 - f) * (x_t @ rows[0].T)
        if not cell.has_skip_term:
            outputs.append(r * c)
        else:
            skip = x_t @ rows[3].T if len(rows) == 4 else cell.alpha * x_t
            outputs.append(r * c + (1 - r) * skip)
    return torch.stack(outputs)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 6)])
@pytest.mark.parametrize(
    "options", [{}, {"has_skip_term": False}, {"has_vc_term": False}, {"rescale": False}, {"project_skip": True}]
)
def test_a_layer_follows_the_paper(sizes, options):
    torch.manual_seed(0)
    cell = SRUCell(*sizes, highway_bias=-1.0, **options).double()
    x = torch.randn(9, 3, sizes[0], dtype=torch.float64)
    h, c = cell(x)
    torch.testing.assert_close(h, by_hand(cell, x), rtol=1e-10, atol=1e-10)
    assert h.shape == (9, 3, 6)
    assert c.shape == (3, 6)
    has_fourth = options != {"has_skip_term": False} and ("project_skip" in options or sizes[0] != 6)
    assert len(cell.weight) == (4 if has_fourth else 3) * 6


def test_no_highway_is_projected():
    with pytest.raises(ValueError, match="project_skip=True has no highway to project"):
        SRUCell(6, 6, has_skip_term=False, project_skip=True)


def test_a_bidirectional_layer_is_two_layers_one_on_the_reversed_sequence():
    torch.manual_seed(0)
    both = SRUCell(4, 3, bidirectional=True).double()
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    h, c = both(x)
    for half, sequence in ((slice(0, 3), x), (slice(3, 6), x.flip(0))):
        one = SRUCell(4, 3).double()
        with torch.no_grad():
            one.weight.copy_(both.weight.view(4, 6, 4)[:, half].reshape(12, 4))
            one.v.copy_(both.v.view(2, -1)[:, half].flatten())
            one.bias.copy_(both.bias.view(2, -1)[:, half].flatten())
        expected, last = one(sequence)
        torch.testing.assert_close(h[..., half], expected if half.start == 0 else expected.flip(0))
        torch.testing.assert_close(c[..., half], last)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_contract_of_an_encoder(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    x = torch.randn(11, 3, 5, requires_grad=True)
    h, _ = encoder(x)
    assert h.shape == (11, 3, encoder.output_size)
    h[-1].sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 3, 5), (4, 0, 5), (4, 1, 5)])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("lstm", "gru")])
def test_empty_and_short_sequences(name, shape):
    """torch's own networks refuse a length of 0."""
    encoder = ENCODERS[name]().eval()
    x = torch.randn(shape)
    h, state = encoder(x)
    assert h.shape == (*shape[:2], encoder.output_size)
    assert h.dtype == x.dtype
    h.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    # The same steps behind a sequence that is longer: nothing there is seen of them, and the state is that before them.
    whole, _ = encoder(torch.cat([x, torch.randn(3, *shape[1:])]))
    torch.testing.assert_close(h, whole[: shape[0]])
    _, same = encoder(x[:0], state)
    for before, after in zip(tensors(state), tensors(same), strict=True):
        assert torch.equal(before, after)


def tensors(state):
    return [state] if isinstance(state, torch.Tensor) else [tensor for part in state for tensor in tensors(part)]


@pytest.mark.parametrize("steps", [0, 1])
def test_the_state_behind_no_step_or_one_is_that_of_the_equations(steps):
    cell, x = SRUCell(5, 5, highway_bias=-1.0).double(), torch.randn(steps, 3, 5, dtype=torch.float64)
    c0 = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h, c = cell(x, c0)
    expected = c0
    if steps:
        rows, v, b = cell.weight.split(5), cell.v.split(5), cell.bias.split(5)
        f = torch.sigmoid(x[0] @ rows[1].T + v[0] * c0 + b[0])
        r = torch.sigmoid(x[0] @ rows[2].T + v[1] * c0 + b[1])
        expected = f * c0 + (1 - f) * (x[0] @ rows[0].T)
        torch.testing.assert_close(h[0], r * expected + (1 - r) * cell.alpha * x[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(c, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(
        *(torch.autograd.grad(s.sum(), [c0, *([cell.weight] if steps else [])]) for s in (c, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ENCODERS)
def test_state_survives_a_cut(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    x = torch.randn(11, 3, 5)
    whole, _ = encoder(x)
    state, parts = None, []
    for part in x.split([1, 4, 2, 4]):
        h, state = encoder(part, state)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_last_step_of_the_cnn_is_the_maximum_over_time():
    torch.manual_seed(0)
    cnn = CNN(5, num_filters=4, widths=(2, 3))
    x = torch.randn(8, 2, 5)
    h, _ = cnn(x)
    padded = torch.cat([torch.zeros(2, 2, 5), x]).permute(1, 2, 0)
    expected = [torch.relu(conv(padded[..., 3 - conv.kernel_size[0] :])).amax(-1) for conv in cnn.convolutions]
    torch.testing.assert_close(h[-1], torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    ("encoder", "published"),
    [
        (SRU(300, 128, 2), 203_776),
        (SRU(300, 128, 4), 303_104),
        (SRU(300, 128, 8), 501_760),
        (LSTM(300, 128, 2), 352_256),
        (CNN(300), 360_300),
        (QRNN(300, 128, 2), 165_120),
        (QRNN(300, 128, 2, highway=True), 203_520),
    ],
)
def test_sizes_are_those_of_the_papers_first_table(encoder, published):
    assert sum(p.numel() for p in encoder.parameters()) == published


def test_the_initialisation_is_the_published_one():
    torch.manual_seed(0)
    cell = SRUCell(600, 500, highway_bias=-3.0, dropout=0.2)
    candidate, forget, reset, skip = cell.weight.detach().view(4, 500, 600)
    assert math.isclose(cell.alpha, 1.0486, abs_tol=1e-4)
    assert candidate.var() * 600 == pytest.approx(0.8, rel=0.02)
    assert forget.var() * 600 == pytest.approx(0.5, rel=0.02)
    assert reset.var() * 600 == pytest.approx(0.5, rel=0.02)
    assert skip.var() * 600 == pytest.approx(cell.alpha**2, rel=0.02)
    assert candidate.abs().max() <= math.sqrt(3 / 600)
    assert cell.v.detach().var() == pytest.approx(0.5, rel=0.15)
    assert cell.bias.tolist() == [0.0] * 500 + [-3.0] * 500


def test_the_forget_gate_starts_at_forget_bias():
    assert SRUCell(2, 2, forget_bias=2.0).bias.tolist() == [2.0, 2.0, 0.0, 0.0]


def test_the_scaling_correction_keeps_the_variance_of_a_deep_stack():
    """Section 3.2: with it, the last layer's output varies about as much as the input; without it, far less."""
    torch.manual_seed(0)
    x = torch.randn(30, 16, 128)
    ratio = {rescale: SRU(128, 128, 20, rescale=rescale)(x)[0].var() / x.var() for rescale in (True, False)}
    assert 0.3 < ratio[True] < 3
    assert ratio[False] < 0.1


@pytest.mark.parametrize(
    ("dropout", "highway_bias", "most"), [(0.2, 0.0, 30), (0.2, -1.0, 2), (0.5, 0.0, 5), (0.5, -1.0, 5), (0.5, -3.0, 2)]
)
def test_the_correction_for_dropout_keeps_the_deviation_of_a_deep_stack_in_training(dropout, highway_bias, most):
    """In the mean over masks and weights, behind 20 layers; the gates vary, which the derivation leaves out."""
    torch.manual_seed(0)
    x = torch.randn(30, 16, 128)
    options = {"dropout": dropout, "highway_bias": highway_bias}
    deviations = [SRU(128, 128, 20, rescale="dropout", **options)(x)[0].std().item() for _ in range(3)]
    assert 0.5 < sum(deviations) / 3 < most


def test_the_correction_for_dropout_is_the_published_one_in_a_layer_without_dropout():
    network = SRU(6, 6, 3, dropout=0.5, highway_bias=-1.0, rescale="dropout")
    r = 1 / (1 + math.e)
    expected = math.sqrt((1 - r**2) / (1 - 2 * r + r**2 / 0.5))
    assert [layer.alpha for layer in network.layers] == pytest.approx([expected] * 2 + [math.sqrt(1 + 2 / math.e)])
    other = SRU(6, 6, 3, dropout=0.5)
    other.load_state_dict(network.state_dict())  # alpha goes with the parameters
    x = torch.randn(4, 2, 6)
    torch.testing.assert_close(other.eval()(x)[0], network.eval()(x)[0])
    with pytest.raises(ValueError, match="rescale must be True, False or \"dropout\", not 'drop-out'"):
        SRU(6, 6, rescale="drop-out")


def test_one_layer_keeps_the_variance_that_the_derivation_assumes():
    """h = X + m r (c - X) with constant gates, c of variance (1 - p) Var[x]: Monte Carlo over masks and inputs."""
    torch.manual_seed(0)
    for p, b in [(0.2, 0.0), (0.5, 0.0), (0.5, -1.0), (0.8, 1.0)]:
        alpha, r = SRUCell(4, 4, dropout=p, highway_bias=b, rescale="dropout").alpha, 1 / (1 + math.exp(-b))
        x, c = alpha * torch.randn(10**6), (1 - p) ** 0.5 * torch.randn(10**6)
        mask = (torch.rand(10**6) < 1 - p) / (1 - p)
        assert (x + mask * r * (c - x)).var() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("bias", [-80.0, 40.0, 80.0])
def test_the_correction_for_dropout_stays_positive_for_every_bias(bias):
    network = SRU(4, 4, dropout=0.5, highway_bias=bias, rescale="dropout")
    assert network[0].alpha > 0
    network.load_state_dict(network.state_dict())  # refuses an alpha of 0


def test_dropout_draws_one_mask_for_all_steps_of_a_sequence():
    torch.manual_seed(0)
    cell = SRUCell(4, 64, dropout=0.5, has_skip_term=False)
    h, _ = cell(torch.randn(10, 3, 4))
    dropped = h == 0
    assert torch.equal(dropped.any(0), dropped.all(0))
    assert 0.3 < dropped.float().mean() < 0.7
    cell.eval()
    assert (cell(torch.randn(10, 3, 4))[0] != 0).all()


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    cell = SRUCell(4, 8, dropout=0.4)
    x = torch.randn(5, 1, 4)
    mean = cell(x.expand(5, 60_000, 4))[0].mean(1)
    torch.testing.assert_close(mean, cell.eval()(x)[0][:, 0], atol=0.02, rtol=0.05)


def test_the_last_layer_of_a_stack_has_no_dropout():
    stack = SRU(4, 4, 3, dropout=0.5)
    assert [layer.dropout for layer in stack.layers] == [0.5, 0.5, 0.0]


def test_padding_changes_nothing():
    torch.manual_seed(0)
    stack = SRU(4, 6, 3, bidirectional=True)
    sequences = [torch.randn(length, 1, 4) for length in (5, 2, 7)]
    batch = torch.full((7, 3, 4), 9.0)
    mask_pad = torch.ones(7, 3, dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        batch[: len(sequence), b] = sequence[:, 0]
        mask_pad[: len(sequence), b] = False
    h, c = stack(batch, mask_pad=mask_pad)
    for b, sequence in enumerate(sequences):
        alone, last = stack(sequence)
        torch.testing.assert_close(h[: len(sequence), b], alone[:, 0])
        torch.testing.assert_close(c[:, b], last[:, 0])
        assert h[len(sequence) :, b].eq(0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SRU(0, 4), "input_size"),
        (lambda: SRU(4, 4, 0), "num_layers"),
        (lambda: SRU(4, 4, dropout=1.5), "dropout"),
        (lambda: QRNN(4, 4, 0), "num_layers"),
        (lambda: QRNN(4, 4, dropout=1.0)(torch.zeros(3, 2, 4)), "dropout"),
        (lambda: SRU(4, 4)(torch.zeros(3, 2, 5)), r"\(T, B, 4\)"),
        (lambda: SRU(4, 4)(torch.zeros(4)), r"\(T, B, 4\)"),
        (lambda: SRU(4, 4)(torch.zeros(3, 5)), r"\(T, B, 4\)"),
        (lambda: SRUCell(4, 4)(torch.zeros(4)), r"\(T, B, 4\)"),
        (lambda: SRU(4, 4)(torch.zeros(3, 2, 4), torch.zeros(2, 3, 4)), "c0"),
        (lambda: SRU(4, 4)(torch.zeros(3, 2, 4), mask_pad=torch.zeros(2, 3, dtype=torch.bool)), "pad"),
    ],
)
def test_wrong_sizes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
