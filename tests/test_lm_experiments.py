"""Published rows of language modelling, with their schedules; tests/scripts/test_papers.py has their sizes."""

import pytest
import torch
from conftest import options
from hydra.utils import instantiate

VOCABULARIES = {
    "enwik8": (205, "bytes"),
    "enwik8_4mb": (205, "bytes"),  # of its own rather fewer
    "ptb": (10_000, "words"),
    "wikitext103": (267_735, "words"),
    "lm1b": (793_470, "words"),
}
SMALL = [name for name in options("experiment") if name.startswith(("enwik8_4mb_", "ptb_small_"))]
EXPERIMENTS = [name for name in options("experiment") if name.split("_")[0] in VOCABULARIES and name not in SMALL]
ATTENDING = [name for name in EXPERIMENTS if "srupp" in name or "transformer" in name]


def build(cfg):
    """The task with its network, without numbers."""
    vocab_size, unit = VOCABULARIES[cfg.choices.data]
    with torch.device("meta"):
        return instantiate(cfg.task)(encoder=instantiate(cfg.model), vocab_size=vocab_size, unit=unit)


def rate(cfg, n):
    """The learning rate of step n, or of epoch n."""
    optimizer = instantiate(cfg.task.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    scheduler = instantiate(cfg.task.scheduler)(optimizer)["scheduler"]
    optimizer.step()
    scheduler.last_epoch = n - 2  # what it counts, from 0 on; the next call adds 1
    scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_names_its_corpus_and_has_an_optimizer_with_a_schedule(configure, name):
    cfg = configure(f"experiment={name}")
    assert cfg.choices.data == name.split("_")[0]
    assert rate(cfg, 1) > 0
    assert rate(cfg, 300) > 0
    unit = "bpc" if cfg.choices.data == "enwik8" else "perplexity"
    assert cfg.paper.metric in (f"test/{unit}", f"val/{unit}")


@pytest.mark.parametrize("name", SMALL)
def test_networks_that_are_compared_have_about_two_million_parameters(configure, name):
    parameters = sum(p.numel() for p in build(configure(f"experiment={name}")).parameters())
    low = 1.94e6 if name.startswith("enwik8") else 1.75e6
    assert low < parameters < 2.06e6


def test_noam_reaches_its_peak_after_32_000_steps(configure):
    cfg = configure("experiment=enwik8_sru_12l_proj")
    # 3 / sqrt(2048 * 32000); half of it at half the way up, and at four times as many steps.
    assert rate(cfg, 32_000) == pytest.approx(3.705794e-4)
    assert rate(cfg, 16_000) == rate(cfg, 128_000) == pytest.approx(1.852897e-4)
    assert rate(cfg, 1) == pytest.approx(3.705794e-4 / 32_000)


def test_cosine_follows_a_warm_up_of_16_000_steps(configure):
    cfg = configure("experiment=enwik8_srupp_base")
    assert rate(cfg, 8_000) == pytest.approx(1.5e-4)
    assert rate(cfg, 16_000) == pytest.approx(3e-4)
    # cos(pi / 25) is 0.9921147.
    assert rate(cfg, 200_000) == pytest.approx(3e-4 / 1.9921147)
    assert rate(cfg, 400_000) == 0


def test_cosine_needs_no_warm_up(configure):
    cfg = configure("experiment=enwik8_srupp_24x512")
    assert rate(cfg, 100_000) == pytest.approx(2.133883e-4)
    assert rate(cfg, 200_000) == pytest.approx(1.25e-4)


def test_penn_treebanks_rate_falls_from_epoch_176_on(configure):
    cfg = configure("experiment=ptb_sru_6l")
    assert [rate(cfg, n) for n in (1, 175, 176, 177)] == pytest.approx([35, 35, 34.3, 33.614])
    assert rate(cfg, 300) == pytest.approx(35 * 0.080031, rel=1e-4)


@pytest.mark.parametrize("summed", [70.0, 3.5])
def test_penn_treebanks_step_is_the_published_one_for_a_summed_loss(configure, summed):
    cfg = configure("experiment=ptb_sru_6l")
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = instantiate(cfg.task.optimizer)([weight])
    (weight * summed / cfg.data.unroll).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], cfg.trainer.gradient_clip_val)
    optimizer.step()
    # Rate 1, the gradient clipped at 5, and 1e-5 of the weight.
    assert weight.item() == pytest.approx(2 - min(summed, 5) - 2e-5, abs=1e-5)


@pytest.mark.parametrize("name", ATTENDING)
def test_memory_is_as_long_as_a_segment_in_training_and_longer_in_the_test(configure, name):
    cfg = configure(f"experiment={name}")
    assert cfg.model.memory_length == cfg.data.unroll == cfg.data.eval_unroll
    if cfg.paper.metric.startswith("test/"):
        assert cfg.model.eval_memory_length > cfg.model.memory_length
    else:
        assert cfg.model.eval_memory_length is None


@pytest.mark.parametrize(
    ("name", "attending"),
    [
        ("enwik8_srupp_k1", range(10)),
        ("enwik8_srupp_k2", [1, 3, 5, 7, 9]),
        ("enwik8_srupp_k5", [4, 9]),
        ("enwik8_srupp_k10", [9]),
        ("enwik8_srupp_no_attention", []),
        ("enwik8_srupp_one_attention", [9]),
    ],
)
def test_every_kth_layer_attends(configure, name, attending):
    assert attends(build(configure(f"experiment={name}"))) == list(attending)


def attends(task):
    modules = [layer.transform_module for layer in task.encoder.layers]
    return [i for i, module in enumerate(modules) if hasattr(module, "linear3")]


@pytest.mark.parametrize(
    ("name", "layers", "published"),
    [
        ("one_attention", [0], 1.173),
        ("one_attention", [4], 1.061),
        ("one_attention", [9], 1.053),
        ("two_attentions", [1, 9], 1.056),
        ("two_attentions", [7, 9], 1.05),
        ("two_attentions", [6, 9], 1.049),
    ],
)
def test_a_sweep_over_the_attention_layer_finds_its_published_number(configure, name, layers, published):
    cfg = configure(f"experiment=enwik8_srupp_{name}", f"model.attention_layers={layers}")
    assert cfg.paper.value.enwik8 == published
    assert attends(build(cfg)) == layers


def test_the_first_layer_of_a_projected_stack_is_not_projected(configure):
    layers = build(configure("experiment=enwik8_sru_8l_proj")).encoder.layers
    assert [layer.projection_size for layer in layers] == [0, *[512] * 7]
    assert layers[0].weight.shape == (4 * 3056, 205)


def test_penn_treebanks_cell_is_that_of_2017(configure):
    task = build(configure("experiment=ptb_sru_3l"))
    assert task.softmax.weights is task.embedding.weights
    for layer in task.encoder.layers:
        assert not layer.has_vc_term
        assert layer.alpha == 1
        assert (layer.highway_bias, layer.rnn_dropout) == (-1, 0.2)
