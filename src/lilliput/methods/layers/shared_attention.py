"""Attention computed once for a span of layers: the others weight their own values by the first one's probabilities.

Paper: Beyond KV Caching: Shared Attention for Efficient LLMs (Liao and Vargas, 2024, arXiv 2407.12866): in trained
models the attention of neighbouring layers is much alike, so

    layer s:            A = softmax(q_s k_s^T),  out = W_o,s A v_s
    layers s+1 .. e:                             out = W_o,l A v_l

without queries and keys, their products, and the half of the cache that held those keys. Here a span begins where the
sum of the cosines between the attention of its first layer and of the others is largest for so many layers. How the
cosine is taken (whole matrices, head by head) and several spans at once are ours (reconstructed). Heal the model
afterwards with distill.logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts
from lilliput.methods.layers._span_layers import LeadingAttention, ReusingAttention
from lilliput.methods.layers._spans import Spans


@dataclass(frozen=True)
class SharedAttention(Spans):
    """Let layers reuse the attention probabilities of an earlier layer; they keep values and output alone.

    The cache holds no keys of those layers. Such a model runs in plain torch, not in the native decoder.
    """

    leading, following = LeadingAttention, ReusingAttention
    paper: ClassVar[str] = "shared_attention"
    facts: ClassVar[Facts] = Facts(
        stage="train",
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="smaller KV-cache, smaller; at a loss of quality until it is trained",
    )
