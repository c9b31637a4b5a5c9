"""Random mixtures of experts of transformers' own."""

import torch


def foreign(kind):
    """A random mixture of transformers' own: olmoe (probabilities as they are) or mixtral (made to a sum of 1)."""
    from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, **special, num_experts=8))
    else:
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **special, num_local_experts=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()
