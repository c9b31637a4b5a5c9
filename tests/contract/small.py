"""Methods with settings that fit tiny models, and what they can change there."""

from torch import nn

from lilliput.errors import UserError
from lilliput.method import Method, find_method

WORKS = ("cnn_work", "pointwise_work", "llama_work", "relu_work", "vit_work")
# tried on the vision transformer; the others have a model among the rest
VISION = ("layers.gqkva", "layers.separable_attention", "tokens.skipvit")

SMALL = {
    "distill.hidden": {"steps": 4},
    "distill.logits": {"steps": 4},
    "distill.taid": {"steps": 4},
    "experts.upcycle": {"experts": 4, "top_k": 2, "steps": 2},
    "factorize.targeted": {"rounds": 1},
    "initialize.tleg": {"blocks": 1, "steps": 2},
    "initialize.weight_selection": {"depth": 1.0},
    "initialize.weight_subcloning": {"depth": 1.0},
    "layers.relufy": {"stage": 2, "sparsity": 0.7},
    "prune.heads": {"ratio": 0.5},
    "prune.hidden_networks": {"steps": 2},
    "prune.neurons": {"round_to": 8},
    "quantize.binary": {"steps": 2},
    "quantize.codebook": {"samples": 64, "rounds": 2},
    "quantize.data_free": {"size": 16, "samples": 16, "steps": 4, "search": 4},
    "quantize.dkm": {"steps": 4},
    "quantize.gpfq": {"samples": 64},
    "quantize.gptq": {"samples": 64},
    "quantize.seeds": {"candidates": 2},
    "train.compressible_subspaces": {"steps": 2},
    "train.epas": {"steps": 4},
}


def small_method(name: str) -> Method:
    """The method with settings that fit a tiny model."""
    return find_method(name)().with_(**SMALL.get(name, {}))


def targets(method: Method, model: nn.Module) -> list[str]:
    """What the method can change; nothing where it refuses the kind of model."""
    try:
        return list(method.targets(model))
    except UserError:
        return []
