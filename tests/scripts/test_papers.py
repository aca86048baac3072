"""The rows of the papers' tables: each experiment cites its number, and its network has the published size."""

import math
import re

import pytest
import torch
from conftest import ROOT, options
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data.audio.utterance_batches import FrameConfig

# Networks of this project beside one another, of which no paper has a number.
OWN = ("enwik8_4mb_", "ptb_small_", "multi30k_", "fsdd_", "librispeech_", "smnist_sru", "psmnist_sru")
EXPERIMENTS = [name for name in options("experiment") if not name.startswith(OWN)]
WORDS = {"enwik8": 205, "ptb": 10_000, "wikitext103": 267_735, "lm1b": 793_470}
# Millions of parameters that follow from the published widths, or from those that were chosen for the published size.
SIZES = {
    "enwik8_sru_6l": 37.04,
    "enwik8_sru_8l": 37.58,
    "enwik8_sru_10l": 37.10,
    "enwik8_sru_8l_proj": 47.08,
    "enwik8_sru_12l_proj": 48.81,
    "ptb_sru_3l": 24.35,
    "ptb_sru_4l": 24.10,
    "ptb_sru_5l": 24.23,
    "ptb_sru_6l": 24.03,
    "ptb_lstm_2l": 23.97,
    "enwik8_srupp_24x512": 42.35,
    "enwik8_srupp_16x768": 42.35,
    "enwik8_srupp_k1": 42.35,
    "enwik8_srupp_base": 107.57,
    "enwik8_srupp_base_k5": 98.13,
    "enwik8_srupp_large": 190.61,
    "enwik8_srupp_large_8to1": 194.99,
    "enwik8_srupp_ratio_8": 108.65,
    "enwik8_srupp_ratio_10": 108.97,
    "wikitext103_srupp_base": 147.68,
    "wikitext103_srupp_large": 231.69,
    "wikitext103_srupp_large_8to1": 233.74,
    "wikitext103_srupp_large_8to1_k5": 224.88,
    "wmt14_transformer": 76.94,
    "wmt14_transformer_sru_4l": 79.05,
    "wmt14_transformer_sru_5l": 90.62,
    "iwslt14_srupp": 20.55,
    "iwslt14_srupp_k2": 19.76,
    "switchboard_lstm_5l": 47.15,
    "switchboard_bilstm_5l": 59.94,
    "switchboard_sru_12l": 55.52,
    "switchboard_bisru_12l": 74.36,
}
# Table 4 of SRU++ says 108M of all its models.
CALLED_108 = {"enwik8_srupp_ratio_8", "enwik8_srupp_ratio_10"}


def build(cfg):
    """The task with its network, without numbers, for a corpus of the published size."""
    vocab_size = WORDS.get(cfg.choices.data, 90_000)
    sizes = {
        "lm": {"vocab_size": vocab_size, "unit": "words"},
        "translation": {"vocab_size": OmegaConf.select(cfg, "data.vocab_size"), "bos": 2, "eos": 3, "decode": str},
        "classification": {"vocab_size": 90_000, "num_classes": 2, "pad": 0},
        "image": {"input_size": 1, "num_classes": 10},
        # 50 parts of speech and 18 kinds of names are those of en_core_web_sm.
        "squad": {"vocab_size": 90_000, "num_features": 4 + 50 + 18},
    }
    if cfg.choices.task == "hybrid":
        recipe = FrameConfig("speaker", cfg.data.delay, cfg.data.segment, cfg.data.right, 83, torch.ones(8802), None)
        kwargs = recipe.model_kwargs
    else:
        kwargs = sizes[cfg.choices.task]
    with torch.device("meta"):
        if cfg.choices.task in ("classification", "squad"):
            kwargs = {**kwargs, "vectors": torch.zeros(90_000, 300)}
        return instantiate(cfg.task)(encoder=instantiate(cfg.model), **kwargs)


def millions(parameters):
    return sum(parameter.numel() for parameter in parameters) / 1e6


PAGES = {
    "SRU (2018)": "sru_2018.md",
    "SRU (2017)": "sru_2017.md",
    "SRU++ (2021)": "srupp_2021.md",
}
# | row | command | size | published | here |
ROW = re.compile(r"^\| [^|]+ \| `python train\.py experiment=(\w+)` \| ([^|]*) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)
ROWS = {page: ROW.findall((ROOT / "docs" / page).read_text(encoding="utf-8")) for page in PAGES.values()}


def numbers(paper):
    """The published numbers of an experiment, in the order of its file."""
    values = OmegaConf.to_container(paper, resolve=True)
    single = values["value"] if isinstance(values["value"], dict) else {"": values["value"]}
    return [v for v in [*(values.get("values") or single.values()), values.get("f1")] if v is not None]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_cites_a_number_that_the_page_of_its_paper_has(configure, name):
    paper = configure(f"experiment={name}").paper
    found = [(page, size, shown) for page, rows in ROWS.items() for row, size, shown in rows if row == name]
    page = PAGES.get(paper.source.partition(",")[0])
    assert [each[0] for each in found] == ([page] if page else [])
    for _, size, shown in found:
        assert [float(n) for n in re.findall(r"\d+\.\d+", shown)] == numbers(paper)
        behind = {len(digits) for digits in re.findall(r"\.(\d+)", shown)}
        assert behind == (
            {paper.digits} if "digits" in paper else {len(str(n).partition(".")[2]) for n in numbers(paper)}
        )
        assert len(re.findall(r"\d\?", shown)) == (0 if paper.verified else len(numbers(paper)))
        expected = [paper.get("parameters"), paper.get("encoder_parameters")]
        scales = [1e-3 if unit == "k" else 1 for unit in re.findall(r"\d([kM])", size)]
        sizes = [float(n) * scale for n, scale in zip(re.findall(r"[\d.]+", size), scales, strict=True)]
        assert sizes == pytest.approx([n for n in expected if n is not None])
    assert re.search(r"(Table|Figure) \d|et al\. \(\d{4}\)", paper.source)
    assert paper.metric.startswith(("test/", "val/", "train/"))
    assert type(paper.verified) is bool, "say paper.verified: true where the number was read in the paper, else false"
    values = paper.value.values() if OmegaConf.is_dict(paper.value) else [paper.value]
    assert all(isinstance(value, float) for value in values)
    if (std := paper.get("std")) is not None:
        assert set(std) == set(paper.value)
        assert all(isinstance(value, float) for value in std.values())
    keys = {
        "source",
        "metric",
        "value",
        "values",
        "std",
        "digits",
        "verified",
        "f1",
        "parameters",
        "encoder_parameters",
    }
    assert set(paper) <= keys


def has_size(paper):
    return paper.get("parameters") is not None or paper.get("encoder_parameters") is not None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_published_size(configure, name):
    cfg = configure(f"experiment={name}")
    if not has_size(cfg.paper):
        # Ablations, tables that have no sizes, and a row that has no number either.
        assert name.startswith(("squad_sru_", "scaling_", "classification_2017_", "smnist_", "psmnist_")), name
        return
    task = build(cfg)
    apart = "embedding." if cfg.choices.task == "squad" else "none"
    counted = millions(p for part, p in task.named_parameters() if not part.startswith(apart))
    encoders = millions(p for encoder in task.encoders for p in encoder.parameters())
    if name in SIZES:
        assert round(counted, 2) == SIZES[name]
    if cfg.choices.task == "classification":
        assert round(encoders, 3) == cfg.paper.encoder_parameters
    elif cfg.choices.task == "squad":
        assert round(counted, 1) == cfg.paper.parameters
    elif name.startswith("wmt14_transformer"):
        assert math.floor(counted) == cfg.paper.parameters
    elif name.startswith("wmt14"):
        assert math.ceil(counted) == cfg.paper.parameters
        assert math.ceil(encoders) == cfg.paper.encoder_parameters
    elif name.startswith("iwslt14"):  # of the layers, only how many are known
        assert counted == pytest.approx(cfg.paper.parameters, rel=0.01)
    elif name not in CALLED_108:
        assert round(counted) == cfg.paper.parameters


def test_every_row_of_a_page_names_an_existing_experiment():
    named = [row for rows in ROWS.values() for row, _, _ in rows]
    assert len(named) == len(set(named)) > 70
    assert set(named) <= set(EXPERIMENTS)
    for page in ROWS:  # and no row is written so that the pattern misses it
        assert (ROOT / "docs" / page).read_text(encoding="utf-8").count("` | ") == len(ROWS[page])


def test_every_expected_size_belongs_to_an_experiment():
    assert set(SIZES) <= set(EXPERIMENTS)
    assert set(SIZES) >= CALLED_108
