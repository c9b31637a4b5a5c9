"""The experiments' parts on small matrices and networks, and their rules on made-up figures."""

import pytest
import torch
from torch import nn

from lilliput.methods.quantize.lookup_tables import kmeans, nearest
from lilliput.paper import Row
from lilliput.papers import rapidnn, t_mac
from lilliput.papers._pictures import Table

# --- T-MAC -----------------------------------------------------------------------------------------------------


def times(ours=(1.0, 0.8, 0.6, 0.4), rival=2.0, noise=0.01):
    """Milliseconds at 4, 3, 2, 1 bits, and of two rivals, one of them slow."""
    found = t_mac.Times()
    wobble = [1 + noise * (i % 3 - 1) for i in range(15)]
    for bits, ms in zip(t_mac.BITS, ours):
        found.ms[t_mac.LOOKUP, bits] = [ms * f for f in wobble]
        found.ms[t_mac.INTEGER, bits] = [ms * rival * f for f in reversed(wobble)]
        found.ms[t_mac.DEQUANTIZE, bits] = [100.0 for _ in wobble]
    return found


def test_a_lookup_that_is_faster_and_linear_holds():
    verdicts = t_mac.judge({"a": times(), "b": times(rival=1.1)})
    assert verdicts.holds
    assert verdicts.mean_ratio(4) == pytest.approx((2.0 * 1.1) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "spoilt",
    [
        times(rival=0.9),
        times(rival=1.0),
        times(ours=(1.0, 0.99, 0.98, 0.97)),  # hardly falls
        times(ours=(0.4, 0.6, 0.8, 1.0)),  # rises
        times(ours=(1.0, 0.4, 0.9, 0.4)),  # not linear
    ],
)
def test_one_matrix_that_fails_refutes_the_claim(spoilt):
    assert not t_mac.judge({"a": times(), "b": spoilt}).holds


def test_the_strongest_rival_counts():
    found = times(rival=2.0)
    found.ms[t_mac.TORCH4, 4] = [0.5] * 15
    ratio = t_mac.judge({"a": found}).ratios["a", 4]
    assert ratio.ratio == pytest.approx(0.5, rel=0.05)
    assert ratio.loss


def test_contenders_give_the_product_of_their_weights():
    torch.manual_seed(0)
    matrix = t_mac.Matrix("small", torch.randn(48, 128), torch.randn(1, 128), copies=2)
    found = t_mac.measure(matrix, rounds=5, seed=0)
    assert set(found.ms) == {
        *((t_mac.LOOKUP, b) for b in t_mac.BITS),
        *((t_mac.INTEGER, b) for b in t_mac.RIVAL_BITS),
        (t_mac.TORCH4, 4),
        (t_mac.FLOAT, 0),
    }
    assert all(error < 1.5 for error in found.error.values())
    assert found.error[t_mac.FLOAT, 0] < 1e-4
    rows = {r.name: r for r in t_mac.table({"small": found})}
    assert rows["lookup, 3 bits"].values["small_us"] > 0


def test_dequantising_is_exact():
    torch.manual_seed(0)
    found = t_mac.measure(t_mac.Matrix("small", torch.randn(32, 64), torch.randn(1, 64)), rounds=5, seed=1)
    assert all(found.error[t_mac.DEQUANTIZE, bits] < 1e-3 for bits in t_mac.BITS)


# --- RAPIDNN ---------------------------------------------------------------------------------------------------


def row(name, accuracy, spread=0.1):
    keys = [f"{net}_accuracy_percent" for net in rapidnn.NETS]
    return Row(name, dict.fromkeys(keys, accuracy), dict.fromkeys(keys, spread))


@pytest.mark.parametrize(
    ("big", "small", "even", "holds"),
    [(89.9, 89.0, 88.0, True), (89.5, 89.0, 88.0, False), (89.9, 88.0, 88.0, False), (90.5, 89.0, 88.9, False)],
)
def test_the_rule_of_lookup_networks(big, small, even, holds):
    rows = [
        row(rapidnn.LONGER, 90.0),
        row(rapidnn.contender("k-means", 32, True), big),
        row(rapidnn.contender("k-means", 16, True), small),
        row(rapidnn.contender("uniform", 16, True), even),
    ]
    loss, gain, verdict = rapidnn.judge(rows, seeds=3)
    assert loss[0] == pytest.approx(90 - big)
    assert gain[0] == pytest.approx(small - even)
    assert verdict is holds


def test_rounding_lets_gradients_pass():
    book = kmeans(torch.randn(100), 4)
    x = torch.randn(10, requires_grad=True)
    y = rapidnn.Nearest(book)(x)
    assert torch.allclose(y, book[nearest(x.detach(), book)], atol=1e-6)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(10))


class Pictures:
    """Random pictures, labelled by where they are brightest."""

    def __init__(self, count=256):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(10, (count,), generator=generator)
        noise = torch.randint(0, 60, (count, 28, 28), generator=generator)
        self.pixels = noise.to(torch.uint8)
        for i, label in enumerate(self.labels.tolist()):
            self.pixels[i, label * 2 : label * 2 + 4] = 250

    def __len__(self):
        return len(self.labels)

    @staticmethod
    def prepare(pixels):
        return (pixels.float() / 255 - 0.3).unsqueeze(1)


@pytest.fixture
def small_work():
    from lilliput.workload import Workload

    torch.manual_seed(0)
    pictures = Pictures()
    batch = {"input": pictures.prepare(pictures.pixels[:64]), "label": pictures.labels[:64]}
    work = Workload.classifier(rapidnn.cnn(), [batch], [batch], [batch], name="small")
    work.training = type("Batches", (), {"pictures": pictures})()
    return work


def test_the_parts_of_the_experiment_on_easy_pictures(small_work):
    scale = rapidnn.Scale(256, 60, 20, 2, 64, 1, (8,))
    model = rapidnn.trained(small_work, scale.steps, seed=0)
    small_work.model = model
    before = [p.detach().clone() for p in model.parameters()]
    assert small_work.score(model, "test").value > 90
    again = rapidnn.retrained(model, small_work, 8, kmeans, scale, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert not any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in again.modules())
    assert not any(m._forward_pre_hooks for m in again.modules())
    lut = rapidnn.compose(again, small_work, 8, 8)
    assert rapidnn.decoded_accuracy(lut, small_work) > 80
    assert rapidnn.weights_only(model, small_work, 16) > 80
    table = Table()
    rapidnn.describe(table, "ours", "cnn", lut, small_work, pictures=4)
    values = table.rows()[0].values
    assert values["cnn_same_answers_by_lookup_percent"] == 100
    assert values["cnn_index_bytes"] < values["cnn_table_bytes"] + 10_000


def test_energies_say_that_they_are_modelled():
    table = Table()
    rapidnn.time_lookups(table, seed=0, entries=8)
    for found in table.rows():
        assert [key for key in found.values if "pj" in key] == ["modelled_pj_per_multiply_add"]
