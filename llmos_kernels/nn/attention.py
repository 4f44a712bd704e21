"""Multi-head attention, with the arguments, masks and errors of torch.

Source: Vaswani et al. 2017, arXiv:1706.03762.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_kernels._core.registry import needs_grad
from llmos_kernels.nn.nested import nested_like, nested_rows
from llmos_kernels.nn.packed import PackedKeys, attend_varlen
from llmos_kernels.ops._attention_arguments import MAX_DIM
from llmos_kernels.ops._products import is_traced
from llmos_kernels.ops.attention import scaled_dot_product_attention
from llmos_kernels.ops.linear import project


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` through ``llmos_kernels.scaled_dot_product_attention``.

    The state dict is that of torch. Every mask, dropout and the attention weights are computed by
    the fused kernels; nested tensors go to torch but for self-attention without masks. A query
    whose keys are all masked gets an attention of 0, also where torch returns NaN because weights
    are needed.

    Args:
        embed_dim, num_heads, ...: the arguments of ``torch.nn.MultiheadAttention``, unchanged.

    Returns:
        ``forward(query, key, value, key_padding_mask, need_weights, attn_mask,
        average_attn_weights, is_causal)`` takes as ``query`` [q_len, batch, embed_dim], [batch,
        q_len, embed_dim] if ``batch_first``, or [q_len, embed_dim], and ``key`` and ``value``
        likewise with k_len, kdim and vdim, of the dtype of the parameters. It returns the output,
        of the shape and dtype of ``query``, and the weights [batch, q_len, k_len], [batch,
        num_heads, q_len, k_len] unless averaged, or None. ``attn_mask`` is [q_len, k_len] or
        [batch * num_heads, q_len, k_len], ``key_padding_mask`` [batch, k_len]: bool, True hides a
        key, or floating, added to the scores.

    Raises:
        AssertionError, RuntimeError: where torch raises them: shapes disagree.
        ValueError: the head dim is above 256 or, in training, ``dropout`` is outside [0, 1).
        TypeError: the dtype of an input is not that of the parameters.

    Example:
        >>> x = torch.randn(8, 128, 512)
        >>> out, weights = MultiheadAttention(512, 8, batch_first=True)(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([8, 128, 512]), torch.Size([8, 128, 128]))
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
        if isinstance(key_padding_mask, PackedKeys):
            return self._attend_packed(query, key, value, key_padding_mask), None
        if query.is_nested or key.is_nested or value.is_nested:
            alike = query is key and key is value and not need_weights
            if alike and attn_mask is None and key_padding_mask is None:
                out = _attend_to_itself(self, query)
                if out is not None:
                    return out, None
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        _check(self, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        # As in torch, is_causal replaces attn_mask only in this case. Otherwise attn_mask decides.
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
        attn_mask, key_padding_mask = merge_masks(
            attn_mask, key_padding_mask, self.num_heads, added
        )
        kind = ("mean" if average_attn_weights else "per_head") if need_weights else None
        result = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            self.dropout if self.training else 0.0,
            is_causal,
            key_padding_mask=key_padding_mask,
            return_weights=kind,
        )
        out, weights = result if isinstance(result, tuple) else (result, None)
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        out = project_out(self, out)
        if not batched:
            out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out, weights

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedKeys
    ) -> Tensor:
        """Return the output for packed inputs, [1, total, embed_dim] if ``batch_first``."""
        parts = self._project(query, key, value)
        q, k, v = (_by_head(p, self.num_heads, self.batch_first) for p in parts)
        out = attend_varlen(
            q,
            k,
            v,
            packed.queries.cu_seqlens,
            packed.keys.cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=packed.is_causal,
        ).flatten(2)
        return project_out(self, out if self.batch_first else out.transpose(0, 1))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the projections of query, key and value.

        The same tensor given twice is multiplied with the weights of both in one GEMM.
        """
        e, bias = self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return project_in(self, _unshared(self, query)).split(e, -1)
        if key is value:
            key = value = _unshared(self, key)
        else:
            key, value = _unshared(self, key), _unshared(self, value)
        query, weight = _unshared(self, query), self.in_proj_weight
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is value:
            q_bias, kv_bias = (None, None) if bias is None else bias.split([e, 2 * e])
            q_weight, kv_weight = weight.split([e, 2 * e])
            keys_values = project(key, kv_weight, kv_bias)
            return project(query, q_weight, q_bias), *keys_values.split(e, -1)
        else:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(project, (query, key, value), weights, biases))


def _unshared(attention: Any, x: Tensor) -> Tensor:
    """Return an input of a projection, or a copy of it where torch's projection saves a copy.

    torch transposes ``batch_first`` inputs, so that its product copies them. What was passed may
    then be changed in place before the backward, as in ``x += attention(x, x, x)[0]``.
    """
    if not torch.is_grad_enabled() or not attention.batch_first or x.dim() != 3:
        return x
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    is_trained = needs_grad(*(getattr(attention, name) for name in names))
    if not is_trained or 1 in x.shape[:2] or is_traced(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def project_in(attention: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return query, key and value of ``x`` [..., embed_dim], side by side: [..., 3 * embed_dim]."""
    layer = attention._modules.get("in_proj")  # ``Int8MultiheadAttention`` has one.
    if layer is not None:
        return layer(x)
    return project(x, attention.in_proj_weight, attention.in_proj_bias)


def project_out(attention: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return ``out_proj`` of ``x`` [..., embed_dim]. As in torch, its hooks do not run."""
    layer = attention.out_proj
    int8 = "weight_int8" in layer._buffers
    return layer.forward(x) if int8 else project(x, layer.weight, layer.bias)


def _attend_to_itself(attention: Any, nested: Tensor) -> Tensor | None:
    """Return the self-attention of a nested tensor; None where torch's has to compute it."""
    if (
        nested.layout != torch.strided
        or not nested.is_contiguous()
        or nested.dim() != 3  # One without sequences has no width.
        or not attention._qkv_same_embed_dim
        or attention.bias_k is not None
        or attention.add_zero_attn
        or attention.head_dim > MAX_DIM
    ):
        return None
    x, cu_seqlens = nested_rows(nested)
    q, k, v = project_in(attention, x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    p = attention.dropout if attention.training else 0.0
    out: Any = scaled_dot_product_attention(
        q, k, v, dropout_p=p, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
    )
    return nested_like(nested, project_out(attention, out.flatten(1)))


def _by_head(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """Return a projection, 2-D or 3-D, as a view [batch, heads, length, head_dim]."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _append(x: Tensor, row: Tensor) -> Tensor:
    """Return ``x`` [batch, heads, length, head_dim], and ``row`` [1, 1, embed_dim] at its end."""
    batch, heads, _, dim = x.shape
    return torch.cat([x, row.to(x.dtype).view(1, heads, 1, dim).expand(batch, -1, -1, -1)], 2)


def merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, added: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``attn_mask`` and ``key_padding_mask`` as ``scaled_dot_product_attention`` takes them.

    Args:
        attn_mask: as in torch, [q_len, k_len] or [batch * heads, q_len, k_len]: bool, True hides a
            key; or float, which is added to the scores.
        key_padding_mask: as in torch, [batch, k_len] or [k_len], of the same kinds.
        heads: the number of heads.
        added: the number of keys that were appended. Every query sees them.

    Returns:
        ``attn_mask``, in which True shows a key, and ``key_padding_mask`` [batch, k_len], in which
        True hides one. A float padding mask becomes part of ``attn_mask``.
    """
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
        hidden = padding == float("-inf")
        if _is_zero_elsewhere(padding, hidden):  # nn.TransformerEncoder makes this of a bool mask.
            return attn_mask, hidden
        padding = padding[:, None, None]
        if attn_mask is None:
            return padding, None
        if attn_mask.dtype == torch.bool:
            return torch.where(attn_mask, padding, float("-inf")), None
        return attn_mask + padding, None
    return attn_mask, None


def _is_zero_elsewhere(padding: Tensor, hidden: Tensor) -> bool:
    """Return whether ``padding`` is 0 where it is not ``hidden``.

    Always False on CUDA, on meta and while tracing, where looking would synchronise or fail.
    """
    traced = is_traced(padding) or torch._C._are_functorch_transforms_active()
    if padding.is_cuda or padding.is_meta or padding.requires_grad or traced:
        return False
    return not padding.masked_fill(hidden, 0).any()


def _check(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Raise AssertionError where torch does: for dimensions, widths and dtypes of masks."""
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
    alike = slice(None) if module._qkv_same_embed_dim else slice(-1)
    if key.shape[alike] != value.shape[alike]:
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


def _check_sizes(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batched: bool,
) -> None:
    """Raise RuntimeError or AssertionError, each where torch does: for sizes of batches and masks.

    ``q`` is [batch, heads, q_len, head_dim] and ``k`` [batch, heads, k_len, head_dim].
    """
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    if k.shape[0] != batch:
        raise RuntimeError(f"query has a batch of {batch}, key one of {k.shape[0]}")
    expected = [batch, k_len] if batched else [k_len]
    if key_padding_mask is not None and list(key_padding_mask.shape) != expected:
        raise AssertionError(
            f"key_padding_mask must be {expected}, got {list(key_padding_mask.shape)}"
        )
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3
        expected = [*([batch * heads] if by_head else []), q_len, k_len]
        if list(attn_mask.shape) != expected:
            raise (AssertionError if by_head and not batched else RuntimeError)(
                f"attn_mask must be {expected}, got {list(attn_mask.shape)}"
            )
