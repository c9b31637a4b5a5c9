"""Keys and values computed once for a span of layers: the others attend to the first one's with queries of their own.

Paper: ECHO-LLaMA: Efficient Caching for High-Performance LLaMA Training (Dialameh et al., 2025, arXiv 2505.17331): from
a layer s on, the layers compute queries alone, and a pretrained model is converted layer by layer with training between

    layer s:            K = rotary(W_k,s x),  V = W_v,s x,  out = W_o,s attention(q_s, K, V)
    layers s+1 .. e:                                        out = W_o,l attention(q_l, K, V)

RoPE is applied once, where the keys are made. The gradual way is this method on one more layer at a time, from the last
one down, with distill.logits between; that the span's first layer keeps its own projections is ours (reconstructed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lilliput.method import BLOCK_COUNT, FLOAT_WEIGHTS, OUTPUT_SHAPE, UNLABELLED, Facts, knob
from lilliput.methods.layers._span_layers import BorrowingAttention, LendingAttention
from lilliput.methods.layers._spans import Spans


@dataclass(frozen=True)
class SharedKv(Spans):
    """Let layers attend to the keys and values of an earlier layer; they keep queries and output alone.

    The cache holds nothing for those layers. Such a model runs in plain torch, not in the native decoder.
    """

    choice: str = knob(
        "last",
        choices=("similar", "last"),
        help="similar: where attention is most alike on the calibration data; last: the last layers, one span",
    )
    leading, following = LendingAttention, BorrowingAttention
    paper: ClassVar[str] = "echo_llama"
    facts: ClassVar[Facts] = Facts(
        stage="train",
        keeps={FLOAT_WEIGHTS, OUTPUT_SHAPE, BLOCK_COUNT},
        data=UNLABELLED,
        effect="smaller KV-cache, smaller; at a loss of quality until it is trained",
    )
