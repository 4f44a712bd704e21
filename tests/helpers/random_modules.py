"""Models composed at random from parts of a user's code, and what a run of one shows.

A ``Plan`` says what a model is made of. ``build`` makes it, the same each time. ``run`` returns all
that a user can see of a call: outputs, gradients, text, calls of hooks, and the state left behind.
"""

import contextlib
import copy
import io
import warnings
from collections import Counter, deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

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


class Meter:
    def __init__(self):
        self.count = 0

    def tick(self):
        self.count += 1


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def note(self):
        self.calls += 1


class World:
    """What the code of one model changes outside of its modules."""

    def __init__(self):
        self.events = Counter()
        self.recent = deque(maxlen=99)
        self.spans = 0
        self.names = {
            "__name__": "a_user",
            "torch": torch,
            "nn": nn,
            "F": F,
            "record_function": self.record,
            "GLOBAL": {"calls": 0},
            "SEEN": [],
            "FLAGS": {"on": False},
            "ON": False,
            "SPAN": self,
        }

    def __enter__(self):
        self.spans += 1

    def __exit__(self, *_):
        pass

    def __deepcopy__(self, memo):
        return self

    def record(self, name):
        self.events[name] += 1
        return record_function(name)

    def callback(self):
        self.events["callback"] += 1

    def state(self):
        names = {k: self.names[k] for k in ("GLOBAL", "SEEN")}
        return copy.deepcopy([names, self.events, list(self.recent), self.spans])

    def clear(self):
        self.__dict__.update(spans=0)
        self.events.clear()
        self.recent.clear()
        self.names["GLOBAL"]["calls"] = 0
        self.names["SEEN"].clear()


class Weight(torch.Tensor):
    """A weight that knows ``linear`` alone, and doubles it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, *bias = args
        return 2 * F.linear(x, weight.as_subclass(torch.Tensor), *bias)


class Model(nn.Module):
    """Calls its parts in turn, each as its signature asks for."""

    def __init__(self, parts, uses):
        super().__init__()
        self.parts, self.uses = nn.ModuleList(parts), uses

    def forward(self, x):
        for part, use in zip(self.parts, self.uses, strict=True):
            dtype = next((p.dtype for p in part.parameters() if p.ndim == 2), x.dtype)
            half = dtype == torch.bfloat16
            x = eval(use, {"part": part, "x": x.to(dtype) if half else x})
            x = x.float() if half else x
        return x


class ByName(Model):
    """Holds its parts as attributes."""

    def __init__(self, parts, uses):
        nn.Module.__init__(self)
        self.uses = uses
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)

    @property
    def parts(self):
        return [self._modules[f"part{i}"] for i in range(len(self.uses))]


def initial():
    """Return the attributes that forwards change, as they are before the first call."""
    return {
        **{"calls": 0, "log": [], "stats": {}, "seen": set(), "hidden": None},
        **{"flag": False, "width": D, "cfg": {"on": False}},
    }


def _set_up(module, world):
    for name, value in initial().items():
        object.__setattr__(module, name, value)
    module.world, module.meter, module.callback = world, Meter(), world.callback


def _activation(plan, world):
    if plan.name != "own":
        return getattr(nn, plan.name)()
    names = world.names
    source = ACTIVATION.format(
        member=MEMBERS.get(plan.member, ""),
        effect=EFFECTS.get(plan.effect, "pass"),
        branch=f"y = y * 2 if {BRANCHES[plan.branch]} else y" if plan.branch else "",
    )
    # What an activation has no attributes for is left out.
    for word in ("self.note()", "self.noted", "self.shout()", "self.remember()", "helper.note()"):
        source = source.replace(f"self.{word}" if word[0] == "h" else word, "self.calls += 1")
    source = source.replace("self.act is None", "self.flag")
    exec(source, names)
    module = names.pop("Activation")()
    _set_up(module, world)
    if plan.effect == "changes a buffer":
        module.register_buffer("steps", torch.zeros(1))
    return module


def _own(plan, world):
    def init(self, world):
        if plan.kind == "norm":
            self.weight, self.eps = nn.Parameter(torch.rand(D) + 0.5), 1e-6
            self.act = None if plan.branch != "a missing child" else nn.Identity()
        elif plan.kind == "feeds":
            self.up, self.act, self.down = nn.Linear(D, 24), activation, nn.Linear(24, D)
        else:
            self.dense, self.dropout, self.norm = nn.Linear(D, D), nn.Dropout(0.0), nn.LayerNorm(D)
            self.act = None if plan.branch != "a missing child" else nn.Identity()
        if plan.effect == "calls a method of a child":
            self.helper = Helper()
        if plan.effect == "changes a buffer":
            self.register_buffer("steps", torch.zeros(1))
        _set_up(self, world)

    activation = _activation(plan.activation, world)
    residual = plan.kind == "residual"
    signature = "self, x, residual" if residual else plan.signature
    inherited = plan.inherited
    given = signature.removeprefix("self, ")
    fields = {
        "residual": ", residual" if residual else "",
        "body": BODIES[plan.kind],
        "inherited": "forward",
        "signature": signature,
        "before": SIGNATURES.get(signature, ("", ""))[1] or "pass",
        "effect": EFFECTS.get(plan.effect, "pass"),
        "call": BODIES[plan.kind],
        "branch": f"y = y * 2 if {BRANCHES[plan.branch]} else y" if plan.branch else "",
        "result": plan.result,
        "subclass": ", name='Made'" if plan.member == "__init_subclass__" else "",
        "member": "" if plan.member == "__init_subclass__" else MEMBERS.get(plan.member, ""),
        "forward": "pass",
    }
    if inherited and all(c not in given for c in "*/="):
        fields["forward"] = f"def forward({signature}): return super().forward({given})"
    source = SOURCE.format(**fields)
    if plan.member == "__init_subclass__":
        member = f"    {MEMBERS[plan.member]}\n\n    def __init__"
        source = source.replace("    def __init__", member, 1)
    exec(source, world.names)
    cls, _ = world.names.pop("Made"), world.names["Base"]
    world.names["Base"].init = init
    return cls(world)


def build(plan):
    """Return the model of ``plan``, and its world."""
    torch.manual_seed(0)
    world, made, uses = World(), [], []
    for part in plan.parts:
        stock = part.kind in STOCK
        module = (
            STOCK[part.kind](_activation(part.activation, world)) if stock else _own(part, world)
        )
        if part.kind == "attention":
            use = "part(x, x, x)[0]"
        elif part.kind == "residual":
            use = "part(x, x)"
        elif stock:
            use = "part(x)"
        else:
            use = SIGNATURES[part.signature][0]
        _weights(module, part.weights)
        _hook(module, part, world, str(len(made)))
        made.append(module)
        uses.append(use if stock else RESULTS[part.result].format(use))
    if plan.shared:
        made.append(made[0])
        uses.append(uses[0])
    plain = all(use == "part(x)" for use in uses)
    bfloat16 = any(part.weights == "bfloat16" for part in plan.parts)
    if plan.container == "sequential" and plain and not bfloat16:
        model = nn.Sequential(*made)
    else:
        model = (ByName if plan.container == "own" else Model)(made, uses)
    for module in model.modules():  # A ``train`` of its own would print.
        vars(module)["training"] = plan.training
    return model, world


def _linear_of(module):
    return next((m for m in module.modules() if type(m) is nn.Linear), None)


def _weights(module, how):
    linear = _linear_of(module)
    if any(map(is_lazy, module.parameters())):
        return
    if how == "frozen":
        for p in list(module.parameters())[:1]:
            p.requires_grad_(False)
    elif how == "bfloat16":
        module.bfloat16()
    elif linear is None:
        return
    elif how == "subclass":
        make_subclass(linear)
    elif how == "weight_norm":
        parametrizations.weight_norm(linear)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(linear)
    elif how == "tied":
        others = [m for m in module.modules() if type(m) is nn.Linear and m is not linear]
        for other in others:
            if other.weight.shape == linear.weight.shape:
                other.weight = linear.weight
            else:
                other.bias = None
    elif how == "replaced":
        replace_forward(linear)


def make_subclass(linear):
    data = linear.weight.detach().as_subclass(Weight)
    linear.weight = nn.Parameter(data, requires_grad=False)


def replace_forward(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5


def _hook(module, plan, world, name):
    if not plan.hook:
        return
    inside = [m for m in module.modules() if not list(m.children())]
    add_hook(inside[-1] if plan.on_child else module, plan.hook, world, name)


def add_hook(module, kind, world, name):
    """Register a hook that counts its calls in ``world``."""

    def seen(*_):
        world.events[kind, name] += 1

    def changes(module, args, output):
        seen()
        return output * 1.5 if isinstance(output, torch.Tensor) else None

    if kind == "pre":
        module.register_forward_pre_hook(seen)
    elif kind == "forward":
        module.register_forward_hook(seen)
    elif kind == "changes":
        module.register_forward_hook(changes)
    elif kind == "backward":
        module.register_full_backward_hook(seen)
    elif kind == "backward pre":
        module.register_full_backward_pre_hook(seen)
    else:
        module.register_forward_hook(seen, with_kwargs=True, always_call=True)


@contextlib.contextmanager
def global_hooks(model, world, on=True):
    """Count the calls of every module of ``model`` by hooks of all modules."""
    if not on:
        yield
        return
    names = {m: n for n, m in model.named_modules()}

    def seen(module, *_):
        world.events["global", names.get(module, "another")] += 1

    handles = [
        torch_module.register_module_forward_hook(seen),
        torch_module.register_module_forward_pre_hook(seen),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit(model, world, how, at):
    """Change a model as a user may after the swap, and return what took its place."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_called(m)]
    leaves = [m for m in model.modules() if not list(m.children()) and _is_called(m)]
    sequentials = [m for m in model.modules() if isinstance(m, nn.Sequential)]
    torch.manual_seed(1)
    if how in ("append", "insert", "delete", "exchange", "extend", "slice", "pop"):
        if sequentials:
            _edit_sequential(sequentials[at % len(sequentials)], how, at)
    elif how in ("flag", "number"):
        for m in model.modules():
            if "flag" in vars(m):
                vars(m).update(flag=True) if how == "flag" else vars(m).update(width=101)
                m.cfg["on"] = True
    elif how == "global flags":
        world.names["FLAGS"]["on"] = world.names["ON"] = True
    elif how == "global hooks":
        pass  # While it runs, see ``run``.
    elif how == "whole hook":
        whole = list(model.modules())
        add_hook(whole[at % len(whole)], HOOKS[at % len(HOOKS)], world, "edit")
    elif how == "hook" and leaves:
        add_hook(leaves[at % len(leaves)], HOOKS[at % len(HOOKS)], world, "edit")
    elif how == "forward" and leaves:
        replace_forward(leaves[at % len(leaves)])
    elif how == "subclass" and linears:
        make_subclass(linears[at % len(linears)])
    elif how == "freeze":
        for p in list(model.parameters())[at:]:
            p.requires_grad_(False)
    elif how == "no child":
        for m in model.modules():
            if "act" in m._modules:
                m._modules["act"] = None
    elif how == "double":
        model.double()
    elif how == "bfloat16 part" and leaves:
        leaves[at % len(leaves)].bfloat16()
    elif how == "deepcopy":
        return copy.deepcopy(model)
    elif how == "load":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, strict=True)
    return model


def _is_called(module):
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _edit_sequential(sequential, how, at):
    if how == "append":
        sequential.append(nn.Tanh())
    elif how == "insert":
        sequential.insert(at % (len(sequential) + 1), nn.Tanh())
    elif how == "delete":
        del sequential[at % len(sequential)]
    elif how == "exchange":
        sequential[at % len(sequential)] = nn.Tanh()
    elif how == "extend":
        sequential.extend([nn.Tanh(), nn.LayerNorm(D)])
    elif how == "pop":
        sequential.pop(at % len(sequential))
    else:
        part = sequential[:at]
        assert type(part) is nn.Sequential and len(part) == min(at, len(sequential))


#: Inputs and modes of calls: whether the model trains, whether gradients are recorded.
CALLS = {
    "train": (lambda: torch.randn(2, 5, D), True, True),
    "eval": (lambda: torch.randn(2, 5, D), False, False),
    "many": (lambda: torch.randn(70, 1, D), False, True),
    "one": (lambda: torch.randn(1, 1, D), True, True),
    "strided": (lambda: torch.randn(2, 5, 2 * D)[..., ::2], False, False),
    "large": (lambda: torch.randn(2, 3, D).index_fill(-1, torch.tensor(3), 12.0), False, True),
    "float64": (lambda: torch.randn(2, 3, D, dtype=torch.float64), False, False),
    "no batch": (lambda: torch.randn(4, D), True, True),
}


def run(model, world, name, hooks=False):
    """Return what a call of ``model`` shows, by name; or the error that it raises."""
    make, training, grad = CALLS[name]
    torch.manual_seed(2)
    x = make().requires_grad_(grad)
    world.clear()
    for module in model.modules():
        vars(module)["training"] = training
    model.zero_grad()
    written = io.StringIO()
    found = {}
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(written),
            torch.set_grad_enabled(grad),
            global_hooks(model, world, hooks),
        ):
            y = model(x * 1 if grad else x)
            found["output"] = y.detach()
            if grad:
                y.sin().sum().backward()
    except Exception as e:
        return {"error": type(e)}
    found["input gradient"] = x.grad
    for key, p in model.named_parameters():
        found[f"gradient of {key}"] = p.grad
    found["text"] = written.getvalue()
    found["world"] = world.state()
    found["state"] = {key: state_of(m) for key, m in model.named_modules()}
    found["buffers"] = dict(model.named_buffers())
    return found


_HIDDEN = ("_parameters", "_buffers", "_modules", "_llmos_swapped_from", "world", "callback")


def state_of(module):
    """Return the attributes of a module, without its parts and hooks."""

    def plain(value):
        return vars(value) if isinstance(value, Meter) else value

    attributes = vars(module).items()
    return {
        k: plain(v)
        for k, v in attributes
        if k not in _HIDDEN and "hooks" not in k and not callable(v)
    }


def differences(found, expected, size, where=""):
    """Yield where two results of ``run`` differ; numbers may by ``size`` of the largest one."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            yield f"{where}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"
        elif found.is_floating_point() and found.numel():
            found, expected = found.detach().double(), expected.detach().double()
            allowed = size * max(1.0, expected.nan_to_num().abs().max().item())
            if not torch.isclose(found, expected, rtol=0, atol=allowed, equal_nan=True).all():
                yield f"{where}: differs by {(found - expected).abs().max().item()}, not {allowed}"
        elif not torch.equal(found, expected):
            yield f"{where}: {found}, not {expected}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            yield f"{where}: only one has {sorted(map(str, found.keys() ^ expected.keys()))}"
        else:
            for key in expected:
                larger = 20 * size if "gradient" in str(key) else size
                yield from differences(found[key], expected[key], larger, f"{where}/{key}")
    elif type(found) is not type(expected) or found != expected:
        yield f"{where}: {found!r}, not {expected!r}"
