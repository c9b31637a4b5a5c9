"""Memory: what a fresh process needs at its peak, and the bytes of a model's weights.

The peak is that of a new Python process, so that nothing an earlier model left behind counts. What the imports alone
take is subtracted, since it depends on the installation and not on the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lilliput.errors import UserError

_MARK = "lilliput-memory:"

# The peak of Linux's ru_maxrss survives exec: it would report the parent's. VmHWM belongs to the new program alone.
_CHILD = """
import gc, json, re, resource, sys
imports, code, sys.argv = sys.argv[1], sys.argv[2], ["measured", *sys.argv[3:]]
def resident(field):
    try:
        with open("/proc/self/status") as file:
            return int(re.search(field + r":\\s*(\\d+) kB", file.read())[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
names = {"__name__": "__main__"}
exec(compile(imports, "<imports>", "exec"), names)
gc.collect()
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
except OSError:
    pass
baseline = resident("VmRSS")
exec(compile(code, "<code>", "exec"), names)
print("\\n" + MARK + json.dumps([baseline, resident("VmHWM")]))
""".replace("MARK", repr(_MARK))

# The skeleton on the meta device brings in every module of the architecture before the baseline is taken.
_IMPORT_ARTIFACT = """
import sys
from pathlib import Path
from lilliput.artifact import load, load_example, read_architecture, skeleton
from lilliput.runtimes import find_runtime
from lilliput.workload import CausalLM, Classifier, Metric, Workload
folder, runtime = Path(sys.argv[1]), find_runtime(sys.argv[2])
architecture = read_architecture(folder)
skeleton(architecture["source"], folder)
"""

_RUN_EXAMPLE = """
example = load_example(folder)
kinds = {kind.kind: kind for kind in (CausalLM, Classifier)}
workload_class = kinds.get(architecture.get("kind"), Workload)
model, no_metric = load(folder), Metric("none", "", True, lambda logits, batch: logits)
workload = workload_class(model, [example], [example], [example], no_metric, example)
runtime.prepare(model, workload)(example)
"""


def peak_memory_bytes(
    code: str, args: Sequence[str] = (), imports: str = "import torch", timeout_seconds: float = 600
) -> int:
    """Peak resident bytes of running `code` in a fresh Python process, less what is resident after `imports`.

    `code` sees the names of `imports` and `sys.argv[1:] == args`. The peak includes pages of mapped files that were
    read. Raises UserError with the last line of the error when the code fails.
    """
    command = [sys.executable, "-c", _CHILD, imports, code, *map(str, args)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"measuring memory took longer than {timeout_seconds} s; give it more time") from None
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode != 0 or not lines:
        error = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise UserError(f"the process whose memory was measured failed: {error}")
    baseline, peak = json.loads(lines[-1].removeprefix(_MARK))
    return max(0, peak - baseline)


def artifact_memory(path: str | Path, runtime: str = "torch") -> int:
    """Peak bytes of loading the artifact in a fresh process, preparing it for `runtime` and running its example once.

    Raises UserError for an artifact whose architecture neither transformers nor the zoo can build.
    """
    return peak_memory_bytes(_RUN_EXAMPLE, [str(path), runtime], imports=_IMPORT_ARTIFACT)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind parameters and buffers; shared ones (tied weights, views) count once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _plain_tensors(tensor):
            storage = part.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors inside a wrapper such as torchao's packed weights, or the tensor itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
