"""Models made by a ``Plan``, the same each time."""

import contextlib
import copy
from collections import Counter, deque

import torch
import torch.nn.functional as F
from random_plans import (
    ACTIVATION,
    BODIES,
    BRANCHES,
    EFFECTS,
    MEMBERS,
    RESULTS,
    SIGNATURES,
    SOURCE,
    STOCK,
    D,
)
from torch import nn
from torch.autograd.profiler import record_function
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations


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
