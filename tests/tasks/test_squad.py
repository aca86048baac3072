"""The reader: spans, windows, padding, tuned words, runs on the sample, predictions, published sizes."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, options
from hydra.utils import instantiate
from test_squad_data import PASSAGE, data_of, question, squad
from torch.nn import functional as F

import predict
import sru
import train
from data.text.squad_features import Item
from tasks.modules import squad_metrics
from tasks.squad import Embedding, QuestionAnswering

SMALL = ("task=squad", "data=squad_sample", "depth=2", "width=8", "task.embedding_size=6", "trainer.max_epochs=2")
DEV = ROOT / "tests/samples/squad-sample-dev.json"
SAMPLE = ROOT / "tests/samples/squad-sample-train.json"
EXPERIMENTS = [name for name in options("experiment") if name.startswith("squad_")]


def reader(vocab_size=30, num_features=2, vectors=None, **options):
    encoder = partial(sru.SRU, hidden_size=5, num_layers=2, bidirectional=True)
    sizes = {"vocab_size": vocab_size, "num_features": num_features, "vectors": vectors}
    task = QuestionAnswering(encoder=encoder, optimizer=torch.optim.Adamax, embedding_size=6, **sizes, **options)
    return task.double().eval()


def pad_sequences(sequences, dtype=torch.int64):
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(a, dtype=dtype) for a in sequences])


def texts(lengths, question_lengths, num_features=2):
    """Passages, features and questions of these lengths, apart."""
    generator = torch.Generator().manual_seed(3)
    words = [torch.randint(1, 30, (n,), generator=generator) for n in (*lengths, *question_lengths)]
    features = [torch.rand(n, num_features, generator=generator, dtype=torch.float64) for n in lengths]
    return words[: len(lengths)], features, words[len(lengths) :]


# Spans


def test_the_best_span_is_that_of_all_pairs():
    first, last = torch.randn(4, 9), torch.randn(4, 9)
    first[3, 5:], last[3, 5:] = -math.inf, -math.inf
    task = reader(max_answer=3)
    values, starts, ends = task.spans(first, last, count=4)
    for row in range(4):
        pairs = [
            (float(first[row, i] + last[row, j]), i, j)
            for i, j in itertools.product(range(9), range(9))
            if 0 <= j - i < 3
        ]
        expected = sorted(pairs, reverse=True)[:4]
        found = list(zip(values[row].tolist(), starts[row].tolist(), ends[row].tolist(), strict=True))
        assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]
        assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected])


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (1, 5), (2, 9)])
def test_a_passage_shorter_than_the_longest_answer_has_spans(steps, count):
    values, starts, ends = reader().spans(torch.zeros(1, steps), torch.zeros(1, steps), count)
    real = [(i, j) for v, i, j in zip(values[0], starts[0].tolist(), ends[0].tolist(), strict=True) if v > -math.inf]
    assert len(set(real)) == len(real) == min(count, steps * (steps + 1) // 2)
    assert all(i <= j < steps for i, j in real)


# The network


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("encoder", ["SRU", "LSTM", "GRU", "QRNN", "SRUppEncoder"])
def test_a_question_alone_is_a_question_in_a_batch(encoder, concatenate):
    make = partial(getattr(sru, encoder), hidden_size=4, num_layers=2, bidirectional=True)
    sizes = {"vocab_size": 30, "num_features": 2, "vectors": None, "embedding_size": 6}
    layers = {"num_layers": 2, "concatenate_layers": concatenate}
    task = QuestionAnswering(encoder=make, optimizer=torch.optim.Adamax, **sizes, **layers).double().eval()
    passages, features, questions = texts([7, 1, 4], [2, 5, 1])
    together = task(pad_sequences(passages), pad_sequences(features, torch.float64), pad_sequences(questions))
    for i, (p, f, q) in enumerate(zip(passages, features, questions, strict=True)):
        alone = task(p[:, None], f[:, None], q[:, None])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(all_[i, : len(p)], one[0], rtol=1e-10, atol=1e-10)
            assert (all_[i, len(p) :] == -math.inf).all()


def test_the_network_is_the_published_one():
    """Chen et al. (2017), section 3.2, step by step for one question."""
    task = reader()
    (p,), (f,), (q,) = texts([5], [3])
    E = task.embedding.words.weight
    alpha = F.relu(task.likeness(E[p])) @ F.relu(task.likeness(E[q])).T
    x = torch.cat([E[p], alpha.softmax(1) @ E[q], f], dim=1)
    h_p, h_q = (encoder(a[:, None])[0][:, 0] for encoder, a in zip(task.encoders, (x, E[q]), strict=True))
    summary = (task.weight(h_q).softmax(0) * h_q).sum(0)
    expected = [h_p @ (form.weight @ summary) for form in (task.first, task.last)]
    for found, one in zip(task(p[:, None], f[:, None], q[:, None]), expected, strict=True):
        torch.testing.assert_close(found[0], one)
    first, last = torch.tensor([2]), torch.tensor([3])
    loss, _, size = task.train().loss((p[:, None], f[:, None], q[:, None], first, last, []))
    assert size == 1
    nll = -expected[0].log_softmax(0)[2] - expected[1].log_softmax(0)[3]
    torch.testing.assert_close(loss, nll)


def test_windows_without_a_target_have_no_loss():
    task = reader()
    passages, features, questions = texts([6, 4], [2, 3])
    batch = pad_sequences(passages), pad_sequences(features, torch.float64), pad_sequences(questions)
    items = [Item(str(i), "", np.array([]), np.array([]), []) for i in range(2)]
    both = task.loss((*batch, torch.tensor([1, -1]), torch.tensor([2, -1]), items))
    alone = task.loss((*(a[:, :1] for a in batch), torch.tensor([1]), torch.tensor([2]), items[:1]))
    torch.testing.assert_close(both[0], alone[0])
    assert both[2] == 1
    assert task.loss((*batch, torch.tensor([-1, -1]), torch.tensor([-1, -1]), items))[0] == 0


def test_the_first_words_are_tuned_and_the_others_fixed():
    vectors = torch.randn(9, 4, dtype=torch.float64)
    embedding = Embedding(9, 300, vectors, tuned=2).double()
    words = torch.tensor([[0, 1], [3, 4], [8, 2]])
    torch.testing.assert_close(embedding(words), vectors[words])
    trained = [p for p in embedding.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(4, 4)]
    embedding(words).sum().backward()
    assert trained[0].grad.sum(1).tolist() == [0, 4, 4, 4]  # <unk> and two words; padding is not trained
    assert not list(filter(lambda p: p.requires_grad, Embedding(9, 300, vectors, tuned=0).parameters()))
    assert Embedding(9, 5, None, tuned=2).words.weight.requires_grad


def test_tuned_words_start_from_scaled_vectors():
    vectors, words = torch.randn(9, 4), torch.arange(9)[:, None]
    found = Embedding(9, 300, vectors, tuned=2, deviation=1.0)(words)[:, 0]
    torch.testing.assert_close(found, vectors / vectors.square().mean().sqrt())


# Runs


def test_a_run_on_the_sample_writes_official_predictions(configure, tmp_path):
    value = train.run(configure(*SMALL))
    outcome = json.loads((tmp_path / "run/metrics.json").read_text())
    predictions = json.loads((tmp_path / "run/predictions.json").read_text(encoding="utf-8"))
    references = squad_metrics.read_references(str(DEV))
    assert predictions.keys() == references.keys()
    found = squad_metrics.evaluate(references, predictions)
    assert outcome["metrics"]["test/em"] == pytest.approx(found["em"], abs=1e-3)
    assert outcome["metrics"]["test/f1"] == pytest.approx(found["f1"], abs=1e-3) == pytest.approx(value, abs=1e-3)
    assert 0 < outcome["encoder_seconds_per_epoch"] < outcome["seconds_per_epoch"]
    passages = DEV.read_text(encoding="utf-8")
    assert all(json.dumps(text, ensure_ascii=False)[1:-1] in passages for text in predictions.values())


def test_the_reader_learns_the_sample(configure, tmp_path):
    """What it was trained on it can answer, which it cannot by chance: about one span in 1500 is right."""
    files = ("data=squad", "data.min_count=1", *(f"data.{split}={SAMPLE}" for split in ("train", "val", "test")))
    large = ("width=24", "task.embedding_size=24", "task.optimizer.lr=0.01", "trainer.max_epochs=15")
    train.run(configure(*SMALL, *files, *large, "dropout=0", "task.embedding_dropout=0"))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["test/em"] > 50


@pytest.mark.parametrize("more", [(), ("model=lstm", "task.concatenate_layers=true", "data.window=60", "{vectors}")])
def test_resumed_within_an_epoch_equals_uninterrupted(configure, tmp_path, more):
    (tmp_path / "vectors.txt").write_text("".join(f"{word} 0.1 0.2 0.3 0.4\n" for word in ("the", "of", "What")))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = (*SMALL, "data.batch_size=16", "trainer.val_check_interval=4", "trainer.limit_val_batches=1",
             *(word.format(vectors=f"data.vectors={tmp_path / 'vectors.txt'}") for word in more))  # fmt: skip
    train.run(configure(*often, f"run_dir={whole}", "trainer.max_epochs=3"))
    train.run(configure(*often, f"run_dir={parts}", "trainer.max_epochs=3", "trainer.max_steps=15"))
    train.run(configure(*often, f"run_dir={parts}", f"resume={parts}", "trainer.max_epochs=3", "trainer.max_steps=-1"))
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def trained(configure, tmp_path):
    train.run(configure(*SMALL, "trainer.max_epochs=1"))
    return tmp_path / "run"


def answer_lines(capsys, *words):
    capsys.readouterr()
    predict.main(list(words))
    return capsys.readouterr().out.splitlines()


def test_a_question_is_answered_from_a_passage_or_a_file(trained, tmp_path, capsys):
    asked = (f"checkpoint={trained}", "question=What was served?")
    (line,) = answer_lines(capsys, *asked, f"passage={PASSAGE}")
    probability, span, text = line.split(maxsplit=2)
    start, end = map(int, span.split("-"))
    assert PASSAGE[start:end] == text
    (tmp_path / "passage.txt").write_text(PASSAGE)
    lines = answer_lines(capsys, *asked, f"input={tmp_path / 'passage.txt'}", "n_best=200")
    assert lines[0] == line
    probabilities = [float(each.split()[0]) for each in lines]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len({each.split()[1] for each in lines}) == len(lines)
    assert 0.2 < sum(probabilities) <= 1 + 1e-6
    assert float(probability) > 0


def test_a_passage_of_ten_thousand_tokens_is_answered(trained, capsys):
    passage = "It was a quiet day. " * 2000 + PASSAGE + "\n\nIt was late. " * 2000
    lines = answer_lines(capsys, f"checkpoint={trained}", "question=What was served?", f"passage={passage}", "n_best=3")
    assert len(lines) == 3
    for line in lines:
        start, end = map(int, line.split()[1].split("-"))
        assert line.split(maxsplit=2)[2] == " ".join(passage[start:end].split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["question=What?"], r"give question='some text\?' and passage="),
        (["passage=Tea."], r"give question='some text\?' and passage="),
        (["question=What?", "passage=Tea.", "input=-"], r"or input=FILE"),
        (["question= ", "passage=Tea."], "the question is empty"),
        (["question=What?", "passage=\n"], "the passage is empty"),
        (["question=What?", "passage=Tea.", "n_best=0"], "n_best=0 must be 1 or more"),
        (["question=What?", "passage=Tea.", "prompt=x"], "there is no option 'prompt'; there are: checkpoint, device"),
    ],
)
def test_a_question_without_an_answer_to_give_is_refused(trained, words, message):
    with pytest.raises(ValueError, match=message):
        predict.main([f"checkpoint={trained}", *words])


def test_a_question_in_any_writing_system_is_answered(trained, capsys):
    for passage in ("東京タワーの高さは333メートルです。", "Москва — столица России.", "القاهرة عاصمة مصر"):
        (line,) = answer_lines(capsys, f"checkpoint={trained}", "question=何?", f"passage={passage}")
        start, end = map(int, line.split()[1].split("-"))
        assert passage[start:end] == line.split(maxsplit=2)[2]


def test_of_several_windows_the_best_score_answers():
    task = reader(max_answer=2)
    items = [Item("1", "a b c", np.array([0, 2]), np.array([1, 3]), ["b"]) for _ in range(2)]
    items[1] = items[1]._replace(starts=np.array([2, 4]), ends=np.array([3, 5]))
    task.record_answers(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), items)
    assert task.answers == {"1": (4.0, "c")}
    task.record_answers(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, -1.0]]), items[:1])
    assert task.answers == {"1": (5.0, "a")}


def test_windows_do_not_change_the_number_of_predictions(configure, tmp_path):
    train.run(configure(*SMALL, "data.window=40"))
    assert len(json.loads((tmp_path / "run/predictions.json").read_text(encoding="utf-8"))) == 44


@pytest.mark.parametrize("answers", [[], [{"text": "served", "answer_start": 0}]])
def test_a_validation_without_a_target_still_has_metrics(configure, tmp_path, answers):
    content = squad((PASSAGE, [{"id": "1", "question": "What?", "answers": answers}]))
    (tmp_path / "val.json").write_text(content)
    files = (f"data.train={SAMPLE}", f"data.val={tmp_path / 'val.json'}", f"data.test={tmp_path / 'val.json'}")
    train.run(configure(*SMALL, "data=squad", *files, "trainer=debug"))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert 0 <= metrics["val/f1"] <= 100
    assert "test/loss" not in metrics


def test_an_empty_passage_is_answered_with_nothing(tmp_path):
    data = data_of(tmp_path, squad((PASSAGE, [question()]), ("", [question(id="2")])))
    task = reader(num_features=3, vocab_size=data.model_kwargs["vocab_size"]).float()
    for batch in data.test_dataloader():
        task.loss(batch)
    assert task.answers["2"][1] == ""
    assert task.answers["1"][1] in PASSAGE


# The papers' rows


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_published_protocol(configure, name):
    cfg = configure(f"experiment={name}")
    with torch.device("meta"):  # 50 parts of speech and 18 kinds of names are those of en_core_web_sm
        sizes = {"vocab_size": 90_000, "num_features": 4 + 50 + 18, "vectors": torch.zeros(90_000, 300)}
        task = instantiate(cfg.task)(encoder=instantiate(cfg.model), **sizes)
    assert task.embedding.tuned.shape == (1002, 300)
    assert isinstance(task.configure_optimizers(), torch.optim.Adamax)
    assert (cfg.data.batch_size, cfg.width, cfg.trainer.gradient_clip_val) == (32, 128, 20)
    assert cfg.epochs == (50 if name.startswith("squad_2017") else 100)
    assert cfg.data.vectors == "glove.840B.300d"
    assert set(cfg.paper.value) == {"squad"}


def test_both_tables_are_there_and_components_go_one_after_another(configure):
    assert len(EXPERIMENTS) == 6 + 6 + 5  # and five rows of 2017
    for depth in (4, 6):
        removed = [
            configure(f"experiment=squad_sru_{depth}l{rest}").choices.ablation
            for rest in ("", "_no_vc", "_no_vc_scaling", "_no_vc_scaling_highway")
        ]
        assert [set(more) - set(less) for less, more in itertools.pairwise(removed)] == [
            {"no_vc"}, {"no_scaling"}, {"no_highway"}
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=pydoc"], "data=pydoc does not go with task=squad, which does not accept num_classes"),
        (["data=squad", "task=lm"], "data=squad does not go with task=lm, which does not accept num_features"),
        (["data.tagger=nltk"], r"data\.tagger=nltk must be spacy or none"),
        (["data.tagger=spacy", "data.spacy_model=null"], r"data\.spacy_model=None must name a pipeline"),
        (["data.window=0"], r"data\.window=0 must be a whole number"),
        (["data.lowercase=3"], r"data\.lowercase=3 must be true or false"),
        (["data.vectors=[a]"], r"data\.vectors=\['a'\] must be a text, or null for none"),
        (["data=squad", "data.train=5"], r"data\.train=5 must be a text"),
        (["data=squad", "data.val=null"], r"data\.val=None must name a file"),
        (["data.cache=null"], r"data\.cache=None must be a text"),
        (["data.seed=-1"], r"data\.seed=-1 must be a whole number, 0 to"),
        (["task.max_answer=0"], r"task\.max_answer=0 must be a whole number, 1 to"),
        (["task.concatenate_layers=2"], r"task\.concatenate_layers=2 must be true or false"),
        (["task.concatenate_layers=true", "model=cnn"], r"needs a model of several layers"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_downloaded(configure, words, message):
    with pytest.raises(Exception, match=message) as refused:
        train.run(configure("task=squad", "data=squad_sample", *words))
    assert isinstance(refused.value.__cause__ or refused.value, ValueError)
