"""Convert the SRUs in a file to our layout or an official one: `python scripts/convert.py IN.pt OUT.pt [--to 2.6.0]`.

IN.pt is a state dict or a checkpoint that contains state dicts. Every SRU in it is converted, also as a part of a
larger model; everything else stays as it is.
"""

import argparse
import copy
import inspect
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tasks/ is not installed

from sru import SRU, SRUCell, SRUpp, convert, official_format
from tasks.run import console, files

# The layouts, and the name of a stack's list of layers in each.
LISTS = {"ours": "layers", **dict.fromkeys((*convert.VERSIONS, "2017"), "rnn_lst")}
# The number of directions is not needed: in every layout the columns of the second direction follow those of the first.
ENTRY = re.compile(r"weight|weight_proj|weight_c|v|bias|scale_x|gain|(layer_norm|custom_m|transform_module)\..+")
# transform_modules of 3.0 that consist of matrices only.
MATRICES = {"transform_module.weight"}, {"transform_module.0.weight", "transform_module.1.weight"}


def detect_layout(state: dict[str, Any], prefix: str) -> str:
    """The layout of the SRU layer whose entries have this prefix; empty if it is not an SRU layer."""
    bias, weight_c = state.get(f"{prefix}bias"), state.get(f"{prefix}weight_c")
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        return ""
    if isinstance(weight_c, Tensor) and bias.dim() == 1 and bias.shape == weight_c.shape:
        return "3.0.0.dev" if any(key.startswith(f"{prefix}transform_module.") for key in state) else "2.6.0"
    v, scale_x, weight = (state.get(f"{prefix}{name}") for name in ("v", "scale_x", "weight"))
    if weight_c is None and (isinstance(v, Tensor) or isinstance(scale_x, Tensor)):
        # Files of older versions have one row per gate; a layer without the term has no v.
        fits = bias.shape == v.shape if isinstance(v, Tensor) else bias.numel() % 2 == 0
        return "ours" if bias.dim() in (1, 2) and fits else ""
    # Only in a stack with the official name: torch's layers have weight and bias too.
    if re.search(rf"(^|\.){LISTS['2017']}\.\d+\.$", prefix) and isinstance(weight, Tensor) and bias.dim() == 1:
        return "2017"
    return ""


def infer(entries: dict[str, Tensor], source: str, has_module: bool) -> dict[str, Any]:
    """The arguments of SRUCell that can be inferred from a layer's entries."""
    size, norm = entries["bias"].numel() // 2, entries.get("layer_norm.weight")
    arguments: dict[str, Any] = {
        "input_size": size if norm is None else norm.numel(),
        "hidden_size": size,  # of both directions
        "layer_norm": norm is not None,
        # A trained weight_c that is all zeros belongs to a layer without the term.
        "has_vc_term": bool(entries.get("v", entries.get("weight_c", torch.zeros(1))).any()),
    } | infer_correction(torch.ones(1) if source == "2017" else entries.get("scale_x"))
    if "transform_module.linear1.weight" in entries:  # of SRU++
        arguments["input_size"] = entries["transform_module.linear1.weight"].shape[1]
    if has_module:  # its columns are the same in every layout, so its entries are only renamed
        return arguments | {"transform_module": nn.Identity()}
    matrix, projection = entries.get("weight"), entries.get("weight_proj")
    if source == "3.0.0.dev":
        projection = entries.get("transform_module.0.weight")
        matrix = entries.get("transform_module.weight" if projection is None else "transform_module.1.weight")
    elif source in ("2.6.0", "2017"):
        matrix, projection = (None if a is None else a.t() for a in (matrix, projection))
    if matrix is None or matrix.shape[0] not in (3 * size, 4 * size):
        form = "no matrix" if matrix is None else f"a matrix to {matrix.shape[0]} columns"
        raise ValueError(f"it has {form}; its bias needs {3 * size} or {4 * size}")
    arguments["input_size"] = input_size = (matrix if projection is None else projection).shape[1]
    return arguments | {
        "projection_size": 0 if projection is None else projection.shape[0],
        "normalize_after": norm is not None and norm.numel() == size != input_size,
        # With equal sizes, a layer without the highway looks the same.
        "has_skip_term": matrix.shape[0] == 4 * size or input_size == size,
    }


def infer_correction(alpha: Tensor | None) -> dict[str, Any]:
    """The arguments of a layer with scaling correction alpha; empty if the file has no alpha."""
    if alpha is None or alpha.numel() != 1:
        return {}
    if alpha.item() == 1:
        return {"rescale": False}
    power = (alpha.item() ** 2 - 1) / 2  # alpha = sqrt(1 + 2 exp(highway_bias))
    if not 0 < power < math.inf:
        return {}  # below 1: of rescale="dropout"; others are invalid, and loading raises an error
    digits = next((n for n in range(5) if is_same_alpha(round(math.log(power), n), alpha)), 5)
    return {"rescale": True, "highway_bias": round(math.log(power), digits) + 0.0}  # not -0.0


def is_same_alpha(highway_bias: float, alpha: Tensor) -> bool:
    """Whether a layer with this bias has this scaling correction, up to rounding."""
    rounding = max(torch.finfo(alpha.dtype).eps, 1e-7)  # the correction itself is rounded to float32
    return math.isclose(math.sqrt(1 + 2 * math.exp(highway_bias)), alpha.item(), rel_tol=rounding)


def convert_layer(
    entries: dict[str, Tensor], source: str, to: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict]:
    """One layer's entries in another layout, and the arguments of its SRUCell."""
    module = {key for key in entries if key.startswith(("custom_m.", "transform_module."))}
    if source != "ours" and module in MATRICES:
        module = set()
    arguments = infer(entries, source, bool(module)) | options
    first = entries.get("transform_module.linear1.weight")
    if first is not None and to == "2.6.0":
        raise ValueError("it is a layer of SRU++, which version 2.6.0 does not have; use --to 3.0.0.dev or ours")
    cell = SRUCell(**arguments)
    cell.load_state_dict({key: value for key, value in entries.items() if key not in module}, assign=True)
    written = cell.state_dict() if to == "ours" else convert.cell_to_official(cell, to)
    if "scale_x" in entries:
        written["scale_x"] = written["scale_x"].to(entries["scale_x"].dtype)  # a layer keeps it in float32 at least
    elif source != "2017":  # the file has only parameters
        del written["scale_x"]
    name = "custom_m" if to == "2.6.0" else "transform_module"
    renamed = {f"{name}.{key.partition('.')[2]}": entries[key] for key in module}
    if first is not None:
        arguments |= {"proj_size": first.shape[0], "attends": "transform_module.linear3.weight" in entries}
    return {key: value.contiguous() for key, value in written.items()} | renamed, arguments


def convert_all(
    state: dict, to: str, options: dict[str, Any], found: dict[str, tuple[str, dict[str, dict]]], where: str = ""
) -> dict:
    """A copy of a dict with every SRU in it, at any depth, in another layout.

    Adds {place: (layout, {layer number: arguments})} to `found` for each SRU; the number of an SRUCell is "".
    ValueError: a layer cannot be converted.
    """
    named: dict[str, Any] = {key: value for key, value in state.items() if isinstance(key, str)}
    layers: dict[str, dict[str, Tensor]] = {}  # {old entry: all new entries of its layer}
    for prefix in [key.removesuffix("bias") for key in named if key.split(".")[-1] == "bias"]:
        source = detect_layout(named, prefix)
        if not source:
            continue
        in_stack = re.fullmatch(rf"(|.*\.){LISTS[source]}\.(\d+)\.", prefix)
        owner, number = in_stack.groups() if in_stack else (prefix, "")
        place = f"{owner}{LISTS[to]}.{number}." if in_stack else prefix
        own = [key for key in named if key.startswith(prefix) and ENTRY.fullmatch(key.removeprefix(prefix))]
        try:
            if in_stack:
                official_format.refuse_too_old(named, owner)
            entries, arguments = convert_layer(
                {key.removeprefix(prefix): named[key] for key in own}, source, to, options
            )
            if in_stack and f"{owner}input_to_hidden.weight" in named:
                size = named[f"{owner}input_to_hidden.weight"].shape[1]
                arguments |= {"input_size": size, "proj_input_to_hidden_first": True}
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{where}{prefix[:-1] or 'the layer'}: {' '.join(str(error).split())}") from error
        found.setdefault(f"{where}{owner}"[:-1], (source, {}))[1][number] = arguments
        entries = {f"{place}{key}": value for key, value in entries.items()}
        layers |= dict.fromkeys(own, entries)
    result = copy.copy(state)  # keeps its class and the attributes of a state dict
    result.clear()
    for key, value in state.items():
        inner = convert_all(value, to, options, found, f"{where}{key}.") if isinstance(value, dict) else value
        result.update(layers.get(key, {key: inner}))
    return result


def format_calls(layers: dict[str, dict[str, Any]]) -> list[str]:
    """Constructor calls for these layers: with one direction and, if the number of columns is even, with two."""
    ordered = [layers[number] for number in sorted(layers, key=lambda number: int(number or 0))]
    sizes = [layer.get("projection_size", 0) for layer in ordered]
    arguments: dict[str, Any] = ordered[0] | {  # the first is the most specific: in the others the sizes are equal
        "projection_size": sizes if len(set(sizes)) > 1 else sizes[0],
        "transform_module": ... if any("transform_module" in layer for layer in ordered) else None,
        "has_vc_term": True,  # implied by v1
    }
    v1 = ["v1=True"] if not any(layer["has_vc_term"] for layer in ordered) else []
    name, size = "SRUCell", arguments["hidden_size"]
    if "" not in layers:
        name, arguments["num_layers"] = "SRU", len(ordered)
    takes = inspect.signature(SRU).parameters
    if "proj_size" in arguments:
        name, takes = "SRUpp", inspect.signature(SRUpp).parameters
        attending = [i for i, layer in enumerate(ordered) if layer["attends"]]
        arguments["attention_layers"] = None if len(attending) == len(ordered) else attending
    written = []
    for directions in ({}, {"hidden_size": size // 2, "bidirectional": True})[: 2 - size % 2]:
        known = arguments | directions
        parts = [
            f"{key}={'...' if known[key] is ... else known[key]}"
            for key, parameter in takes.items()
            if key in known and (key == "num_layers" or known[key] != parameter.default)
        ]
        written.append(f"{name}({', '.join(parts + v1)})")
    return written


def holds_optimizer(content: Any) -> bool:
    """Whether a file contains the state of an optimizer, at any depth."""
    if isinstance(content, dict):
        return {"state", "param_groups"} <= content.keys() or any(map(holds_optimizer, content.values()))
    return isinstance(content, list | tuple) and any(map(holds_optimizer, content))


def read(path: Path) -> dict:
    """The dict in a file; ValueError if it is not a dict, or contains anything but tensors and plain values."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        raise ValueError(
            f"{path} is damaged, not from torch.save, or needs pickle, which may run any code; nothing was run "
            f"({type(error).__name__}). If you trust it, load it and torch.save(model.state_dict(), PATH)."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def main(words: list[str] | None = None) -> None:
    """Convert a file and report each SRU in it; SystemExit if nothing was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.pt")
    parser.add_argument("target", type=Path, metavar="OUT.pt")
    parser.add_argument(
        "--to", default="ours", choices=("ours", *convert.VERSIONS), help="the layout to write (default: %(default)s)"
    )
    help_set = "whether the layers are those of 2017: v1=true or v1=false (default: true if weight_c is all zeros)"
    parser.add_argument("--set", choices=("v1=true", "v1=false"), help=help_set)
    parser.add_argument("--force", action="store_true", help="overwrite OUT.pt, which may be the same as IN.pt")
    options = parser.parse_args(words)
    known = {"has_vc_term": options.set == "v1=false"} if options.set else {}
    found: dict[str, tuple[str, dict[str, dict]]] = {}
    try:
        if options.target.exists() and not options.force:
            raise ValueError(f"{options.target} exists; give another name, or --force to overwrite it")
        content = convert_all(read(options.source), options.to, known, found)
        if not found:
            raise ValueError(f"{options.source} holds no SRU: no layer with bias and weight_c (official) or v (ours)")
        if {source for source, _ in found.values()} == {options.to}:
            others = " or ".join(f"--to {name}" for name in ("ours", *convert.VERSIONS) if name != options.to)
            raise ValueError(f"{options.source} is in the layout {options.to} already; give {others}")
        with files.atomic_write(
            options.target, options.target.with_name(f".{options.target.name}.{os.getpid()}")
        ) as file:
            torch.save(content, file)
    except (ValueError, OSError, RuntimeError) as error:  # torch.save raises RuntimeError where it cannot write
        sys.exit(f"error: {error}")
    for place, (source, layers) in found.items():
        print(f"{place or options.source.name}: {source} -> {options.to}", *format_calls(layers), sep="\n    ")
    print("If there are two calls, the second is for a bidirectional network. The file does not contain the number of")
    print("directions, the activation and the dropout; if all layers have the same size, it does not contain")
    print("has_skip_term and normalize_after either. The rest of the file is unchanged.")
    if any("rescale" not in layer for _, layers in found.values() for layer in layers.values()):
        print("A layer has no scale_x, or one below 1: pass the rescale and highway_bias that it was trained with.")
    if holds_optimizer(content):
        print("Create a new optimizer: its state in the file has the old order of the weights.")


if __name__ == "__main__":
    console.use_utf8()
    main()
