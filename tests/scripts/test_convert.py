"""scripts/convert.py: saved files from one layout to another and back, and what it refuses."""

import collections
import re
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, all_recordings
from torch import nn

from scripts import convert as script
from sru import SRU, SRUCell, SRUpp
from sru.convert import VERSIONS, to_official

RECORDINGS = {path.stem: path for folder in GOLDEN for path in sorted(folder.glob("sru_*.pt"))}
NETWORKS = {
    "plain": {"input_size": 5, "hidden_size": 3},
    "one size": {"input_size": 4, "hidden_size": 4},
    "both ways": {"input_size": 5, "hidden_size": 2, "num_layers": 3, "bidirectional": True},
    "projected": {"input_size": 6, "hidden_size": 5, "projection_size": [2, 0], "rescale": False},
    "layer norm": {"input_size": 5, "hidden_size": 3, "layer_norm": True, "highway_bias": -1.0},
    "layer norm after": {"input_size": 5, "hidden_size": 3, "layer_norm": True, "normalize_after": True},
    "no highway": {"input_size": 5, "hidden_size": 3, "has_skip_term": False},
    "of 2017": {"input_size": 5, "hidden_size": 3, "v1": True},
    "input first": {"input_size": 5, "hidden_size": 2, "bidirectional": True, "proj_input_to_hidden_first": True},
    "twelve layers": {"input_size": 3, "hidden_size": 2, "num_layers": 12},
}


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(content, *options): what the script makes of a file with this content; its complaint as ValueError."""

    def convert_file(content, *options):
        source, target = tmp_path / "in.pt", tmp_path / "out.pt"
        target.unlink(missing_ok=True)
        torch.save(content, source)
        try:
            script.main([str(source), str(target), *options])
        except SystemExit as refused:
            assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}
            raise ValueError(refused.code) from refused
        assert {path.name for path in tmp_path.iterdir()} == {"in.pt", "out.pt"}
        return torch.load(target, weights_only=True)

    return convert_file


def network(name, dtype=torch.float32):
    """A network whose every parameter is drawn, so that no two entries look alike."""
    made = SRU(**NETWORKS[name]).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_survives_the_round_trip(name, version, convert):
    made = network(name, torch.float64)
    ours, official = made.state_dict(), to_official(made, version)
    assert_same(convert(ours, "--to", version), official)
    assert_same(convert(official), ours)
    other = convert(official, "--to", next(v for v in VERSIONS if v != version))
    assert_same(convert(other, "--to", version), official)


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_file_survives_the_round_trip_and_gives_the_recorded_output(name, convert):
    recorded = torch.load(RECORDINGS[name], weights_only=True)
    package = recorded["config"].pop("package")
    version = next(v for v in VERSIONS if v in package)
    ours = convert({"state_dict": recorded["state_dict"], "config": recorded["config"]})
    assert not [key for key in ours["state_dict"] if "rnn_lst" in key or "weight_c" in key]
    arguments = {key: value for key, value in ours["config"].items() if key != "cls"}
    made = SRU(**arguments).double()
    made.load_state_dict(ours["state_dict"])
    c0 = recorded["c0"]
    if arguments.get("nn_rnn_compatible_return"):
        c0 = c0.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    h, _ = made(recorded["x"], c0, recorded.get("mask_pad"))
    torch.testing.assert_close(h, recorded["h"], rtol=0, atol=1e-10)
    assert_same(convert(ours, "--to", version)["state_dict"], recorded["state_dict"])


def test_all_recordings_make_the_round_trip():
    all_recordings()
    assert len(RECORDINGS) >= 11


def test_the_number_of_directions_makes_no_difference_to_a_file(convert):
    """Columns are ordered (direction, hidden, k): two directions of 2 are laid out as one of 4."""
    for version in VERSIONS:
        made = network("both ways")
        one_way = SRU(5, 4, 3)
        one_way.load_state_dict(made.state_dict())
        assert_same(to_official(one_way, version), to_official(made, version))


@pytest.mark.parametrize("to", VERSIONS)
def test_a_layer_by_itself_converts(to, convert):
    cell = SRUCell(5, 3, projection_size=2)
    official = convert({f"encoder.{key}": value for key, value in cell.state_dict().items()}, "--to", to)
    assert "encoder.weight_c" in official
    again = SRUCell(5, 3, projection_size=2)
    again.load_state_dict({key.removeprefix("encoder."): value for key, value in official.items()})
    assert_same(again.state_dict(), cell.state_dict())
    assert_same(convert(official), {f"encoder.{key}": value for key, value in cell.state_dict().items()})


def test_everything_else_in_a_checkpoint_stays_as_it_is(convert):
    """Among it what looks a little like a layer, and a second state dict of the same names."""
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 5), "rnn": network("plain"), "norm": nn.BatchNorm1d(3)})
    model["attention"] = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    state = model.state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.randn(9)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    rest = {"epoch": 3, "optimizer": optimizer, "weight_c": torch.randn(2, 3), "names": ["a"], "nothing": None}
    content = {"model": state, "nested": {"ema": dict(model.named_parameters())}, **rest}
    official = convert(content, "--to", "2.6.0")
    assert list(official) == list(content)
    assert isinstance(official["model"], collections.OrderedDict)
    assert official["model"]._metadata == state._metadata
    for key, value in to_official(model["rnn"], "2.6.0").items():
        assert torch.equal(official["model"][f"rnn.{key}"], value)
        if not key.endswith("scale_x"):
            assert torch.equal(official["nested"]["ema"][f"rnn.{key}"], value)
    assert not any(key.startswith("rnn.layers") for key in official["model"])
    for key, value in rest.items():
        assert str(official[key]) == str(value)
    assert_same(
        {key: value for key, value in official["model"].items() if not key.startswith("rnn.")},
        {key: value for key, value in state.items() if not key.startswith("rnn.")},
    )
    ours = convert(official)
    assert list(ours["model"]) == list(state)
    assert_same(ours["model"], state)
    assert_same(ours["nested"]["ema"], dict(model.named_parameters()))
    model.load_state_dict(ours["model"])


def test_two_networks_in_one_file_are_converted_separately(convert):
    model = nn.ModuleDict({"there": network("of 2017"), "back": network("projected")})
    official = {
        f"{name}.{key}": value for name, part in model.items() for key, value in to_official(part, "3.0.0.dev").items()
    }
    assert_same(convert(official), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_stays(dtype, convert):
    for name in ("of 2017", "layer norm"):
        made = network(name, dtype)
        if name == "layer norm":
            made[0].layer_norm.double()
        official = to_official(made, "2.6.0")
        assert_same(convert(made.state_dict(), "--to", "2.6.0"), official)
        assert_same(convert(official), made.state_dict())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("where", ["", "encoder."])
def test_another_number_of_layers_is_named(layers, where):
    torch.manual_seed(0)
    source, here = SRU(4, 4, layers), SRU(4, 4, 2)
    model = nn.ModuleDict({"encoder": here}) if where else here
    for state in (source.state_dict(), *(to_official(source, version) for version in VERSIONS)):
        state = {f"{where}{key}": value for key, value in state.items()}
        message = rf"{where}num_layers \(in the file: {layers}, here: 2\)"
        with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
            model.load_state_dict(state)
        model.load_state_dict(state, strict=False)
        assert torch.equal(here[0].weight, source[0].weight)
    with pytest.raises(RuntimeError, match="Missing key") as error:
        here.load_state_dict({})
    assert "num_layers" not in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rnn: nn.ModuleDict({"encoder": rnn}), "ModuleDict: pass model.encoder"),
        (lambda rnn: nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"rnn": rnn})), "Sequential: pass model[1].rnn"),
        (lambda rnn: nn.ModuleList([rnn, SRU(4, 4), rnn]), "ModuleList: pass model[0] or model[1]"),
        (lambda rnn: rnn[0], "SRUCell"),
        (lambda rnn: nn.Linear(4, 4), "Linear"),
        (lambda rnn: rnn.state_dict(), "OrderedDict"),
    ],
)
def test_to_official_names_the_sru_within_a_model(build, message):
    with pytest.raises(TypeError) as refused:
        to_official(build(SRU(4, 4)))
    assert str(refused.value) == f"to_official takes an SRU, not {message}"


def test_a_layers_own_module_only_changes_its_name(convert):
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 12))
    made = SRU(5, 3, 3, transform_module=[module, nn.Linear(3, 9), None], layer_norm=True)
    ours = made.state_dict()
    old, new = convert(ours, "--to", "2.6.0"), convert(ours, "--to", "3.0.0.dev")
    assert_same(old, to_official(made, "2.6.0"))
    assert_same(new, to_official(made, "3.0.0.dev"))
    assert_same(convert(old), ours)
    assert_same(convert(new), ours)
    assert_same(convert(new, "--to", "2.6.0"), old)
    # One that is a matrix and no more is a layer's matrix, in the layouts that cannot tell.
    made = SRU(5, 3, 1, transform_module=nn.Linear(5, 12, bias=False))
    for version in VERSIONS:
        assert_same(convert(made.state_dict(), "--to", version), to_official(made, version))
    assert "layers.0.weight" in convert(to_official(made, "3.0.0.dev"))


def test_a_weight_c_of_zeros_is_a_v1_unless_set_otherwise(convert, capsys):
    official = to_official(SRU(5, 3, weight_c_init=0.0))
    SRU(5, 3, v1=True).load_state_dict(convert(official))
    assert "v1=True" in capsys.readouterr().out
    SRU(5, 3).load_state_dict(convert(official, "--set", "v1=false"))
    assert "v1" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"rnn_lst.0.*has_vc_term=True"):
        convert(to_official(network("plain")), "--set", "v1=true")


def test_the_script_names_each_sru_and_its_layout(convert, capsys):
    convert({"model": {f"rnn.{key}": value for key, value in to_official(network("projected")).items()}})
    call = "SRU(input_size=6, hidden_size=5, num_layers=2, projection_size=[2, 0], rescale=False)"
    assert capsys.readouterr().out.startswith(f"model.rnn: 3.0.0.dev -> ours\n    {call}\n")
    convert(to_official(SRU(4, 4, transform_module=nn.Linear(4, 12))))
    assert "    SRU(input_size=4, hidden_size=4, num_layers=2, transform_module=...)\n" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["ours", *VERSIONS])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_printed_constructor_builds_the_network(name, to, convert, capsys):
    made, both = network(name), NETWORKS[name].get("bidirectional", False)
    source = made.state_dict() if to != "ours" else to_official(made)
    converted = convert(dict(sorted(source.items())), "--to", to)  # as from a format without an order
    calls = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    SRU(")]
    assert len(calls) == 2 - made.output_size % 2
    again = eval(calls[-1] if both else calls[0])
    again.load_state_dict(converted)
    x = torch.randn(4, 2, made.input_size)
    assert torch.equal(again(x)[0], made(x)[0])


def test_the_script_prints_the_constructor_of_a_single_layer(convert, capsys):
    convert({f"encoder.{key}": value for key, value in SRUCell(5, 3, v1=True).state_dict().items()}, "--to", "2.6.0")
    assert "encoder: ours -> 2.6.0\n    SRUCell(input_size=5, hidden_size=3, v1=True)\n" in capsys.readouterr().out


def test_an_optimizer_in_the_file_is_mentioned(convert, capsys):
    model = SRU(3, 4)
    convert({"model": model.state_dict(), "state": {"step": 3}}, "--to", "2.6.0")
    assert "optimizer" not in capsys.readouterr().out
    state = torch.optim.Adam(model.parameters()).state_dict()
    for rest in ({"optimizer": state}, {"optimizer_states": [state]}):  # by hand, by Lightning
        convert({"model": model.state_dict(), **rest}, "--to", "2.6.0")
        assert "Create a new optimizer" in capsys.readouterr().out


def test_help_and_documents_name_every_option(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text_of_help = capsys.readouterr().out
    document = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--\w+", text_of_help)) - {"--help"}
    assert options == {"--to", "--set", "--force"}
    for text in (text_of_help, document):
        assert all(option in text for option in (*options, "v1=true"))
        assert "larger model" in " ".join(text.split())


def damaged(**changes):
    """An official state dict with entries changed, or where None removed."""
    state = to_official(network("plain"), "2.6.0") | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (torch.ones(3), [], "holds a Tensor, not a state dict"),
        ([{"rnn_lst.0.bias": torch.ones(4)}], [], "holds a list, not a state dict"),
        ({}, [], "holds no SRU"),
        (nn.LSTM(3, 4).state_dict(), [], "holds no SRU"),
        (nn.TransformerEncoderLayer(4, 2).state_dict(), [], "holds no SRU"),
        (damaged(rnn_lst__0__gain=torch.ones(3)), [], r"rnn_lst\.0: .*weight normalisation"),
        (damaged(ln_lst__0__weight=torch.ones(3)), [], "2.1.7"),
        (damaged(rnn_lst__1__weight=None), [], r"rnn_lst\.1: it has no matrix"),
        (damaged(rnn_lst__1__weight=torch.ones(3, 8)), [], "a matrix to 8 columns; its bias needs 9 or 12"),
        (damaged(rnn_lst__1__weight=torch.ones(3)), [], r"rnn_lst\.1: "),
        (damaged(rnn_lst__1__scale_x=torch.ones(2)), [], r"rnn_lst\.1: "),
        (damaged(), ["--to", "2.6.0"], "in the layout 2.6.0 already; give --to ours or --to 3.0.0.dev$"),
        (SRU(3, 4).state_dict(), [], "in the layout ours already; give --to 2.6.0 or --to 3.0.0.dev$"),
        (SRU(5, 6, projection_size=5).state_dict(), ["--to", "2.6.0"], "ignores projection_size=5"),
        (nn.Linear(2, 2), [], "needs pickle"),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused_and_nothing_is_written(content, options, message, convert):
    with pytest.raises(ValueError, match=message) as refused:
        convert(content, *options)
    assert str(refused.value).startswith("error: ")
    assert len(str(refused.value).splitlines()) == 1


def test_set_takes_v1_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--set", "v1=maybe"])
    assert re.search("v1=maybe.*v1=true.*v1=false", capsys.readouterr().err)


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    target = tmp_path / "out.pt"
    whole = tmp_path / "whole.pt"
    torch.save(damaged(), whole)
    for name, data in {
        "empty": b"",
        "text": b"hello\n",
        "half": whole.read_bytes()[: whole.stat().st_size // 2],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SystemExit, match=f"{name} is damaged"):
            script.main([str(tmp_path / name), str(target)])
    for missing in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(SystemExit, match=f"there is no file {missing}"):
            script.main([str(missing), str(target)])
    assert not target.exists()


def test_a_file_is_overwritten_on_request_only_and_whole_or_not_at_all(tmp_path, monkeypatch):
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(damaged(), source)
    target.write_text("precious")
    with pytest.raises(SystemExit, match=r"^error: .* exists; give another name, or --force to overwrite it$"):
        script.main([str(source), str(target)])

    def fail(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(SystemExit, match="No space left"):
            script.main([str(source), str(target), "--force"])
    assert target.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", "out.pt"}
    script.main([str(source), str(target), "--force"])
    assert "layers.0.v" in torch.load(target, weights_only=True)
    # A file may also take its own place.
    script.main([str(source), str(source), "--force"])
    assert "layers.0.v" in torch.load(source, weights_only=True)


@pytest.mark.parametrize("place", ["missing/out.pt", "in.pt/out.pt"])
def test_a_missing_folder_is_refused(place, tmp_path):
    torch.save(damaged(), tmp_path / "in.pt")
    with pytest.raises(SystemExit, match=r"^error: "):
        script.main([str(tmp_path / "in.pt"), str(tmp_path / place)])
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_the_command_line_converts_from_any_folder(tmp_path):
    torch.save(damaged(), tmp_path / "in.pt")
    command = [sys.executable, str(ROOT / "scripts/convert.py"), "in.pt", "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layers.1.weight" in torch.load(tmp_path / "out.pt", weights_only=True)


def test_a_file_of_srupp_names_the_network_to_build(tmp_path, capsys):
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    network = SRUpp(6, 8, 4, 3, attention_layers=[1]).eval()
    torch.save(to_official(network), source)
    script.main([str(source), str(target)])
    call = next(line for line in capsys.readouterr().out.splitlines() if "SRUpp(" in line)
    built = eval(call, {"SRUpp": SRUpp}).eval()
    built.load_state_dict(torch.load(target, weights_only=True))
    x = torch.randn(5, 2, 6)
    assert torch.equal(built(x)[0], network(x)[0])
    with pytest.raises(SystemExit, match=r"it is a layer of SRU\+\+, which version 2.6.0 does not have"):
        script.main([str(source), str(tmp_path / "old.pt"), "--to", "2.6.0"])
