"""A Llama in numpy, in float64, that keeps a list of entries for each head of keys with all that ever happened to them.

The reference of the cache policies: rules here are plain functions over whole histories, nothing is accumulated.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Entry:
    key: np.ndarray  # not turned
    value: np.ndarray
    home: int  # position in the text
    position: int  # where its key is turned to
    seen: list = field(default_factory=list)  # its probability for each query, the mean over query heads
    taste: list = field(default_factory=list)  # the same for a prompt that is not kept
    novelty: float = 0.0


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class NumpyLlama:
    """Reads tokens piece by piece; `entries[layer][head]` are the kept ones."""

    def __init__(self, model):
        self.config, self.length = model.config, 0
        self.weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.entries = [[[] for _ in range(self.config.num_key_value_heads)] for _ in model.model.layers]

    def turn(self, x, position):
        """Rotary positions as multiplication of complex numbers."""
        half = len(x) // 2
        theta = self.config.rope_parameters["rope_theta"] ** (-np.arange(half) / half)
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta)
        return np.concatenate([z.real, z.imag])

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.weights[name]

    def read(self, tokens, store=True):
        """Logits (tokens, V) after each token; with `store` False nothing is kept but the taste of the entries."""
        w, positions = self.weights, self.length + np.arange(len(tokens))
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(len(self.entries)):
            block = f"model.layers.{i}."
            h = self.norm(x, block + "input_layernorm.weight")
            x = x + self.attention(i, h, positions, store) @ w[block + "self_attn.o_proj.weight"].T
            h = self.norm(x, block + "post_attention_layernorm.weight")
            gate, up = (h @ w[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[block + "mlp.down_proj.weight"].T
        self.length += len(tokens) if store else 0
        return self.norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T

    def attention(self, layer, h, positions, store):
        names = (f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkv")
        q, k, v = ((h @ self.weights[name].T).reshape(len(h), -1, self.config.head_dim) for name in names)
        out, group = np.zeros_like(q), q.shape[1] // k.shape[1]
        for g, old in enumerate(self.entries[layer]):
            new = [Entry(k[t, g], v[t, g], int(p), int(p)) for t, p in enumerate(positions)]
            for t, position in enumerate(positions):
                visible = old + new[: t + 1]
                keys, values = np.stack([self.turn(e.key, e.position) for e in visible]), [e.value for e in visible]
                mean = 0.0
                for head in range(g * group, (g + 1) * group):
                    p = softmax(keys @ self.turn(q[t, head], position) / np.sqrt(q.shape[2]))
                    out[t, head] = p @ np.stack(values)
                    mean = mean + p / group
                for entry, value in zip(visible, mean):
                    (entry.seen if store else entry.taste).append(value)
            if store:
                self.entries[layer][g] = old + new
        return out.reshape(len(h), -1)

    def evict(self, rule):
        """`rule(entries, length)` gives the entries that stay."""
        self.entries = [[rule(head, self.length) for head in layer] for layer in self.entries]

    def homes(self):
        return [[sorted(e.home for e in head) for head in layer] for layer in self.entries]


def kept_positions(cache):
    """The same of a cache: positions by layer and head, of a batch of one."""
    return [[sorted(p for p in head.tolist() if p >= 0) for head in layer.positions[0]] for layer in cache.layers]


PIECES = (11, 1, 1, 1, 1, 1, 1, 5, 1, 1, 1, 4, 4, 1, 1)  # a prompt longer than the budgets, steps, and longer pieces


def assert_same_as_reference(model, cache, rule, tokens):
    """Logits and kept entries after every piece; the numbers of kept entries seen on the way are given back."""
    reference, sizes = NumpyLlama(model), []
    for piece in tokens.split(PIECES):
        found = model(piece[None], past_key_values=cache).logits[0]
        expected = reference.read(piece.numpy())
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-3, atol=2e-3)
        reference.evict(rule)
        assert kept_positions(cache) == reference.homes()
        sizes.append(len(reference.entries[0][0]))
    return sizes


def heavy(budget, newest):
    """The rule of heavy hitters: the last ones, then the largest sums of all probabilities so far."""

    def rule(entries, length):
        last = [e for e in entries if e.home >= length - newest]
        others = sorted((e for e in entries if e.home < length - newest), key=lambda e: -sum(e.seen))
        return last + others[: budget - len(last)]

    return rule
