"""The hybrid of a network and HMMs: latency control, the carried state, likelihoods, resume and the paper's rows."""

import json
from functools import partial

import kaldiio
import numpy as np
import pytest
import torch

import predict
import tasks.trained
import train
from data.audio import synthesis
from data.audio.kaldi_ark import Archive
from data.audio.utterance_batches import Batch, FrameConfig
from data.kaldi import Kaldi
from sru import CNN, GRU, LSTM, QRNN, SRU, SRUppEncoder, Transformer, TransformerXL
from tasks.hybrid import Hybrid
from tasks.modules.latency_controlled import LatencyControlled, merge_states
from tasks.modules.newbob import newbob

RECURRENT = {"sru": SRU, "lstm": LSTM, "gru": GRU, "qrnn": QRNN}
WAYS = [False, True]


def build_controlled(model, num_layers=2, segment=4, right=3, size=3, **options):
    encoder = partial(RECURRENT[model], hidden_size=5, **options)
    layers = {"input_size": size, "num_layers": num_layers, "segment": segment, "right": right}
    return LatencyControlled(encoder, **layers).double().eval()


def directions(layer, model):
    """A layer's two directions as functions step(x (n,), state) -> (h, state), and what each starts from."""
    if model == "lstm":

        def cell(suffix):
            w, u, b, d = (getattr(layer.rnn, f"{name}_l0{suffix}") for name in
                          ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))  # fmt: skip

            def step(x, state):
                i, f, g, o = (w @ x + b + u @ state[0] + d).chunk(4)
                c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                return h, (h, c)

            return step

        zeros = torch.zeros(5).double()
        return [cell(""), cell("_reverse")], (zeros, zeros)
    cell = layer.layers[0]
    weight = cell.weight.unflatten(0, (cell.matrices, 2, 5))
    v, b = cell.v.view(2, -1), cell.bias.view(2, -1)

    def half(side):
        columns = slice(5 * side, 5 * side + 5)

        def step(x, c):
            z, f, r, *skip = weight[:, side] @ x
            f = torch.sigmoid(f + v[0, columns] * c + b[0, columns])
            r = torch.sigmoid(r + v[1, columns] * c + b[1, columns])
            c = f * c + (1 - f) * z
            carried = skip[0] if skip else x[columns] * cell.alpha
            return r * c + (1 - r) * carried, c

        return step

    return [half(0), half(1)], torch.zeros(5).double()


def step_by_step(stack, model, x, segment, right):
    """What the definition says, of one sequence x (T, n): a list of h."""
    parts, carried = [directions(layer, model) for layer in stack.layers], {}
    found = []
    for begin in range(0, len(x), segment):
        end = min(begin + segment, len(x))
        rows = list(x[begin : end + right])
        for i, ((ahead, back), zero) in enumerate(parts):
            state, forward = carried.get(i, zero), []
            for t, row in enumerate(rows):
                h, state = ahead(row, state)
                forward.append(h)
                if t == end - begin - 1:
                    carried[i] = state
            state, backward = zero, []
            for row in reversed(rows):
                h, state = back(row, state)
                backward.append(h)
            rows = [torch.cat(both) for both in zip(forward, reversed(backward), strict=True)]
        found += rows[: end - begin]
    return torch.stack(found)


@pytest.mark.parametrize("model", ["sru", "lstm"])
@pytest.mark.parametrize(("segment", "right"), [(4, 3), (3, 0), (2, 5)])
def test_chunks_are_read_as_the_definition_says(model, segment, right):
    stack = build_controlled(model, 3, segment, right)
    x = torch.randn(11, 2, 3).double()
    with torch.no_grad():
        found = stack.read(x)
        for column in range(2):
            wanted = step_by_step(stack, model, x[:, column], segment, right)
            torch.testing.assert_close(found[:, column], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", RECURRENT)
def test_padding_changes_nothing(model):
    stack = build_controlled(model)
    lengths = [11, 6, 4, 1]
    x = torch.randn(11, 4, 3).double()
    pad = torch.arange(11)[:, None] >= torch.tensor(lengths)
    together = stack.read(x, pad)
    for column, length in enumerate(lengths):
        alone = stack.read(x[:length, column : column + 1])
        torch.testing.assert_close(together[:length, column], alone[:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", RECURRENT)
def test_with_all_that_follows_it_is_the_plain_bidirectional_stack(model):
    stack = build_controlled(model, segment=4, right=9)
    plain = RECURRENT[model](3, 5, 2, bidirectional=True).double().eval()
    for i, layer in enumerate(stack.layers):
        source = plain.rnn.state_dict() if hasattr(plain, "rnn") else plain.layers[i].state_dict()
        if hasattr(plain, "rnn"):
            one = {name.replace(f"_l{i}", "_l0"): a for name, a in source.items() if f"_l{i}" in name}
            layer.rnn.load_state_dict(one)
        else:
            layer.layers[0].load_state_dict(source)
    x, weight = torch.randn(13, 2, 3).double(), torch.randn(13, 2, 10).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    # The first chunk sees the nine that follow, the last ones all that is left; the whole gradient goes through both.
    outputs = [stack.read(inputs[0]), plain(inputs[1])[0]]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for h in outputs:
        (h * weight).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-10)
    sums = [sum(float(p.grad.square().sum()) for p in network.parameters()) for network in (stack, plain)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-8)


@pytest.mark.parametrize("model", [Transformer, TransformerXL, SRUppEncoder, CNN])
def test_a_model_without_states_of_two_directions_is_refused(model):
    encoder = partial(model, **({} if model is CNN else {"hidden_size": 8}))
    with pytest.raises(ValueError, match=rf"{model.__name__} has no states of two directions.*type model=sru"):
        LatencyControlled(encoder, input_size=3, num_layers=2, segment=4, right=3)


def test_a_state_of_another_form_is_refused():
    with pytest.raises(TypeError, match=r"a state of two directions is .*, not \(3, 2, 4\)"):
        merge_states(torch.zeros(3, 2, 4), None)


def task_of(model, ways=False, **options):
    """A Hybrid in float64 of features of 3 numbers and 4 targets."""
    recipe = FrameConfig(None, options.pop("delay", 0), 4, 3 if ways else 0, 3, torch.tensor([4, 1, 3, 0]), None)
    encoder = partial(RECURRENT[model], hidden_size=5, num_layers=2, bidirectional=ways)
    made = Hybrid(
        encoder=encoder, optimizer=torch.optim.SGD, bidirectional=ways, num_layers=2, **recipe.model_kwargs | options
    )
    return made.double(), recipe


def folder_of(path, lengths):
    generator = np.random.default_rng(3)
    path.mkdir()
    with Archive(path / "feats.ark") as feats, Archive(path / "ali.ark") as ali:
        for i, length in enumerate(lengths):
            feats.write(f"u{i}", generator.normal(size=(length, 3)).astype(np.float32))
            ali.write(f"u{i}", generator.integers(4, size=length).astype(np.int32))
    return path


@pytest.mark.parametrize("ways", WAYS, ids=["one way", "both ways"])
@pytest.mark.parametrize("model", RECURRENT)
def test_segments_with_their_state_give_what_whole_utterances_give(tmp_path, model, ways):
    """Streams that begin utterances at different times; what is parted between them is compared up to there."""
    task, recipe = task_of(model, ways)
    folder = folder_of(tmp_path / "x", [10, 3, 9, 17, 5, 12, 1, 8])
    data = Kaldi(
        root="", cache=str(tmp_path), train=str(folder), val=str(folder), test=str(folder), cmvn=None, batch_size=2,
        segment=4, right=recipe.right,
    )  # fmt: skip
    data.setup()
    (whole,) = data.vocabulary.batches(data.splits["train"], 10**6)
    task.train()
    with torch.no_grad():
        logits = task(whole.x.double(), whole.pad)
        wanted = {tuple(x[0].tolist()): (x, h) for x, h in zip(whole.x.unbind(1), logits.unbind(1), strict=True)}
        begun, mixed = [None, None], 0
        for batch in data.train_dataloader():
            found = task.segment_logits(batch._replace(x=batch.x.double()))
            mixed += int(batch.begins.any() and not batch.begins.all())
            for column in range(2):
                if batch.begins[column]:
                    begins = wanted.pop(tuple(batch.x[0, column].tolist()), None)
                    begun[column] = begins and (begins, 0)
                if begun[column] is None:
                    continue
                (x, h), start = begun[column]
                length = int((~batch.pad[:4, column]).sum())
                torch.testing.assert_close(batch.x[:length, column], x[start : start + length])
                torch.testing.assert_close(found[:length, column], h[start : start + length], rtol=1e-9, atol=1e-9)
                begun[column] = (x, h), start + length
    assert not wanted
    assert mixed


def test_the_carried_state_has_no_gradient():
    task, _ = task_of("sru")
    batch = Batch(torch.randn(4, 2, 3).double(), torch.ones(4, 2).long(), torch.zeros(4, 2) > 0, torch.ones(2) > 0)
    task.loss(batch)
    assert not task.state.requires_grad
    loss, _, size = task.loss(batch._replace(begins=torch.zeros(2) > 0))
    loss.backward()
    assert size == 8


def test_loss_and_errors_are_over_frames_with_a_target():
    task, _ = task_of("sru")
    task.softmax.weight.data.zero_()
    task.softmax.bias.data = torch.tensor([0, 1, 0, 0]).double().log1p()  # probabilities of a fifth, but for two
    targets = torch.tensor([[-1, 1], [1, 0], [3, -1]])
    batch = Batch(torch.randn(3, 2, 3).double(), targets, torch.zeros(3, 2) > 0, torch.ones(2) > 0)
    loss, metrics, size = task.loss(batch)
    assert size == 4
    assert float(metrics["frame_error"]) == 50
    assert float(loss.detach()) == pytest.approx((2 * np.log(5) + 2 * np.log(2.5)) / 4)
    loss, _, size = task.loss(batch._replace(targets=torch.full((3, 2), -1)))
    assert (float(loss.detach()), size) == (0, 0)


def test_steps_that_follow_need_a_bidirectional_network():
    with pytest.raises(ValueError, match=r"data\.right=3 future frames need a bidirectional network"):
        task_of("sru", right=3)
    with pytest.raises(ValueError, match="bidirectional=false does not go with"):
        Hybrid(
            encoder=partial(SRU, hidden_size=5, bidirectional=True), optimizer=torch.optim.SGD, bidirectional=False,
            num_layers=2, **task_of("sru")[1].model_kwargs,
        )  # fmt: skip


def test_matrices_start_within_the_bound_that_is_asked_for():
    task, _ = task_of("lstm", uniform_init=0.05)
    sizes = {name: float(p.detach().abs().max()) for name, p in task.named_parameters()}
    matrices = [size for name, size in sizes.items() if "weight" in name]
    assert max(matrices) <= 0.05
    assert min(matrices) > 0.04
    assert max(size for name, size in sizes.items() if "bias" in name) > 0.05
    with pytest.raises(ValueError, match=r"task\.uniform_init=-1 must be above 0"):
        task_of("lstm", uniform_init=-1)


def test_the_rate_is_halved_where_a_validation_is_no_better():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.3)
    scheduler = newbob(optimizer, factor=0.5, momentum=0.9)["scheduler"]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.2, 0)
    found = []
    for loss in (3.0, 2.0, 2.5, 2.0, 1.0, float("inf")):
        optimizer.step()
        scheduler.step()
        scheduler.after_validation(loss)
        found.append((group["lr"], group["momentum"]))
    assert found == [(0.2, 0.9), (0.2, 0.9), (0.1, 0.9), (0.05, 0.9), (0.05, 0.9), (0.025, 0.9)]
    with pytest.raises(ValueError, match="Adamax has no momentum"):
        newbob(torch.optim.Adamax([torch.nn.Parameter(torch.zeros(1))]), factor=0.5, momentum=0.9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("spoken")


@pytest.fixture
def small(configure, cache):
    """small(*overrides): a configuration of a small network on the sample, which is written once."""
    few = ("task=hybrid", "width=16", "depth=1", "epochs=2", "trainer.limit_train_batches=30", f"data.cache={cache}")
    return lambda *words: configure(*few, *words)


def checkpoint(folder, name="last"):
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


@pytest.mark.parametrize("ways", WAYS, ids=["one way", "both ways"])
@pytest.mark.parametrize("model", RECURRENT)
def test_a_network_learns_the_sample(configure, cache, model, ways):
    words = [f"model={model}", f"data.cache={cache}", "dropout=0", "task.writes_likelihoods=false"]
    words += ["bidirectional=true", "data.right=10", "data.delay=0"] if ways else []
    # A gated recurrence of torch starts more slowly by this optimiser.
    words += ["task.optimizer._target_=torch.optim.Adam", "~task.optimizer.weight_decay", "task.optimizer.lr=0.01"]
    words += ["task.scheduler=null", "trainer.limit_train_batches=70", "width=32"]
    # What always says the most frequent target, a pause, has more than 70 per cent wrong.
    assert train.run(configure("task=hybrid", *words, "epochs=1")) < 45


@pytest.mark.parametrize("ways", WAYS, ids=["one way", "both ways"])
def test_likelihoods_are_posteriors_over_priors_of_the_features_frames(small, tmp_path, ways, cache):
    both = ("bidirectional=true", "data.right=7") if ways else ()
    train.run(small("epochs=1", "data.delay=4", *both))
    found = kaldiio.load_scp(str(tmp_path / "run/likelihoods.scp"))
    task, recipe = tasks.trained.load(str(tmp_path / "run"))
    frames, _ = recipe.read(str(cache / f"spoken_words-{synthesis.VERSION}/test"), 100)
    assert sorted(found) == sorted(frames.keys)
    counts = recipe.counts.clamp(min=1).double()
    for i in (0, 7, 29):
        x, _ = recipe.sequence(frames, i)
        assert len(x) == frames.lengths[i] + 4
        with torch.no_grad():
            logits = task(torch.from_numpy(x)[:, None], torch.zeros(len(x), 1, dtype=torch.bool))
        wanted = logits[4:, 0].double().log_softmax(1) - (counts / counts.sum()).log()
        scores = found[frames.keys[i]]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


def test_predictions_are_those_of_the_test(small, tmp_path, cache, capsys):
    train.run(small("epochs=1"))
    capsys.readouterr()
    output, sample = tmp_path / "some.ark", cache / f"spoken_words-{synthesis.VERSION}"
    words = [f"checkpoint={tmp_path / 'run'}", f"output={output}"]
    predict.main([*words, f"input={sample / 'test/feats.scp'}", "frames_per_batch=500"])
    assert "30 utterances, 5,022 frames: their likelihoods of 31 targets are in" in capsys.readouterr().out
    one, two = (kaldiio.load_scp(str(path)) for path in (tmp_path / "run/likelihoods.scp", tmp_path / "some.scp"))
    assert list(one) == list(two)
    for key in one:
        np.testing.assert_allclose(one[key], two[key], rtol=1e-4, atol=1e-4)
    with pytest.raises(FileExistsError, match=r"some\.ark and .*some\.scp would be overwritten"):
        predict.main([*words, f"input={sample / 'test'}"])
    before = sorted(path.name for path in tmp_path.iterdir())
    refused = [words[0], f"output={tmp_path / 'other.ark'}"]
    with Archive(tmp_path / "narrow.ark") as archive:
        archive.write("a", np.ones((4, 13), np.float32))
    with pytest.raises(ValueError, match="the frames of a have 13 features, expected 40"):
        predict.main([*refused, f"input={tmp_path / 'narrow.scp'}"])
    (tmp_path / "piped.scp").write_text("a copy-feats scp:x ark:- |\n")
    with pytest.raises(ValueError, match="is a command; commands are not executed"):
        predict.main([*refused, f"input={tmp_path / 'piped.scp'}"])
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; type the path of a Kaldi folder"):
        predict.main([*refused, f"input={tmp_path / 'nowhere'}"])
    with pytest.raises(ValueError, match=r"must end in \.ark"):
        predict.main([*words[:1], f"output={tmp_path / 'x.scp'}", f"input={sample / 'test'}"])
    assert sorted({path.name for path in tmp_path.iterdir()} - {"narrow.ark", "narrow.scp", "piped.scp"}) == before


@pytest.mark.parametrize("ways", WAYS, ids=["one way", "both ways"])
def test_resumed_equals_uninterrupted(small, tmp_path, ways):
    """Also from within an epoch: the third validation of each epoch's three is the first part's last."""
    often = ["trainer.val_check_interval=10", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    often += ["bidirectional=true", "data.right=7", "model=lstm"] if ways else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(small(*often, f"run_dir={whole}", "task.writes_likelihoods=false"))
    stopped = [*often, f"run_dir={parts}", "task.writes_likelihoods=false"]
    train.run(small(*stopped, "trainer.max_steps=10"))
    for more in ("trainer.max_steps=40", "trainer.max_steps=-1"):
        torch.manual_seed(99)
        train.run(small(*stopped, f"resume={parts}", more))
    one, two = checkpoint(whole), checkpoint(parts)
    assert one["global_step"] == two["global_step"] == 60
    for name in ("state_dict", "lr_schedulers", "optimizer_states"):
        assert_same(one[name], two[name])
    assert_same(one["state"], two["state"])
    assert one["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9


def assert_same(one, two):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def test_a_test_without_targets_writes_likelihoods_all_the_same(configure, tmp_path):
    folders = [folder_of(tmp_path / split, [10, 12, 9]) for split in ("train", "val", "test")]
    (folders[2] / "ali.scp").unlink()
    (folders[2] / "ali.ark").unlink()
    places = [f"data.{folder.name}={folder}" for folder in folders]
    train.run(configure("task=hybrid", "data=kaldi", *places, "data.cmvn=global", "data.batch_size=2", "epochs=1"))
    outcome = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "test/frame_error" not in outcome["metrics"]
    assert sorted(kaldiio.load_scp(str(tmp_path / "run/likelihoods.scp"))) == ["u0", "u1", "u2"]
