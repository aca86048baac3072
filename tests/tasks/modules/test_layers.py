"""Word embeddings: their deviation at the start."""

import math

import pytest
import torch

from tasks.modules.layers import word_embedding


def rms(x):
    return float(x.detach().square().mean().sqrt())


def test_fixed_vectors_keep_their_directions_at_any_deviation():
    vectors = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    assert torch.equal(word_embedding(50, vectors, 0, 300).weight, vectors)
    scaled = word_embedding(50, vectors, 0, 300, deviation=1.0).weight
    torch.testing.assert_close(scaled, vectors * 4)  # a vector of length 1 has a root mean square of 1 / 4
    assert not scaled.requires_grad


def test_trained_embeddings_start_at_the_deviation():
    weight = word_embedding(2000, None, 0, 32, deviation=0.5).weight
    assert rms(weight[1:]) == pytest.approx(0.5, rel=0.02)
    assert not weight[0].any()
    assert weight.requires_grad
    assert rms(word_embedding(2000, None, 0, 32).weight[1:]) == pytest.approx(0.25 / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True])
def test_a_deviation_that_is_no_number_above_0_is_refused(value):
    with pytest.raises(ValueError, match=r"task.embedding_deviation=.* must be a number above 0, for example 1.0"):
        word_embedding(5, None, 0, 4, deviation=value)
