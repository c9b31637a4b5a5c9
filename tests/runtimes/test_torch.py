import torch

from lilliput.runtimes import find_runtime


def test_threads_are_set_for_the_call_only(mobile_work):
    seen = []
    mobile_work.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    session = find_runtime("torch").prepare(mobile_work.model, mobile_work, threads=2)
    torch.set_num_threads(1)
    session(mobile_work.example)
    assert seen == [2]
    assert torch.get_num_threads() == 1


def test_convolutions_run_channels_last(mobile_work):
    session = find_runtime("torch").prepare(mobile_work.model, mobile_work)
    strides = []
    session.model.depth.register_forward_hook(lambda m, args, out: strides.append(out.stride()))
    session(mobile_work.example)
    assert strides[0][1] == 1


def test_language_models_run(llama_work):
    session = find_runtime("torch").prepare(llama_work.model, llama_work, threads=1)
    batch = llama_work.test[0]
    with torch.no_grad():
        expected = llama_work.model(input_ids=batch["input_ids"]).logits
    assert torch.equal(llama_work.forward(session, batch), expected)
    assert not session(batch).requires_grad
