"""Every op has one kernel for each device, a case, and is defined once."""

import subprocess
import sys

import pytest
import torch

from llmos_kernels._core.registry import DEFINED, define
from llmos_kernels._tools import environment
from llmos_kernels.testing import CASES, raw_calls

#: Ops without a Case: ``built_for`` describes the build; test_int8.py requires equal integers;
#: test_encoder_layer.py tests an op without gradients, test_weight_panels.py copies of weights.
INT8 = {name for name in DEFINED if name.startswith("llmos::int8_")}
NO_CASE = {"llmos::built_for", "llmos::encoder_layer", "llmos::linear_panels", *INT8}


@pytest.mark.parametrize("name", DEFINED)
def test_one_owner(name):
    # A second kernel replaces the first without a warning; the dump shows the first as inactive.
    assert "(inactive)" not in torch._C._dispatch_dump(name)


#: What the CUDA part does when it is loaded, before ops are defined.
CUDA_PART = """
import torch
library = torch.library.Library("llmos", "IMPL")
library.impl("layer_norm_forward", lambda *args: None, "CUDA")
import llmos_kernels
for op in ("llmos::layer_norm_forward", "llmos::layer_norm_forward_triton"):
    print(op, torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"))
    assert "(inactive)" not in torch._C._dispatch_dump(op)
assert not hasattr(torch.ops.llmos, "layer_norm_backward_triton")
from llmos_kernels._tools import environment
print(environment.owner("llmos::layer_norm_forward", "CUDA"))
"""


def test_one_owner_beside_the_cuda_part():
    done = subprocess.run([sys.executable, "-c", CUDA_PART], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "llmos::layer_norm_forward True",
        "llmos::layer_norm_forward_triton True",
    ]
    assert done.stdout.splitlines()[2].endswith("else _triton/norm/layer_norm.py")


def test_every_op_has_a_case():
    seen = {
        op.name()
        for c in CASES
        for op, _ in raw_calls(c, c.make(c.shapes[-1], dtype=torch.float32, requires_grad=True))
    }
    assert seen == set(DEFINED) - NO_CASE


def test_owners():
    table = {(op, key): environment.owner(op, key) for op in DEFINED for key in environment.KEYS}
    assert table["llmos::layer_norm_forward", "CPU"] == "csrc/cpu/host/layer_norm.cpp"
    assert table["llmos::layer_norm_backward", "CUDA"] == "_triton/norm/layer_norm_backward.py"


def test_a_new_device_gets_the_reference():
    x = torch.ones(2, 8, device="meta")
    y, stats = torch.ops.llmos.layer_norm_forward(x, None, None, 8, 1e-5, True)
    assert y.shape == (2, 8) and y.is_meta and stats.shape == (2, 2)


def test_defining_twice_raises():
    with pytest.raises(RuntimeError, match="layer_norm_forward"):
        define("layer_norm_forward(Tensor x) -> Tensor", reference=lambda x: x, fake=lambda x: x)
