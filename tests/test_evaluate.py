"""evaluate.py: the results of training, other splits, data and options, and refusals; and trained.load."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, options

import evaluate
import train
from data.classification import SentenceClassification, Vocabulary
from data.images import Digits
from tasks import trained

SAMPLES = ROOT / "tests/samples"
SMALL = ("depth=1", "width=16", "epochs=1", "trainer.limit_train_batches=6")
OF_TASK = {"squad": ["data=squad_sample"], "translation": ["data.tokens_per_batch=1200"]}


def metrics_of(folder):
    """The recorded test metrics of a run."""
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


@pytest.mark.parametrize("task", options("task"))
def test_a_checkpoint_alone_reproduces_the_test_results(configure, tmp_path, task):
    train.run(configure(f"task={task}", *OF_TASK.get(task, []), *SMALL))
    expected = metrics_of(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    alone = (tmp_path / "run/checkpoints/best.ckpt").rename(tmp_path / "elsewhere/any name.ckpt")
    shutil.rmtree(tmp_path / "run")
    assert evaluate.main([f"checkpoint={alone}"]) == expected
    assert len(expected) > 1


def test_the_folder_of_a_run_selects_its_mean_of_checkpoints(configure, tmp_path):
    often = ("callbacks.average.count=2", "trainer.val_check_interval=2", "task.optimizer.lr=0.01")
    train.run(configure("task=translation", *OF_TASK["translation"], *SMALL, *often))
    run = tmp_path / "run"
    assert evaluate.main([f"checkpoint={run}"]) == metrics_of(run)
    assert evaluate.main([f"checkpoint={run}/checkpoints/average.ckpt"]) == metrics_of(run)
    assert evaluate.main([f"checkpoint={run}/checkpoints/best.ckpt"])["test/loss"] != metrics_of(run)["test/loss"]


def test_a_missing_best_checkpoint_is_reported_and_the_last_one_used(translator, tmp_path, capsys):
    shutil.copytree(translator, tmp_path / "run")
    (tmp_path / "run/checkpoints/best.ckpt").unlink()
    evaluate.main([f"checkpoint={tmp_path / 'run'}", "limit=1"])
    said = capsys.readouterr().err
    assert f"{tmp_path}/run/checkpoints/best.ckpt does not exist, because no validation has ended, so " in said
    assert f"python train.py resume={tmp_path}/run" in said
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=f"Start the run again: the same command, with run_dir={tmp_path}/run"):
        evaluate.main([f"checkpoint={tmp_path / 'run'}"])


def test_a_run_without_validation_has_its_last_weights(configure, tmp_path, capsys):
    train.run(configure(*SMALL, "trainer.limit_val_batches=0"))
    assert re.search(r"tested +the last weights", capsys.readouterr().out)
    assert evaluate.main([f"checkpoint={tmp_path}/run"]) == metrics_of(tmp_path / "run")


def test_a_split_and_a_precision_and_a_batch_size(configure, tmp_path, capsys):
    train.run(configure(*SMALL, "trainer.precision=bf16-mixed"))
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert evaluate.main([f"checkpoint={run}"]) == metrics_of(run)
    val = evaluate.main([f"checkpoint={run}", "split=val"])
    assert val.keys() == {"val/loss", "val/accuracy"}
    assert val["val/accuracy"] == metrics["val/accuracy"]
    full = evaluate.main([f"checkpoint={run}", "precision=32-true", "data.batch_size=7"])
    assert full["test/loss"] == pytest.approx(metrics_of(run)["test/loss"], rel=1e-2)
    assert full["test/loss"] != metrics_of(run)["test/loss"]
    capsys.readouterr()
    some = evaluate.main([f"checkpoint={run}", "split=train", "limit=2"])
    assert re.search(r"only +2 batches", capsys.readouterr().out)
    assert some.keys() == {"train/loss", "train/accuracy"}


def test_a_text_is_read_with_the_characters_of_the_checkpoint(configure, tmp_path):
    """The file has fewer characters, so its own vocabulary would number them differently."""
    train.run(configure("task=lm", *SMALL, "data.eval_unroll=100"))
    run, file = tmp_path / "run", tmp_path / "text"
    file.write_text("the end of the line\n" * 200)
    words = (f"checkpoint={run}", "data=bytes", "data.unit=characters", f"data.path={file}")
    found = evaluate.main([*words, "data.valid_bytes=1000", "data.test_bytes=2000", "data.eval_unroll=100"])
    task, vocabulary = trained.load(run)
    bits = task.score(vocabulary.encode(file.read_text()[-2000:]))
    assert found["test/bpc"] == pytest.approx(float(bits.mean()), rel=1e-5)
    assert evaluate.main([f"checkpoint={run}", "data.eval_unroll=999"]) == pytest.approx(metrics_of(run), rel=1e-4)
    with pytest.raises(ValueError, match=r"data\.unit=bytes: the checkpoint reads characters"):
        evaluate.main([*words[:2], words[3]])
    file.write_text("☃ and other characters\n" * 200)
    with pytest.raises(ValueError, match="the text has characters that the checkpoint's vocabulary has not, '☃'"):
        evaluate.main([*words])


def test_a_text_of_words_is_read_with_the_words_of_the_checkpoint(tmp_path):
    from data.lm import Text
    from data.lm import Vocabulary as Tokens

    files = {}
    for split in ("train", "val", "test"):
        (tmp_path / split).write_text("a new b\n")
        files[split] = {"name": str(tmp_path / split)}
    data = Text(root="", cache=str(tmp_path / "cache"), unit="words", files=files, batch_size=1, unroll=2)
    data.checkpoint_vocabulary = Tokens("words", ["<eos>", "<unk>", "z", "b", "a"])
    data.setup()
    assert data.splits["test"].tolist() == [4, 1, 3, 0]
    assert data.evaluation("test").inputs.tolist() == [[4, 1, 3]]


def test_one_file_to_translate_or_to_answer_is_enough(configure, tmp_path):
    """The sample as a user's own files gives the same results, with the checkpoint's vocabulary."""
    train.run(configure("task=translation", *OF_TASK["translation"], *SMALL))
    run, prefix = tmp_path / "run", SAMPLES / "translation-dev"
    files = ("data=parallel", f"data.test={prefix}", "data.source=en", "data.target=de")
    assert evaluate.main([f"checkpoint={run}", *files, "data.eval_tokens_per_batch=4096"]) == metrics_of(run)
    with pytest.raises(ValueError, match="translates the other way round"):
        evaluate.main([f"checkpoint={run}", *files[:2], "data.source=de", "data.target=en"])
    train.run(configure("task=squad", *OF_TASK["squad"], *SMALL, f"run_dir={tmp_path / 'squad'}"))
    words = ("data=squad", f"data.test={SAMPLES / 'squad-sample-dev.json'}")
    assert evaluate.main([f"checkpoint={tmp_path / 'squad'}", *words]) == metrics_of(tmp_path / "squad")


def test_sentences_are_read_with_the_words_of_the_checkpoint(tmp_path):
    (tmp_path / "sentcls").mkdir()
    (tmp_path / "sentcls/all").write_text("0 good new\n1 bad\n" * 20)
    files = {"all": {"name": "all", "url": None, "sha256": None, "examples": None}}
    make = {"root": str(tmp_path), "cache": str(tmp_path), "labels": ["negative", "positive"], "files": files}
    data = SentenceClassification(**make)
    data.checkpoint_vocabulary = Vocabulary(["<pad>", "bad", "<unk>", "good"], ["negative", "positive"])
    data.setup()
    (x, labels), *_ = data.evaluation("test")
    assert {(*column.tolist(), label) for column, label in zip(x.T, labels.tolist(), strict=True)} <= {
        (3, 2, 0),
        (0, 1, 1),
    }
    other = SentenceClassification(**make)
    other.checkpoint_vocabulary = Vocabulary(["<pad>", "<unk>"], ["subjective", "objective"])
    with pytest.raises(ValueError, match="the labels of the data are negative, positive, those of the checkpoint subj"):
        other.setup()


def test_images_in_another_order_are_refused():
    seen = Digits(num_val=200)
    other = Digits(num_val=200, order="pixels")
    other.checkpoint_vocabulary = seen.vocabulary_of(seen.state_dict())
    with pytest.raises(ValueError, match=r"are pixels, .*those of the checkpoint rows, "):
        other.setup()


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A run folder of a small translator."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["task=translation", *OF_TASK["translation"], *SMALL, "logger=csv", f"run_dir={folder}"]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_output_is_written_where_requested_and_never_overwritten(translator, tmp_path):
    before = {path: path.read_bytes() for path in translator.rglob("*") if path.is_file()}
    found = evaluate.main([f"checkpoint={translator}", "task.beam=1", f"output={tmp_path / 'new'}"])
    record = json.loads((tmp_path / "new/metrics.json").read_text())
    assert record["metrics"] == found
    assert record["options"]["task"] == {"beam": 1}
    assert len((tmp_path / "new/hypotheses.txt").read_text().splitlines()) == len(
        (SAMPLES / "translation-dev.en").read_text().splitlines()
    )
    evaluate.main([f"checkpoint={translator}", f"output={tmp_path / 'one/greedy.json'}", "split=val"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["greedy.json"]
    assert before == {path: path.read_bytes() for path in translator.rglob("*") if path.is_file()}
    for output in (translator, tmp_path / "new", tmp_path / "new/other.json"):
        with pytest.raises(FileExistsError, match="would be overwritten; name another folder"):
            evaluate.main([f"checkpoint={translator}", f"output={output}"])


def test_a_loaded_network_is_the_one_that_was_trained(translator):
    """Its tied weights are one parameter, counted once."""
    task, vocabulary = trained.load(translator)
    record = json.loads((translator / "metrics.json").read_text())
    assert sum(p.numel() for p in task.parameters()) == record["parameters"]
    assert task.softmax.weight is task.source_embedding.weight
    assert not task.training
    h, _ = task.encoder(torch.randn(5, 2, 16))
    assert h.shape == (5, 2, task.encoder.output_size)
    assert len(vocabulary) == 800


def older(translator, folder, **changes):
    """A copy of the run whose checkpoint has no configuration, or changed content."""
    content = torch.load(translator / "checkpoints/best.ckpt", weights_only=True)
    del content["config"]
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content | changes, folder / "checkpoints/best.ckpt")
    return folder


def test_an_older_checkpoint_is_used_with_the_configuration_of_its_folder(translator, tmp_path):
    folder = older(translator, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="copy the whole folder of the run"):
        evaluate.main([f"checkpoint={folder}"])
    shutil.copy(translator / "config.yaml", folder)
    assert evaluate.main([f"checkpoint={folder}"]) == metrics_of(translator)


@pytest.mark.parametrize("part", ["data", "model", "task"])
def test_a_checkpoint_from_a_stranger_builds_none_of_its_classes(translator, tmp_path, part):
    config = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)["config"]
    imported = {"_target_": "sru.layer.torch.nn.Linear"}  # a module of this project imports it from elsewhere
    strangers = ({"_target_": "os.system"}, {"files": {"_target_": "os.system"}}, imported)
    for number, changed in enumerate(strangers):
        folder = older(translator, tmp_path / str(number), config=config | {part: config[part] | changed})
        with pytest.raises(ValueError, match="not part of this project; nothing was built"):
            evaluate.main([f"checkpoint={folder}"])


def test_a_checkpoint_from_a_stranger_downloads_nothing(translator, tmp_path):
    config = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)["config"]
    config["data"]["files"] = {"x.de": {"hub": {"path": "somewhere"}}}
    folder = older(translator, tmp_path / "run", config=config)
    assert evaluate.main([f"checkpoint={folder}"]) == evaluate.main([f"checkpoint={translator}/checkpoints/last.ckpt"])
    config = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)["config"]
    del config["choices"]
    with pytest.raises(ValueError, match="is damaged: it has no choices"):
        evaluate.main([f"checkpoint={older(translator, tmp_path / 'two', config=config)}"])


@pytest.mark.parametrize("part", ["data", "task"])
def test_a_checkpoint_from_a_stranger_names_no_file_to_compose(translator, tmp_path, part):
    config = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)["config"]
    for number, name in enumerate(("../data/multi30k", str(tmp_path / "evil"), None, 3, "pydoc,cr", f"{part}=x")):
        config["choices"] = config["choices"] | {part: name}
        folder = older(translator, tmp_path / str(number), config=config)
        with pytest.raises(ValueError, match=f"the checkpoint's {part}, .* is not a file of conf/{part}"):
            evaluate.main([f"checkpoint={folder}"])


def test_a_network_of_more_layers_than_weights_is_refused_before_it_is_made(translator, tmp_path):
    config = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)["config"]
    config["model"]["num_layers"] = 10**7
    with pytest.raises(ValueError, match="the weights of 10000000 layers"):
        trained.load(older(translator, tmp_path / "run", config=config))


def test_nan_weights_are_refused(translator, tmp_path):
    content = torch.load(translator / "checkpoints/last.ckpt", weights_only=True)
    state = content["state_dict"]
    state |= {name: tensor * float("nan") for name, tensor in state.items() if not name.endswith("scale_x")}
    folder = older(translator, tmp_path / "run", config=content["config"], state_dict=state)
    with pytest.raises(ValueError, match="test/loss is NaN for checkpoint="):
        evaluate.main([f"checkpoint={folder}"])


def test_other_tied_weights_and_other_held_out_examples_are_refused(configure, tmp_path):
    train.run(configure("task=lm", *SMALL, "data.unroll=20", "data.eval_unroll=50", f"run_dir={tmp_path}/lm"))
    with pytest.raises(ValueError, match=r"task\.tied=True does not fit the checkpoint's weights"):
        evaluate.main([f"checkpoint={tmp_path}/lm", "task.tied=true"])
    train.run(configure(*SMALL, f"run_dir={tmp_path}/sentences"))
    with pytest.raises(ValueError, match=r"data.fold=1 would test examples of training \(0\): leave it out"):
        evaluate.main([f"checkpoint={tmp_path}/sentences", "data.fold=1"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["split=test"], "checkpoint is missing"),
        (["checkpoint={run}", "data=../data/multi30k"], "data=../data/multi30k is not a file of conf/data"),
        (["checkpoint={run}", "data=multi30"], "data=multi30 is not a file of conf/data. Did you mean: multi30k"),
        (["checkpoint=/nowhere"], "checkpoint=/nowhere is neither a run's folder nor a .ckpt"),
        (["checkpoint={run}/config.yaml"], "config.yaml is damaged, or not a checkpoint of this project"),
        (["checkpoint={foreign}"], "is not a checkpoint of this project"),
        (["checkpoint={cut}"], "is damaged, or not a checkpoint"),
        (["checkpoint={run}", "split=dev"], "split=dev must be one of test, val, train"),
        (["checkpoint={run}", "splt=val"], "there is no option 'splt'. Did you mean: split"),
        (["checkpoint={run}", "split"], "'split': expected KEY=VALUE, each key once"),
        (["checkpoint={run}", "data.max_lenght=9"], "no option data.max_lenght. Did you mean: max_length"),
        (["checkpoint={run}", "data.vocab_size=900"], "data.vocab_size is fixed by the checkpoint: leave it"),
        (["checkpoint={run}", "data.max_length=0"], "data.max_length=0 must be a whole number"),
        (["checkpoint={run}", "task.bean=3"], "no option task.bean. Did you mean: beam"),
        (["checkpoint={run}", "task.beam=0"], "task.beam=0 must be a whole number, 1 to 1000"),
        (["checkpoint={run}", "task.embedding_size=8"], "task.embedding_size=8 does not fit the checkpoint's weights"),
        (["checkpoint={run}", "task.vocab_size=8"], "task.vocab_size is fixed by the checkpoint"),
        (["checkpoint={run}", "model.hidden_size=8"], "model.hidden_size is fixed by the checkpoint: leave it"),
        (["checkpoint={run}", "data=translation_sampl"], "Did you mean: translation_sample"),
        (
            ["checkpoint={run}", "data=cr"],
            "of another kind than the data of training, translation_sample; of the same kind are: ",
        ),
        (["checkpoint={run}", "data=parallel"], "data.source=None must be a language"),
        (["checkpoint={run}", "data.test="], "data.test= is empty: type a value, or leave it out"),
        (["checkpoint={run}", "limit=0"], "limit=0 must be a number of batches"),
        (["checkpoint={run}", "limit=["], "limit=[ must be a number of batches"),
        (["checkpoint={run}", "precision=8"], "precision=8 must be one of 32-true"),
        (["checkpoint={run}", "device=tpu"], "device=tpu must be auto, cpu"),
        (["checkpoint={run}", "output=/proc/x"], "output=/proc/x cannot be written"),
    ],
)
def test_wrong_options_of_evaluate_are_refused(translator, tmp_path, words, expected):
    from tasks.run import errors

    best = (translator / "checkpoints/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(best[: len(best) // 2])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    places = {"{run}": translator, "{cut}": tmp_path / "cut.ckpt", "{foreign}": tmp_path / "foreign.ckpt"}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        evaluate.main(words)
    told = errors.explain(caught.value)
    assert expected in told
    assert not told.startswith(("TypeError", "KeyError", "AttributeError"))


def test_the_command_explains_itself_and_its_errors():
    def run(*words):
        return subprocess.run(
            [sys.executable, "evaluate.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )

    usage, wrong = run("--help"), run("split=val")
    assert (usage.returncode, wrong.returncode) == (0, 1)
    assert "test, val or train" in usage.stdout
    assert wrong.stderr.startswith("error: checkpoint is missing; type checkpoint=FOLDER")
    assert "Traceback" not in wrong.stderr
