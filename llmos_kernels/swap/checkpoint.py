"""``save_quantized`` and ``load_quantized``: quantized models as files of safetensors and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels.nn.attention import MultiheadAttention
from llmos_kernels.nn.int8 import Int8Linear, Int8MultiheadAttention, empty_rows
from llmos_kernels.nn.linear import Linear
from llmos_kernels.ops.int8_linear import MODES, check_threshold
from llmos_kernels.swap.optimize import check_model
from llmos_kernels.swap.quantize import layers, leave_fast_path, replace
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.linear import FusedConv1D, is_conv1d

#: Names of the files in a folder: the state dict, and which modules are int8.
TENSORS, INDEX = "model.safetensors", "llmos_quantization.json"
_FORMAT = 1


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write a model that ``quantize`` has changed into ``folder``.

    ``model.safetensors`` holds its state dict, ``llmos_quantization.json`` which modules are int8
    and how. Needs the package safetensors.

    Args:
        model: the model.
        folder: is made if it does not exist.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``model`` is no module.
        ValueError: the model has no int8 layers, or state that is no tensor.

    Example:
        >>> report = quantize(model)
        >>> save_quantized(model, "folder")
    """
    save_file, _ = _safetensors()
    check_model(model)
    index = {"format": _FORMAT, "modules": describe(model)}
    if not index["modules"]:
        raise ValueError("the model has no int8 layers: quantize it first")
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
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
    """Load what ``save_quantized`` wrote into ``model``, in place.

    Args:
        model: a model of the same structure, with float weights of any values.
        folder: what was written.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        TypeError: ``model`` is no module.
        ValueError: a file was not written by ``save_quantized``; a tensor or a module is missing,
            unknown or of another shape; ``model`` is int8 already, or on the meta device.

        The model is unchanged after any of them.

    Example:
        >>> load_quantized(fresh_model, "folder")
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
    except Exception as e:  # json and safetensors have errors of their own, a missing key is one.
        raise ValueError(f"{folder}: cannot be read: {type(e).__name__}: {e}") from e
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory first")
    # A copy without memory shows what the files must hold, before the model is changed.
    prepared = replica(model, device="meta")
    prepare(prepared, modules)
    expected = prepared.state_dict()
    _compare(folder / TENSORS, expected, given)
    prepare(model, modules)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(given[name])


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the int8 modules of ``model``, as JSON: class, mode and threshold by name."""
    found: dict[str, dict[str, Any]] = {}
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


def prepare(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Make the modules that ``describe`` named int8, with weights of zeros.

    Args:
        model: a model with float weights.
        modules: what ``describe`` returned.

    Raises:
        ValueError: a module is missing, of another class, or int8 already. The model is unchanged.
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
    """Raise ValueError where names, shapes or dtypes of two state dicts differ."""
    for problem, names in (
        ("lacks", sorted(expected.keys() - given.keys())),
        ("has foreign tensors", sorted(given.keys() - expected.keys())),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} {problem}: {', '.join(names[:3])}{rest}")
    for name, t in expected.items():
        if given[name].shape != t.shape or given[name].dtype != t.dtype:
            raise ValueError(
                f"{path}: {name} is {given[name].dtype} {list(given[name].shape)},"
                f" the model has {t.dtype} {list(t.shape)}"
            )


def _safetensors() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the functions of safetensors that save and load a file."""
    try:
        from safetensors.torch import load_file, save_file
    except ImportError as e:
        raise ImportError(
            "quantized models are files of safetensors: pip install safetensors"
        ) from e
    return save_file, load_file
