"""Edits of a model composed at random, as a user may make them after the swap."""

import copy

import torch
from random_modules import add_hook, make_subclass, replace_forward
from random_plans import HOOKS, D
from torch import nn


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
