"""Guard bands around the tensors that a kernel reads, allocates and writes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 64  # Elements of a guard band, on each side of a tensor.


def bits(t):
    """Return a view of the bits as integers."""
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def guarded_empty(shape, dtype, device):
    """Return a buffer with guard bands and the tensor in it; all bits are 1, NaN as a float."""
    n = torch.Size(shape).numel()
    buffer = torch.empty(n + 2 * BAND, dtype=dtype, device=device)
    bits(buffer).fill_(-1)
    return buffer, buffer[BAND : BAND + n].view(shape)


class Guards(TorchDispatchMode):
    """Surround every allocation with guard bands."""

    def __init__(self):
        super().__init__()
        self.buffers = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.overloadpacket.__name__ not in ("empty", "new_empty", "empty_like", "empty_strided"):
            return op(*args, **kwargs)
        like = op(*args, **kwargs)
        assert like.is_contiguous()
        buffer, t = guarded_empty(like.shape, like.dtype, like.device)
        self.buffers.append((buffer, t))
        return t

    def copy_of(self, t):
        """Return a copy of ``t`` with guard bands."""
        buffer, inner = guarded_empty(t.shape, t.dtype, t.device)
        self.buffers.append((buffer, inner))
        return inner.copy_(t)

    def assert_intact(self, name):
        """Assert that no guard band has changed."""
        for buffer, _ in self.buffers:
            bands = torch.cat([bits(buffer)[:BAND], bits(buffer)[-BAND:]])
            assert (bands == -1).all(), f"{name} wrote outside a tensor"
