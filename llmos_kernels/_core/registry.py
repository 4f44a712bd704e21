"""Registration of ops: each is declared once, with its schema, reference, fake and Triton launcher.

PyTorch's dispatcher chooses the implementation by device. The C++ kernels of ``csrc/`` register
themselves for the CPU and, where the CUDA part is built, for CUDA: they hand to Triton, as the op
``<name>_triton``, what it is better at. The Triton launcher has the other ops on CUDA. Every other
device, and a build without the extension, runs the reference.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llmos_kernels._core.errors import DtypeError
from llmos_kernels._core.flops import count_flops

#: The dtypes that every kernel accepts. float64 goes to the reference; others raise DtypeError.
KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

_LIB = torch.library.Library("llmos", "DEF")
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Op:
    """The reference and the Triton launcher of an op, as given to ``define``."""

    reference: Callable
    triton: str | None  # "module:launcher", with the module relative to llmos_kernels._triton.

    @functools.cached_property
    def launch(self) -> Callable:
        """Return the Triton launcher, whose module is imported on first use."""
        if self.triton is None:
            raise ValueError("this op has no Triton launcher")
        module, _, launcher = self.triton.partition(":")
        return getattr(importlib.import_module(f"llmos_kernels._triton.{module}"), launcher)


#: Every defined op by its qualified name, ``llmos::<name>``.
DEFINED: dict[str, Op] = {}


def check_backend(backend: str | None, what: str = "backend") -> str | None:
    """Return ``backend``; raise ValueError if it is neither None nor "reference"."""
    if backend not in (None, "reference"):
        raise ValueError(f"{what} must be None or 'reference', got {backend!r}")
    return backend


_FORCED = check_backend(os.environ.get("LLMOS_BACKEND") or None, "LLMOS_BACKEND")


def use_reference(backend: str | None, dtype: torch.dtype) -> bool:
    """Return True if the reference computes this call instead of a kernel.

    It does on request (``backend`` or ``LLMOS_BACKEND``), for float64, and inside ``torch.func``
    transforms and forward-mode AD, which need plain torch ops to batch and differentiate.
    """
    if backend is None and dtype in KERNEL_DTYPES and _FORCED is None:
        return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    check_backend(backend)
    if dtype not in KERNEL_DTYPES and dtype != torch.float64:
        raise DtypeError(f"expected float32, bfloat16, float16 or float64 tensors, got {dtype}")
    return True


def needs_grad(*tensors: Tensor | None) -> bool:
    """Return True if autograd has to record a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: str | None = None,
    flops: Callable[..., int] | None = None,
) -> torch._ops.OpOverload:
    """Register ``llmos::<name>`` and return its overload, ready to call.

    Args:
        schema: The op's name, arguments and results, in the syntax of ``torch.library``.
        reference: Computes the results where no kernel is registered. Takes the schema's arguments.
        fake: Returns empty results of the right shape and dtype, for tracing.
        triton: ``"module:launcher"`` under ``llmos_kernels._triton``, the implementation for CUDA,
            or what a C++ implementation hands to.
        flops: Returns the FLOPs of the op's matrix products, for torch's counter. Takes the
            schema's arguments.
    """
    overload = define_composite(schema, run=reference, fake=fake, flops=flops)
    name = schema.partition("(")[0]
    op = DEFINED[f"llmos::{name}"] = Op(reference, triton)
    if triton:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"llmos::{name}", "CUDA"):
            name, of = f"{name}_triton", name
            _LIB.define(schema.replace(of, name, 1), tags=(torch.Tag.needs_exact_strides,))
        _LIB.impl(name, _on_device(op), "CUDA")
    return overload


def define_composite(
    schema: str, *, run: Callable, fake: Callable, flops: Callable[..., int] | None = None
) -> torch._ops.OpOverload:
    """Register ``llmos::<name>``, which runs other ops and has no kernel; return its overload."""
    name = schema.partition("(")[0]
    # What a fake returns depends on the strides of its arguments: compilers have to keep these.
    _LIB.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _LIB.impl(name, torch.no_grad()(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmos::{name}", fake, lib=_LIB)
    overload = getattr(torch.ops.llmos, name).default
    if flops:
        count_flops(overload, flops)
    return overload


class CannotCompile(RuntimeError):
    """Triton cannot compile: it finds no C compiler, or cannot write its cache."""


@functools.cache
def _warn_of_reference(why: str) -> None:
    """Warn, once for each reason, that the reference runs on CUDA."""
    text = f"{why}; the slow reference answers on CUDA (python -m llmos_kernels env)"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _on_device(op: Op) -> Callable:
    """Return the CUDA implementation of ``op``: its launcher, or the reference without Triton."""

    def launch(*args: Any) -> Any:
        if not HAS_TRITON:
            _warn_of_reference("Triton is not installed")
        else:
            with torch.cuda.device_of(args[0]):
                try:
                    return op.launch(*args)
                except CannotCompile as e:
                    _warn_of_reference(str(e))
        with torch.no_grad():
            return op.reference(*args)

    return launch
