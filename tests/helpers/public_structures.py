"""Transformers after the public structure of well-known code, small, written anew.

Each function returns a model in eval mode and its arguments.
"""

import math

import torch
import torch.nn.functional as F
from public_decoders import HEADS, LENGTH, WIDTH, min_gpt, nano_gpt
from torch import nn


class AnnotatedNorm(nn.Module):
    """The norm of the annotated Transformer: unbiased deviation, epsilon outside of the root."""

    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


def attention(query, key, value, mask=None, dropout=None):
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    if dropout is not None:
        p_attn = dropout(p_attn)
    return torch.matmul(p_attn, value), p_attn


class MultiHeadedAttention(nn.Module):
    """The attention of the annotated Transformer, which keeps its weights to be drawn."""

    def __init__(self):
        super().__init__()
        self.d_k, self.h = WIDTH // HEADS, HEADS
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn = None
        self.dropout = nn.Dropout(p=0.1)

    def forward(self, query, key, value, mask=None):
        if mask is not None:
            mask = mask.unsqueeze(1)
        nbatches = query.size(0)
        query, key, value = [
            lin(x).view(nbatches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value))  # noqa: B905
        ]
        x, self.attn = attention(query, key, value, mask=mask, dropout=self.dropout)
        x = x.transpose(1, 2).contiguous().view(nbatches, -1, self.h * self.d_k)
        del query
        del key
        del value
        return self.linears[-1](x)


class PositionwiseFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.w_2(self.dropout(self.w_1(x).relu()))


class SublayerConnection(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout = AnnotatedNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, x, sublayer):
        return x + self.dropout(sublayer(self.norm(x)))


class AnnotatedLayer(nn.Module):
    """A layer of the annotated Transformer; with a memory one of its decoder."""

    def __init__(self, is_decoder):
        super().__init__()
        self.self_attn = MultiHeadedAttention()
        self.src_attn = MultiHeadedAttention() if is_decoder else None
        self.feed_forward = PositionwiseFeedForward()
        self.sublayer = nn.ModuleList(SublayerConnection() for _ in range(2 + is_decoder))

    def forward(self, x, mask, memory=None, memory_mask=None):
        x = self.sublayer[0](x, lambda x: self.self_attn(x, x, x, mask))
        if self.src_attn is not None:
            x = self.sublayer[1](x, lambda x: self.src_attn(x, memory, memory, memory_mask))
        return self.sublayer[-1](x, self.feed_forward)


class Annotated(nn.Module):
    """The encoder and decoder of the annotated Transformer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(AnnotatedLayer(False) for _ in range(2))
        self.decoder = nn.ModuleList(AnnotatedLayer(True) for _ in range(2))
        self.norms = nn.ModuleList(AnnotatedNorm(WIDTH) for _ in range(2))

    def forward(self, src, tgt, src_mask, tgt_mask):
        for layer in self.encoder:
            src = layer(src, src_mask)
        memory = self.norms[0](src)
        for layer in self.decoder:
            tgt = layer(tgt, tgt_mask, memory, src_mask)
        return self.norms[1](tgt)


class FairseqAttention(nn.Module):
    """After fairseq: time first, batch and heads in one dimension, scaled queries, bmm."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(WIDTH, WIDTH) for _ in range(4)
        )
        self.dropout = 0.1

    def forward(self, query, key_padding_mask=None):
        tgt_len, bsz, embed_dim = query.size()
        q, k, v = self.q_proj(query) * self.scaling, self.k_proj(query), self.v_proj(query)
        q, k, v = (
            t.contiguous().view(tgt_len, bsz * self.num_heads, self.head_dim).transpose(0, 1)
            for t in (q, k, v)
        )
        weights = torch.bmm(q, k.transpose(1, 2))
        if key_padding_mask is not None:
            weights = weights.view(bsz, self.num_heads, tgt_len, tgt_len)
            weights = weights.masked_fill(
                key_padding_mask.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf")
            )
            weights = weights.view(bsz * self.num_heads, tgt_len, tgt_len)
        weights_float = F.softmax(weights, dim=-1, dtype=torch.float32)
        weights = weights_float.type_as(weights)
        probs = F.dropout(weights, p=self.dropout, training=self.training)
        attn = torch.bmm(probs, v)
        attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
        return self.out_proj(attn)


class FairseqLayer(nn.Module):
    """After fairseq's encoder layer, which norms before or after."""

    def __init__(self, normalize_before=False):
        super().__init__()
        self.self_attn = FairseqAttention()
        self.self_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.activation_fn = F.relu
        self.dropout_module = nn.Dropout(0.1)
        self.activation_dropout_module = nn.Dropout(0.1)
        self.normalize_before = normalize_before

    def forward(self, x, encoder_padding_mask=None):
        residual = x
        if self.normalize_before:
            x = self.self_attn_layer_norm(x)
        x = self.self_attn(x, key_padding_mask=encoder_padding_mask)
        x = self.dropout_module(x)
        x = residual + x
        if not self.normalize_before:
            x = self.self_attn_layer_norm(x)
        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        x = self.activation_fn(self.fc1(x))
        x = self.activation_dropout_module(x)
        x = self.fc2(x)
        x = self.dropout_module(x)
        x = residual + x
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x


class DETRLayer(nn.Module):
    """After DETR's encoder layer: torch's attention, positions added to query and key."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.dropout, self.dropout1, self.dropout2 = (nn.Dropout(0.1) for _ in range(3))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.activation = F.relu

    def with_pos_embed(self, tensor, pos):
        return tensor if pos is None else tensor + pos

    def forward(self, src, src_key_padding_mask=None, pos=None):
        q = k = self.with_pos_embed(src, pos)
        src2 = self.self_attn(q, k, value=src, key_padding_mask=src_key_padding_mask)[0]
        src = src + self.dropout1(src2)
        src = self.norm1(src)
        src2 = self.linear2(self.dropout(self.activation(self.linear1(src))))
        src = src + self.dropout2(src2)
        return self.norm2(src)


class ConformerBlock(nn.Module):
    """After the Conformer: two half feed-forwards around attention and a convolution."""

    def __init__(self):
        super().__init__()
        self.ff1, self.ff2 = (
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 64),
                nn.SiLU(),
                nn.Dropout(0.1),
                nn.Linear(64, WIDTH),
                nn.Dropout(0.1),
            )
            for _ in range(2)
        )
        self.attn_norm, self.conv_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.conv = nn.Sequential(
            nn.Conv1d(WIDTH, 2 * WIDTH, 1),
            nn.GLU(dim=1),
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            nn.BatchNorm1d(WIDTH),
            nn.SiLU(),
            nn.Conv1d(WIDTH, WIDTH, 1),
        )
        self.dropout, self.final_norm = nn.Dropout(0.1), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + 0.5 * self.ff1(x)
        normed = self.attn_norm(x)
        x = x + self.dropout(self.attn(normed, normed, normed, need_weights=False)[0])
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + 0.5 * self.ff2(x)
        return self.final_norm(x)


def rows(time_first=False):
    return torch.randn(LENGTH, 2, WIDTH) if time_first else torch.randn(2, LENGTH, WIDTH)


def padding():
    """Return a mask [batch, length] that is True where a key is padding."""
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[0, 6:] = True
    return mask


def annotated():
    causal = torch.ones(1, LENGTH, LENGTH).tril().bool()
    return Annotated().eval(), (rows(), rows(), ~padding()[:, None], causal)


def fairseq(normalize_before=False):
    layers = nn.ModuleList(FairseqLayer(normalize_before) for _ in range(2))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, encoder_padding_mask=None):
            for layer in self.layers:
                x = layer(x, encoder_padding_mask)
            return x

    return Encoder().eval(), (rows(time_first=True), padding())


def fairseq_pre_norm():
    return fairseq(normalize_before=True)


def detr():
    return DETRLayer().eval(), (rows(time_first=True), padding(), rows(time_first=True))


def conformer():
    return nn.Sequential(ConformerBlock(), ConformerBlock()).eval(), (rows(),)


#: The attentions, activations and norms of each structure, and those that torch computes after a
#: swap: minGPT's feed-forward is called through a lambda, the annotated Transformer's norm is no
#: LayerNorm, and two activations of the Conformer are in its convolutions.
STRUCTURES = {
    min_gpt: ((2, 2, 5), (0, 2, 0)),
    nano_gpt: ((2, 2, 5), (0, 0, 0)),
    annotated: ((6, 4, 12), (0, 0, 12)),
    fairseq: ((2, 2, 4), (0, 0, 0)),
    fairseq_pre_norm: ((2, 2, 4), (0, 0, 0)),
    detr: ((1, 1, 2), (0, 0, 0)),
    conformer: ((2, 6, 10), (0, 2, 0)),
}
