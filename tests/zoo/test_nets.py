import shutil

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lilliput.anatomy import anatomy
from lilliput.errors import UserError
from lilliput.zoo import nets

PICTURE_NETS = [name for name in nets.NAMES if name != "llama-tiny"]


def fresh(name):
    torch.manual_seed(0)
    return nets.build(name)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PICTURE_NETS)
def test_logits_and_independence_of_the_batch(name):
    model, x = fresh(name), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (3, 10)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(model(x[1:2]), y[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("resnet-small", 0.2e6, 0.7e6),
        ("bottleneck-resnet-small", 0.2e6, 0.7e6),
        ("mobilenet-small", 0.1e6, 0.3e6),
        ("mobilenet-medium", 0.4e6, 0.7e6),
        ("vit-small", 0.4e6, 1e6),
        ("llama-tiny", 2e6, 3e6),
    ],
)
def test_parameter_counts(name, low, high):
    assert low < parameters(nets.build(name)) < high


def test_resnet_parameter_count_is_that_of_the_paper():
    # He et al., table 6: ResNet-20 on CIFAR has 0.27 M; their shortcuts have no weights, ours have 2,752
    assert parameters(nets.resnet(16, 20, channels=3)) == pytest.approx(0.27e6, rel=0.02)


@pytest.mark.parametrize(
    ("make", "blocks"), [(lambda d: nets.resnet(4, d), 6), (lambda d: nets.bottleneck_resnet(4, d), 9)]
)
def test_depth_counts_the_layers_with_weights_on_the_longest_path(make, blocks):
    model = make(2 * blocks + 2)
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(inside) == 2 * blocks + 2


@pytest.mark.parametrize(
    "model",
    [
        nets.resnet(8, 20),
        nets.bottleneck_resnet(4, 11, classes=3),
        nets.mobilenet(4),
        nets.vit(32, 2, 2, patch=7),
        nets.vit(24, 1, 3, mlp_ratio=1.5, size=32),
    ],
    ids=["resnet", "bottleneck", "mobilenet", "vit", "vit-32"],
)
def test_other_sizes(model):
    size = 32 if getattr(model, "pos", torch.empty(1, 1, 1)).shape[1] == 65 else 28
    x = torch.randn(2, 1, size, size)
    assert model.eval()(x).shape == (2, model.head.out_features)


def test_mobilenet_has_depthwise_layers_shortcuts_and_relu6():
    model = nets.mobilenet(8)
    kinds = [type(m) for m in model.modules()]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels == m.out_channels]
    assert len(depthwise) == len(model.blocks) == 9
    assert sum(b.residual for b in model.blocks) == 6
    assert nn.ReLU6 in kinds
    assert nn.ReLU not in kinds


def test_attention_against_an_explicit_computation():
    torch.manual_seed(0)
    layer, x = nets.Attention(12, 3), torch.randn(2, 5, 12)
    q, k, v = (p(x).view(2, 5, 3, 4).permute(0, 2, 1, 3) for p in (layer.q, layer.k, layer.v))
    mixed = torch.softmax(q @ k.mT / 4**0.5, -1) @ v
    torch.testing.assert_close(layer(x), layer.out(mixed.permute(0, 2, 1, 3).reshape(2, 5, 12)))


def test_attention_takes_narrower_heads():
    layer = nets.Attention(12, 3)
    layer.q, layer.k = nn.Linear(12, 6), nn.Linear(12, 6)
    assert layer(torch.randn(1, 4, 12)).shape == (1, 4, 12)


def test_anatomy_knows_the_transformers():
    vit, llama = anatomy(nets.build("vit-small")), anatomy(nets.build("llama-tiny"))
    assert (vit.kind, len(vit.blocks), vit.blocks[0].attention.heads) == ("vit", 4, 4)
    assert vit.blocks[1].mlp.into == ("blocks.1.mlp.fc1",)
    assert (llama.kind, len(llama.blocks), llama.tied) == ("llama", 6, True)


# --- tools that trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURE_NETS)
def test_torch_fx_traces(name):
    model, x = fresh(name), torch.randn(2, 1, 28, 28)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    assert traced(torch.randn(5, 1, 28, 28)).shape == (5, 10)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet-small", "blocks.0.conv1"),
        ("bottleneck-resnet-small", "blocks.1.conv2"),
        ("mobilenet-small", "blocks.2.expand.0"),
        ("vit-small", "blocks.1.mlp.fc1"),
    ],
)
def test_torch_pruning_removes_channels(name, layer):
    import torch_pruning as tp

    model, x = fresh(name), torch.randn(2, 1, 28, 28)
    before = parameters(model)
    graph = tp.DependencyGraph().build_dependency(model, x)
    module = model.get_submodule(layer)
    prune = tp.prune_linear_out_channels if isinstance(module, nn.Linear) else tp.prune_conv_out_channels
    graph.get_pruning_group(module, prune, idxs=[0, 3]).prune()
    assert parameters(model) < before
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("name", PICTURE_NETS)
def test_onnx_export(name, tmp_path):
    file = tmp_path / "net.onnx"
    torch.onnx.export(fresh(name), (torch.randn(1, 1, 28, 28),), file, dynamo=False)
    onnx.checker.check_model(onnx.load(file), full_check=True)


# --- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.NAMES)
def test_shipped_weights_load_in_float32_and_eval_mode(name):
    model = nets.load(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(next(model.parameters()), next(fresh(name).parameters()))


def test_shipped_files_are_small_and_all_noted():
    files = {f.name: f.stat().st_size for f in nets.CHECKPOINTS.iterdir() if f.name != "hashes.toml"}
    assert sum(files.values()) < 20e6
    assert (
        files.keys() == nets.facts().keys() == {f"{n}.safetensors" for n in nets.NAMES} | {"llama-tiny.tokenizer.json"}
    )


def test_tied_embedding_stays_tied():
    model = nets.load("llama-tiny")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_llama_predicts_english_better_than_noise():
    model, tokenizer = nets.load("llama-tiny"), nets.load_tokenizer()
    text = "The Congress of the United States has the power to lay and collect taxes."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(input_ids=i).logits[0, :-1], i[0, 1:]).item()
            for i in (ids, ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))])
        ]
    assert nats[0] < 0.7 * nats[1]


@pytest.mark.parametrize("text", ["", "Hello, world!\n", "naïve — 日本 🙂", "  two  spaces\t"])
def test_tokenizer_spells_everything(text):
    tokenizer = nets.load_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 2048
    assert tokenizer.eos_token_id == 0


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The checkpoints, in a folder where they may be damaged."""
    shutil.copytree(nets.CHECKPOINTS, tmp_path / "checkpoints")
    monkeypatch.setattr(nets, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_changed_byte_is_noticed(copied, at):
    file = copied / "mobilenet-small.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.*install lilliput again"):
        nets.load("mobilenet-small")


def test_a_missing_file_says_how_to_make_it(copied):
    (copied / "vit-small.safetensors").unlink()
    with pytest.raises(UserError, match=r"python -m lilliput\.zoo\.train vit-small"):
        nets.load("vit-small")


# --- wrong use -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nets.build("resnet-50"), "no net 'resnet-50'; there are: resnet-small"),
        (lambda: nets.load("x"), "no net 'x'"),
        (lambda: nets.resnet(16, 15), "depth is 15; give 6 n"),
        (lambda: nets.bottleneck_resnet(16, 2), "depth is 2; give 9 n"),
        (lambda: nets.mobilenet(5), "width is 5"),
        (lambda: nets.vit(30, 2, 4), "dim is 30"),
        (lambda: nets.vit(patch=5), "patch is 5"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(UserError, match=message):
        call()
