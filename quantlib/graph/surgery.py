"""Modules that hide their layers from tracing, in a form that shows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlib.errors import ModelError


class SelfAttention(nn.Module):
    """torch's MultiheadAttention of a sequence with itself: its projections are linear layers of their own.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        width = original.embed_dim
        self.num_heads, self.batch_first = original.num_heads, original.batch_first
        self.in_proj = _linear(width, 3 * width, original.in_proj_weight, original.in_proj_bias)
        self.out_proj = _linear(width, width, original.out_proj.weight, original.out_proj.bias)

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
        """Tokens [N, L, E], or [L, N, E], to tokens; and the weights [N, L, L] where they are needed.

        Raises:
            ModelError: If it is given something that only the original can do.
        """
        if query is not key or key is not value or key_padding_mask is not None or is_causal or query.dim() != 3:
            raise ModelError("attention between two sequences, or with padding, is taken as a whole")
        x = query if self.batch_first else query.transpose(0, 1)
        batch, tokens, width = x.shape
        size = width // self.num_heads
        split = self.in_proj(x).reshape(batch, tokens, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
        queries, keys, values = split[0], split[1], split[2]  # (N, heads, L, size)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.logical_not()  # torch's two functions mean opposite things by True.
        weights = None
        if need_weights:
            product = queries @ keys.transpose(-2, -1) * size**-0.5
            weights = (product if attn_mask is None else product + attn_mask).softmax(-1)
            mixed = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask)
        y = self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return (y if self.batch_first else y.transpose(0, 1)), weights


class EncoderLayer(nn.Module):
    """torch's TransformerEncoderLayer, without its branches."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm_first, self.activation = original.norm_first, original.activation
        self.self_attn: nn.Module = original.self_attn
        self.linear1, self.dropout, self.linear2 = original.linear1, original.dropout, original.linear2
        self.norm1, self.norm2 = original.norm1, original.norm2
        self.dropout1, self.dropout2 = original.dropout1, original.dropout2

    def forward(self, src: Tensor, *_: object, **__: object) -> Tensor:
        """Tokens to tokens."""
        x = src
        if self.norm_first:
            x = x + self._attend(self.norm1(x))
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x))
        y: Tensor = self.norm2(x + self._feed(x))
        return y

    def _attend(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout1(self.self_attn(x, x, x, need_weights=False)[0])
        return y

    def _feed(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return y


class Encoder(nn.Module):
    """torch's TransformerEncoder, without its branches."""

    def __init__(self, original: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.norm = original.layers, original.norm

    def forward(self, src: Tensor, *masks: object, **named: object) -> Tensor:
        """Tokens to tokens.

        Raises:
            ModelError: If there is a mask.
        """
        if any(each is not None and each is not False for each in (*masks, *named.values())):
            raise ModelError("a transformer with masks is taken as a whole")
        x = src
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)


def replace_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Replace attention in a model, in place, by what computes the same and can be traced.

    Returns:
        The modules that were replaced, by path.
    """
    originals: dict[str, nn.Module] = {}
    for path, module in list(model.named_modules()):
        replaced = _replacement(module)
        if path and replaced is not None:
            originals[path] = module
            model.set_submodule(path, replaced.eval())
    return originals


def _replacement(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.MultiheadAttention:
        plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return SelfAttention(module) if plain else None
    if type(module) is nn.TransformerEncoderLayer:
        return EncoderLayer(module)
    return Encoder(module) if type(module) is nn.TransformerEncoder else None


def _linear(in_features: int, out_features: int, weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    """A linear layer with given parameters."""
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    assert isinstance(weight, nn.Parameter)
    layer.weight = weight
    if isinstance(bias, nn.Parameter):
        layer.bias = bias
    return layer
