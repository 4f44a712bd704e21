"""What a model composed at random is made of: parts of a user's code, drawn as a ``Plan``."""

from dataclasses import dataclass

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

D = 16

#: What a forward may do besides returning a tensor: a line of code before the rest.
EFFECTS = {
    "sets an attribute": "self.hidden = x",
    "sets by name": "setattr(self, 'hidden', x)",
    "sets by dict": "self.__dict__['hidden'] = x",
    "sets by object": "object.__setattr__(self, 'hidden', x)",
    "sets by method": "self.__setattr__('hidden', x)",
    "counts": "self.calls += 1",
    "appends": "self.log.append(len(x))",
    "extends": "self.log += [len(x)]",
    "extends under another name": "log = self.log; log += [len(x)]",
    "updates": "self.stats.update(n=len(x))",
    "updates under another name": "stats = self.stats; stats |= {'n': len(x)}",
    "appends by name": "getattr(self.log, 'append')(len(x))",
    "sets an item": "self.stats['n'] = len(x)",
    "adds to a set": "self.seen.add(len(x))",
    "adds to a deque": "self.world.recent.append(len(x))",
    "changes an object": "self.meter.tick()",
    "calls a callback": "self.callback()",
    "calls a callback by name": "getattr(self, 'callback')()",
    "calls a method": "self.note()",
    "reads a property": "self.noted",
    "calls a static method": "self.shout()",
    "calls a class method": "self.remember()",
    "calls a method of a child": "self.helper.note()",
    "counts in a global": "GLOBAL['calls'] += 1",
    "appends to a global": "SEEN.append(len(x))",
    "prints": "print('forward', tuple(x.shape))",
    "has a span": "with SPAN: y = x",
    "records a function": "with record_function('part'): y = x",
    "changes a buffer": "self.steps.add_(1)",
    "marks its input": "x.mark = self.world.events.update(['marked'])",
}
#: What a forward may decide by: a condition under which the result is doubled.
BRANCHES = {
    "shape": "x.shape[0] > 64",
    "len": "len(x) > 64",
    "size()": "x.size(0) > 64",
    "numel()": "x.numel() > 1000",
    "ndim": "x.ndim == 2",
    "dtype": "x.dtype == torch.float64",
    "requires_grad": "x.requires_grad",
    "training": "self.training",
    "grad mode": "torch.is_grad_enabled()",
    "autocast": "torch.is_autocast_enabled('cpu')",
    "a value": "bool(x.max() > 10)",
    "layout": "x.is_contiguous()",
    "an attribute": "self.flag",
    "an attribute by name": "getattr(self, 'flag')",
    "a number": "self.width > 100",
    "an entry": "self.cfg['on']",
    "a global": "FLAGS['on']",
    "a global name": "ON",
    "a missing child": "self.act is None",
}
#: Signatures of a forward of one tensor, with how a caller gives it and what is done first.
SIGNATURES = {
    "self, x": ("part(x)", ""),
    "self, x, /": ("part(x)", ""),
    "self, *, x": ("part(x=x)", ""),
    "self, x=None": ("part(x=x)", ""),
    "self, x, *, scale=1.0": ("part(x, scale=2.0)", "x = x * scale"),
    "self, x, mask=None": ("part(x)", "x = x if mask is None else x * mask"),
    "self, x, other": ("part(x, x * 0.5)", "x = x + other"),
    "self, *args": ("part(x)", "x = args[0]"),
    "self, x, *rest": ("part(x, 1)", ""),
    "self, **given": ("part(x=x)", "x = given['x']"),
    "self, x, **given": ("part(x, note='seen')", ""),
}
RESULTS = {"y": "{}", "(y, None)": "{}[0]", "{'out': y}": "{}['out']"}
#: What else a class may define.
MEMBERS = {
    "__getstate__": "def __getstate__(self): return dict(self.__dict__)",
    "__reduce__": "def __reduce__(self): return (type(self), ())",
    "__init_subclass__": "def __init_subclass__(cls, *, name): pass",
    "__slots__": "__slots__ = ('extra',)",
    "__call__": (
        "def __call__(self, *args, **kwargs):\n"
        "        self.calls += 1\n"
        "        return super().__call__(*args, **kwargs)"
    ),
    "__getattr__": (
        "def __getattr__(self, name):\n"
        "        if name == 'unknown': return 1\n"
        "        return super().__getattr__(name)"
    ),
    "__setattr__": (
        "def __setattr__(self, name, value):\n"
        "        if name == '__class__': raise TypeError('of one class')\n"
        "        super().__setattr__(name, value)"
    ),
    "__new__": "def __new__(cls, world): return super().__new__(cls)",
    "train": (
        "def train(self, mode=True):\n"
        "        print('train', mode)\n"
        "        return super().train(mode)"
    ),
    "extra_repr": "def extra_repr(self): return 'own'",
}
BODIES = {
    "feeds": "self.down(self.act(self.up(x)))",
    "norm": "self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()",
    "residual": "self.norm(self.dropout(self.dense(x)) + residual)",
}
SOURCE = """
class Base(nn.Module):
    def __init__(self, world):
        super().__init__()
        self.init(world)

    def note(self): self.calls += 1

    @property
    def noted(self):
        self.calls += 1
        return self.calls

    @staticmethod
    def shout(): print('forward')

    @classmethod
    def remember(cls): SEEN.append(1)

    def whole(self, x{residual}):
        return {body}

    def {inherited}({signature}):
        {before}
        {effect}
        y = {call}
        {branch}
        return {result}


class Made(Base{subclass}):
    {member}
    {forward}
"""
ACTIVATION = """
class Activation(nn.Module):
    {member}

    def forward(self, x):
        {effect}
        y = F.gelu(x)
        {branch}
        return y
"""
#: Parts of torch, for [batch, length, D].
STOCK = {
    "linear": lambda act: nn.Linear(D, D),
    "lazy": lambda act: nn.LazyLinear(D),
    "layer norm": lambda act: nn.LayerNorm(D),
    "rms norm": lambda act: nn.RMSNorm(D),
    "sequential": lambda act: nn.Sequential(nn.Linear(D, 24), act, nn.Linear(24, D)),
    "dropping": lambda act: nn.Sequential(nn.Linear(D, 24), act, nn.Dropout(0.0), nn.Linear(24, D)),
    "activated": lambda act: nn.Sequential(nn.Linear(D, D), act),
    "nested": lambda act: nn.Sequential(
        nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 24), act, nn.Linear(24, D)), nn.Dropout(0.0)
    ),
    "encoder": lambda act: nn.TransformerEncoderLayer(D, 2, 24, 0.0, F.gelu, batch_first=True),
    "pre-norm": lambda act: nn.TransformerEncoderLayer(
        D, 2, 24, 0.0, F.silu, batch_first=True, norm_first=True
    ),
    "attention": lambda act: nn.MultiheadAttention(D, 2, batch_first=True),
}
HOOKS = ("pre", "forward", "changes", "backward", "backward pre", "keywords")
WEIGHTS = ("subclass", "weight_norm", "spectral_norm", "frozen", "bfloat16", "tied", "replaced")
EDITS = (
    *("append", "insert", "delete", "exchange", "extend", "slice", "pop"),
    *("flag", "number", "global flags", "hook", "whole hook", "forward", "subclass", "freeze"),
    *("no child", "double", "deepcopy", "load", "global hooks", "bfloat16 part"),
)


@dataclass(frozen=True)
class Activation:
    """An activation: of torch by name, or one of a user, "own", with a feature or none."""

    name: str
    effect: str = ""
    branch: str = ""
    member: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a model: of torch (``STOCK``), or of a class of its own (``BODIES``)."""

    kind: str
    activation: Activation
    effect: str = ""
    branch: str = ""
    member: str = ""
    signature: str = "self, x"
    result: str = "y"
    inherited: bool = False
    hook: str = ""
    on_child: bool = False
    weights: str = ""


@dataclass(frozen=True)
class Plan:
    """What a model is made of, and what becomes of it after the swap."""

    parts: tuple[Part, ...]
    container: str
    shared: bool
    global_hooks: bool
    with_inputs: bool
    training: bool
    edits: tuple[tuple[str, int], ...]


def _rarely(draw, values):
    return draw(st.sampled_from(["", "", *values]))


@st.composite
def activations(draw):
    name = draw(st.sampled_from(["GELU", "SiLU", "Tanh", "own", "own"]))
    if name != "own":
        return Activation(name)
    what = draw(st.sampled_from(["effect", "branch", "member"]))
    of = {"effect": EFFECTS, "branch": BRANCHES, "member": ("__call__", "__slots__")}
    return Activation(name, **{what: _rarely(draw, of[what])})


@st.composite
def parts(draw):
    """Draw a part. One with a feature of its own has few others, which would hide it."""
    is_users = draw(st.booleans())
    kind = draw(st.sampled_from(["feeds", *BODIES] if is_users else list(STOCK)))
    options = {}
    features = {"effect": EFFECTS, "branch": BRANCHES, "member": MEMBERS}
    what = draw(st.sampled_from(["", *features, "branch"])) if is_users else ""
    if what:
        options[what] = draw(st.sampled_from(list(features[what])))
        activation = Activation("GELU")
    else:
        activation = draw(activations())
        for name, values in (("hook", HOOKS), ("weights", WEIGHTS)):
            if draw(st.integers(0, 3)) == 3:
                options[name] = draw(st.sampled_from(values))
    if is_users:
        options["inherited"] = draw(st.booleans())
        if kind != "residual" and not what and draw(st.booleans()):
            options["signature"] = draw(st.sampled_from(list(SIGNATURES)))
            options["result"] = draw(st.sampled_from(list(RESULTS)))
    return Part(kind, activation, on_child=draw(st.booleans()), **options)


plans = st.builds(
    Plan,
    st.lists(parts(), min_size=1, max_size=3).map(tuple),
    container=st.sampled_from(["own", "list", "sequential"]),
    shared=st.booleans(),
    global_hooks=st.integers(0, 9).map(lambda n: n == 9),
    with_inputs=st.booleans(),
    training=st.booleans(),
    edits=st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 7)), max_size=3).map(tuple),
)
