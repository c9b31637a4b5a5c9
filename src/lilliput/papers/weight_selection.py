"""Weight selection: does a small vision transformer learn better from evenly spaced elements of a larger one?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lilliput.methods.initialize.weight_selection import WeightSelection
from lilliput.paper import Evidence, Paper
from lilliput.papers._healed import clearly, said
from lilliput.papers._started import Run, anew, as_many_more, gain, learned_tuned, parent_row, row
from lilliput.workload import Workload
from lilliput.zoo import images, nets
from lilliput.zoo.images import Pictures

paper = Paper(
    title="Initializing Models with Larger Ones",
    authors="Zhiqiu Xu, Yanjie Chen, Kirill Vishniakov, Yida Yin, Zhiqiang Shen, Trevor Darrell, Lingjie Liu, "
    "Zhuang Liu",
    year=2024,
    arxiv="2311.18823",
    claim="A small model that begins with evenly spaced elements of the tensors of a larger trained one learns small "
    "data sets better and sooner than from random weights.",
    methods=("initialize.weight_selection",),
)

PARENT, RANDOM = "the large model", "random weights"
OURS, HEADS = "evenly spaced elements", "evenly spaced elements, whole heads"
SHUFFLED = "the same elements, shuffled within each tensor"
NAMES = (  # of the zoo's vision transformer -> of transformers'
    (r"^patch\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^cls$", "vit.embeddings.cls_token"),
    (r"^pos$", "vit.embeddings.position_embeddings"),
    (r"^blocks\.", "vit.layers."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attn\.out\.", ".attention.o_proj."),
)
BATCH = 64
RATES = (3e-4, 1e-3, 3e-3)  # vision transformers want lower ones than language models
UNIT = "test_error_percent"


@dataclass(frozen=True)
class Effort:
    """How much an experiment does."""

    steps: int
    seeds: int
    test_pictures: int = 2000
    validation_pictures: int = 500


def experiment(seed: int = 0, full: bool = False) -> Evidence:
    """The zoo's vision transformer (96 wide, 4 blocks) gives one half as wide, trained on some of Fashion-MNIST.

    Random weights get as many more steps as the selection takes. Each contender has its own learning rate. Holds when
    selected elements, the paper's way, end with fewer errors than random weights and than the same elements shuffled
    within each tensor, each by more than two standard errors over seeds. `full` trains longer.
    """
    effort = Effort(steps=1200, seeds=3, test_pictures=10_000) if full else Effort(steps=120, seeds=3)
    works = [pictures_work(seed + i, effort) for i in range(effort.seeds)]
    found = compare(works, effort, seed)
    gains = {name: gain(found[OURS], found[name]) for name in found}
    return Evidence(
        setup=f"vit-small, 96 wide, 4 blocks and heads, to 48 wide and 2 heads; Fashion-MNIST, {effort.steps} steps of "
        f"{BATCH} pictures, {effort.test_pictures} test pictures, {effort.seeds} seeds from {seed}; "
        f"{torch.get_num_threads()} threads, CPU",
        rows=[
            parent_row(PARENT, works[0], UNIT),
            *(row(name, runs, UNIT) for name, runs in found.items()),
        ],
        holds=judge(gains[RANDOM], gains[SHUFFLED]),
        figure=f"percentage points fewer errors than random weights {said(gains[RANDOM])}, than the same elements "
        f"shuffled {said(gains[SHUFFLED])}, than with whole heads {said(gains[HEADS])}",
        limits="One small vision transformer on grey pictures, whose parent has learned the same pictures and hands on "
        "its output layer too; the paper takes parents trained on ImageNet-21k to other, smaller sets, and trains "
        "hundreds of epochs.",
    )


def judge(over_random: tuple[float, float], over_shuffled: tuple[float, float]) -> bool:
    """The rule of `experiment`; gains are (percentage points by which ours is better, standard error)."""
    return clearly(over_random) and clearly(over_shuffled)


def compare(works: Sequence[Workload], effort: Effort, seed: int) -> dict[str, list[Run]]:
    """Every contender on every workload, with the seed of its place."""
    paper_way = WeightSelection(depth=1.0, unit="elements")
    small = paper_way.apply(works[0].model)
    makes = {
        OURS: lambda work, s: paper_way.apply(work.model),
        HEADS: lambda work, s: paper_way.with_(unit="heads").apply(work.model),
        SHUFFLED: lambda work, s: shuffled_(paper_way.apply(work.model), s),
    }
    found = {name: learned_tuned(make, works, effort.steps, seed, rates=RATES) for name, make in makes.items()}
    steps = as_many_more(found[OURS], effort.steps)
    found[RANDOM] = learned_tuned(lambda work, s: anew(small, s), works, steps, seed, rates=RATES)
    return found


@torch.no_grad()
def shuffled_(model: nn.Module, seed: int) -> nn.Module:
    """The elements of each tensor in an order drawn by the seed: their sizes stay, what they compute goes."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    return model


def pictures_work(seed: int, effort: Effort) -> Workload:
    """vit-small and Fashion-MNIST: training pictures drawn by the seed, the first of the other fixed splits."""
    splits = images.fashion_mnist()
    everything, count = splits["training"], effort.steps * BATCH
    pick = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))[:count]
    training = Pictures(everything.pixels[pick], everything.labels[pick], everything.prepare)
    parts = (
        splits["calibration"].first(BATCH),
        splits["validation"].first(effort.validation_pictures),
        splits["test"].first(effort.test_pictures),
    )
    model = as_transformers(nets.load("vit-small"))
    return Workload.classifier(model, *(list(part.batches(250)) for part in parts), training=training.batches(BATCH))


def as_transformers(net: Any) -> nn.Module:
    """The zoo's vision transformer as the transformers model with the same function, whose config can be resized."""
    from transformers import ViTConfig, ViTForImageClassification

    first = net.blocks[0]
    config = ViTConfig(
        hidden_size=first.attn.q.in_features,
        num_hidden_layers=len(net.blocks),
        num_attention_heads=first.attn.heads,
        intermediate_size=first.mlp.fc1.out_features,
        image_size=net.patch.kernel_size[0] * round((net.pos.shape[1] - 1) ** 0.5),
        patch_size=net.patch.kernel_size[0],
        num_channels=net.patch.in_channels,
        layer_norm_eps=net.norm.eps,
        num_labels=net.head.out_features,
    )
    model, tensors = ViTForImageClassification(config), {}
    for name, tensor in net.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    model.load_state_dict(tensors)
    return model.eval()
