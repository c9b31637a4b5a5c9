"""Makes `AutoModelForCausalLM.from_pretrained(<artifact>)` work, without importing transformers before it is used.

The quantizer is registered as soon as somebody imports `transformers.quantizers.auto`.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers is loaded already, else when it loads."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from lilliput import hf_quantizer

    hf_quantizer.register()


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: Loader):
        self.real = real

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        self.real.exec_module(module)
        _register()
