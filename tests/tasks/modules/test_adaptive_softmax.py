"""The adaptive embedding and softmax against torch's, against plain layers and against the published sizes."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tasks.modules.adaptive_softmax import AdaptiveEmbedding, AdaptiveSoftmax

CUTOFFS = [4, 7]
BOTH = pytest.mark.parametrize("cutoffs", [[], CUTOFFS], ids=["plain", "clusters"])


def tied_pair(cutoffs, vocab_size=12, size=8, **options):
    embedding = AdaptiveEmbedding(vocab_size, 4, size, cutoffs=cutoffs, div_value=2)
    return embedding, AdaptiveSoftmax(size, vocab_size, cutoffs=cutoffs, div_value=2, tied=embedding, **options)


def spread(module):
    """Weights and biases away from their small or zero initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def count(*modules):
    return sum(p.numel() for p in nn.ModuleList(modules).parameters())


@pytest.mark.parametrize("size", [410, 2048])
@pytest.mark.parametrize(
    ("vocab_size", "cutoffs", "tie_projections", "words", "features"),
    [  # WikiText-103 and Billion Word
        (267_735, [19_997, 39_997, 199_997], True, 36_920_736, 1360),
        (793_471, [59_998, 159_998], False, 127_580_224, 1344),
    ],
)
def test_sizes_are_those_published(vocab_size, cutoffs, tie_projections, words, features, size):
    with torch.device("meta"):
        embedding = AdaptiveEmbedding(vocab_size, 1024, size, cutoffs=cutoffs)
        softmax = AdaptiveSoftmax(size, vocab_size, cutoffs=cutoffs, tied=embedding, tie_projections=tie_projections)
    assert count(embedding) == words + features * size
    projections = features * size if tie_projections else 2 * features * size
    assert count(embedding, softmax) == words + projections + vocab_size + len(cutoffs) * 1025


@pytest.mark.parametrize(("cutoffs", "div_value"), [([5], 2), ([5, 9, 20], 2), ([10, 11], 4)])
def test_the_softmax_is_torchs(cutoffs, div_value):
    theirs = spread(nn.AdaptiveLogSoftmaxWithLoss(16, 30, cutoffs, div_value, head_bias=True))
    ours = AdaptiveSoftmax(16, 30, cutoffs=cutoffs, div_value=div_value)
    with torch.no_grad():
        ours.weights[0].copy_(theirs.head.weight[: cutoffs[0]])
        ours.bias[: cutoffs[0]] = theirs.head.bias[: cutoffs[0]]
        ours.cluster_weight.copy_(theirs.head.weight[cutoffs[0] :])
        ours.cluster_bias.copy_(theirs.head.bias[cutoffs[0] :])
        for i, (projection, words) in enumerate(theirs.tail, start=1):
            ours.projections[i].copy_(projection.weight.T)
            ours.weights[i].copy_(words.weight)
    h, targets = torch.randn(90, 16), torch.arange(30).repeat(3)
    torch.testing.assert_close(ours(h, targets), -theirs(h, targets).output)
    torch.testing.assert_close(ours.log_prob(h), theirs.log_prob(h))


@BOTH
@pytest.mark.parametrize("tie_projections", [True, False])
def test_the_loss_is_the_negative_log_probability_and_probabilities_sum_to_one(cutoffs, tie_projections):
    softmax = spread(tied_pair(cutoffs, tie_projections=tie_projections)[1])
    h, targets = torch.randn(36, 8), torch.randint(12, (36,))
    log_prob = softmax.log_prob(h)
    torch.testing.assert_close(log_prob.exp().sum(dim=1), torch.ones(36))
    torch.testing.assert_close(softmax(h, targets), -log_prob.gather(1, targets[:, None])[:, 0])


def test_without_cutoffs_the_softmax_is_the_ordinary_one():
    softmax = spread(AdaptiveSoftmax(8, 12))
    assert {name: tuple(p.shape) for name, p in softmax.named_parameters()} == {"weights.0": (12, 8), "bias": (12,)}
    h, targets = torch.randn(5, 3, 8), torch.randint(12, (5, 3))
    logits = F.linear(h, softmax.weights[0], softmax.bias)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(5, 3)
    assert torch.equal(softmax(h, targets), expected)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize(("cutoffs", "features"), [([], [8]), ([], [4]), (CUTOFFS, [8, 4, 2]), (CUTOFFS, [4, 2, 1])])
def test_each_token_gets_its_own_clusters_vector(cutoffs, features, shape):
    embedding = AdaptiveEmbedding(12, features[0], 8, cutoffs=cutoffs, div_value=2)
    assert [None if p is None else tuple(p.shape) for p in embedding.projections] == [
        None if e == 8 else (8, e) for e in features
    ]
    parts = zip(embedding.weights, embedding.projections, strict=True)
    table = torch.cat([weight if p is None else weight @ p.T for weight, p in parts])
    tokens = torch.randint(12, shape)
    torch.testing.assert_close(embedding(tokens), table[tokens])


@pytest.mark.parametrize("output_size", [256, 512])
def test_vectors_start_with_a_norm_of_about_one_in_every_cluster(output_size):
    embedding = AdaptiveEmbedding(3000, 256, output_size, cutoffs=[1000, 2000])
    for cluster in torch.arange(3000).view(3, 1000):
        x = embedding(cluster).detach()
        assert x.norm(dim=1).mean() == pytest.approx(1, rel=0.1)
        assert x.var() * output_size == pytest.approx(1, rel=0.1)


@BOTH
@pytest.mark.parametrize("tie_projections", [True, False])
def test_gradients_are_those_of_finite_differences(cutoffs, tie_projections):
    embedding, softmax = tied_pair(cutoffs, tie_projections=tie_projections)
    network = spread(nn.ModuleList([embedding, softmax])).double()
    tokens, targets = torch.tensor([[0, 5, 11], [3, 4, 7]]), torch.tensor([[4, 11, 2], [6, 0, 8]])

    def loss(*_):  # gradcheck changes the parameters in place
        return softmax(embedding(tokens).tanh(), targets)

    assert torch.autograd.gradcheck(loss, tuple(network.parameters()))


@BOTH
@pytest.mark.parametrize("tie_projections", [True, False])
def test_a_tied_gradient_is_the_sum_of_the_untied_ones(cutoffs, tie_projections):
    embedding, softmax = tied_pair(cutoffs, tie_projections=tie_projections)
    assert all(a is b for a, b in zip(embedding.weights, softmax.weights, strict=True))
    assert (embedding.projections is softmax.projections) == tie_projections
    free = AdaptiveSoftmax(8, 12, 4, cutoffs=cutoffs, div_value=2)
    free.load_state_dict(softmax.state_dict())
    twin = AdaptiveEmbedding(12, 4, 8, cutoffs=cutoffs, div_value=2)
    twin.load_state_dict(embedding.state_dict())
    tokens, targets = torch.randint(12, (2, 6, 5))
    softmax(embedding(tokens), targets).sum().backward()
    free(twin(tokens), targets).sum().backward()
    for name, parameter in embedding.named_parameters():
        expected = twin.get_parameter(name).grad.clone()
        if name.startswith("weights") or tie_projections:
            expected += free.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected)


def test_tails_are_computed_only_for_their_own_words():
    softmax = spread(AdaptiveSoftmax(8, 12, cutoffs=CUTOFFS, div_value=2))
    with torch.no_grad():
        softmax.weights[2].fill_(torch.nan)
    targets = torch.tensor([0, 3, 4, 6])
    loss = softmax(torch.randn(4, 8), targets)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert softmax(torch.randn(1, 8), torch.tensor([7])).isnan().all()
    for parameter in softmax.parameters():  # of every cluster, so that distributed training finds them all
        assert parameter.grad.isfinite().all()
    assert softmax.weights[2].grad.count_nonzero() == 0


@pytest.mark.parametrize("words", [range(4), range(4, 7), range(7, 12), range(4, 12)], ids=str)
def test_a_batch_may_lie_in_some_clusters_only(words):
    embedding, softmax = tied_pair(CUTOFFS)
    tokens = torch.tensor(list(words))
    h = embedding(tokens)
    assert h.shape == (len(words), 8)
    loss = softmax(h, tokens)
    torch.testing.assert_close(loss, -softmax.log_prob(h)[torch.arange(len(words)), tokens])
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in softmax.parameters())


def test_of_a_cluster_of_one_word_the_head_alone_decides():
    embedding, softmax = tied_pair([1, 2], vocab_size=3)
    tokens = torch.tensor([[2, 0, 1], [1, 1, 2]])
    log_prob = softmax._logits(embedding(tokens), 0).log_softmax(dim=-1)
    torch.testing.assert_close(softmax.log_prob(embedding(tokens).flatten(0, 1)), log_prob.flatten(0, 1))
    torch.testing.assert_close(softmax(embedding(tokens), tokens), -log_prob.gather(2, tokens[..., None])[..., 0])


@BOTH
def test_under_autocast_losses_are_float32(cutoffs):
    embedding, softmax = tied_pair(cutoffs, vocab_size=40)
    tokens, targets = torch.randint(40, (2, 9, 5))
    expected = softmax(embedding(tokens), targets)
    with torch.autocast("cpu", torch.bfloat16):
        h = embedding(tokens)
        loss = softmax(h, targets)
        assert softmax.log_prob(h.flatten(0, 1)).dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    loss.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in softmax.parameters())


@BOTH
def test_in_bfloat16_the_softmax_is_taken_in_float32(cutoffs):
    softmax, h = tied_pair(cutoffs)[1].bfloat16(), torch.randn(36, 8, dtype=torch.bfloat16)
    assert softmax(h, torch.arange(12).repeat(3)).dtype == torch.float32
    torch.testing.assert_close(softmax.log_prob(h).exp().sum(dim=1), torch.ones(36))


@pytest.mark.parametrize("word", [12, -1])
@BOTH
def test_a_word_beyond_the_vocabulary_is_refused(cutoffs, word):
    embedding, softmax = tied_pair(cutoffs)
    with pytest.raises(IndexError):
        embedding(torch.tensor([1, word]))
    with pytest.raises(IndexError):
        softmax(torch.randn(2, 8), torch.tensor([1, word]))


@pytest.mark.parametrize("cutoffs", [[2000, 10000], [0, 10], [10, 5], [5, 5], [10, 1000], [9.5]])
@pytest.mark.parametrize("layer", [AdaptiveEmbedding, lambda v, e, **options: AdaptiveSoftmax(e, v, **options)])
def test_cutoffs_that_do_not_fit_are_refused(layer, cutoffs):
    message = f"task.cutoffs={cutoffs} with a vocabulary of 1000 words: every cutoff must lie between 1 and 999"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(1000, 64, cutoffs=cutoffs)


def test_clusters_without_features_are_refused():
    AdaptiveEmbedding(1000, 64, cutoffs=[10, 20, 30])
    with pytest.raises(ValueError, match=r"task.embedding_size=63 must be 64 or more, as task.div_value=4"):
        AdaptiveEmbedding(1000, 63, cutoffs=[10, 20, 30])
    with pytest.raises(ValueError, match=r"task\.div_value=0 must be a whole number"):
        AdaptiveSoftmax(64, 1000, cutoffs=[10], div_value=0)


def test_projections_of_different_sizes_cannot_be_shared():
    options = {"vocab_size": 12, "cutoffs": CUTOFFS, "div_value": 2, "tied": tied_pair(CUTOFFS)[0]}
    with pytest.raises(ValueError, match=r"input_size=6 .* output_size=8, .* type task\.tie_projections=false"):
        AdaptiveSoftmax(6, **options)
    assert AdaptiveSoftmax(6, **options, tie_projections=False).projections[0].shape == (6, 4)
