"""Greedy tokens on packed weights: the native decoder, its own steps one by one, and the plain torch reference.

Activations are rounded to 8 bits before a product, so that a last bit that differs may become a whole step. The native
decoder is its steps to the bit; the reference sums in other orders, and may choose another token where two are as good.
"""

import pytest
import torch
from test_decoder import NativeSteps, build, mix_formats, tokens

from lilliput.kernels.decoder import Decoder, Reference
from lilliput.methods.quantize.codebook import Codebook
from lilliput.methods.quantize.group import Group

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, NEW, DRAWS = 20, 40, 3
MODELS = {
    "mixed": lambda: mix_formats(build("Llama", {})),
    "int4": lambda: Group(bits=4, group=32).apply(build("Llama", {"tie_word_embeddings": True})),
    "tables": lambda: Codebook(bits=4, weighting=False).apply(build("Llama", {"tie_word_embeddings": True})),
}


class Jittered(Reference):
    """The reference with what enters a product changed by up to 4 units in the last place, by chance."""

    generator = torch.Generator().manual_seed(0)

    def linear(self, layer, x):
        units = torch.randint(-4, 5, x.shape, generator=self.generator)
        return super().linear(layer, x * (1 + units * 2.0**-23))


def greedy(decoder, prompt):
    """NEW tokens, and the logits (NEW, V) that chose them."""
    cache, row, chosen, logits = decoder.cache(len(prompt) + NEW), prompt, [], []
    for _ in range(NEW):
        logits.append(decoder(row, cache)[0])
        row = logits[-1].argmax(keepdim=True)
        chosen.append(int(row))
    return chosen, torch.stack(logits)


def along(decoder, prompt, continuation):
    """Logits (len(continuation) + 1, V) after the prompt and after each token of the continuation."""
    ids = torch.cat([prompt, torch.tensor(continuation, dtype=torch.int64)])
    return decoder(ids, decoder.cache(len(ids)), every=True)[len(prompt) - 1 :]


@pytest.mark.parametrize("name", MODELS)
def test_the_native_decoder_is_its_steps_one_by_one(name):
    model = MODELS[name]()
    native, steps = Decoder(model), NativeSteps(model)
    for seed in range(PROMPTS):
        prompt = tokens(1 + seed, seed)
        mine, theirs = greedy(native, prompt), greedy(steps, prompt)
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("name", MODELS)
def test_another_token_comes_only_where_two_are_as_good(name):
    """At the first token that differs the two lie closer, in the reference, than the noise between the paths on the
    same text before it; and it is no larger than the reference's own when last bits of its activations change."""
    model = MODELS[name]()
    native, reference, jittered = Decoder(model), Reference(model), Jittered(model)
    between, own = [], []
    for seed in range(PROMPTS):
        prompt = tokens(1 + seed, seed)
        mine, theirs = greedy(native, prompt)[0], greedy(reference, prompt)[0]
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), NEW - 1)
        found, expected, *others = (along(d, prompt, mine[:same]) for d in (native, reference, *[jittered] * DRAWS))
        off = (found - expected).abs()
        between.append(float(off.max()))
        own.append(max(float((other - expected).abs().max()) for other in others))
        a, b = theirs[same], mine[same]
        assert float(expected[-1, a] - expected[-1, b]) <= float(off[-1, a] + off[-1, b]) + own[-1]
    assert max(between) <= 2 * max(own)
