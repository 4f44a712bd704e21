"""How a kernel is launched: as the wheel has it compiled, else as Triton compiles it now."""

import functools
import subprocess

import torch
import triton
from triton.runtime.jit import JITFunction

from llmos_kernels._core.registry import CannotCompile
from llmos_kernels._triton.runtime import kernel_pack

#: The launch options that choose a variant.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
#: The architectures with tensor memory accelerators, whose tensor cores read shared memory themselves.
ENGINES = ("sm_90", "sm_100", "sm_103")


@functools.cache
def has_engine(device: torch.device) -> bool:
    """Whether a device is a GPU of ``ENGINES``."""
    return device.type == "cuda" and kernel_pack.arch_of(device) in ENGINES


class Kernel(JITFunction):
    """A Triton kernel whose launches look into the pack first."""

    #: Why Triton cannot compile in this process, once it has turned out that it cannot.
    broken: str | None = None

    def __init__(self, fn, **options):
        super().__init__(fn, **options)
        self.packed: dict = {}

    @property
    def name(self) -> str:
        """As the pack knows it: ``gemm.linear:_forward_kernel``."""
        return f"{self.fn.__module__.partition('._triton.')[2]}:{self.fn.__name__}"

    def pack(self, device: int):
        """What the pack has of this kernel for the device, or None; see ``_pack.for_device``."""
        try:
            return self.packed[device]
        except KeyError:
            found = kernel_pack.for_device(device)
            made = found and found.kernel(self.name, parameters(self), OPTIONS)
            return self.packed.setdefault(device, made)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(self, grid, args, kwargs):
        """``kernel[grid](*args, **kwargs)``"""
        device, stream = current()
        packed = self.pack(device)
        if packed is not None:
            try:
                if packed.launch(device, stream, grid, args, kwargs):
                    return None
            except kernel_pack.Unusable as e:
                if kernel_pack.MODE == "require":
                    raise
                self.packed[device] = None
                kernel_pack.warn_of_triton(e)
            if kernel_pack.MODE == "require":
                raise RuntimeError(kernel_pack.missing(device, self.name, packed.key(args, kwargs)))
        if Kernel.broken:
            raise CannotCompile(Kernel.broken)
        try:
            return self.run(*args, grid=grid, warmup=False, **kwargs)
        except (RuntimeError, subprocess.CalledProcessError, OSError) as e:
            if isinstance(e, RuntimeError) and "Failed to find C compiler" not in str(e):
                raise
            why = f"Triton cannot compile: {e}"
            # A full disk or a folder that was removed may pass.
            if not isinstance(e, OSError):
                Kernel.broken = why
            raise CannotCompile(why) from e


def parameters(fn: JITFunction) -> list[tuple[str, int]]:
    """The name of each parameter and what of its value chooses a variant: 1 that it is a constant,
    2 whether it is 1, 4 whether 16 divides it; as Triton specialises."""
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
    """The current device and its current stream."""
    device = torch._C._cuda_getDevice()
    return device, torch._C._cuda_getCurrentRawStream(device)


def kernel(fn=None, **options):
    """``triton.jit`` for what is launched from Python."""
    if fn is None:
        return functools.partial(kernel, **options)
    if triton.knobs.runtime.interpret:
        return triton.jit(fn, **options)
    return Kernel(fn, **options)
