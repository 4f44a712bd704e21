"""Attention, feed-forwards and norms as people write them by hand, in many spellings."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """The attention of tutorials, with a mask of 0 where a key is hidden."""

    def __init__(self, width=32, heads=4, p=0.1):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.drop = nn.Dropout(p)

    def forward(self, q, k, v, mask=None):
        batch = q.size(0)
        q, k, v = (
            project(x).view(batch, -1, self.heads, self.head_dim).transpose(1, 2)
            for project, x in ((self.to_q, q), (self.to_k, k), (self.to_v, v))
        )
        scale = torch.sqrt(torch.tensor(self.head_dim, dtype=torch.float32))
        scores = torch.matmul(q, k.transpose(-2, -1)) / scale
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        out = torch.matmul(self.drop(F.softmax(scores, dim=-1)), v).transpose(1, 2)
        return self.to_out(out.contiguous().view(batch, -1, self.heads * self.head_dim))


class FeedForward(nn.Module):
    def __init__(self, width=32, inner=64):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = self.up(x)
        x = F.relu(x)
        return self.down(x)


class Layer(nn.Module):
    def __init__(self, width=32, heads=4, inner=64, p=0.1):
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, inner)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x, mask=None):
        x = self.norm1(self.drop1(self.attention(x, x, x, mask)) + x)
        return self.norm2(self.drop2(self.feed_forward(x)) + x)


class CausalBlock(nn.Module):
    """A pre-norm block with one projection, a causal buffer and an inline feed-forward."""

    def __init__(self, width=32, heads=4, longest=64):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("causal", torch.ones(longest, longest).tril().bool())

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).permute(0, 2, 1, 3)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * (1 / math.sqrt(q.shape[-1]))
        causal = self.causal[:length, :length]
        scores = torch.where(causal, scores, torch.finfo(x.dtype).min)
        out = torch.einsum("bhij,bhjd->bhid", self.drop(scores.softmax(-1)), v)
        x = x + self.drop(self.out(out.permute(0, 2, 1, 3).reshape(batch, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Encoder(nn.Module):
    def __init__(self, layers=2, width=32, heads=4, inner=64):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Projected(nn.Module):
    """Base of attentions that differ in what they do with query, key and value."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.p = 0.1

    def forward(self, x, mask=None):
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.attend(q, k, v, mask)


def attention(attend):
    """Return a class of attention that computes ``attend(self, q, k, v, mask)``."""
    return type(attend.__name__, (Projected,), {"attend": attend})


@attention
def additive(self, q, k, v, mask):
    scores = q @ k.mT * self.head_dim**-0.5 + mask
    return torch.softmax(scores, -1) @ v


@attention
def softmax_in_float32(self, q, k, v, mask):
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=self.p, training=self.training)
    return torch.matmul(weights, v)


@attention
def scaled_query(self, q, k, v, mask):
    q = q / math.sqrt(self.head_dim)
    return torch.matmul((q @ k.transpose(-1, -2)).softmax(dim=-1), v)


@attention
def written_in_place(self, q, k, v, mask):
    scores = torch.matmul(q, k.transpose(2, 3))
    hidden = (mask < 0).expand_as(scores)
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores.float(), dim=-1).type_as(scores)
    return torch.matmul(weights, v)


@attention
def einsum_by_length(self, q, k, v, mask):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.125
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@attention
def batches_of_heads(self, q, k, v, mask):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v)


@attention
def learned_scale(self, q, k, v, mask):
    return ((q @ k.mT) * self.q.weight[0, 0].abs()).softmax(-1) @ v


@attention
def one_key_head(self, q, k, v, mask):
    k, v = (t[:, :1].repeat_interleave(self.heads, 1) for t in (k, v))
    return (q @ k.mT / 3).softmax(-1) @ v


@attention
def interleaved_heads(self, q, k, v, mask):
    k, v = (t[:, ::2].repeat_interleave(2, dim=1) for t in (k, v))
    return (q @ k.mT / 3 + mask).softmax(-1) @ v


def expanded(t, times):
    batch, heads, length, dim = t.shape
    t = t[:, :, None, :, :].expand(batch, heads, times, length, dim)
    return t.reshape(batch, heads * times, length, dim)


@attention
def expanded_heads(self, q, k, v, mask):
    k, v = expanded(k[:, :2], 2), expanded(v[:, :2], 2)
    return torch.matmul(F.softmax(q @ k.transpose(2, 3) + mask, dim=-1), v)


@attention
def without_maximum(self, q, k, v, mask):
    logits = q @ k.mT + mask
    return (logits - logits.max(-1, keepdim=True).values).softmax(-1) @ v


@attention
def without_expanded_maximum(self, q, k, v, mask):
    logits = q @ k.mT + mask
    return (logits - logits.amax(-1)[..., None]).softmax(-1) @ v


@attention
def tiled_heads(self, q, k, v, mask):
    k, v = (t[:, :2].unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(q.shape) for t in (k, v))
    return (q @ k.mT + mask).softmax(-1) @ v


@attention
def returns_weights(self, q, k, v, mask):
    weights = (q @ k.mT / 3 + mask).softmax(-1)
    return weights @ v, weights


FOUND = (additive, softmax_in_float32, scaled_query, written_in_place, einsum_by_length)
FOUND += (batches_of_heads, learned_scale, one_key_head, returns_weights, tiled_heads)
#: Those whose keys and values are shared by heads of the query, as kernels take them.
SHARED = (one_key_head, interleaved_heads, expanded_heads)
FOUND += (*SHARED[1:], without_maximum, without_expanded_maximum)


@attention
def over_queries(self, q, k, v, mask):
    return (q @ k.mT).softmax(-2) @ v


@attention
def scaled_weights(self, q, k, v, mask):
    return (2 * (q @ k.mT).softmax(-1)) @ v


@attention
def fills_with_little(self, q, k, v, mask):
    return (q @ k.mT).masked_fill(mask < 0, -1.0).softmax(-1) @ v


@attention
def uses_scores(self, q, k, v, mask):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.sum()


@attention
def without_maximum_of_queries(self, q, k, v, mask):
    logits = q @ k.mT
    return (logits - logits.amax(-1).unsqueeze(-2)).softmax(-1) @ v


@attention
def writes_to_value(self, q, k, v, mask):
    weights = (q @ k.mT).softmax(-1)
    out = weights @ v
    v.mul_(2)
    return out + v


@attention
def writes_between(self, q, k, v, mask):
    scores = q @ k.mT
    q.mul_(2)
    return scores.softmax(-1) @ v + q


STAYS = (
    without_maximum_of_queries,
    over_queries,
    scaled_weights,
    fills_with_little,
    uses_scores,
    writes_between,
)


class Norm(nn.Module):
    """Base of norms that differ in how they are written."""

    def __init__(self, width=32):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.eps = 1e-5


def norm(forward):
    """Return a class of norms with this forward."""
    return type(forward.__name__, (Norm,), {"forward": forward})


@norm
def squares_of_differences(self, x):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return self.weight * ((x - mean) / torch.sqrt(variance + self.eps)) + self.bias


@norm
def variance_of_torch(self, x):
    difference = x - x.mean(dim=-1, keepdim=True)
    variance = x.var(dim=-1, keepdim=True, unbiased=False)
    return difference * torch.rsqrt(variance + self.eps) * self.weight + self.bias


@norm
def weighted_before(self, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


@norm
def root_as_power(self, x):
    difference = x - x.mean(-1, keepdim=True)
    variance = difference.pow(2).mean(-1, keepdim=True)
    return difference / (variance + self.eps) ** 0.5 * self.weight + self.bias


@norm
def root_mean_square(self, x):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * wide.to(x.dtype)


@norm
def root_mean_square_of_products(self, x):
    return self.weight * (x / torch.sqrt((x * x).mean(2, keepdim=True) + self.eps))


@norm
def without_weight(self, x):
    return x * (x.square().mean([-1], True) + self.eps).sqrt().reciprocal()


@norm
def unbiased(self, x):
    difference = x - x.mean(-1, keepdim=True)
    return difference / (x.var(-1, keepdim=True) + self.eps).sqrt() * self.weight


@norm
def epsilon_outside(self, x):
    difference = x - x.mean(-1, keepdim=True)
    return self.weight * difference / (x.std(-1, keepdim=True) + self.eps) + self.bias


@norm
def over_another_dimension(self, x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)


@norm
def of_something_else(self, x):
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


#: Norms that are found, and what only looks like them.
LAYER_NORMS = [squares_of_differences, variance_of_torch, weighted_before, root_as_power]
RMS_NORMS = [root_mean_square, root_mean_square_of_products, without_weight]
NO_NORMS = [unbiased, epsilon_outside, over_another_dimension, of_something_else]


def check_gradients(model, fuse, args, stock=None):
    """Check the gradients of ``model`` in train mode, without dropout, as ``fuse`` returns it.

    They are those of ``stock``, by default a copy of ``model``.
    """
    stock = copy.deepcopy(model) if stock is None else stock
    for m in (*model.modules(), *stock.modules()):
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(getattr(m, "dropout", None), float):
            m.dropout = 0.0
    for m in (fuse(model.train()), stock.train()):
        torch.manual_seed(1)
        out = m(*args)
        (out * torch.randn_like(out)).sum().backward()
    largest = max(p.grad.abs().max() for p in stock.parameters())
    for (n, p), (_, q) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6 * largest.item(), msg=n)
