"""Multi-head attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels.ops.attention import scaled_dot_product_attention
from llmos_kernels.ops.linear import project


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` through ``llmos_kernels.scaled_dot_product_attention``.

    Masks of every kind, dropout and the weights stay on the fused path. A query whose keys are all
    masked gets an attention of 0, also where torch, asked for weights, gives NaN.

    Raises what torch raises where shapes disagree, and ValueError for a head dim above 256 or, in
    training, a ``dropout`` outside [0, 1).
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        _check(self, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        # As in torch, the hint replaces the mask only here; elsewhere the mask is all that counts.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        batched, batch_first = query.dim() == 3, self.batch_first or query.dim() == 2
        q, k, v = (
            _by_head(p, self.num_heads, batch_first) for p in self._project(query, key, value)
        )
        attn_mask = None if is_causal else attn_mask
        _check_sizes(q, k, attn_mask, key_padding_mask, batched)
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v, added = _append(k, self.bias_k), _append(v, self.bias_v), added + 1
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, self.embed_dim)
            k, v, added = _append(k, zero), _append(v, zero), added + 1
        attn_mask, key_padding_mask = _masks(attn_mask, key_padding_mask, self.num_heads, added)
        kind = ("mean" if average_attn_weights else "per_head") if need_weights else None
        result = scaled_dot_product_attention(
            q, k, v, attn_mask,
            self.dropout if self.training else 0.0,
            is_causal,
            key_padding_mask=key_padding_mask,
            return_weights=kind,
        )  # fmt: skip
        out, weights = result if isinstance(result, tuple) else (result, None)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        out = project_out(self, out)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _project(self, query, key, value) -> tuple[Tensor, ...]:
        """Query, key and value times their weights, in as few products as their identity allows."""
        e, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return project_in(self, query).split(e, -1)
        weight = self.in_proj_weight
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is value:
            b, bs = (None, None) if bias is None else bias.split([e, 2 * e])
            w, ws = weight.split([e, 2 * e])
            return project(query, w, b), *project(key, ws, bs).split(e, -1)
        else:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(project, (query, key, value), weights, biases))


def project_in(attention: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    """``x`` [..., embed_dim] times the weights of query, key and value, one after the other."""
    layer = attention._modules.get("in_proj")  # Of int8.
    if layer is not None:
        return layer(x)
    return project(x, attention.in_proj_weight, attention.in_proj_bias)


def project_out(attention: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    """``out_proj`` of ``x``. As in torch it lends its weights: its hooks do not run."""
    layer = attention.out_proj
    int8 = "weight_int8" in layer._buffers
    return layer.forward(x) if int8 else project(x, layer.weight, layer.bias)


def _by_head(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """A view [batch, heads, length, head_dim] of a projection."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _append(x: Tensor, row: Tensor) -> Tensor:
    """``x`` [batch, heads, length, head_dim] and one key more, ``row`` [1, 1, embed_dim]."""
    batch, heads, _, dim = x.shape
    return torch.cat([x, row.to(x.dtype).view(1, heads, 1, dim).expand(batch, -1, -1, -1)], 2)


def _masks(attn_mask, key_padding_mask, heads: int, added: int) -> tuple[Tensor | None, ...]:
    """Both masks as the op takes them: visible where True or added; a bool padding apart."""
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
        attn_mask = F.pad(attn_mask, (0, added)) if added else attn_mask
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        padding = F.pad(padding, (0, added)) if added else padding
        if padding.dtype == torch.bool:
            return attn_mask, padding
        ignored = padding == float("-inf")
        if _holds_only_zeros(padding, ignored):  # As nn.TransformerEncoder makes it of a bool mask.
            return attn_mask, ignored
        padding = padding[:, None, None]
        if attn_mask is None:
            return padding, None
        if attn_mask.dtype == torch.bool:
            return torch.where(attn_mask, padding, float("-inf")), None
        return attn_mask + padding, None
    return attn_mask, None


def _holds_only_zeros(padding: Tensor, but: Tensor) -> bool:
    """Whether that is so and can be known at once: not on a GPU, and not where a graph is traced."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if padding.is_cuda or padding.requires_grad or traced:
        return False
    return not padding.masked_fill(but, 0).any()


def _check(module, query, key, value, key_padding_mask, attn_mask) -> None:
    """Raises AssertionError where torch does."""
    dims = query.dim()
    if dims not in (2, 3) or not dims == key.dim() == value.dim():
        raise AssertionError(
            "query, key and value must all be 3-D, or 2-D without a batch,"
            f" got {dims}-D, {key.dim()}-D and {value.dim()}-D"
        )
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(
            f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}"
        )
    same = slice(None) if module._qkv_same_embed_dim else slice(-1)
    if key.shape[same] != value.shape[same]:
        raise AssertionError(
            f"key shape {list(key.shape)} does not match value shape {list(value.shape)}"
        )
    for name, mask, allowed in (
        ("key_padding_mask", key_padding_mask, (dims - 1,)),
        ("attn_mask", attn_mask, (2, 3)),
    ):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"only bool and floating types of {name} are supported, got {mask.dtype}"
            )
        if mask.dim() not in allowed:
            raise AssertionError(
                f"for {dims}-D inputs {name} must be {' or '.join(f'{d}-D' for d in allowed)},"
                f" got {mask.dim()}-D"
            )


def _check_sizes(q, k, attn_mask, key_padding_mask, batched: bool) -> None:
    """Raises RuntimeError or AssertionError, each where torch does."""
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    if k.shape[0] != batch:
        raise RuntimeError(f"query has a batch of {batch}, key one of {k.shape[0]}")
    wanted = [batch, k_len] if batched else [k_len]
    if key_padding_mask is not None and list(key_padding_mask.shape) != wanted:
        raise AssertionError(
            f"key_padding_mask must be {wanted}, got {list(key_padding_mask.shape)}"
        )
    if attn_mask is not None:
        whole = attn_mask.dim() == 3
        wanted = [*([batch * heads] if whole else []), q_len, k_len]
        if list(attn_mask.shape) != wanted:
            raise (AssertionError if whole and not batched else RuntimeError)(
                f"attn_mask must be {wanted}, got {list(attn_mask.shape)}"
            )
