"""All tokens, in 8, 4 or 2 bits.   code = round((x - low) / step),  x' = low + step code

A channel of the keys has outliers that stay large from token to token, so keys share a grid along `group` tokens of a
channel; values have none, and share it along `group` channels of a token. The last tokens stay as they are: `residual`
of them, and up to `group` - 1 more until a whole group can be coded. Every step decodes one layer after the other, so
one layer's keys and values are whole at a time. A prompt is attended to exactly and coded afterwards. Padding on the
left is coded like any token, so it shifts the groups.

Paper: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.method import CachePolicy, Facts, knob
from lilliput.methods.cache._cache import PolicyCache, PolicyLayer, head_width, policy_layers

GRID = torch.float16  # of low and step


def encode(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, low and step of x (..., n, d) with one grid along `dim`; codes are packed 8 / bits to a byte along d.

    low and step keep `dim` with size 1. Raises UserError when x does not fit float16.
    """
    low, high = x.amin(dim, keepdim=True).to(GRID), x.amax(dim, keepdim=True)
    step = ((high.float() - low.float()) / (2**bits - 1)).clamp_min(0).to(GRID)
    if not (torch.isfinite(low).all() and torch.isfinite(step).all()):
        raise UserError("keys or values beyond the range of float16 cannot be coded; use another cache policy")
    distance = (x.float() - low.float()) / step.float().masked_fill(step == 0, 1.0)
    codes = distance.round().clamp(0, 2**bits - 1).to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8)
    return (parts << shifts).sum(-1, dtype=torch.uint8), low, step


def decode(codes: Tensor, low: Tensor, step: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers (..., n, d) that `encode` rounded to."""
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    whole = ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    return torch.addcmul(low.float(), whole.float(), step.float()).to(dtype)


class LowBitLayer(PolicyLayer):
    """Codes of the older tokens in whole groups; `keys` and `values` (B, heads, tokens, d) hold the last ones.

    key codes (B, heads, groups, group, d bits / 8), value codes (B, heads, tokens, d / group, group bits / 8).
    """

    key_codes: Tensor | None = None
    key_low: Tensor
    key_step: Tensor
    value_codes: Tensor
    value_low: Tensor
    value_step: Tensor

    def __init__(self, bits: int, group: int, residual: int):
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens seen and the new ones."""
        return self.seen + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, heads, all tokens, d): the older ones decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        whole = self._decoded(self.keys, self.values)
        self.seen += key_states.shape[2]
        self._encode_oldest((self.keys.shape[2] - self.residual) // self.group * self.group)
        return whole

    def _decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The coded tokens with `keys` and `values` behind them."""
        if self.key_codes is None:
            return keys, values
        old = decode(self.key_codes, self.key_low, self.key_step, self.bits, keys.dtype).flatten(2, 3)
        old_values = decode(self.value_codes, self.value_low, self.value_step, self.bits, values.dtype).flatten(3, 4)
        return torch.cat([old, keys], 2), torch.cat([old_values, values], 2)

    def _encode_oldest(self, count: int) -> None:
        """Turn the oldest `count` tokens of the full-precision part into codes."""
        if count <= 0:
            return
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        key_parts = encode(keys.unflatten(2, (-1, self.group)), self.bits, -2)
        value_parts = encode(values.unflatten(3, (-1, min(self.group, values.shape[3]))), self.bits, -1)
        names = (f"{side}_{part}" for side in ("key", "value") for part in ("codes", "low", "step"))
        first = self.key_codes is None
        for name, part in zip(names, key_parts + value_parts):
            setattr(self, name, part if first else torch.cat([getattr(self, name), part], 2))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()


@dataclass(frozen=True)
class LowBit(CachePolicy):
    """Keep every token, the older ones in a few bits per number."""

    bits: int = knob(4, choices=(8, 4, 2), help="of a key or value")
    group: int = knob(
        32, choices=(16, 32, 64, 128), help="numbers on one grid: tokens of a channel, for values channels"
    )
    residual: int = knob(128, low=0, help="last tokens kept as they are")

    facts: ClassVar[Facts] = Facts(stage="serve", effect="smaller cache")

    def cache(self, model: nn.Module) -> PolicyCache:
        layers = policy_layers(model, self.name(), lambda: LowBitLayer(self.bits, self.group, self.residual))
        width = head_width(model)
        if width % min(self.group, width) or min(self.group, width) * self.bits % 8:
            raise UserError(f"LowBit.group is {self.group}, which does not divide heads of {width}; give a smaller one")
        return PolicyCache(layers)
