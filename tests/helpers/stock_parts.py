"""Counts the attentions, feed-forwards and norms of a model that torch computes, not we."""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

#: Ops of torch of which one is in each part.
_PARTS = {
    "attention": ("aten::_softmax", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    "feed-forward": ("aten::relu", "aten::gelu", "aten::silu", "aten::relu_", "aten::tanh"),
    "norm": ("aten::native_layer_norm", "aten::rsqrt", "aten::std"),
}


def stock_parts(model, args=(), kwargs=None):
    """Return how many parts of each kind run in torch when ``model`` is called, without gradients.

    A part counts by an op that it has once: a softmax, an activation, a layer norm or the inverse
    or deviation of one that is written out. Matrices do not count: they are those of routers,
    experts and poolers.
    """
    with torch.no_grad():
        model(*args, **(kwargs or {}))  # The first call may trace.
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            model(*args, **(kwargs or {}))
    events = (e for e in seen.events() if e.input_shapes and len(e.input_shapes[0]) > 2)
    calls = Counter(event.name for event in events)
    return {part: sum(calls[op] for op in ops) for part, ops in _PARTS.items()}
