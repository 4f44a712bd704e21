"""Copies of a swapped module go by the rules that its own class has for copies.

After intel-extension-for-pytorch #356: ``__getstate__`` and ``__reduce__`` of a user's class.
"""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import llmos_kernels as lk

D = 16


class Feeds(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, width), nn.GELU(), nn.Linear(width, D)
        self.width, self.note = width, "made"

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class WithState(Feeds):
    """Holds a lock, which no pickle takes."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class WithReduce(Feeds):
    """Is made again by a call of its class, and takes its weights along."""

    def __init__(self, width=48):
        super().__init__(width)

    def __reduce__(self):
        return type(self), (self.width,), {"weights": self.state_dict()}

    def __setstate__(self, state):
        self.load_state_dict(state["weights"])


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", [Feeds, WithState, WithReduce])
def test_copies(cls, how):
    module, x = cls().eval(), torch.randn(3, D)
    expected = module(x)
    assert lk.optimize(module, always=True).swapped and type(module) is not cls
    again = COPIES[how](module)
    assert type(again) is type(module) and again.note == "made"
    assert again.up.weight is not module.up.weight
    assert hasattr(again, "lock") == hasattr(module, "lock")
    torch.testing.assert_close(again(x), expected)
    if cls is not WithReduce:  # Its own rule leaves out what is not in its state.
        lk.restore(again)
        assert type(again) is cls
