"""What the tests of the kernels share."""

import pytest
from grouped import executing

from lilliput import kernels


@pytest.fixture(params=kernels.available_isas())
def isa(request):
    """Each instruction set of this machine in turn."""
    with executing(request.param):
        yield request.param
