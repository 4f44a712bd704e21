"""The VNNI layout of an int8 weight, which int8 products on CPUs read.

The weight [out, in] becomes panels of VNNI_OUTPUTS rows. In a panel, VNNI_INPUTS consecutive
elements of a row stand next to each other, as the dot-product instructions take them. They are
stored as uint8 = int8 + 128, because those instructions multiply uint8 by int8. CPUs without these
instructions read the same layout, and take the 128 off again.
"""

import sys

from torch import Tensor

from llmos_kernels._core.registry import (
    define,
)
from llmos_kernels.ops.int8 import (
    VNNI_INPUTS,
    VNNI_OUTPUTS,
    check_int8,
    vnni_shape,
)

__all__ = ["int8_vnni_weight"]


def _vnni_reference(weight_int8: Tensor) -> Tensor:
    """Return the copy of ``weight_int8`` in VNNI layout."""
    outputs, inputs = weight_int8.shape
    panels, groups, *_ = vnni_shape(weight_int8)
    padded = weight_int8.new_zeros(panels * VNNI_OUTPUTS, groups * VNNI_INPUTS)
    padded[:outputs, :inputs] = weight_int8
    # The instruction multiplies uint8 by int8: the weight plus 128, which flips the top bit.
    blocks = (padded ^ -128).view(panels, VNNI_OUTPUTS, groups, VNNI_INPUTS)
    return blocks.transpose(1, 2).contiguous()


_to_vnni = define(
    "int8_vnni_weight(Tensor weight_int8) -> Tensor",
    reference=_vnni_reference,
    fake=lambda weight_int8: weight_int8.new_empty(vnni_shape(weight_int8)),
)


def int8_vnni_weight(weight_int8: Tensor) -> Tensor | None:
    """Return a weight in the VNNI layout that products on this device read, None if they read none.

    Without it ``int8_linear`` of mode "dynamic" makes that copy at each call of more than 16 rows,
    and of fewer rows where there are outliers; ``int8_linear_rows`` makes it at every call.

    Args:
        weight_int8: [out, in], int8, any strides.

    Returns:
        A copy of the weight's size, for this process alone: its layout is not an interface. None on
        devices other than the CPU, and without the compiled extension.

    Raises:
        TypeError: The weight is not int8.
        ValueError: The weight does not have two dimensions.

    Example:
        >>> rows, scale = int8_quantize(torch.randn(512, 768))
        >>> vnni = int8_vnni_weight(rows)
        >>> y = int8_linear(torch.randn(32, 768), rows, scale, vnni_weight=vnni)
    """
    check_int8(weight_int8=weight_int8)
    if weight_int8.ndim != 2:
        raise ValueError(f"weight_int8 must be [out, in], got {list(weight_int8.shape)}")
    if weight_int8.device.type != "cpu" or "llmos_kernels._C" not in sys.modules:
        return None
    return _to_vnni(weight_int8.detach())
