import numpy as np
import pytest
import torch
from numpy_llama import NumpyLlama, kept_positions, softmax
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from lilliput.errors import UserError
from lilliput.methods.cache import InfiniPot
from lilliput.methods.cache._rotary import turned

PIECES = (9, 3, 1, 1, 4, 5, 1, 1, 1, 5, 4)  # together 35


class NumpyPot(NumpyLlama):
    """The rule of the pot, written down from its description."""

    def __init__(self, model, policy, catalyst=None):
        super().__init__(model)
        self.policy, self.catalyst, self.text, self.last, self.distilled = policy, catalyst, [], None, 0

    def take(self, tokens):
        if len(self.entries[0][0]) + len(tokens) > self.policy.budget:
            self.read(self.text[-self.policy.window :] if self.catalyst is None else self.catalyst, store=False)
            self.evict(self.distil)
            self.distilled += 1
        logits = self.read(tokens)
        before = logits[:-1] if self.last is None else np.concatenate([self.last[None], logits[:-1]])
        surprise = [-np.log(softmax(row)[token]) for row, token in zip(before, tokens[len(tokens) - len(before) :])]
        for layer in self.entries:
            for head in layer:
                for entry, value in zip(head[len(head) - len(surprise) :], surprise):
                    entry.novelty = value
        self.last, self.text = logits[-1], [*self.text, *tokens]
        return logits

    def distil(self, entries, length):
        novel = int(self.policy.kept * self.policy.novelty)
        by_taste = sorted(entries, key=lambda e: -np.mean(e.taste))
        rest = sorted(by_taste[self.policy.kept - novel :], key=lambda e: -e.novelty)
        stay = sorted(by_taste[: self.policy.kept - novel] + rest[:novel], key=lambda e: e.home)
        for j, entry in enumerate(stay):
            entry.taste.clear()
            if self.policy.reset_positions:
                entry.position = length - len(stay) + j
        return stay


@pytest.mark.parametrize("catalyst", [None, [7, 8, 9]])
@pytest.mark.parametrize("reset", [True, False])
def test_it_reads_and_distils_as_described(sharp_llama, text, catalyst, reset):
    policy = InfiniPot(budget=12, keep=0.5, novelty=0.34, window=3, reset_positions=reset)
    cache = policy.cache(sharp_llama, None if catalyst is None else torch.tensor(catalyst))
    reference = NumpyPot(sharp_llama, policy, catalyst)
    for piece in text.split(PIECES):
        found = sharp_llama(input_ids=piece[None], past_key_values=cache, use_cache=True).logits[0]
        np.testing.assert_allclose(found.detach().numpy(), reference.take(piece.tolist()), rtol=3e-3, atol=3e-3)
        expected = [[sorted(e.position for e in head) for head in layer] for layer in reference.entries]
        assert kept_positions(cache) == expected
    assert reference.distilled >= 3


def test_after_distilling_keys_stand_together_before_the_next_token(sharp_llama, text):
    cache = InfiniPot(budget=12, keep=0.5).cache(sharp_llama)
    for piece in text[:14].split((12, 2)):
        sharp_llama(piece[None], past_key_values=cache)
    assert kept_positions(cache) == [[list(range(6, 14))] * 2] * 2


def test_turning_a_key_gives_the_key_of_the_other_position(sharp_llama):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotary, keys = sharp_llama.model.rotary_emb, torch.randn(1, 2, 5, 8)
    here, there = torch.tensor([[0, 3, 9, 40, 7]]), torch.tensor([[0, 8, 90, 41, 2]])
    at = [apply_rotary_pos_emb(keys, keys, *rotary(keys, position_ids=p))[1] for p in (here, there)]
    by = (there - here)[:, None].expand(1, 2, 5)
    torch.testing.assert_close(turned(at[0], by, rotary.inv_freq), at[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned(keys, by, rotary.inv_freq[:2])[..., 4:], keys[..., 4:])  # those carry none


def test_the_caller_gets_the_logits_it_asked_for(sharp_llama, text):
    plain = sharp_llama(text[None]).logits
    for asked, expected in ((0, plain), (1, plain[:, -1:]), (torch.tensor([2, 5]), plain[:, [2, 5]])):
        found = sharp_llama(text[None], past_key_values=InfiniPot().cache(sharp_llama), logits_to_keep=asked).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hooks_are_set_once_and_leave_other_caches_alone(sharp_llama, text):
    for _ in range(3):
        InfiniPot().cache(sharp_llama)
    assert len(sharp_llama._forward_pre_hooks) == len(sharp_llama._forward_hooks) == 1
    out = sharp_llama(text[None], past_key_values=DynamicCache(), logits_to_keep=1)
    assert out.logits.shape[1] == 1


def test_a_prompt_that_does_not_fit_at_once_is_refused_with_the_size_of_its_pieces(sharp_llama, text):
    policy = InfiniPot(budget=12, keep=0.5)
    with pytest.raises(UserError, match=r"35 tokens.*prefill_chunk_size=6"):
        sharp_llama.generate(text[None], max_new_tokens=2, past_key_values=policy.cache(sharp_llama))
    done = sharp_llama.generate(
        text[None], max_new_tokens=20, eos_token_id=63, past_key_values=policy.cache(sharp_llama), prefill_chunk_size=6
    )
    assert done.shape[1] > 35


def test_padding_and_embeddings_are_refused(sharp_llama, text):
    ids = text[:20].view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(UserError, match="padding"):
        sharp_llama(ids, attention_mask=mask, past_key_values=InfiniPot().cache(sharp_llama))
    with pytest.raises(UserError, match="input_ids"):
        sharp_llama(inputs_embeds=torch.zeros(1, 3, 32), past_key_values=InfiniPot().cache(sharp_llama))


def test_a_model_without_rotary_positions_can_leave_them(text):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    with pytest.raises(UserError, match="reset_positions=False"):
        InfiniPot().cache(model)
    cache = InfiniPot(budget=12, reset_positions=False).cache(model)
    for piece in text.split(5):
        assert torch.isfinite(model(piece[None], past_key_values=cache).logits).all()
    assert cache.held <= 12


def test_rows_of_a_batch_are_distilled_each_on_its_own(sharp_llama, text):
    policy = InfiniPot(budget=12, window=3)
    ids = torch.stack([text[:17], text[18:]])
    both, alone = policy.cache(sharp_llama), [policy.cache(sharp_llama) for _ in ids]
    for first in range(0, 17, 5):
        piece = ids[:, first : first + 5]
        found = sharp_llama(piece, past_key_values=both).logits
        expected = [sharp_llama(row[None], past_key_values=cache).logits[0] for row, cache in zip(piece, alone)]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)
