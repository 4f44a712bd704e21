"""Small models for the tests of ``optimize``: residual blocks, and others that only look alike."""

import torch
from torch import nn


class Block(nn.Module):
    """A post-norm residual block, of a class that no rule knows by name."""

    def __init__(self, d=16, p=0.1):
        super().__init__()
        self.project = nn.Linear(2 * d, d)
        self.norm = nn.LayerNorm(d)
        self.drop = nn.Dropout(p)

    def forward(self, states, skip):
        return self.norm(self.drop(self.project(states)) + skip)


class PreNorm(Block):
    """A pre-norm residual block, which no fused op computes."""

    def forward(self, states, skip):
        return self.norm(skip) + self.drop(self.project(states))


class TwiceNorm(nn.LayerNorm):
    """Computes something else than its base, with an effect for which no trace is taken."""

    def forward(self, input):
        with torch.profiler.record_function("twice"):
            return 2 * super().forward(input)


class DropsLast(Block):
    def forward(self, states, skip):
        return self.drop(self.norm(self.project(states) + skip))


class DropsSum(Block):
    def forward(self, states, skip):
        return self.norm(self.drop(self.project(states) + skip))


class DropsNothing(Block):
    def forward(self, states, skip):
        return self.norm(self.project(states) + skip)


class LooksAtShapes(Block):
    def forward(self, states, skip):
        y = self.drop(self.project(states))
        return self.norm((y * 2 if y.dim() == 3 else y) + skip)


class Scales(Block):
    alpha = 1

    def forward(self, states, skip):
        return self.norm(self.drop(self.project(states)) * self.alpha + skip)


class OptionalSkip(Block):
    def forward(self, states, skip=None):
        return self.norm(self.drop(self.project(states)) + skip)


class Model(nn.Module):
    def __init__(self, block=Block, p=0.1):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.first = nn.LayerNorm(16)
        self.widen = nn.Linear(16, 32)
        self.block = block(p=p)
        self.last = nn.RMSNorm(16)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        x = self.first(self.embed(x))
        return self.last(self.block(self.widen(x), skip=x))


def classes(model):
    """Return the class of every module by name."""
    return {name: type(m) for name, m in model.named_modules()}
