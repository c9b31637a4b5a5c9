"""Over-complete dictionaries of atoms, learned from harmless data, and sparse codes in them; groups side by side.

    x ~ a_1 w_1 + ... + a_s w_s,   s atoms of K by orthogonal matching pursuit, K > d or not

Learned by the method of optimal directions (Engan et al., 1999): codes, then the atoms that fit them best, in turn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 1e-5  # keeps equal atoms apart in the normal equations


def sparse_codes(x: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """x (G, N, d) and atoms (G, K, d) of length 1 -> indices and weights (G, N, count) of orthogonal matching pursuit.

    All groups and samples take each step together; the weights of all chosen atoms are fitted again at each.
    """
    rest, chosen, index = x, x.new_zeros(*x.shape[:2], 0, x.shape[2]), []
    weights = x.new_zeros(*x.shape[:2], 0)
    used = torch.zeros(*x.shape[:2], atoms.shape[1], dtype=torch.bool, device=x.device)
    for _ in range(min(count, atoms.shape[1])):
        best = (rest @ atoms.mT).abs().masked_fill(used, -1).argmax(-1)
        used = used.scatter(-1, best.unsqueeze(-1), True)
        atom = atoms.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        chosen = torch.cat([chosen, atom.unsqueeze(2)], 2)
        gram = chosen @ chosen.mT
        gram = gram + RIDGE * torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(gram, chosen @ x.unsqueeze(-1)).squeeze(-1)
        rest = x - (weights.unsqueeze(2) @ chosen).squeeze(2)
        index.append(best)
    return torch.stack(index, -1), weights


def rebuilt(index: Tensor, weights: Tensor, atoms: Tensor) -> Tensor:
    """What indices and weights (G, N, s) of atoms (G, K, d) stand for, (G, N, d)."""
    groups, samples, count = index.shape
    taken = atoms.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, atoms.shape[2]))
    return (weights.unsqueeze(2) @ taken.view(groups, samples, count, -1)).squeeze(2)


def sparsely(x: Tensor, atoms: Tensor, count: int) -> Tensor:
    """x (G, N, d) rebuilt from `count` atoms each."""
    return rebuilt(*sparse_codes(x, atoms, count), atoms)


@torch.no_grad()
def learned_atoms(x: Tensor, atoms: int, count: int, rounds: int = 8, seed: int = 0) -> Tensor:
    """Dictionaries (G, K, d) for samples x (G, N, d), K = atoms or N if that is less; seeded samples begin."""
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    found = F.normalize(x[:, order[:atoms]], dim=-1)
    for _ in range(rounds):
        index, weights = sparse_codes(x, found, count)
        codes = x.new_zeros(*x.shape[:2], found.shape[1]).scatter(-1, index, weights)
        gram = codes.mT @ codes
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12).view(-1, 1, 1)
        gram = gram + 1e-4 * scale * torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        better = F.normalize(torch.linalg.solve(gram, codes.mT @ x), dim=-1)
        idle = codes.abs().sum(1).unsqueeze(-1) == 0
        found = torch.where(idle, found, better)
    return found


# --- pieces of pictures ----------------------------------------------------------------------------------------


def pieces(x: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) -> (places, B, C size^2), without overlap; sides that do not fit are continued."""
    padded = F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size), mode="replicate")
    return F.unfold(padded, size, stride=size).permute(2, 0, 1)


def assembled(parts: Tensor, shape: torch.Size, size: int) -> Tensor:
    """The pictures of a shape (B, C, H, W) that these pieces were cut from."""
    height, width = (side + -side % size for side in shape[2:])
    whole = F.fold(parts.permute(1, 2, 0), (height, width), size, stride=size)
    return whole[..., : shape[2], : shape[3]]
