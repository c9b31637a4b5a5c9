import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lilliput.errors import UserError
from lilliput.methods.train._adapting import LORA
from lilliput.methods.train.verified_stream import ProbeVerifier, VerifiedStream, answer_loss, padded, sample

SMALL = VerifiedStream(candidates=4, new_tokens=5, block=2, steps=2, batch=4, lr=1e-2, part="ffn_out", temperature=1.0)
WANTED = torch.arange(30, 64)  # the tokens that the made-up verifier likes


def prompts(count=6, longest=9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (longest - i % 3,), generator=generator) for i in range(count)]


def share_of_wanted(prompt, answers):
    return torch.tensor([float(torch.isin(a, WANTED).float().mean()) for a in answers])


def tokens(answers):
    return [a.tokens.tolist() for a in answers]


# --- sampling --------------------------------------------------------------------------------------------------


def test_greedy_answers_in_a_padded_batch_are_those_of_each_prompt_alone(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    found = sample(tiny_llama, prompts(), 1, 6, 0.0, seed=0)
    for prompt, (answer,) in zip(prompts(), found):
        alone = tiny_llama.generate(prompt[None], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer.tolist() == alone[0, len(prompt) :].tolist()


def test_samples_follow_their_seed_and_leave_torchs_random_state(tiny_llama, fingerprint):
    before, state = fingerprint(tiny_llama), torch.get_rng_state()
    one, again, other = (sample(tiny_llama, prompts(), 3, 5, 1.0, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(tiny_llama) == before
    listed = [[a.tolist() for answers in found for a in answers] for found in (one, again, other)]
    assert listed[0] == listed[1] != listed[2]
    assert [len(answers) for answers in one] == [3] * 6


def test_an_answer_ends_with_the_end_token(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    endless = sample(tiny_llama, prompts(1), 1, 4, 5.0, 0)[0][0].tolist()
    assert len(endless) == 4
    tiny_llama.generation_config.eos_token_id = [endless[2], endless[3]]
    found = sample(tiny_llama, prompts(1), 1, 4, 5.0, 0)[0][0].tolist()
    assert found == endless[: endless.index(endless[2]) + 1]


def test_padding_goes_to_the_side_that_is_asked_for():
    texts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    ids, mask = padded(texts, 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = padded(texts, 9, left=True)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_loss_is_that_of_the_answers_tokens_alone(tiny_llama):
    pairs = [(p, torch.arange(3, 3 + n)) for p, n in zip(prompts(), (2, 5, 1))]
    summed, count = 0.0, 0
    for prompt, answer in pairs:
        ids = torch.cat([prompt, answer])
        logp = tiny_llama(input_ids=ids[None]).logits[0].log_softmax(-1)
        summed -= sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(answer.tolist()))
        count += len(answer)
    assert float(answer_loss(tiny_llama, pairs)) == pytest.approx(summed / count, rel=1e-5)


# --- the stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all", LORA])
def test_it_learns_what_the_verifier_likes_and_is_restored(tiny_llama, part, fingerprint):
    if part == LORA:
        pytest.importorskip("peft")
    before, state = fingerprint(tiny_llama), torch.get_rng_state()
    asked = prompts(2) * 4
    method = SMALL.with_(threshold=0.5, steps=12, lr=3e-2, part=part)
    learned = method.run(tiny_llama, share_of_wanted, asked)
    still = method.with_(steps=0).run(tiny_llama, share_of_wanted, asked)
    assert fingerprint(tiny_llama) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert tokens(learned)[:2] == tokens(still)[:2]  # the first block is answered before anything is learned
    likes = [
        torch.cat([share_of_wanted(None, a.candidates) for a in answers[-4:]]).mean() for answers in (learned, still)
    ]
    assert likes[0] > likes[1] + 0.1


def test_the_answer_is_the_most_trusted_and_is_learned_from_the_threshold_on(tiny_llama):
    highest = max(a.trust for a in SMALL.with_(block=9).run(tiny_llama, share_of_wanted, prompts(9)))
    with SMALL.with_(threshold=highest).open(tiny_llama, share_of_wanted) as stream:
        answers = stream.ask(prompts(9))
        learned = [a for a in answers if a.learned is not None]
        assert 0 < len(learned) < 9
        assert [answer.tolist() for _, answer in stream.buffer] == [a.tokens.tolist() for a in learned]
    for answer in answers:
        trusts = share_of_wanted(None, answer.candidates)
        assert answer.trust == pytest.approx(float(trusts.max()))
        assert answer.tokens.tolist() == answer.candidates[int(trusts.argmax())].tolist()
        assert (answer.learned is not None) == (answer.trust >= highest)


def test_answers_without_trust_teach_nothing(tiny_llama):
    half = SMALL.with_(threshold=0.5)
    distrusting = half.run(tiny_llama, lambda prompt, answers: share_of_wanted(prompt, answers) / 3, prompts())
    assert all(a.learned is None for a in distrusting)
    assert tokens(distrusting) == tokens(half.with_(steps=0).run(tiny_llama, share_of_wanted, prompts()))


def test_a_teacher_chooses_what_is_learned_and_the_verifier_what_is_answered(tiny_llama):
    def disliked(prompt, answers):
        return 1 - share_of_wanted(prompt, answers)

    answers = SMALL.with_(threshold=0.0, steps=0).run(tiny_llama, share_of_wanted, prompts(), teacher=disliked)
    for a in answers:
        trusts = share_of_wanted(None, a.candidates)
        assert a.tokens.tolist() == a.candidates[int(trusts.argmax())].tolist()
        assert a.learned.tolist() == a.candidates[int(trusts.argmin())].tolist()


def test_each_different_answer_is_verified_once(tiny_llama):
    seen = []

    def counting(prompt, answers):
        seen.append([a.tolist() for a in answers])
        return torch.zeros(len(answers))

    SMALL.with_(temperature=0.01).run(tiny_llama, counting, prompts(2))
    assert len(seen) == 2
    assert all(len({tuple(a) for a in answers}) == len(answers) < 4 for answers in seen)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_verifier_that_fails_after_something_was_learned_leaves_the_model_as_it_was(tiny_llama, error, fingerprint):
    before, calls = fingerprint(tiny_llama), []

    def failing(prompt, answers):
        calls.append(prompt)
        if len(calls) == 4:
            raise error
        return torch.ones(len(answers))

    with pytest.raises(error):
        SMALL.run(tiny_llama, failing, prompts())
    assert fingerprint(tiny_llama) == before


@pytest.mark.parametrize("wrong", [[0.5], [2.0] * 4, [float("nan")] * 4, [[0.1] * 4]])
def test_numbers_that_are_no_trust_are_refused(tiny_llama, wrong):
    with pytest.raises(UserError, match="the verifier gave"):
        SMALL.with_(temperature=5.0).run(tiny_llama, lambda prompt, answers: torch.tensor(wrong), prompts(1))


def test_no_queries_are_no_answers_and_wrong_ones_are_refused(tiny_llama, tiny_cnn):
    assert SMALL.run(tiny_llama, share_of_wanted, []) == []
    with pytest.raises(UserError, match="a prompt holds token 99"):
        SMALL.run(tiny_llama, share_of_wanted, [[1, 99]])
    with pytest.raises(UserError, match="TinyCnn has no generate"):
        SMALL.run(tiny_cnn, share_of_wanted, prompts())


# --- the verifier ----------------------------------------------------------------------------------------------


def labelled_pairs():
    generator = torch.Generator().manual_seed(3)
    pairs = [(torch.tensor([5, 6]), torch.randint(3, 64, (4,), generator=generator)) for _ in range(60)]
    return pairs, torch.tensor([bool(answer[-1] >= 30) for _, answer in pairs])


def test_a_probe_learns_what_can_be_seen_in_an_answer(tiny_llama):
    pairs, right = labelled_pairs()
    probe = ProbeVerifier(tiny_llama).fit(pairs[:40], right[:40], decay=1e-3)
    assert ((probe.trust(pairs[:40]) > 0.5) == right[:40]).float().mean() > 0.95
    trust = probe(pairs[0][0], [answer for _, answer in pairs[40:]])
    torch.testing.assert_close(trust, probe.trust(pairs[40:]), rtol=1e-4, atol=1e-5)
    assert ((trust >= 0) & (trust <= 1)).all()


def test_its_weights_are_those_of_another_solver(tiny_llama):
    pairs, right = labelled_pairs()
    probe = ProbeVerifier(tiny_llama).fit(pairs, right, decay=0.05)
    features = probe.features(pairs).double().numpy()
    x, y = (features - features.mean(0)) / features.std(0, ddof=1), right.numpy() * 2.0 - 1

    def loss(w):
        return np.logaddexp(0, -y * (x @ w[:-1] + w[-1])).mean() + 0.05 * (w[:-1] ** 2).sum()

    expected = minimize(loss, np.zeros(x.shape[1] + 1), options={"gtol": 1e-6}).x
    np.testing.assert_allclose(probe.weight.numpy(), expected, rtol=0.02, atol=2e-3)


def test_features_are_the_last_state_and_the_log_probabilities(tiny_llama):
    prompt, answer = torch.tensor([5, 6, 7]), torch.tensor([8, 9])
    alone = ProbeVerifier(tiny_llama).features([(prompt, answer)])[0]
    batched = ProbeVerifier(tiny_llama).features([(prompt, answer), (prompt, torch.arange(3, 12))])[0]
    torch.testing.assert_close(alone, batched, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        out = tiny_llama(input_ids=torch.cat([prompt, answer])[None], output_hidden_states=True)
    logp = out.logits[0].log_softmax(-1)
    each = torch.stack([logp[2, 8], logp[3, 9]])
    expected = torch.cat([out.hidden_states[-1][0, -1], each.mean()[None], each.min()[None]])
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


def test_a_probe_looks_through_a_model_of_its_own(tiny_llama):
    pairs, right = labelled_pairs()
    probe = ProbeVerifier(tiny_llama).fit(pairs, right)
    before = probe.trust(pairs)
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(3)
    assert torch.equal(probe.trust(pairs), before)


def test_a_probe_needs_right_and_wrong_answers(tiny_llama):
    pairs, right = labelled_pairs()
    with pytest.raises(UserError, match="call fit"):
        ProbeVerifier(tiny_llama)(*pairs[0][:1], [pairs[0][1]])
    with pytest.raises(UserError, match="some right and some wrong"):
        ProbeVerifier(tiny_llama).fit(pairs, torch.ones_like(right))
    with pytest.raises(UserError, match="60 answers"):
        ProbeVerifier(tiny_llama).fit(pairs, right[:5])
