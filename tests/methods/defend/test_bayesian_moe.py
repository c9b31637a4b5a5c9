"""The posterior against dense linear algebra and autograd, on mixtures of both kinds and plain feed-forward parts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.defend._expert_tokens import seen_tokens, sites_of
from lilliput.methods.defend._kronecker import Factors, Sums
from lilliput.methods.defend.bayesian_moe import (
    PRECISIONS,
    VALIDATION,
    AnswerTokens,
    BayesianMoe,
    best_by_evidence,
    predictive,
)
from lilliput.methods.experts.upcycle import Upcycle
from lilliput.workload import Workload

ANSWERS = (5, 9, 11)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test."""


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(params=["plain", "ours", "mixtral"])
def work(request, tiny_llama):
    """Random texts with labels, for answers of three tokens."""
    made = {
        "plain": lambda: tiny_llama,
        "ours": lambda: Upcycle(experts=4, top_k=2, steps=0, how="copy").apply(tiny_llama),
        "mixtral": mixtral,
    }
    return texts(AnswerTokens(made[request.param](), ANSWERS))


def texts(model):
    generator = torch.Generator().manual_seed(1)

    def batch(count=8):
        ids = torch.randint(3, 64, (count, 6), generator=generator)
        return {"input": ids, "label": torch.randint(len(ANSWERS), (count,), generator=generator)}

    return Workload.classifier(model, [batch()], [batch()], [batch()], training=[batch() for _ in range(3)])


# --- the factors -------------------------------------------------------------------------------------------------


@pytest.fixture
def regression():
    """Softmax regression with zero weights: all samples have the same curvature, so that the factors are exact."""
    generator = torch.Generator().manual_seed(0)
    a, classes = torch.randn(40, 5, generator=generator), 3
    p = torch.full((40, classes), 1 / classes)
    sums = Sums(5, classes)
    for part in (slice(0, 25), slice(25, 40)):
        g = torch.eye(classes).unsqueeze(1).repeat(1, len(a[part]), 1)
        sums.add(a[part], g, p[part])
    return a, sums


def dense(a, precision):
    """The exact precision of the weights (3, 5) as a matrix (15, 15)."""
    p = torch.full((3,), 1 / 3, dtype=torch.float64)
    hessian = torch.diag(p) - p.outer(p)
    return torch.kron(hessian, a.double().T @ a.double()) + precision * torch.eye(15, dtype=torch.float64)


@pytest.mark.parametrize("precision", [0.1, 10.0])
def test_of_a_linear_model_the_posterior_is_the_exact_one(regression, precision):
    a, sums = regression
    factors = Factors(sums, 0, 1.0)
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(3))
    jacobian = torch.kron(torch.eye(3, dtype=torch.float64), x.double())  # (3, 15)
    exact = jacobian @ torch.linalg.inv(dense(a, precision)) @ jacobian.T
    found = factors.covariance(x, torch.eye(3).unsqueeze(1), [precision, 2 * precision])
    assert torch.allclose(found[0], exact, rtol=1e-4, atol=1e-6)
    assert (found[1].diagonal() < found[0].diagonal()).all()
    ratio = 15 * math.log(precision) - float(torch.logdet(dense(a, precision)))
    assert factors.log_ratio(precision) == pytest.approx(ratio, rel=1e-4)


def test_a_share_of_the_data_stands_for_all_of_it(regression):
    sums = regression[1]
    half = Factors(sums, 0, 0.5)
    assert torch.allclose(half.curvature, 2 * Factors(sums, 0, 1.0).curvature)


def test_the_evidence_chooses_the_precision_with_the_highest_marginal_likelihood(regression):
    a, sums = regression
    sites = sites_of_weights(torch.full((3, 5), 0.3))
    best = best_by_evidence(sites, [[Factors(sums, 0, 1.0)]])

    def evidence(tau):
        return 15 * math.log(tau) - float(torch.logdet(dense(a, tau))) - tau * 15 * 0.09

    assert evidence(best) >= max(evidence(best * 10**0.5), evidence(best / 10**0.5))
    assert 0.1 < best < 1e4


def sites_of_weights(weight):
    from lilliput.methods.defend._expert_tokens import Site

    return [Site("", [weight], False)]


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_a_low_rank_is_exact_where_the_inputs_have_it(rank):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    g, p = torch.randn(2, 30, 4, generator=generator), torch.full((30, 2), 0.5)
    sums = Sums(6, 4)
    sums.add(a, g, p)
    x, gx = torch.randn(5, 6, generator=generator), torch.randn(2, 5, 4, generator=generator)
    full, low = (Factors(sums, r, 1.0) for r in (0, rank))
    assert low.inputs.shape == (6, rank)
    assert low.left_out == 6 - rank
    assert torch.allclose(full.covariance(x, gx, [0.5]), low.covariance(x, gx, [0.5]), rtol=1e-3)
    assert low.log_ratio(0.5) == pytest.approx(full.log_ratio(0.5), rel=1e-4)


def test_an_expert_without_tokens_keeps_its_prior():
    factors = Factors(Sums(6, 4), 0, 1.0)
    a, g = torch.randn(2, 6), torch.randn(3, 2, 4)
    jacobian = torch.einsum("cnd,nk->cdk", g, a).flatten(1).double()
    assert torch.allclose(factors.covariance(a, g, [4.0])[0], jacobian @ jacobian.T / 4, rtol=1e-4)
    assert factors.log_ratio(4.0) == 0


# --- what reaches the experts ------------------------------------------------------------------------------------


def expert_weight(work, site, expert):
    """The parameter that holds an expert's last weight, and where in it that is."""
    module = work.model.get_submodule(site.name)
    if not site.mixture:
        return module.weight, ...
    return (module[expert].down_proj.weight, ...) if isinstance(module, nn.ModuleList) else (module.down_proj, expert)


def test_tokens_give_the_jacobian_that_autograd_gives(work):
    x = work.test[0]["input"][:3]
    sites = sites_of(work.model, "test", 0)
    assert len(sites) == 2
    logits, found = seen_tokens(work.model, sites, lambda: work.model(x))
    assert torch.allclose(logits, work.model(x), atol=1e-5)
    used = {(t.site, t.expert) for t in found}
    for place, site in enumerate(sites):
        for expert in range(len(site.weights)):
            parameter, index = expert_weight(work, site, expert)
            parts = [t for t in found if (t.site, t.expert) == (place, expert)]
            for sample in range(3):
                for answer in range(len(ANSWERS)):
                    exact = slopes(work.model(x)[sample, answer], parameter)[index]
                    ours = torch.zeros_like(exact)
                    for t in parts:
                        its = t.samples == sample
                        ours += t.gradients[answer, its].T @ t.inputs[its]
                    assert torch.allclose(ours, exact, atol=1e-4 * max(1, float(exact.abs().max())))
    assert len(used) >= 2


def test_in_the_last_block_the_last_token_alone_counts(work):
    sites = sites_of(work.model, "test", 1)
    assert len(sites) == 1
    _, found = seen_tokens(work.model, sites, lambda: work.model(work.test[0]["input"]))
    experts_a_token = 2 if sites[0].mixture else 1
    assert sum(len(t.samples) for t in found) == 8 * experts_a_token


def test_the_covariance_is_that_of_dense_matrices(work):
    """Each expert's precision n G (x) A + tau I as a full matrix, and autograd's Jacobian."""
    guarded = BayesianMoe(blocks=1, samples=16).wrap(work.model, work)
    x, tau = work.test[0]["input"][:2], guarded.precision
    posterior = guarded.predict(x)
    exact = torch.zeros(2, 3, 3, dtype=torch.float64)
    share = 16 / 24
    for expert, factors in enumerate(guarded.factors[0]):
        assert factors.left_out in (0, len(factors.inputs))
        if factors.left_out:
            continue
        a, g, n = raw_factors(work, guarded.sites, expert)
        precision = torch.kron(g, a) * n / share + tau * torch.eye(len(g) * len(a), dtype=torch.float64)
        parameter, index = expert_weight(work, guarded.sites[0], expert)
        for sample in range(2):
            rows = [slopes(work.model(x)[sample, c], parameter)[index].flatten() for c in range(3)]
            jacobian = torch.stack(rows).double()
            exact[sample] += jacobian @ torch.linalg.solve(precision, jacobian.T)
    assert torch.allclose(posterior.covariance.double(), exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))


def slopes(value, parameter):
    """The gradient, 0 where an expert was not used."""
    found = torch.autograd.grad(value, parameter, allow_unused=True)[0]
    return torch.zeros_like(parameter) if found is None else found


def raw_factors(work, sites, expert):
    """A, G and the number of tokens of an expert of the last block over the first 16 training samples, by autograd."""
    inputs, spreads = [], []
    for batch in work.training[:2]:
        logits, found = seen_tokens(work.model, sites, lambda batch=batch: work.model(batch["input"]))
        for t in (t for t in found if t.expert == expert):
            p = logits.softmax(-1)[t.samples].double()
            hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
            inputs.append(t.inputs.double())
            spreads.append(torch.einsum("cnd,nce,enf->ndf", t.gradients.double(), hessian, t.gradients.double()))
    a, g = torch.cat(inputs), torch.cat(spreads)
    return a.T @ a / len(a), g.mean(0), len(a)


# --- the guard ---------------------------------------------------------------------------------------------------


def test_without_variance_the_probabilities_are_the_models():
    logits = torch.randn(4, 3)
    for draws in (0, 100):
        assert torch.allclose(predictive(logits, torch.zeros(4, 3, 3), draws), logits.softmax(-1), atol=1e-5)


def test_probabilities_are_means_over_draws():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    logits, covariance = torch.randn(2, 3, generator=generator), (root @ root.mT).float()
    drawn = logits + torch.einsum("scd,nd->nsc", root, torch.randn(200_000, 3, generator=generator).double())
    assert torch.allclose(predictive(logits, covariance, 20_000), drawn.softmax(-1).mean(0).float(), atol=0.01)
    by_formula = predictive(logits, covariance, 0)
    scale = (1 + math.pi / 8 * covariance.diagonal(dim1=1, dim2=2)).sqrt()
    assert torch.allclose(by_formula, (logits / scale).softmax(-1))


def test_large_doubt_is_near_chance_and_two_equal_logits_share_it():
    logits = torch.tensor([[4.0, 0.0, 0.0]])
    sure = [float(predictive(logits, v * torch.eye(3)[None], 4000)[0, 0]) for v in (0.01, 4.0, 1e6)]
    assert sure[0] > sure[1] > sure[2]
    assert sure[2] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("settings", [{}, {"rank": 4, "blocks": 1}, {"draws": 0}, {"prior": VALIDATION, "samples": 8}])
def test_a_guarded_model_is_a_classifier_with_probabilities(work, settings):
    before = {k: v.clone() for k, v in work.model.state_dict().items()}
    guarded = BayesianMoe(**settings).wrap(work.model, work)
    found = guarded(work.test[0]["input"])
    assert torch.allclose(found.exp().sum(-1), torch.ones(8), atol=1e-4)
    assert torch.isfinite(found).all()
    assert torch.equal(guarded(work.test[0]["input"]), found)
    assert not torch.allclose(found.exp(), work.model(work.test[0]["input"]).softmax(-1), atol=1e-6)
    assert 0 <= work.score(guarded, "test").value <= 100  # in inference mode
    assert all(torch.equal(v, before[k]) for k, v in work.model.state_dict().items())
    assert all(p.grad is None for p in work.model.parameters())


def test_the_precision_by_validation_is_the_likeliest(work):
    guarded = BayesianMoe(prior=VALIDATION).wrap(work.model, work)
    best = guarded.precision

    def loss(precision):
        guarded.precision = precision
        return float(sum(F.nll_loss(guarded(b["input"]), b["label"]) for b in work.validation))

    assert loss(best) == pytest.approx(min(map(loss, PRECISIONS)), abs=1e-5)


def test_more_data_leaves_less_doubt(work):
    few = BayesianMoe().wrap(work.model, work)
    work.training = [*work.training, *copy.deepcopy(work.training), *copy.deepcopy(work.training)]
    many = BayesianMoe().wrap(work.model, work)
    few.precision = many.precision = 1.0
    x = work.test[0]["input"]
    variances = [one.predict(x).covariance.diagonal(dim1=1, dim2=2).sum() for one in (few, many)]
    assert variances[1] < variances[0]


def test_wrong_models_and_data_are_named(cnn_work, llama_work, work):
    with pytest.raises(UserError, match=r"defend\.bayesian_moe works on transformer blocks"):
        BayesianMoe().wrap(cnn_work.model, cnn_work)
    with pytest.raises(UserError, match="AnswerTokens"):
        BayesianMoe().wrap(llama_work.model, llama_work)
    with pytest.raises(UserError, match="two different ones"):
        AnswerTokens(llama_work.model, [4, 4])
    with pytest.raises(UserError, match=r"rank is 2\.5; give a whole number"):
        BayesianMoe(rank=2.5).wrap(work.model, work)
    work.validation = [{"input": b["input"]} for b in work.validation]
    with pytest.raises(UserError, match="validation data has no labels"):
        BayesianMoe(prior=VALIDATION).wrap(work.model, work)


def test_packed_experts_are_refused(tiny_llama):
    from lilliput.methods.quantize.group import Group

    packed = AnswerTokens(Group().apply(tiny_llama), ANSWERS)
    with pytest.raises(UserError, match="float weights"):
        BayesianMoe().wrap(packed, texts(packed))
