"""The C++ of a network compiled and run here, frame by frame: to check it and to use it."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lilliput.errors import UserError
from lilliput.methods.circuits._tools import run, tool

FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC")


def run_cpp(cpp: str, q: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Frames q, uint8 (frames, C, H, W) -> scores, int64 (frames, classes), and the class of each frame.

    Raises UserError where no compiler is, or it complains.
    """
    if q.dtype != torch.uint8 or q.ndim != 4:
        raise UserError(f"the frames are {q.dtype} {tuple(q.shape)}; give uint8 (frames, C, H, W), see `net.read`")
    frames = q.permute(0, 2, 3, 1).contiguous()
    scores, best = torch.zeros(len(q), classes, dtype=torch.int64), torch.zeros(len(q), dtype=torch.int64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "net.cpp").write_text(cpp)
        run([tool("g++"), *FLAGS, "net.cpp", "-o", "net.so"], folder)
        classify = ctypes.CDLL(str(folder / "net.so")).classify
        for i in range(len(q)):
            best[i] = classify(ctypes.c_void_p(frames[i].data_ptr()), ctypes.c_void_p(scores[i].data_ptr()))
    return scores, best
