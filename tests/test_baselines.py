"""The baselines step by step; what else they promise is in test_layer.py."""

import pytest
import torch

from sru import CNN, GRU, LSTM, QRNN

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


@pytest.mark.parametrize("cls", [LSTM, GRU])
def test_both_directions_have_no_step(cls):
    with pytest.raises(ValueError, match=f"a bidirectional {cls.__name__} needs the whole sequence: it has no step"):
        cls(5, 7, bidirectional=True).step(torch.randn(2, 5))


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_of_another_shape_is_refused(name):
    for shape in ((5,), (1, 2, 5)):
        with pytest.raises(ValueError, match=r"x must be \(B, input_size\), one step of a sequence, not "):
            BASELINES[name]().step(torch.randn(shape))
