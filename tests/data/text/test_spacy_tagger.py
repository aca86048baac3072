"""Features by spaCy; a pipeline of rules, made here, takes the place of a trained one, which would be a download."""

import re
import sys

import pytest
from test_squad import SMALL
from test_squad_data import data_of, question, squad

import predict
import train
from data.squad import QuestionAnswering
from data.text import spacy_tagger
from data.text.spacy_tagger import Tagger

spacy = pytest.importorskip("spacy")
CONTENT = squad(
    ("Ada Lovelace wrote notes in London.", [question("Who writes notes?", "Ada Lovelace", 0)]),
    ("", [question("Who?", "", 0, id="2")]),
)


def pipeline_in(folder, *parts):
    """A folder of a pipeline: verbs and nouns by their ends, two names, everything else its own lemma."""
    pipeline = spacy.blank("en")
    if "tags" in parts:
        ruler = pipeline.add_pipe("attribute_ruler")
        ruler.add([[{"TEXT": {"REGEX": "."}}]], {"TAG": "X", "LEMMA": "?"})
        ruler.add([[{"LOWER": {"IN": ["wrote", "writes"]}}]], {"TAG": "VERB", "LEMMA": "write"})
        ruler.add([[{"LOWER": "notes"}]], {"TAG": "NOUN", "LEMMA": "note"})
    if "names" in parts:
        names = pipeline.add_pipe("entity_ruler")
        names.add_patterns([{"label": "PERSON", "pattern": "Ada Lovelace"}, {"label": "PLACE", "pattern": "London"}])
    pipeline.to_disk(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return pipeline_in(tmp_path / "rules", "tags", "names")


def test_tags_names_and_lemmas_become_features(tmp_path, model):
    data = data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=model)
    assert data.model_kwargs["num_features"] == 4 + 3 + 2
    assert (data.vocabulary.tags, data.vocabulary.entities) == (["NOUN", "VERB", "X"], ["PERSON", "PLACE"])
    features = next(iter(data.train_dataloader())).features[:, 0]
    ada, lovelace, wrote, notes, in_, london, stop = features.tolist()
    assert wrote[:2] == [0, 0]  # written otherwise,
    assert wrote[3] == 1  # but the lemma is the question's
    assert notes[:2] == [1, 1]
    assert notes[3] == 1
    assert [row[4:7] for row in (wrote, notes, stop)] == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert [row[7:] for row in (ada, lovelace, in_, london)] == [[1, 0], [1, 0], [0, 0], [0, 1]]
    padding = next(iter(data.test_dataloader())).features[:, 0]
    assert not padding.any()  # the empty passage


def test_tags_are_kept_and_several_processes_give_the_same(tmp_path, model, monkeypatch):
    texts = [["Ada", "Lovelace", "wrote", "notes", "."], [], ["Who", "writes", "?"]] * 5
    one = list(Tagger(model).annotate(texts))
    monkeypatch.setattr(spacy_tagger, "FEW", 0)
    assert list(Tagger(model).annotate(texts)) == one
    data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=model).setup()
    monkeypatch.setattr(Tagger, "annotate", None)
    data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=model).setup()
    assert data_of(tmp_path, CONTENT).model_kwargs["num_features"] == 3  # another entry of the cache


def test_a_tagged_run_is_tested_resumed_and_asked(configure, tmp_path, model, capsys):
    (tmp_path / "file.json").write_text(CONTENT)
    files = [f"data.{split}={tmp_path / 'file.json'}" for split in ("train", "val", "test")]
    words = (*SMALL, "data=squad", *files, "data.min_count=1", "data.tagger=spacy", f"data.spacy_model={model}")
    train.run(configure(*words))
    train.run(configure(*words, f"resume={tmp_path / 'run'}", "trainer.max_epochs=3"))
    predict.main([f"checkpoint={tmp_path / 'run'}", "question=Who wrote?", "passage=Ada Lovelace wrote."])
    assert re.search(r"\d-\d+  \S", capsys.readouterr().out)


def test_a_single_text_is_tagged_as_the_corpus_was(tmp_path, model):
    data = data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=model)
    reader = QuestionAnswering.vocabulary_of(data.state_dict())
    (batch,) = reader.batches("Ada Lovelace wrote notes in London.", "Who writes notes?")
    assert batch.features.equal(next(iter(data.train_dataloader())).features)
    reader.options["identity"] = [*reader.options["identity"], "another"]
    with pytest.raises(ValueError, match="install the one of training"):
        next(reader.batches("Tea.", "What?"))


@pytest.mark.parametrize(
    ("parts", "missing"), [((), "LEMMA, TAG, ENT_IOB"), (("tags",), "ENT_IOB"), (("names",), "LEMMA, TAG")]
)
def test_a_pipeline_that_lacks_something_says_what(tmp_path, parts, missing):
    folder = pipeline_in(tmp_path / "few", *parts)
    with pytest.raises(ValueError, match=rf"gives no {missing} \(it has .*or data\.tagger=none"):
        data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=folder).setup()


def test_a_pipeline_or_spacy_that_is_missing_says_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"python -m spacy download en_core_web_zz, or data\.tagger=none"):
        data_of(tmp_path, CONTENT, tagger="spacy", spacy_model="en_core_web_zz").setup()
    with pytest.raises(ValueError, match=r"data\.tagger=nltk must be spacy or none"):
        data_of(tmp_path, CONTENT, tagger="nltk")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"type pip install '\.\[spacy\]', or data\.tagger=none"):
        data_of(tmp_path, CONTENT, tagger="spacy").setup()


def test_a_pipeline_that_merges_tokens_or_is_damaged_is_refused(tmp_path, model):
    pipeline = spacy.load(model)
    pipeline.add_pipe("merge_entities")
    pipeline.to_disk(tmp_path / "merging")
    with pytest.raises(ValueError, match=r"makes 6 tokens of 7: use a pipeline without"):
        data_of(tmp_path, CONTENT, tagger="spacy", spacy_model=str(tmp_path / "merging")).setup()
    (tmp_path / "rules/meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"spacy_model=.*rules is damaged"):
        Tagger(model)


def test_a_pipeline_of_other_rules_is_another_one(tmp_path, model):
    before = Tagger(model).identity
    pipeline = spacy.load(model)
    pipeline.get_pipe("attribute_ruler").add([[{"LOWER": "in"}]], {"TAG": "ADP", "LEMMA": "in"})
    pipeline.to_disk(model)
    assert Tagger(model).identity != before
