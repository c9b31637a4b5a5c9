"""Tiny models that write, and what their texts are compared with."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from lilliput.methods.decode import GatedLoraMtp, SpeculativeStreaming
from lilliput.methods.decode._backends import Backend


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture
def make_llama():
    """`make_llama(layers, seed, **config)`: random weights, large enough that texts are not one word for ever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers=2, seed=0, vocabulary=64, **config):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True}
        options = {**sizes, **special, "max_position_embeddings": 128, **config}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        return model

    return make


@pytest.fixture
def model(make_llama):
    return make_llama()


@pytest.fixture
def prompt():
    """`prompt(length, seed)`: token ids (1, length) of the 64."""

    def make(length=9, seed=0):
        return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def counting_work(llama_work):
    """A workload whose model counts in a circle of 64, which is easy to guess, with windows of such text."""
    model, circle = llama_work.model, torch.arange(64).repeat(4)
    windows = [{"input_ids": torch.stack([circle[s : s + 24] for s in range(0, 128, 4)])}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.requires_grad_(True)
    for _ in range(150):
        optimizer.zero_grad()
        ids = windows[0]["input_ids"]
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    llama_work.training = windows
    return llama_work


@pytest.fixture
def make_rows():
    """`make_rows(kind, model, count, std)`: masks or streams whose adapters are random, so that drafts are too."""

    def make(kind, model, count=3, std=0.5):
        masks = GatedLoraMtp(masks=count, rank=4)
        settings = masks if kind == "masks" else SpeculativeStreaming(streams=count, layers=1, rank=4)
        part, draws = settings.new(model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if "up" in name or name.startswith("out"):
                    parameter.copy_(std * torch.randn(parameter.shape, generator=draws))
        return part

    return make


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, tokens):
        self.heard += tokens.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.fixture
def listener():
    return Listener()


class Table(Backend):
    """Logits (V, V, V) by the last two tokens, read from a table: fast, and its distributions are known exactly."""

    def __init__(self, logits):
        self.logits, self.text = logits, []

    @property
    def filled(self):
        return len(self.text)

    def extend(self, fresh, draft=None):
        self.text += fresh.tolist()
        tokens, parents = (draft.tokens, draft.parents) if draft else ([], [])
        ways = [self.text[-2:]]
        for token, parent in zip(tokens, parents):
            ways.append([ways[parent + 1][-1], token])
        self.text += tokens
        return torch.stack([self.logits[a, b] for a, b in ways])

    def gather(self, start, nodes):
        self.text = self.text[:start] + [self.text[start + node] for node in nodes] + self.text[start + len(nodes) :]

    def rewind(self, length):
        del self.text[length:]


@pytest.fixture
def make_table():
    """`make_table(seed, size)`: a back end of that many tokens with random logits."""
    return lambda seed, size=5: Table(2 * torch.randn(size, size, size, generator=torch.Generator().manual_seed(seed)))


def p_value(counts, p):
    """Of Pearson's chi-square test of counts against the probabilities p; 0 when something happened that cannot.

    Cells that are expected less than five times are put together.
    """
    counts, expected = counts.double().flatten(), p.double().flatten() * counts.sum()
    if bool(((expected == 0) & (counts > 0)).any()):
        return 0.0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    possible = expected > 0
    expected = expected[possible] * counts.sum() / expected.sum()  # scipy wants equal sums
    return float(chisquare(counts[possible], expected).pvalue)


@pytest.fixture
def likely():
    """`likely(counts, p)`: whether draws so far from p are no rarer than one in ten thousand."""
    return lambda counts, p: p_value(counts, p) > 1e-4


@pytest.fixture
def draws_are_likely(likely):
    """`draws_are_likely(model, decoder, parts)`: three tokens drawn after a prompt, often, against their exact
    probabilities by a model of four tokens. Of these the last two come from a pass with a draft, if that holds."""

    def check(model, decoder, parts, draws=600):
        prompt, counts = torch.tensor([[1, 2, 3]]), torch.zeros(4, 4, 4)
        torch.manual_seed(0)
        for _ in range(draws):
            found = model.generate(prompt, custom_generate=decoder, do_sample=True, top_k=0, max_new_tokens=3, **parts)
            counts[tuple(found[0, 3:].tolist())] += 1
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        with torch.no_grad():
            p = model(torch.cat([prompt.expand(16, -1), pairs], 1)).logits.double().softmax(-1).view(4, 4, 5, 4)
        exact = p[0, 0, 2][:, None, None] * p[:, 0, 3][:, :, None] * p[:, :, 4]
        return likely(counts, exact)

    return check


@pytest.fixture
def make_words():
    """`make_words(order)`: a tokenizer of 64 words, in that order of their numbers if it is given."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def make(order=range(64)):
        words = {f"word{i}": place for place, i in enumerate(order)}
        inner = Tokenizer(models.WordLevel(words, unk_token="word0"))
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="word0")

    return make
