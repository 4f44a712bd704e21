"""``optimize`` and ``restore``: a swap is an assignment to ``module.__class__``.

Parameters, names, hooks, devices, optimizers and every reference to the module stay as they are.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from llmos_kernels.swap import pretrained, proof, rules
from llmos_kernels.swap.report import Entry, Report

MARK = "_llmos_swapped_from"


def optimize(
    model: nn.Module,
    verify: bool = True,
    strict: bool = False,
    *,
    inputs: tuple | dict | None = None,
) -> Report:
    """Swap what can be swapped in ``model``, in place, each swap proved; ``restore`` undoes it.

    With ``verify`` each module is compared to its replacement, outputs and gradients, in eval and
    in train mode, and timed. One that misses its error budget stays, as does one that no rule can
    swap safely: the report says why. ``inputs`` (a tuple of arguments, or a dict of keyword
    arguments) are run through the model once, in eval mode, so that each proof uses what its module
    really gets; random numbers are used otherwise. ``strict`` raises ValueError, the model
    unchanged, where a module would be kept. A model that is no ``torch.nn.Module`` raises TypeError.

    The attention of a Hugging Face model is chosen by name, "llmos", and proved on the whole model:
    its outputs in eval mode against its own eager attention and a copy in float64.
    """
    check_model(model, inputs)
    plan = [(name, m, rules.why_not(m, around)) for name, m, around in _candidates(model)]
    models = [
        (name, m, pretrained.why_not(m, around(model, name)))
        for name, m in pretrained.candidates(model)
    ]
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.inference_mode(False), torch.random.fork_rng(devices=gpus):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in gpus),
        ):
            generator.manual_seed(0)
        captured = capture(model, [m for _, m, why in plan + models if not why], inputs)
        chosen = [
            _judge(
                name,
                f"attention of {type(m).__name__}",
                why,
                partial(pretrained.prove, m, captured.get(m)) if verify else None,
            )
            for name, m, why in models
        ]
        entries = [
            _judge(name, type(m).__name__, why, partial(_prove, m, captured) if verify else None)
            for name, m, why in plan
        ]
    report = Report(chosen + entries)
    if strict and report.kept:
        raise ValueError(f"modules that cannot be swapped:\n{Report(report.kept)}")
    for entry, (_, module, _) in zip(entries, plan, strict=True):
        if entry.swapped:
            module.__dict__[MARK] = type(module)
            module.__class__ = rules.drop_in(module)
    for entry, (_, part, _) in zip(chosen, models, strict=True):
        if entry.swapped:
            pretrained.select(part)
    return report


def restore(model: nn.Module) -> None:
    """Give every module that ``optimize`` swapped in ``model`` its class or its attention back.

    Raises ValueError, the model unchanged, where another tool has changed such a class since.
    """
    check_model(model)
    swapped = [(name, m) for name, m in model.named_modules() if MARK in m.__dict__]
    for name, module in swapped:
        if not rules.is_swap(module, module.__dict__[MARK]):
            raise ValueError(
                f"{name or 'the model'} became a {type(module).__name__} after it was swapped:"
                " undo that first (a parametrization, or sharding)"
            )
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(MARK)
    pretrained.restore(model)


def check_model(model, inputs=None) -> None:
    """Raises TypeError where ``model`` is no module, or ``inputs`` no arguments for one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if inputs is not None and not isinstance(inputs, (tuple, dict)):
        raise TypeError(f"inputs must be a tuple or a dict, got {type(inputs).__name__}")


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Each module that a rule knows, once: name, module, the modules around it."""
    for name, module in model.named_modules():
        if rules.is_candidate(module):
            yield name, module, around(model, name)


def around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that ``name`` lies in, outermost first."""
    parts = name.split(".") if name else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def capture(model: nn.Module, modules: list[nn.Module], inputs: tuple | dict | None) -> dict:
    """How each of ``modules`` is called when ``model`` runs ``inputs``; empty without them."""
    if inputs is None:
        return {}
    if isinstance(inputs, dict):
        return proof.captured_calls(model, modules, lambda: model(**inputs))
    return proof.captured_calls(model, modules, lambda: model(*inputs))


def _prove(module: nn.Module, captured: dict) -> tuple[float, float]:
    cls = rules.drop_in(module)
    calls = [captured[module]] if module in captured else proof.example_calls(module)
    error = max(proof.largest_error(module, cls, call) for call in calls)
    return error, proof.speedup(module, cls, calls[0])


def _judge(name: str, shown: str, why: str, prove: Callable[[], tuple[float, float]] | None):
    """What to do with one candidate, by the error and the speedup that ``prove`` finds."""
    if why:
        return Entry(name, shown, False, why)
    if prove is None:
        return Entry(name, shown, True, "not verified")
    try:
        error, ratio = prove()
    except Exception as e:  # Whatever a user's module raises is a reason to keep it.
        first = next(iter(str(e).splitlines()), "")
        return Entry(name, shown, False, f"could not be verified: {type(e).__name__}: {first}")
    if error > 1:
        return Entry(name, shown, False, "it misses the error budget", error, ratio)
    return Entry(name, shown, True, "", error, ratio)
