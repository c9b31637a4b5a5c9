import pytest
import torch
from torch import nn

from lilliput.errors import UserError
from lilliput.methods.quantize.int8_static import Int8Static
from lilliput.runtimes import check, find_runtime
from lilliput.runtimes.openvino import executed_precisions
from lilliput.workload import Workload


def products(model):
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())


def test_float_models_run_in_float32_on_the_threads_asked_for(mobile_work):
    session = find_runtime("openvino").prepare(mobile_work.model, mobile_work, threads=1)
    assert executed_precisions(session) == {"f32": products(mobile_work.model)}
    assert session.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert "LATENCY" in str(session.compiled.get_property("PERFORMANCE_HINT"))


@pytest.mark.parametrize("activations", ["affine", "symmetric"])
def test_every_convolution_really_runs_on_integers(mobile_work, activations):
    model = Int8Static(activations=activations).apply(mobile_work.model, mobile_work)
    counts = executed_precisions(find_runtime("openvino").prepare(model, mobile_work, threads=1))
    assert counts.keys() <= {"u8", "i8"}
    assert sum(counts.values()) == products(mobile_work.model)


def test_layers_left_in_float_are_counted_as_float(mobile_work):
    model = Int8Static().apply(mobile_work.model, mobile_work, layers=["stem", "down"])
    counts = executed_precisions(find_runtime("openvino").prepare(model, mobile_work, threads=1))
    assert counts == {"u8": 2, "f32": products(mobile_work.model) - 2}


def test_linear_layers_of_a_transformer_run_on_integers():
    """Of usual sizes: the products of very small layers are generated as one float kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192)).eval()
    batches = [{"input": torch.randn(2, 64, 192), "label": torch.zeros(2, dtype=torch.long)}]
    work = Workload.classifier(model, batches, batches, batches)
    session = find_runtime("openvino").prepare(Int8Static().apply(model, work), work, threads=1)
    assert executed_precisions(session) == {"u8": 2}


def test_a_generated_kernel_counts_its_products(vit_work):
    counts = executed_precisions(find_runtime("openvino").prepare(vit_work.model, vit_work, threads=1))
    attention = 2 * len(vit_work.model.blocks)
    assert counts == {"f32": products(vit_work.model) + attention}


def test_int8_results_match_the_emulation_to_float_rounding_without_depth():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval()
    batches = [{"input": torch.randn(4, 8, 12, 12), "label": torch.zeros(4, dtype=torch.long)}]
    work = Workload.classifier(model, batches, batches, batches)
    rounded = Int8Static().apply(model, work)
    assert check(find_runtime("openvino").prepare(rounded, work, threads=1), rounded, work) < 1e-6


def test_encoders_with_several_inputs_run():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(-1).float()
            return self.head((self.table(input_ids) * mask).sum(1) / mask.sum(1))

    torch.manual_seed(0)
    model = Encoder().eval()
    ids = torch.randint(0, 20, (4, 6))
    batch = {"input_ids": ids, "attention_mask": (ids > 5).long().clamp_min(0), "label": torch.zeros(4).long()}
    batch["attention_mask"][:, 0] = 1
    work = Workload(model, [batch], [batch], [batch], metric=None, example={k: v[:1] for k, v in batch.items()})
    session = find_runtime("openvino").prepare(model, work, threads=1)
    assert session.names == ("input_ids", "attention_mask")
    assert check(session, model, work) < 1e-6


def test_a_language_model_is_refused(llama_work):
    (reason,) = find_runtime("openvino").supports(llama_work.model, llama_work)
    assert "keys and values between steps" in reason
    with pytest.raises(UserError, match="keys and values"):
        find_runtime("openvino").prepare(llama_work.model, llama_work)
