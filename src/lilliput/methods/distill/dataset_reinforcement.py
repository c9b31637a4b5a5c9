"""A teacher's answers to many views of each picture, stored once and read by every student that is trained later.

The file holds the few largest probabilities of each view and the seed of the views, not the pictures; a student gets
the very views that the teacher saw, bit for bit, at the cost of an ordinary training.

    DatasetReinforcement(samples=20).reinforce(data, teacher, "answers.safetensors")
    data = ReinforcedDataset(data, "answers.safetensors")     # a torch Dataset; data.set_epoch(n) gives other views
    loss = distillation_loss(student(batch["input"]), batch["taught"], 1.0)     # of a DataLoader's batches

`batch["taught"]` are logarithms of probabilities and stand for a teacher's logits in any loss of this family.

Paper: Faghri et al., Reinforce Data, Multiply Impact: Improved Model Accuracy and Robustness with Dataset
Reinforcement, ICCV 2023 (arXiv 2303.08983). Its views also use RandAugment and crops of other sizes; here pictures are
moved by whole pixels, mirrored, erased in part and mixed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.errors import UserError
from lilliput.hooks import evaluating
from lilliput.method import UNLABELLED, Facts, Settings, knob
from lilliput.methods.distill._store import FLOOR, Header, Store, log_probabilities, sparse, write
from lilliput.methods.distill._views import MIXES, ORIGINAL, ViewedDataset, Views, pictures_of, uniforms
from lilliput.workload import Batch

SAVED_EVERY_S = 30.0  # while the teacher answers
LOOKED_AT = 64  # pictures of a fingerprint
TOLERATED = 0.02  # difference of a probability at which another teacher must have answered


@dataclass(frozen=True)
class DatasetReinforcement(Settings):
    """Store a teacher's sparse answers to seeded views of a dataset, for any number of students."""

    samples: int = knob(10, low=1, high=100_000, help="views of each picture")
    top_k: int = knob(10, low=1, high=1000, help="probabilities kept of a view; the rest is spread evenly")
    padding: int = knob(4, low=0, high=1000, help="pixels that a picture is moved by, at most")
    flip: bool = knob(True, choices=(True, False), help="mirror half of the views")
    erase: float = knob(0.25, low=0.0, high=1.0, help="chance that a rectangle is erased")
    mix: str = knob("none", choices=MIXES, help="mix each view with one of another picture")
    batch: int = knob(128, low=1, high=100_000, help="pictures of a teacher's pass")
    seed: int = knob(0, low=0, high=2**63 - 1, help="of the views")
    facts: ClassVar[Facts] = Facts(
        stage="distill", data=UNLABELLED, effect="better students, at the training cost of plain labels"
    )
    paper: ClassVar[str] = "dataset_reinforcement"

    @property
    def views(self) -> Views:
        return Views(self.padding, self.flip, self.erase, self.mix)

    def reinforce(self, data: Any, teacher: nn.Module | Sequence[nn.Module], file: str | Path) -> Path:
        """Store the answers of a teacher, or the mean of several, to `samples` views of each picture of `data`.

        `data` is a map-style dataset of (picture (C, H, W) in float, label). A file that is there is continued; it may
        hold fewer draws because the process was killed, or since more are wanted now. Raises UserError when it
        belongs to other data, settings or another teacher, or is damaged.
        """
        file, teachers = Path(file), [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if len(data) == 0 or not teachers:
            raise UserError(f"{len(data)} pictures and {len(teachers)} teachers were given; give at least one of each")
        with ExitStack() as modes, torch.no_grad():
            for one in teachers:
                modes.enter_context(evaluating(one))
            first = self._answers(data, teachers, torch.arange(min(len(data), self.batch)), 0)
            header = self._header(data, first.shape[-1])
            draws = self._continued(file, header, first) if file.exists() else []
            saved = time.monotonic()
            while len(draws) < self.samples:
                parts = torch.arange(len(data)).split(self.batch)
                answers = torch.cat([self._answers(data, teachers, part, len(draws)) for part in parts])
                draws.append(sparse(answers, header.top_k))
                if len(draws) == self.samples or time.monotonic() - saved > SAVED_EVERY_S:
                    write(file, header, draws)
                    saved = time.monotonic()
        return file

    def _answers(self, data: Any, teachers: list[nn.Module], indices: Tensor, draw: int) -> Tensor:
        """(B, C) mean probabilities. Raises UserError for what is not one row of finite logits per picture."""
        x = self.views.of(pictures_of(data, indices)[0], data, indices, draw, self.seed)
        outputs = [teacher(x) for teacher in teachers]
        logits = [getattr(out, "logits", out).float() for out in outputs]
        for found in logits:
            if found.shape != (len(x), logits[0].shape[-1]) or not bool(torch.isfinite(found).all()):
                shape = tuple(found.shape)
                raise UserError(f"a teacher gave {shape} for {len(x)} pictures; it must give one finite row for each")
        return torch.stack([found.softmax(-1) for found in logits]).mean(0)

    def _header(self, data: Any, classes: int) -> Header:
        settings = asdict(self.views) | {"seed": self.seed}
        return Header(fingerprint(data), len(data), classes, min(self.top_k, classes), settings)

    def _continued(self, file: Path, header: Header, first: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The draws of a file for the same data, settings and teacher."""
        store = Store(file)
        for name, wanted in asdict(header).items():
            if name != "checks" and wanted != (there := getattr(store.header, name)):
                raise UserError(f"{file} was made with {name} {there}, not {wanted}; delete it or give another file")
        draws = [store.read(draw) for draw in range(store.draws)]
        classes, kept = (part[: len(first)] for part in draws[0])
        if float((first.gather(1, classes.long()) - kept.float()).abs().max()) > TOLERATED:
            raise UserError(f"{file} holds the answers of another teacher; delete it or give another file")
        return draws


class ReinforcedDataset(ViewedDataset):
    """Views of `data` with a teacher's answers to them: items {"input", "label", "taught"}.

    Epoch n gives the views of draw n modulo the number of draws. A share `original` of the items are plain pictures
    with their own label as answer. Raises UserError when the file is damaged or was made of other data.
    """

    def __init__(self, data: Any, file: str | Path, original: float = 0.01):
        if not 0 <= original <= 1:
            raise UserError(f"original is {original}; give a share from 0 to 1")
        self.original, self.store = original, Store(Path(file))
        header = self.store.header
        self.classes, settings = header.classes, dict(header.settings)
        super().__init__(data, seed=settings.pop("seed"), views=Views(**settings))
        if len(data) != header.pictures or fingerprint(data) != header.data:
            sizes = f"{header.pictures} pictures, {len(data)} given"
            raise UserError(f"{file} was made of other data ({sizes}); give the pictures that the teacher saw")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Read the draw of an epoch."""
        self.epoch, self.draw = epoch, epoch % self.store.draws
        self._answers = self.store.read(self.draw)

    def batch(self, indices: Tensor) -> Batch:
        """{"input" (B, C, H, W), "label" (B,), "taught" (B, classes)} of pictures `indices` (B,)."""
        plain, labels = pictures_of(self.data, indices)
        x = self.views.of(plain, self.data, indices, self.draw, self.seed)
        classes, kept = self._answers
        taught = log_probabilities(classes[indices], kept[indices], self.classes)
        own = (uniforms(self.seed, self.epoch, indices)[:, ORIGINAL] < self.original) & (labels >= 0)
        if own.any():
            if int(labels.max()) >= self.classes:
                raise UserError(
                    f"a picture has the label {int(labels.max())}, but the teacher knows {self.classes} classes; "
                    "set original=0"
                )
            certain = F.one_hot(labels.clamp_min(0), self.classes).float().clamp_min(FLOOR).log()
            x, taught = torch.where(own[:, None, None, None], plain, x), torch.where(own[:, None], certain, taught)
        return {"input": x, "label": labels, "taught": taught}


def fingerprint(data: Any) -> str:
    """A hash of the number of pictures and of some of them, evenly spaced."""
    picks = torch.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).round().long()
    pictures, labels = pictures_of(data, picks)
    digest = hashlib.sha256(f"{len(data)} {tuple(pictures.shape)}".encode())
    digest.update(pictures.contiguous().numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:32]
