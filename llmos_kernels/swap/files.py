"""Quantized models as files: safetensors and JSON."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.int8 import Int8Linear, Int8MultiheadAttention, empty_rows
from llmos_kernels.nn.linear import FusedConv1D, Linear, is_conv1d
from llmos_kernels.ops.int8_linear import MODES, check_threshold
from llmos_kernels.swap.optimize import check_model
from llmos_kernels.swap.quantize import layers, leave_fast_path, replace
from llmos_kernels.swap.replica import replica

TENSORS, INDEX = "model.safetensors", "llmos_quantization.json"
_FORMAT = 1


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a model that ``quantize`` has changed into ``folder``, which is made if need be.

    ``model.safetensors`` has its state dict, ``llmos_quantization.json`` which modules are int8 and how.
    Needs the package safetensors. Raises ValueError for a model without int8 layers, and for one with
    state that is no tensor.
    """
    save_file, _ = _safetensors()
    check_model(model)
    index = {"format": _FORMAT, "modules": describe(model)}
    if not index["modules"]:
        raise ValueError("the model has no int8 layers: quantize it first")
    tensors: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for name, t in model.state_dict().items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} is no tensor but a {type(t).__name__}")
        # Tied tensors are written each; safetensors refuses memory that is shared.
        place = t.device, t.untyped_storage().data_ptr()
        tensors[name] = t.clone() if place in seen else t.contiguous()
        seen.add(place)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def load_quantized(model: nn.Module, folder: str | Path) -> None:
    """Give ``model``, made with float weights of any values, what ``save_quantized`` wrote, in place.

    Raises ValueError for a file that is not one of ours, for missing, foreign or misshapen tensors
    and modules, for a model that is int8 already and for parameters on the meta device, the model
    unchanged; FileNotFoundError where there is no such file.
    """
    _, load_file = _safetensors()
    check_model(model)
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text())
        modules = index["modules"]
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r}, known is {_FORMAT}")
        given = load_file(folder / TENSORS)
    except FileNotFoundError:
        raise
    except Exception as e:  # Of json, of safetensors, or a key that is not there.
        raise ValueError(f"{folder}: cannot be read: {type(e).__name__}: {e}") from e
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory first")
    wanted = replica(model, device="meta")
    prepare(wanted, modules)
    expected = wanted.state_dict()
    _compare(folder / TENSORS, expected, given)
    prepare(model, modules)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(given[name])


def describe(model: nn.Module) -> dict[str, dict]:
    """The int8 modules of ``model``, as JSON: name to class, mode and threshold."""
    found: dict[str, dict] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        layer: Any = module
        if type(module) is Int8MultiheadAttention:
            layer = module.in_proj
            inside.update(module.modules())
        elif type(module) is not Int8Linear or module in inside:
            continue
        found[name] = {
            "class": type(module).__name__,
            "mode": layer.mode,
            "outlier_threshold": layer.outlier_threshold,
        }
    return found


def prepare(model: nn.Module, modules: dict[str, dict]) -> None:
    """Make the modules that ``describe`` named int8, of zeros. Raises ValueError, nothing changed,
    where one is not there, or not what it was.
    """
    plan: list[tuple[Any, str, float]] = []
    if not isinstance(modules, dict):
        raise ValueError(f"int8 modules must be named in an object, got {modules!r}")
    for name, how in modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no module {name!r}") from None
        try:
            kinds, threshold = _KINDS[how["class"]], check_threshold(how["outlier_threshold"])
            known = how["mode"] in MODES
        except (KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(f"{name}: unknown kind of int8 module: {how}")
        if type(module) in (Int8Linear, Int8MultiheadAttention):
            raise ValueError(f"{name} is int8 already: load into a model of float weights")
        conv1d = is_conv1d(module) or isinstance(module, FusedConv1D)
        if type(module) not in kinds and not (conv1d and nn.Linear in kinds):
            raise ValueError(f"{name} is a {type(module).__name__}, the file has {how['class']}")
        plan.append((module, how["mode"], threshold))
    for module, mode, threshold in plan:
        replace(module, [empty_rows(weight) for weight, _ in layers(module)], mode, threshold)
    leave_fast_path(model)


_KINDS: dict[str, tuple[type, ...]] = {
    "Int8Linear": (nn.Linear, Linear),
    "Int8MultiheadAttention": (nn.MultiheadAttention, MultiheadAttention),
}


def _compare(path: Path, expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    for problem, names in (
        ("lacks", sorted(expected.keys() - given.keys())),
        ("has foreign tensors", sorted(given.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} {problem}: {', '.join(names[:3])}{more}")
    for name, t in expected.items():
        if given[name].shape != t.shape or given[name].dtype != t.dtype:
            raise ValueError(
                f"{path}: {name} is {given[name].dtype} {list(given[name].shape)},"
                f" the model has {t.dtype} {list(t.shape)}"
            )


def _safetensors():
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as e:
        raise ImportError(
            "quantized models are files of safetensors: pip install safetensors"
        ) from e
    return save_file, load_file
