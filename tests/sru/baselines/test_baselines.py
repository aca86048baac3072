"""The baselines step by step and both ways; what else they promise is in test_layer.py and test_padding.py."""

import pytest
import torch

from sru import CNN, GRU, LSTM, QRNN, SRU

BASELINES = {
    "lstm": lambda: LSTM(5, 7, 2),
    "gru": lambda: GRU(5, 7, 2),
    "qrnn": lambda: QRNN(5, 7, 2),
    "qrnn_highway": lambda: QRNN(5, 7, 2, highway=True),
    "cnn": lambda: CNN(5, num_filters=4),
}


@pytest.mark.parametrize("name", BASELINES)
def test_steps_are_one_call(name):
    network, x = BASELINES[name]().double().eval(), torch.randn(9, 2, 5, dtype=torch.float64)
    expected, last = network(x)
    _, state = network(x[:3])  # steps go on from a call
    for i in range(3, 9):
        h, state = network.step(x[i], state)
        torch.testing.assert_close(h, expected[i])
    torch.testing.assert_close(state, last)
    state, outputs = None, []
    for x_t in x:
        h, state = network.step(x_t, state)
        outputs.append(h)
    torch.testing.assert_close(torch.stack(outputs), expected)
    torch.testing.assert_close(network(x, state)[0], network(torch.cat([x, x]))[0][9:])


@pytest.mark.parametrize("cls", [LSTM, GRU, QRNN, CNN])
def test_both_directions_have_no_step(cls):
    options = {} if cls is CNN else {"hidden_size": 7}
    with pytest.raises(ValueError, match=f"a bidirectional {cls.__name__} needs the whole sequence: it has no step"):
        cls(5, bidirectional=True, **options).step(torch.randn(2, 5))
    with pytest.raises(ValueError, match="bidirectional must be True or False, not 'no'"):
        cls(5, bidirectional="no", **options)


@pytest.mark.parametrize("highway", [False, True])
def test_a_qrnn_of_both_directions_is_two_layers_one_on_the_reversed_sequence(highway):
    both = QRNN(5, 7, 1, highway=highway, bidirectional=True).double()
    x, c0 = torch.randn(9, 2, 5, dtype=torch.float64), torch.randn(1, 2, 14, dtype=torch.float64)
    h, c = both(x, c0)
    for half, reverse in zip(torch.arange(14).chunk(2), (False, True), strict=True):
        one = QRNN(5, 7, 1, highway=highway).double()
        one.layers[0].linear.weight.data = both.layers[0].linear.weight.unflatten(0, (-1, 14))[:, half].flatten(0, 1)
        found, last = one(x.flip(0) if reverse else x, c0[..., half])
        torch.testing.assert_close(h[..., half], found.flip(0) if reverse else found)
        torch.testing.assert_close(c[..., half], last)


def test_a_qrnn_of_both_directions_has_the_matrices_of_an_sru():
    def matrices(network):
        return sum(p.numel() for p in network.parameters() if p.dim() == 2 and min(p.shape) > 3)

    shape = 300, 128, 4
    assert matrices(QRNN(*shape, highway=True, bidirectional=True)) == matrices(SRU(*shape, bidirectional=True))


def test_a_cnn_of_both_directions_is_two_one_on_the_reversed_sequence():
    both, x = CNN(5, num_filters=4, bidirectional=True), torch.randn(9, 2, 5)
    h, (tail, peak) = both(x)
    for i, reverse in enumerate((False, True)):
        one = CNN(5, num_filters=4)
        one.convolutions = both.convolutions[3 * i : 3 * i + 3]
        found, state = one(x.flip(0) if reverse else x)
        torch.testing.assert_close(h.chunk(2, 2)[i], found.flip(0) if reverse else found)
        torch.testing.assert_close((tail.chunk(2, 2)[i], peak.chunk(2, 2)[i]), state)


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_of_another_shape_is_refused(name):
    for shape in ((5,), (1, 2, 5)):
        with pytest.raises(ValueError, match=r"x must be \(B, input_size\), one step of a sequence, not "):
            BASELINES[name]().step(torch.randn(shape))
