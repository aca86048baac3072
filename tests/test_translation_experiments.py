"""The papers' rows of translation, under the published schedules; tests/scripts/test_papers.py has their sizes."""

import pytest
import torch
from conftest import options
from hydra.utils import instantiate

from sru import SRUCell

EXPERIMENTS = [name for name in options("experiment") if name.startswith(("wmt14", "iwslt14", "multi30k"))]
PUBLISHED = [name for name in EXPERIMENTS if not name.startswith("multi30k")]


def build(cfg):
    """The task with its network, without numbers."""
    sizes = {"vocab_size": cfg.data.vocab_size, "bos": 2, "eos": 3, "decode": str}
    with torch.device("meta"):
        return instantiate(cfg.task)(encoder=instantiate(cfg.model), **sizes)


def millions(task):
    return sum(parameter.numel() for parameter in task.parameters()) / 1e6


@pytest.mark.parametrize(("depth", "size"), [(4, 87.4), (5, 101.1)])
def test_a_highway_would_be_larger_than_published(configure, depth, size):
    task = build(configure(f"experiment=wmt14_transformer_sru_{depth}l", "model.has_skip_term=true"))
    assert round(millions(task), 1) == size


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_row_has_a_corpus_and_an_optimizer(configure, name):
    cfg = configure(f"experiment={name}")
    assert cfg.choices.data == name.split("_")[0]
    optimizer = instantiate(cfg.task.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.param_groups[0]["lr"] > 0
    if name in PUBLISHED:
        assert cfg.paper.metric == "test/bleu"


def test_the_rate_of_transformers_is_published(configure):
    cfg = configure("experiment=wmt14_transformer")
    optimizer = instantiate(cfg.task.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    scheduler = instantiate(cfg.task.scheduler)(optimizer)["scheduler"]
    optimizer.step()
    scheduler.last_epoch = 15_998  # of the step before, counted from 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * 512**-0.5 * 16_000**-0.5)
    assert cfg.trainer.accumulate_grad_batches * cfg.data.tokens_per_batch == 25_600


def test_published_translators_share_what_they_shared(configure):
    task = build(configure("experiment=wmt14_transformer"))
    assert task.source_embedding.weight is task.target_embedding.weight is not task.softmax.weight
    task = build(configure("experiment=wmt14_seq2seq_sru_3l"))
    assert len({id(m.weight) for m in (task.source_embedding, task.target_embedding, task.softmax)}) == 3


def test_the_sru_of_five_layers_drops_twice_as_much(configure):
    task = build(configure("experiment=wmt14_transformer_sru_5l"))
    layers = [*task.encoder.layers, *task.decoder.layers]
    assert {(layer.dropout, layer.feed_forward.cell.dropout) for layer in layers} == {(0.1, 0.2)}
    assert not any(layer.feed_forward.cell.has_skip_term for layer in layers)


def test_every_second_layer_attends_to_its_own_steps_and_each_to_the_source(configure):
    task = build(configure("experiment=iwslt14_srupp_k2"))
    for stack, of_source in ((task.encoder, False), (task.decoder, True)):
        modules = [layer.transform_module for layer in stack.layers]
        assert [hasattr(module, "linear3") for module in modules] == [False, True] * 3
        assert [module.source is not None for module in modules] == [of_source] * 6


@pytest.mark.parametrize(
    ("model", "ablations", "changed"),
    [
        ("sru", "no_vc", ("has_vc_term", False)),
        ("sru", "no_highway", ("has_skip_term", False)),
        ("sru", "no_scaling", ("rescale", False)),
        ("sru", "no_vc,no_scaling,no_highway", ("has_skip_term", False)),
        ("transformer_sru", "no_vc", ("has_vc_term", False)),
    ],
)
def test_ablations_and_depth_compose(configure, model, ablations, changed):
    task = build(configure("task=translation", f"model={model}", f"ablation=[{ablations}]", "depth=3"))
    cells = [module for module in task.modules() if isinstance(module, SRUCell)]
    assert len(cells) == 6
    assert {getattr(cell, changed[0]) for cell in cells} == {changed[1]}


def test_an_ablation_of_a_highway_that_is_not_there_is_refused(configure):
    cfg = configure("task=translation", "model=transformer_sru", "ablation=[no_scaling]")
    with pytest.raises(Exception, match="rescale=False has no highway to scale"):
        build(cfg)
