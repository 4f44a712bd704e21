"""Launching of kernels: from the pack if it holds the variant, else through Triton's compiler."""

import functools
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from llmos_kernels._core.registry import CannotCompile
from llmos_kernels._triton.runtime import kernel_pack

#: The launch options that are part of a variant's key in the pack.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
#: The architectures with TMA (tensor memory accelerator) and with tensor cores that read their
#: operands from shared memory: by wgmma on sm_90, by its successor tcgen05 on sm_100 and sm_103.
WGMMA_ARCHS = ("sm_90", "sm_100", "sm_103")


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Return True if ``device`` is a GPU of an architecture in ``WGMMA_ARCHS``."""
    return device.type == "cuda" and kernel_pack.arch_of(device) in WGMMA_ARCHS


class Kernel(JITFunction):
    """A Triton kernel that is launched from the pack where the pack holds the variant."""

    #: Why Triton cannot compile in this process; None until a compilation has failed for good.
    compile_error: str | None = None

    def __init__(self, fn: Callable, **options: Any) -> None:
        super().__init__(fn, **options)
        #: This kernel's ``_C.PackedKernel`` by device; None for a device without a pack.
        self.pack_kernels: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """Return the kernel's name in the pack, such as ``gemm.linear:_forward_kernel``."""
        return f"{self.fn.__module__.partition('._triton.')[2]}:{self.fn.__name__}"

    def pack_kernel(self, device: int) -> Any:
        """Return this kernel's ``_C.PackedKernel`` for ``device``, or None without a pack."""
        try:
            return self.pack_kernels[device]
        except KeyError:
            pack = kernel_pack.for_device(device)
            made = pack and pack.kernel(self.name, parameters(self), OPTIONS)
            return self.pack_kernels.setdefault(device, made)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        """Return the function that launches this kernel on ``grid``."""
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(self, grid: tuple[int, ...], args: tuple, kwargs: dict) -> Any:
        """Launch the kernel, from the pack or through Triton: ``kernel[grid](*args, **kwargs)``.

        Raises:
            CannotCompile: The pack does not hold the variant, and Triton cannot compile it.
            RuntimeError: The pack does not hold the variant, and ``LLMOS_PACK=require``.
        """
        device, stream = current()
        from_pack = self.pack_kernel(device)
        if from_pack is not None:
            try:
                if from_pack.launch(device, stream, grid, args, kwargs):
                    return None
            except kernel_pack.Unusable as e:
                if kernel_pack.MODE == "require":
                    raise
                self.pack_kernels[device] = None
                kernel_pack.warn_of_triton(e)
            if kernel_pack.MODE == "require":
                key = from_pack.key(args, kwargs)
                raise RuntimeError(kernel_pack.missing(device, self.name, key))
        if Kernel.compile_error:
            raise CannotCompile(Kernel.compile_error)
        try:
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        except (RuntimeError, subprocess.CalledProcessError, OSError) as e:
            if isinstance(e, RuntimeError) and "Failed to find C compiler" not in str(e):
                raise
            why = f"Triton cannot compile: {e}"
            # An OSError, such as a full disk, may pass: the next launch tries again.
            if not isinstance(e, OSError):
                Kernel.compile_error = why
            raise CannotCompile(why) from e


def parameters(fn: JITFunction) -> list[tuple[str, int]]:
    """Return each parameter's name, and how the kernel is specialised on its value, as bits.

    As in Triton, 1 means that the value is a constant of the variant, 2 that a variant depends on
    whether the value is 1, and 4 that it depends on whether 16 divides the value.
    """
    return [
        (
            p.name,
            1 * p.is_constexpr
            + 2 * (not p.do_not_specialize)
            + 4 * (not p.do_not_specialize and not p.do_not_specialize_on_alignment),
        )
        for p in fn.params
    ]


def current() -> tuple[int, int]:
    """Return the current CUDA device and its current stream."""
    device = torch._C._cuda_getDevice()
    return device, torch._C._cuda_getCurrentRawStream(device)


def kernel(fn: Callable | None = None, **options: Any) -> Any:
    """Return ``fn`` as a ``Kernel``: the decorator of functions that are launched from Python.

    Without ``fn`` it returns a decorator with these options of ``triton.jit``. In Triton's
    interpreter it is ``triton.jit`` itself.
    """
    if fn is None:
        return functools.partial(kernel, **options)
    if triton.knobs.runtime.interpret:
        return triton.jit(fn, **options)
    return Kernel(fn, **options)
