"""The translator: decoding step by step, beam search, batches, BLEU, runs on the sample, predictions."""

import csv
import itertools
import json
import math
from functools import partial

import pytest
import torch
from conftest import ROOT

import predict
import sru
import tasks.trained
import train
from tasks.modules.encoders import select_rows
from tasks.translation import Translation

BOS, EOS, WORDS = 2, 3, 9
SMALL = ("task=translation", "depth=1", "width=16", "data.tokens_per_batch=1200", "trainer.max_epochs=2")
ENCODERS = {
    "sru": partial(sru.SRU, hidden_size=6, num_layers=2),
    "srupp": partial(sru.SRUppEncoder, hidden_size=6, proj_size=4, num_layers=2),
    "lstm": partial(sru.LSTM, hidden_size=6, num_layers=2),
    "gru": partial(sru.GRU, hidden_size=6, num_layers=2),
    "qrnn": partial(sru.QRNN, hidden_size=6, num_layers=2),
    "cnn": partial(sru.CNN, num_filters=2),
    "transformer": partial(sru.Transformer, hidden_size=6, num_layers=2, num_heads=2),
    "transformer_sru": partial(sru.TransformerSRU, hidden_size=6, num_layers=2, num_heads=2),
    "transformer_xl": partial(sru.TransformerXL, hidden_size=6, num_layers=2, num_heads=2),
}


def translator(encoder="sru", **options):
    sizes = {"vocab_size": WORDS, "bos": BOS, "eos": EOS, "decode": lambda words: " ".join(map(str, words))}
    options = {"bidirectional": True, "embedding_size": 6, **options}
    task = Translation(encoder=ENCODERS[encoder], optimizer=torch.optim.Adam, **sizes, **options).double().eval()
    with torch.no_grad():  # far from uniform, so that sentences end
        task.softmax.weight.normal_(std=2)[0] = 0
    return task


def test_perplexity_is_of_the_mean_of_all_words_and_not_of_training():
    means = {"loss": torch.tensor(2.0)}
    assert translator().epoch_metrics(means, "val")["perplexity"] == pytest.approx(math.e**2)
    assert translator().epoch_metrics(means, "train") == {}


def sources(*lengths):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.cat([torch.randint(4, WORDS, (n,), generator=generator), torch.tensor([EOS])]) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_score_of_step_by_step_is_that_of_one_call(encoder, both):
    task = translator(encoder, bidirectional=both).requires_grad_(False)
    source = sources(4)
    for score, sentence in task.search(source, beam=3, length_penalty=0.7, n_best=3)[0]:
        whole = task(source, torch.tensor([BOS, *sentence])[:, None])[:, 0].log_softmax(1)
        exact = sum(float(whole[i, word]) for i, word in enumerate([*sentence, EOS]))
        assert score == pytest.approx(exact / ((5 + len(sentence) + 1) / 6) ** 0.7, abs=1e-4)


def test_a_beam_of_one_is_greedy():
    for seed in range(5):
        torch.manual_seed(seed)
        task, source = translator(), sources(3)
        ((_, found),) = task.search(source, beam=1, length_penalty=0.6)[0]
        sentence: list[int] = []
        while len(sentence) < 2 * len(source) + 10:
            logits = task(source, torch.tensor([BOS, *sentence])[:, None])[-1, 0]
            word = int(logits.index_fill(0, torch.tensor([0, BOS]), -math.inf).argmax())
            if word == EOS or len(sentence) + 1 == 2 * len(source) + 10:
                break
            sentence.append(word)
        assert found == sentence


def test_a_wide_beam_finds_the_best_of_all_sentences():
    """Of at most three words: all of them are compared."""
    task, source = translator().requires_grad_(False), sources(2)
    with torch.no_grad():
        task.softmax.weight[EOS] += 1.5 * task.softmax.weight[EOS].sign()
    scored = {}
    for length in range(4):
        for sentence in itertools.product([1, *range(4, WORDS)], repeat=length):
            whole = task(source, torch.tensor([BOS, *sentence])[:, None])[:, 0].log_softmax(1)
            scored[sentence] = sum(float(whole[i, word]) for i, word in enumerate([*sentence, EOS]))
    short = [pair for pair in task.search(source, beam=400, length_penalty=0.0, n_best=400)[0] if len(pair[1]) <= 3]
    best = sorted(scored, key=lambda sentence: -scored[sentence])[:5]
    assert [tuple(words) for _, words in short[:5]] == best
    assert [score for score, _ in short[:5]] == pytest.approx([scored[sentence] for sentence in best], abs=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_translations_do_not_depend_on_the_batch(encoder):
    task = translator(encoder)
    source = sources(5, 1, 3, 0)
    together = task.search(source, beam=3, length_penalty=0.6, n_best=2)
    for column, found in enumerate(together):
        length = int((source[:, column] != 0).sum())
        ((*alone,),) = task.search(source[:length, column : column + 1], beam=3, length_penalty=0.6, n_best=2)
        assert [words for _, words in found] == [words for _, words in alone]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], abs=1e-4)


def test_the_loss_is_a_mean_over_words_and_smoothed_in_training():
    task = translator(label_smoothing=0.1)
    source = sources(3, 2)
    target = torch.tensor([[BOS, BOS], [5, 6], [7, EOS], [EOS, 0]])
    log_probabilities = task(source, target[:-1]).log_softmax(2)
    wanted = [(0, 0, 5), (1, 0, 7), (2, 0, EOS), (0, 1, 6), (1, 1, EOS)]
    nll = -sum(log_probabilities[t, b, word] for t, b, word in wanted) / 5
    uniform = -sum(log_probabilities[t, b].mean() for t, b, _ in wanted) / 5
    task.trainer = type("Trainer", (), {"testing": False})()
    loss, _, size = task.loss((source, target, []))
    assert size == 5
    torch.testing.assert_close(loss, nll)
    torch.testing.assert_close(task.train().loss((source, target, []))[0], 0.9 * nll + 0.1 * uniform)


def test_the_decoder_starts_where_an_encoder_of_one_direction_ended():
    task = translator(bidirectional=False)
    source, target = sources(4), torch.tensor([[BOS], [5]])
    state, seen = task.encode(source)
    h, _ = task.decoder.decoder(task.target_embedding(target), state)
    torch.testing.assert_close(task(source, target), task.softmax(task.decoder.attend(h, *seen)))
    assert translator().encode(source)[0] is None


@pytest.mark.parametrize(("shares", "ties", "matrices"), [(1, 1, 1), (1, 0, 2), (0, 1, 2), (0, 0, 3)])
def test_matrices_are_shared_as_asked(shares, ties, matrices):
    task = translator(share_embeddings=bool(shares), tied=bool(ties))
    of_words = [p for p in task.parameters() if p.shape == (WORDS, 6)]
    assert len(of_words) == matrices
    assert (task.softmax.bias is None) == ties


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("encoder", ["srupp", "transformer", "transformer_sru"])
def test_a_model_that_attends_sees_the_whole_source(encoder, both):
    task, source, target = translator(encoder, bidirectional=both), sources(4), torch.tensor([[BOS], [5]])
    for parameter in task.parameters():  # what attends in an SRU++ starts with a weight of 0
        torch.nn.init.normal_(parameter)
    other = source.clone()
    other[-2, 0] = 4 + (other[-2, 0] - 3) % (WORDS - 4)
    first = [task.encoder(task.source_embedding(words))[0][0] for words in (source, other)]
    assert not torch.equal(*first)
    assert not torch.equal(task(source, target), task(other, target))


def test_sequences_are_chosen_from_any_state():
    state = (torch.arange(6).view(1, 3, 2), [torch.arange(6).view(2, 3), None])
    first, (second, nothing) = select_rows(state, torch.tensor([2, 2, 0]))
    assert first.tolist() == [[[4, 5], [4, 5], [0, 1]]]
    assert second.tolist() == [[2, 2, 0], [5, 5, 3]]
    assert nothing is None


def test_a_test_writes_every_line_and_its_bleu(configure, tmp_path):
    sacrebleu = pytest.importorskip("sacrebleu")
    train.run(configure(*SMALL))
    lines = (tmp_path / "run/hypotheses.txt").read_text(encoding="utf-8").split("\n")[:-1]
    references = (ROOT / "tests/samples/translation-dev.de").read_text(encoding="utf-8").split("\n")[:-1]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert len(lines) == len(references) == 40
    assert metrics["test/bleu"] == pytest.approx(sacrebleu.corpus_bleu(lines, [references]).score, abs=1e-3)
    assert metrics["test/chrf"] == pytest.approx(sacrebleu.corpus_chrf(lines, [references]).score, abs=1e-3)


def test_an_epoch_can_be_chosen_by_its_bleu(configure, tmp_path):
    words = ("task.validates_bleu=true", "callbacks.best.monitor=val/chrf", "callbacks.best.mode=max")
    train.run(configure(*SMALL, "task.beam=2", *words))
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        found = [float(row["val/chrf"]) for row in csv.DictReader(file) if row["val/chrf"]]
    assert len(found) == 2
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert metrics["val/chrf"] == pytest.approx(max(found))
    assert metrics["test/chrf"] == pytest.approx(max(found), abs=1e-3)  # the sample's test is its validation


def test_choosing_by_bleu_needs_translations(configure):
    with pytest.raises(ValueError, match=r"callbacks\.best\.monitor=val/bleu needs translations: type task\.validates"):
        train.run(configure(*SMALL, "callbacks.best.monitor=val/bleu", "callbacks.best.mode=max"))


def test_a_network_without_numbers_translates_nothing():
    task = translator()
    with torch.no_grad():
        task.softmax.weight.fill_(math.nan)
    assert task.search(sources(3, 2), 5, 0.6) == [[(-math.inf, [])]] * 2


@pytest.mark.parametrize("encoder", ["srupp", "transformer", "transformer_sru", "transformer_xl"])
def test_a_translator_looks_back_on_all_of_a_sentence(encoder, monkeypatch):
    lengths = {"memory_length": 1} | ({"eval_memory_length": 2} if encoder in ("srupp", "transformer_xl") else {})
    monkeypatch.setitem(ENCODERS, encoder, partial(ENCODERS[encoder], **lengths))
    test_a_score_of_step_by_step_is_that_of_one_call(encoder, True)


def test_resumed_equals_uninterrupted(configure, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = (*SMALL, "trainer.val_check_interval=2")
    train.run(configure(*often, f"run_dir={whole}"))
    train.run(configure(*often, f"run_dir={parts}", "trainer.max_steps=3"))
    train.run(configure(*often, f"run_dir={parts}", f"resume={parts}", "trainer.max_steps=-1"))
    one, two = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (whole / "hypotheses.txt").read_bytes() == (parts / "hypotheses.txt").read_bytes()


@pytest.fixture
def trained(configure, tmp_path):
    train.run(configure(*SMALL, "trainer.max_epochs=1"))
    return tmp_path / "run"


def test_every_line_is_translated(trained, tmp_path, capsys):
    (tmp_path / "lines").write_text("The house is old.\n\n雪 ist 白い?\n   \nGood", encoding="utf-8")
    told = []
    for options in (["batch_size=1"], ["batch_size=32"], ["beam=3", "n_best=3"]):
        capsys.readouterr()
        predict.main([f"checkpoint={trained}", f"input={tmp_path / 'lines'}", *options])
        told.append(capsys.readouterr().out.split("\n")[:-1])
    assert told[0] == told[1]
    assert len(told[0]) == 5
    assert told[0][1] == told[0][3] == ""
    (tmp_path / "lines").write_bytes((tmp_path / "lines").read_bytes().replace(b"\n", b"\r\n"))
    capsys.readouterr()
    predict.main([f"checkpoint={trained}", f"input={tmp_path / 'lines'}"])
    assert capsys.readouterr().out.split("\n")[:-1] == told[0]
    assert len(told[2]) == 15
    assert told[2][3:6] == told[2][9:12] == ["0.0000\t"] * 3
    scores = [float(line.split("\t")[0]) for line in told[2]]
    assert all(scores[i] >= scores[i + 1] for i in range(15) if i % 3 < 2)


def test_a_long_line_is_translated_in_parts(trained, tmp_path, capsys):
    (tmp_path / "lines").write_text("The house is old. " * 5 + "\nGood", encoding="utf-8")
    task, vocabulary = tasks.trained.load(str(trained))
    numbers = vocabulary.encode("The house is old. " * 5)
    parts = [vocabulary.decode(numbers[begin : begin + 9]) for begin in range(0, len(numbers), 9)]
    predict.main([f"checkpoint={trained}", f"input={tmp_path / 'lines'}", "max_length=9"])
    told = capsys.readouterr()
    assert f"line 1 is long: translated in {len(parts)} parts" in told.err
    assert len(told.out.split("\n")) == 3
    found = []
    for begin in range(0, len(numbers), 9):
        source = torch.tensor([*numbers[begin : begin + 9], EOS])[:, None]
        found.append(task.decode_line(task.search(source, 5, 0.6)[0][0][1]))
    assert told.out.split("\n")[0] == " ".join(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beam=0"], r"beam=0 must be a whole number, 1 \(always the most likely word\) or more"),
        (["n_best=6"], "^n_best=6 must be 1 to beam=5$"),
        (["length_penalty=-1"], "length_penalty=-1.0 must be 0 or more"),
        (["input=/nowhere"], "input=/nowhere cannot be read"),
        (["max_length=0"], "batch_size=32 and max_length=0 must be 1 or more"),
    ],
)
def test_a_wrong_option_of_translating_is_refused(trained, words, message):
    with pytest.raises((ValueError, OSError), match=message):
        predict.main([f"checkpoint={trained}", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.beam=0"], r"task\.beam=0 must be a whole number"),
        (["task.label_smoothing=1"], r"task\.label_smoothing=1 must be a number, 0 to 0\.999"),
        (["task.tied=yes please"], r"task\.tied=yes please must be true or false"),
        (["data=pydoc"], "data=pydoc does not go with task=translation"),
    ],
)
def test_a_wrong_option_of_training_is_refused(configure, words, message):
    with pytest.raises(Exception, match=message) as refused:
        train.run(configure(*SMALL[:3], *words))
    assert isinstance(refused.value.__cause__ or refused.value, ValueError)
