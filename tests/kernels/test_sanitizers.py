"""The kernels, built without Python under AddressSanitizer and UBSan, on odd shapes."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "src" / "lilliput" / "kernels"


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler")
def test_no_kernel_touches_memory_beside_its_buffers(tmp_path):
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", KERNELS, "-B", build, "-DLILLIPUT_SANITIZE=ON"],
        ["cmake", "--build", build, "--parallel", "2"],
    ):
        run(command)
    checks = [file.stem for file in Path(__file__).parent.glob("check_*.cpp")]
    assert checks
    for check in checks:
        assert run([build / check]).split() == ["right"]
