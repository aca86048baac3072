"""Numbers recorded from the official package, reproduced in float64, and its files read and written.

A few of the recordings lie in samples/golden; the others beside SRU_TEST_DATA (conftest.py).
"""

import pytest
import torch
from conftest import GOLDEN, all_recordings

from sru import SRU, SRUCell, convert

FILES = {path.stem: path for folder in GOLDEN for path in sorted(folder.glob("sru_*.pt"))}
BACKENDS = ["cpu", "reference"]


def recording(name: str) -> tuple[dict, dict]:
    """What was recorded, and the arguments of the official constructor."""
    recorded = torch.load(FILES[name], weights_only=True)
    return recorded, {k: v for k, v in recorded["config"].items() if k not in ("cls", "package")}


def layout(state: torch.Tensor, arguments: dict) -> torch.Tensor:
    """A state (L, B, directions * H) as nn_rnn_compatible_return wants it; the official package gives it only."""
    if not arguments.get("nn_rnn_compatible_return"):
        return state
    return state.unflatten(2, (-1, arguments["hidden_size"])).transpose(1, 2).flatten(0, 1)


def test_there_are_recordings():
    assert len(FILES) >= 4


def test_all_recordings_are_checked():
    all_recordings()
    assert len(FILES) == 11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILES)
def test_outputs_and_gradients_are_the_official_ones(name, backend):
    recorded, arguments = recording(name)
    network = SRU(**arguments, backend=backend).double()
    network.load_state_dict(recorded["state_dict"])
    x, c0 = (recorded[key].requires_grad_() for key in ("x", "c0"))
    h, c = network(x, layout(c0, arguments), recorded.get("mask_pad"))
    torch.testing.assert_close(h, recorded["h"], rtol=0, atol=1e-10)
    torch.testing.assert_close(c, recorded["c"], rtol=0, atol=1e-10)
    ((h * recorded["weight_h"]).sum() + (c * recorded["weight_c"]).sum()).backward()
    torch.testing.assert_close(x.grad, recorded["grad_x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(c0.grad, recorded["grad_c0"], rtol=0, atol=1e-10)
    # The gradients go the way of the parameters: through the official layout, and by the official names.
    version = "2.6.0" if "2.6.0" in recorded["config"]["package"] else "3.0.0.dev"
    for parameter in network.parameters():
        parameter.data = parameter.grad
    grads = convert.to_official(network, version)
    assert set(recorded["grads"]) <= set(grads)
    for key, grad in recorded["grads"].items():
        torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", FILES)
def test_a_state_dict_survives_the_way_there_and_back(name):
    recorded, arguments = recording(name)
    network = SRU(**arguments).double()
    network.load_state_dict(recorded["state_dict"])
    version = "2.6.0" if "2.6.0" in recorded["config"]["package"] else "3.0.0.dev"
    written = convert.to_official(network, version)
    assert set(written) == set(recorded["state_dict"])
    for key, value in recorded["state_dict"].items():
        assert torch.equal(written[key], value), key
    for other in convert.VERSIONS:
        again = SRU(**arguments).double()
        again.load_state_dict(convert.to_official(network, other))
        for key, value in network.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_one_layer_loads_by_itself():
    recorded, _ = recording("sru_default")
    state = {k.removeprefix("rnn_lst.0."): v for k, v in recorded["state_dict"].items() if k.startswith("rnn_lst.0.")}
    cell = SRUCell(6, 8).double()
    cell.load_state_dict(state)
    h, _ = cell(recorded["x"], recorded["c0"][0])
    stack = SRU(6, 8).double()
    stack.load_state_dict(recorded["state_dict"])
    assert torch.equal(h, stack[0](recorded["x"], recorded["c0"][0])[0])


def test_a_part_of_a_larger_model_loads():
    recorded, arguments = recording("sru_bidirectional_masked")
    model = torch.nn.ModuleDict({"rnn": SRU(**arguments), "head": torch.nn.Linear(8, 2)}).double()
    state = {f"rnn.{key}": value for key, value in recorded["state_dict"].items()} | {
        f"head.{key}": value for key, value in model["head"].state_dict().items()
    }
    model.load_state_dict(state)
    h, _ = model["rnn"](recorded["x"], recorded["c0"], recorded["mask_pad"])
    torch.testing.assert_close(h, recorded["h"], rtol=0, atol=1e-10)
    assert "rnn.rnn_lst.0.weight" in state  # the caller's dict is left alone


def test_the_scaling_correction_of_the_file_replaces_that_of_the_constructor():
    recorded, arguments = recording("sru_default")
    network = SRU(**arguments, rescale=True)
    network.load_state_dict(recorded["state_dict"])
    assert [layer.alpha for layer in network.layers] == [1.0, 1.0]
    copy = SRU(**arguments, rescale=True)
    copy.load_state_dict(network.state_dict())
    assert [layer.alpha for layer in copy.layers] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sru_default", {"hidden_size": 9}, "check hidden_size"),
        ("sru_default", {"has_skip_term": False}, "check hidden_size, bidirectional and has_skip_term"),
        ("sru_default", {"projection_size": 2}, "projection_size=0 in the file and 2 here"),
        ("sru_3_0_projection", {"projection_size": 5}, "projection_size=4 in the file and 5 here"),
        ("sru_default", {"v1": True}, "has_vc_term=True"),
        ("sru_default", {"num_layers": 3}, "Missing key"),
        ("sru_default", {"layer_norm": True}, "layer_norm"),
    ],
)
def test_a_file_of_another_network_is_refused_with_the_difference(name, change, message):
    recorded, arguments = recording(name)
    with pytest.raises((ValueError, RuntimeError), match=message):
        SRU(**arguments | change).load_state_dict(recorded["state_dict"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rnn_lst.0.gain", "weight normalisation"),
        ("ln_lst.0.weight", "2.1.7"),
        ("rnn_lst.0.weight", "transform_module="),
    ],
)
def test_files_that_cannot_be_converted_are_refused_with_the_reason(key, message):
    recorded, arguments = recording("sru_default")
    state = recorded["state_dict"]
    if key in state:
        del state[key]
    else:
        state[key] = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        SRU(**arguments).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "version", "message"),
    [
        ({"activation": "relu"}, "2.6.0", "no relu"),
        ({"zoneout": 0.1}, "3.0.0.dev", "no zoneout"),
        ({"projection_size": 6}, "2.6.0", "ignores projection_size=6"),
        ({}, "2.5", "must be one of 2.6.0, 3.0.0.dev"),
    ],
)
def test_options_that_the_official_package_lacks_are_not_written(options, version, message):
    with pytest.raises(ValueError, match=message):
        convert.to_official(SRU(6, 8, **options), version)
