"""All that a user can see of a call: outputs, gradients, text, calls of hooks, the state left."""

import contextlib
import io
import warnings

import torch
from random_modules import Meter, global_hooks
from random_plans import D

#: Inputs and modes of calls: whether the model trains, whether gradients are recorded.
CALLS = {
    "train": (lambda: torch.randn(2, 5, D), True, True),
    "eval": (lambda: torch.randn(2, 5, D), False, False),
    "many": (lambda: torch.randn(70, 1, D), False, True),
    "one": (lambda: torch.randn(1, 1, D), True, True),
    "strided": (lambda: torch.randn(2, 5, 2 * D)[..., ::2], False, False),
    "large": (lambda: torch.randn(2, 3, D).index_fill(-1, torch.tensor(3), 12.0), False, True),
    "float64": (lambda: torch.randn(2, 3, D, dtype=torch.float64), False, False),
    "no batch": (lambda: torch.randn(4, D), True, True),
}


def run(model, world, name, hooks=False):
    """Return what a call of ``model`` shows, by name; or the error that it raises."""
    make, training, grad = CALLS[name]
    torch.manual_seed(2)
    x = make().requires_grad_(grad)
    world.clear()
    for module in model.modules():
        vars(module)["training"] = training
    model.zero_grad()
    written = io.StringIO()
    found = {}
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(written),
            torch.set_grad_enabled(grad),
            global_hooks(model, world, hooks),
        ):
            y = model(x * 1 if grad else x)
            found["output"] = y.detach()
            if grad:
                y.sin().sum().backward()
    except Exception as e:
        return {"error": type(e)}
    found["input gradient"] = x.grad
    for key, p in model.named_parameters():
        found[f"gradient of {key}"] = p.grad
    found["text"] = written.getvalue()
    found["world"] = world.state()
    found["state"] = {key: state_of(m) for key, m in model.named_modules()}
    found["buffers"] = dict(model.named_buffers())
    return found


_HIDDEN = ("_parameters", "_buffers", "_modules", "_llmos_swapped_from", "world", "callback")


def state_of(module):
    """Return the attributes of a module, without its parts and hooks."""

    def plain(value):
        return vars(value) if isinstance(value, Meter) else value

    attributes = vars(module).items()
    return {
        k: plain(v)
        for k, v in attributes
        if k not in _HIDDEN and "hooks" not in k and not callable(v)
    }


def differences(found, expected, size, where=""):
    """Yield where two results of ``run`` differ; numbers may by ``size`` of the largest one."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            yield f"{where}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"
        elif found.is_floating_point() and found.numel():
            found, expected = found.detach().double(), expected.detach().double()
            allowed = size * max(1.0, expected.nan_to_num().abs().max().item())
            if not torch.isclose(found, expected, rtol=0, atol=allowed, equal_nan=True).all():
                yield f"{where}: differs by {(found - expected).abs().max().item()}, not {allowed}"
        elif not torch.equal(found, expected):
            yield f"{where}: {found}, not {expected}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            yield f"{where}: only one has {sorted(map(str, found.keys() ^ expected.keys()))}"
        else:
            for key in expected:
                larger = 20 * size if "gradient" in str(key) else size
                yield from differences(found[key], expected[key], larger, f"{where}/{key}")
    elif type(found) is not type(expected) or found != expected:
        yield f"{where}: {found!r}, not {expected!r}"
