"""The methods, by family: `lilliput.methods.prune.Channels` is the class defined in `methods/prune/channels.py`."""

import importlib
import pkgutil


def __getattr__(family: str):
    if family.startswith("_") or family not in {m.name for m in pkgutil.iter_modules(__path__) if m.ispkg}:
        raise AttributeError(f"no method family {family!r}")
    return importlib.import_module(f"{__name__}.{family}")


def family_getattr(package: str, path: list[str]):
    """`__getattr__` for a family's folder: imports only the file that defines the class asked for."""

    def find(name: str):
        for entry in pkgutil.iter_modules(path):
            if not entry.name.startswith("_") and entry.name.replace("_", "") == name.lower():
                return getattr(importlib.import_module(f"{package}.{entry.name}"), name)
        raise AttributeError(f"{package} has no method {name!r}")

    return find
