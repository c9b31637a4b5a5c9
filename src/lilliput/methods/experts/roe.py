"""Several routes of one model for each token, their predictions averaged (hyper-parallel scaling).

    chosen = TopK(r + tau_l g, k),  g ~ Gumbel(0, 1)      p = mean over K samples of softmax(logits)

Paper: Zibakhsh, Samragh, Nishu, Hannah, Kundu and Cho, MoEs Are Stronger than You Think: Hyper-Parallel Inference
Scaling with RoE, 2025 (arXiv 2509.17238). The first sample takes the usual route and alone writes keys and values; all
read them (clean cache), so the cache does not grow with K. Reconstructed, as its code is not public: the chosen are
weighted by the router's logits without noise, probabilities rather than logits are averaged, and the usual route is one
of the K.

    model.generate(ids, custom_generate=RoE(samples=8), taus=RoE(samples=8).tuned(model, windows))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import OUTPUT_SHAPE, Decoder, Facts, knob
from lilliput.methods.cache._cache import policy_layers
from lilliput.methods.decode import Tally
from lilliput.methods.decode._backends import TorchBackend
from lilliput.methods.decode._draft import NOTHING, Draft
from lilliput.methods.decode._verify import Drafter, Loop, check_call
from lilliput.methods.experts._routing import Routed, at_routers, mixtures_of, routers_of
from lilliput.methods.search.tpe import Tpe

NAME = "experts.roe"
PROBES = 16  # random tokens that a router is asked about
FIRST = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7)  # shares of the highest noise that are tried first, for all mixtures alike
PROBABILITIES, LOGITS = "probabilities", "logits"


@dataclass(frozen=True)
class Cost:
    """What a token costs."""

    flops: int  # twice the weights that are multiplied; attention to earlier tokens is not counted
    kv_bytes: int  # keys and values of the text so far, whatever the samples
    experts: int  # a layer's experts that are read at most


@dataclass(frozen=True)
class RoE(Decoder):
    """Average the predictions of several stochastic routes through a mixture of experts, for each token."""

    samples: int = knob(8, low=1, high=1024, help="routes a token, the usual one among them; 1 is the plain model")
    tau: float = knob(0.3, low=0.0, high=100.0, help="noise on the router's logits, where `taus` gives none by layer")
    ends: bool = knob(False, choices=(False, True), help="noise in the first and the last mixture too")
    average: str = knob(PROBABILITIES, choices=(PROBABILITIES, LOGITS), help="what is averaged over the routes")
    seed: int = knob(0, low=0, help="of the noise")
    paper: ClassVar[str] = "roe"
    facts: ClassVar[Facts] = Facts(stage="serve", keeps={OUTPUT_SHAPE}, effect="better predictions for more compute")

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        taus: Sequence[float] | None = None,
        streamer: Any = None,
        tally: Tally | None = None,
        **options: Any,
    ) -> Tensor:
        check_call(model, input_ids, generation_config, options)
        cache = options["past_key_values"]
        if cache.get_seq_length() or getattr(cache, "_is_user_defined", False):
            raise UserError("a roster of experts keeps its own keys and values; give no past_key_values")
        loop = Loop(_Roster(model, self, self.routes(model, taus)), _Silent(), logits_processor, stopping_criteria)
        loop.sample, loop.streamer = generation_config.do_sample, streamer
        ids = loop.run(input_ids, tally or Tally())
        if streamer is not None:
            streamer.end()
        return ids

    def routes(self, model: nn.Module, taus: Sequence[float] | None = None) -> Routes:
        """New noise for a model. Raises UserError for taus of another number than its mixtures, or negative ones."""
        routers = routers_of(model, NAME)
        layers = len(routers)
        if taus is None:
            taus = [0.0 if not self.ends and layer in (0, layers - 1) else self.tau for layer in range(layers)]
        if len(taus) != layers or not all(0 <= tau < math.inf for tau in taus):
            raise UserError(f"taus are {list(taus)}; give {layers} numbers of 0 or more, one for each mixture")
        return Routes(model, routers, self.samples, taus, self.seed)

    @torch.no_grad()
    def logits(self, model: nn.Module, ids: Tensor, taus: Sequence[float] | None = None) -> Tensor:
        """Averaged logits (B, T, V) after every token of texts ids (B, T), as generation would have them."""
        with evaluating(model):
            return averaged(self.routes(model, taus)(ids, clean_cache(model)), self.average)

    def tuned(
        self, model: nn.Module, texts: Sequence[Tensor], trials: int = 30, highest: float = 1.0
    ) -> tuple[float, ...]:
        """The noise of each mixture, 0 to `highest`, with the lowest loss on texts (B, T) each, by trying.

        No noise and equal noise are tried first, so on these texts it is never worse than the plain model. Give texts
        that are not those it is judged by.
        """
        layers = len(mixtures_of(model, NAME))
        names = [f"tau_{layer}" for layer in range(layers)]

        def loss(trial: optuna.Trial) -> float:
            taus = [trial.suggest_float(name, 0.0, highest) for name in names]
            return sum(next_token_loss(self.logits(model, ids, taus), ids) for ids in texts) / len(texts)

        shown = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(sampler=Tpe(startup=max(1, trials // 2)).build(self.seed))
            for share in FIRST:
                study.enqueue_trial(dict.fromkeys(names, share * highest))
            study.optimize(loss, n_trials=trials)
        finally:
            optuna.logging.set_verbosity(shown)
        return tuple(study.best_params[name] for name in names)

    def cost(self, model: Any, length: int) -> Cost:
        """What the next token of a text of `length` tokens costs."""
        weights = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
        for part, router in zip(mixtures_of(model, NAME), routers_of(model, NAME)):
            experts = model.get_submodule(part.experts)
            held = sum(p.numel() for p in experts.parameters())
            weights -= sum(m.weight.numel() for m in experts.modules() if type(m) is nn.Linear)
            weights += router.weight.numel() + held * router.top_k // router.num_experts
        router, cache = routers_of(model, NAME)[0], clean_cache(model)
        with torch.no_grad(), evaluating(model):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        most = min(router.num_experts, self.samples * router.top_k)
        return Cost(2 * weights * self.samples, kv_bytes * length, most)


class CleanLayer(DynamicLayer):
    """Keys and values of the first of every `samples` rows, shown to all of them."""

    samples = 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = super().update(key_states[:: self.samples], value_states[:: self.samples], *args, **kwargs)
        keys, values = (t if self.samples == 1 else t.repeat_interleave(self.samples, 0) for t in found)
        return keys, values


def clean_cache(model: nn.Module) -> Cache:
    """An empty clean cache. Raises UserError for a model that is no decoder or has sliding windows."""
    return Cache(layers=policy_layers(model, NAME, CleanLayer, mixed=False))


class Routes:
    """A model with noise on its routers; a call gives the logits (B, K, T, V) of K samples of texts (B, T)."""

    def __init__(self, model: Any, routers: Sequence[nn.Module], samples: int, taus: Sequence[float], seed: int):
        self.model, self.routers, self.samples, self.taus = model, routers, samples, taus
        self.generator = torch.Generator().manual_seed(seed)
        self.rules: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}
        self.tokens = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Cache, **options: Any) -> Tensor:
        for layer in cache.layers:
            layer.samples = self.samples  # pyright: ignore[reportAttributeAccessIssue]
        self.tokens = ids.shape[1]
        rows = ids.repeat_interleave(self.samples, 0)
        with at_routers(self.routers, self._see):
            logits = self.model(input_ids=rows, past_key_values=cache, use_cache=True, **options).logits
        return logits.unflatten(0, (len(ids), self.samples))

    @torch.no_grad()
    def plain(self, ids: Tensor, cache: Cache, **options: Any) -> None:
        """Read tokens on the usual route alone."""
        for layer in cache.layers:
            layer.samples = 1  # pyright: ignore[reportAttributeAccessIssue]
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, **options)

    def _see(self, layer: int, x: Tensor, routed: Routed) -> Routed | None:
        """Another choice for all samples but the first of each text."""
        if self.samples == 1 or self.taus[layer] == 0:
            return None
        if layer not in self.rules:
            self.rules[layer] = weighing(self.routers[layer])
        logits = routed.logits
        noise = -torch.empty(logits.shape).exponential_(generator=self.generator).log()
        noise = noise.unflatten(0, (-1, self.samples, self.tokens))
        noise[:, 0] = 0
        noisy = logits.float() + self.taus[layer] * noise.flatten(0, 2).to(logits.device)
        chosen = noisy.topk(routed.chosen.shape[-1], -1).indices
        usual = (torch.arange(len(logits), device=logits.device) // self.tokens % self.samples == 0)[:, None]
        weights = self.rules[layer](logits, chosen).to(routed.weights.dtype)
        return Routed(logits, torch.where(usual, routed.weights, weights), torch.where(usual, routed.chosen, chosen))


@torch.no_grad()
def weighing(router: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, chosen) -> weights, as this router weighs: its probabilities, or these made to a sum that is always the
    same. Raises UserError for a router that does neither.

    It is asked past its hooks, about tokens for which it hardly prefers an expert, where the two differ most, and about
    some for which it does.
    """
    weight = router.weight
    x = torch.randn(PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    x = torch.cat([0.1 * x, len(weight) ** 0.5 * x]) / weight.norm().clamp_min(1e-6)
    routed = Routed(*router.forward(x))
    found, weights = _shares(routed.logits, routed.chosen), routed.weights.float()
    close = partial(torch.allclose, rtol=1e-3 if weights.dtype == routed.weights.dtype else 2e-2)
    total = weights.sum(-1).mean()
    if close(found, weights):
        return _shares
    if close(F.normalize(found, p=1, dim=-1) * total, weights):
        return lambda logits, chosen: F.normalize(_shares(logits, chosen), p=1, dim=-1) * total
    raise UserError(f"{NAME} does not know how a {type(router).__name__} weighs the experts that it chooses")


def _shares(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.float().softmax(-1).gather(-1, chosen)


def averaged(logits: Tensor, what: str) -> Tensor:
    """Logits (B, K, T, V) of K samples -> (B, T, V); their scale is that of the first, so that equal ones stay."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    if what == LOGITS:
        return logits.float().mean(1)
    mean = logits.float().log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return mean + logits[:, 0].float().logsumexp(-1, keepdim=True)


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean loss, in nats, of each token of ids (B, T) by the logits (B, T, V) before it."""
    return float(F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()))


class _Silent(Drafter):
    """Drafts nothing: a token a step."""

    def propose(self, ids: Tensor, room: int, hidden: Tensor | None) -> Draft:
        return NOTHING


class _Roster(TorchBackend):
    """Reads one text; the prompt on the usual route up to its last token."""

    def __init__(self, model: Any, settings: RoE, routes: Routes):
        super().__init__(model, clean_cache(model))
        self.average, self.routes = settings.average, routes

    def extend(self, fresh: Tensor, draft: Draft = NOTHING) -> Tensor:
        options = {self.keeps: 1} if self.keeps else {}
        if self.routes.samples > 1 and len(fresh) > 1:
            self.routes.plain(fresh[None, :-1], self.cache, **options)
            fresh = fresh[-1:]
        return averaged(self.routes(fresh[None], self.cache, **options), self.average)[0, -1:]
