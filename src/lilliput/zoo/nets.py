"""Small networks for 1x28x28 pictures of 10 classes and a tiny Llama, with the weights that `zoo.train` made here.

`build(name)` gives an untrained net, `load(name)` the shipped weights. The constructors behind the names take widths
and depths, so an experiment builds its own size. torch.fx, Torch-Pruning and torch.onnx trace the picture nets.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lilliput.errors import UserError

CHECKPOINTS = Path(__file__).parent / "checkpoints"


# --- convolutional ---------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)): He et al., 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class BottleneckBlock(nn.Module):
    """1x1 down, 3x3, 1x1 up to `expansion` times the width, with a shortcut: He et al., 2016."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` residual blocks at 1, 2 and 4 times `width`, mean pooling, a linear head."""

    def __init__(self, block: type[nn.Module], width: int, blocks: int, classes: int, channels: int, stem_stride: int):
        super().__init__()
        expansion = getattr(block, "expansion", 1)
        self.conv = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential()
        inputs = width
        for stage, stage_width in enumerate((width, 2 * width, 4 * width)):
            for i in range(blocks):
                self.blocks.append(block(inputs, stage_width, stride=2 if stage and i == 0 else 1))
                inputs = stage_width * expansion
        self.head = nn.Linear(inputs, classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


def resnet(width: int = 16, depth: int = 14, classes: int = 10, channels: int = 1, stem_stride: int = 1) -> ResNet:
    """A CIFAR-type ResNet; `depth` is 6 n + 2. With `stem_stride=2` it costs a quarter."""
    return ResNet(ResidualBlock, width, _blocks_of(depth, 6), classes, channels, stem_stride)


def bottleneck_resnet(
    width: int = 16, depth: int = 20, classes: int = 10, channels: int = 1, stem_stride: int = 1
) -> ResNet:
    """The same with 1x1-3x3-1x1 bottlenecks; `depth` is 9 n + 2."""
    return ResNet(BottleneckBlock, width, _blocks_of(depth, 9), classes, channels, stem_stride)


def _blocks_of(depth: int, per_block: int) -> int:
    blocks, rest = divmod(depth - 2, per_block)
    if blocks < 1 or rest:
        raise UserError(f"depth is {depth}; give {per_block} n + 2, such as {per_block + 2} or {2 * per_block + 2}")
    return blocks


class InvertedResidual(nn.Module):
    """1x1 up (unless `expand` is 1), depthwise 3x3, linear 1x1 down, and a shortcut: Sandler et al., 2018."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.expand = _conv_bn_relu6(inputs, hidden, 1) if expand > 1 else nn.Identity()
        self.depthwise = _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2 for small pictures: a 3x3 stem of stride 2, inverted residuals, a 1x1 convolution, a linear head."""

    # (expansion, width in units of the stem's, blocks, stride of the first)
    STAGES = ((1, 1, 1, 1), (4, 1.5, 2, 1), (4, 2, 3, 2), (4, 4, 3, 2))

    def __init__(self, width: int, classes: int, channels: int, stem_stride: int):
        super().__init__()
        self.stem = _conv_bn_relu6(channels, width, 3, stem_stride)
        self.blocks = nn.Sequential()
        inputs = width
        for expand, multiple, repeats, stride in self.STAGES:
            outputs = int(width * multiple)
            for i in range(repeats):
                self.blocks.append(InvertedResidual(inputs, outputs, stride if i == 0 else 1, expand))
                inputs = outputs
        self.last = _conv_bn_relu6(inputs, 16 * width, 1)
        self.head = nn.Linear(16 * width, classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


def mobilenet(width: int = 16, classes: int = 10, channels: int = 1, stem_stride: int = 2) -> MobileNet:
    """A MobileNetV2 whose stages have 1, 1.5, 2 and 4 times `width` channels (an even number)."""
    if width < 2 or width % 2:
        raise UserError(f"width is {width}; give an even number of channels")
    return MobileNet(width, classes, channels, stem_stride)


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --- transformers ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with separate projections; the head width follows from the projections' widths."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, T, d) of x (B, T, dim)."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output (B, T, dim) of what `split` gave."""
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.split(x))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token first, learned positions, `layers` blocks, a norm and a linear head: Dosovitskiy et al."""

    def __init__(
        self, dim: int, layers: int, heads: int, hidden: int, patch: int, size: int, channels: int, classes: int
    ):
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(
    dim: int = 96,
    layers: int = 6,
    heads: int = 4,
    mlp_ratio: float = 4,
    patch: int = 4,
    size: int = 28,
    channels: int = 1,
    classes: int = 10,
) -> VisionTransformer:
    """A vision transformer for square pictures of `size` pixels."""
    if dim % heads:
        raise UserError(f"dim is {dim}, which {heads} heads do not divide; give a multiple of {heads}")
    if size % patch:
        raise UserError(f"patch is {patch}, which does not divide the picture's {size} pixels")
    return VisionTransformer(dim, layers, heads, int(dim * mlp_ratio), patch, size, channels, classes)


def llama(
    dim: int = 192, layers: int = 6, heads: int = 6, kv_heads: int = 2, hidden: int = 512, vocab: int = 2048
) -> nn.Module:
    """A transformers LlamaForCausalLM with tied embeddings and a context of 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


# --- the named ones --------------------------------------------------------------------------------------------

_NETS: dict[str, Callable[[], Any]] = {
    "resnet-small": partial(resnet, width=32, depth=14, stem_stride=2),
    "resnet-medium": partial(resnet, width=32, depth=14),
    "bottleneck-resnet-small": partial(bottleneck_resnet, width=24, depth=20, stem_stride=2),
    "mobilenet-small": partial(mobilenet, width=16),
    "mobilenet-medium": partial(mobilenet, width=32),
    "vit-small": partial(vit, dim=96, layers=4, heads=4),
    "llama-tiny": llama,
}
NAMES = tuple(_NETS)


def build(name: str) -> nn.Module:
    """An untrained net in eval mode. Raises UserError with the names that exist."""
    if name not in _NETS:
        raise UserError(f"there is no net {name!r}; there are: {', '.join(NAMES)}")
    return _NETS[name]().eval()


def load(name: str) -> nn.Module:
    """A net with its shipped weights, float32, eval mode. Raises UserError when the file is missing or was changed."""
    model = build(name)
    try:
        tensors = load_file(_checked(f"{name}.safetensors"))
    except SafetensorError as error:
        raise UserError(f"the shipped weights of {name} cannot be read: {error}; install lilliput again") from None
    missing, unexpected = model.load_state_dict({k: _float32(t) for k, t in tensors.items()}, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise UserError(f"the shipped weights of {name} do not fit the net; run: python -m lilliput.zoo.train {name}")
    return model


def load_tokenizer() -> Any:
    """The byte-level BPE tokenizer of llama-tiny (2,048 tokens; 0 is <|endoftext|>)."""
    from transformers import PreTrainedTokenizerFast

    file = _checked("llama-tiny.tokenizer.json")
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=end, eos_token=end, pad_token=end)


def facts() -> dict[str, dict[str, Any]]:
    """What `zoo.train` wrote beside the weights: file name -> sha256, measured score, seconds, seed."""
    file = CHECKPOINTS / "hashes.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


def _checked(file_name: str) -> Path:
    """The path of a shipped file whose sha256 is the one in hashes.toml."""
    file, expected = CHECKPOINTS / file_name, facts().get(file_name, {}).get("sha256")
    net = file_name.partition(".")[0]
    if expected is None or not file.exists():
        raise UserError(
            f"{file_name} was not shipped with this install; make it with: python -m lilliput.zoo.train {net}"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
        raise UserError(f"{file} is damaged: its sha256 is not the one in hashes.toml; install lilliput again")
    return file


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
