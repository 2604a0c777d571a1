"""Attention as the operations that it consists of, for the tape to record one by one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ZsuError

if TYPE_CHECKING:
    from .tape import Tape


def scaled_dot_product_attention(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **kwargs
) -> Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention."""
    if dropout_p or kwargs.get("enable_gqa"):
        raise ZsuError("attention with dropout or grouped queries", where="attention", remedy="call model.eval()")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    if tape.attention == "cp-lrp" and value in tape.origins:  # constant weights
        query, key = tape.aside((query.detach(), key.detach()), "attention", gate=False)
    if attn_mask is not None:
        tape.outside.see(attn_mask, "")
    with tape:  # recorded as if the model did it
        scores = torch.matmul(query * scale, key.transpose(-2, -1))
        scores = scores if attn_mask is None else scores + attn_mask
        return torch.matmul(F.softmax(scores, -1), value)


def multi_head_attention_forward(
    tape: Tape, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
    add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
    need_weights=True, attn_mask=None, use_separate_proj_weight=False, **kwargs
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """torch's multi_head_attention_forward."""
    where = tape.where(in_proj_weight, "attention")
    if use_separate_proj_weight or bias_k is not None or add_zero_attn or key_padding_mask is not None:
        remedy = "use nn.MultiheadAttention without kdim, vdim, add_bias_kv, add_zero_attn and padding mask"
        raise ZsuError("attention with separate projections, extra keys or padding", where=where, remedy=remedy)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.detach().chunk(3)
    weights = in_proj_weight.detach().chunk(3)
    for t in (*weights, *(b for b in biases if b is not None)):
        tape.outside.see(t, "")
    tape.parts += weights  # kept alive, because names go by id
    tape.names |= {id(w): f"{where}.{letter}.weight" for letter, w in zip("qkv", weights, strict=True)}

    def project(t: Tensor, w: Tensor, b: Tensor | None) -> Tensor:  # (L, N, E) -> (N, heads, L, d)
        return F.linear(t.transpose(0, 1), w, b).unflatten(2, (num_heads, -1)).transpose(1, 2)

    constant = tape.attention == "cp-lrp" and value in tape.origins
    if constant:
        query, key = tape.aside((query.detach(), key.detach()), "attention", gate=False)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads))  # (N heads, L, L) -> (N, heads, L, L)
    with tape:
        q, k, v = (project(*of) for of in zip((query, key, value), weights, biases, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)  # (N, L, E)
        out = F.linear(out, out_proj_weight, out_proj_bias).transpose(0, 1)  # (L, N, E)
    if not need_weights:
        return out, None
    with torch.no_grad():
        weights = (q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)).softmax(-1).mean(1)  # (N, L, L)
    return out, tape.aside(weights, "softmax", gate=True)
