"""How a changed model differs from the architecture it came from, as a list of edits that can be replayed.

`describe(model, skeleton)` compares two module trees; `replay(skeleton, edits)` makes the second into the first. Only
the torch modules of the table below, and module classes with a `config()` inside lilliput or an installed method
package, are ever built: an edit can name sizes, never code.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from lilliput.errors import UserError

Edit = dict[str, Any]

_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "bias",
    "padding_mode",
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
TORCH_MODULES: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features", "bias"),
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "Conv1d": _CONV,
    "Conv2d": _CONV,
    "BatchNorm1d": _BATCH_NORM,
    "BatchNorm2d": _BATCH_NORM,
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine", "bias"),
    "Identity": (),
    "Sequential": (),
    "Flatten": ("start_dim", "end_dim"),
    "Dropout": ("p",),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "ReLU": (),
    "ReLU6": (),
    "Sigmoid": (),
    "Tanh": (),
    "Hardtanh": ("min_val", "max_val"),
}
LIMIT = 2**31  # no size in an edit may exceed this
_MISSING = object()


def module_config(module: nn.Module) -> Edit | None:
    """{"type", "config"} that builds an equal-shaped module, or None for a module that only its owner can build.

    Our own modules have a method `rebuild_config()` that returns the arguments of their constructor.
    """
    kind = type(module)
    if hasattr(kind, "rebuild_config"):
        return {"type": f"{kind.__module__}.{kind.__qualname__}", "config": module.rebuild_config()}
    if kind.__module__.startswith("torch.nn") and kind.__name__ in TORCH_MODULES:
        return {"type": kind.__name__, "config": {k: _plain(module, k) for k in TORCH_MODULES[kind.__name__]}}
    return None


def _plain(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if name == "bias":
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def build_module(kind: str, config: dict[str, Any]) -> nn.Module:
    """The module an edit names. Raises UserError for a class outside the allowed ones or an absurd size."""
    _check_sizes(kind, config)
    if kind not in TORCH_MODULES:
        cls = _allowed_class(kind)
    elif set(config) - set(TORCH_MODULES[kind]):
        raise UserError(f"edit for {kind} has unknown settings {sorted(set(config) - set(TORCH_MODULES[kind]))}")
    else:
        cls = getattr(nn, kind)
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    except (TypeError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"edit for {kind} cannot be built: {error}") from None


def _allowed_class(kind: str) -> type[nn.Module]:
    module, _, name = kind.rpartition(".")
    roots = {"lilliput"} | {e.value.split(":")[0].split(".")[0] for e in entry_points(group="lilliput.methods")}
    if module.split(".")[0] not in roots:
        raise UserError(f"the artifact wants to build {kind!r}, which is not one of Lilliput's modules; it is refused")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"the artifact needs {kind!r}, which this version does not have; update lilliput") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "rebuild_config")):
        raise UserError(f"{kind!r} is not a module that can be rebuilt; the artifact is refused")
    return cls


def _check_sizes(kind: str, values: Any) -> None:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | dict):
            _check_sizes(kind, value)
        elif isinstance(value, int) and abs(value) > LIMIT:
            raise UserError(f"edit for {kind} holds the size {value}; nothing here is that large, the file is refused")


# --- comparing -------------------------------------------------------------------------------------------------


def describe(model: nn.Module, skeleton: nn.Module) -> list[Edit]:
    """The edits that make `skeleton` into `model` (shapes and structure; the tensors travel apart)."""
    edits: list[Edit] = []
    _compare("", model, skeleton, edits)
    return edits


def _compare(name: str, new: nn.Module, old: nn.Module, edits: list[Edit]) -> None:
    ours, theirs = module_config(new), module_config(old)
    if ours is not None and ours != theirs:
        edits.append({"edit": "set", **_tree(name, new)})
        if type(new) is not nn.Sequential and list(new.children()):
            _compare(name, new, _built_anew(ours), edits)
        return
    if type(new) is not type(old):
        raise _unsavable(name, new)
    if isinstance(new, nn.ModuleList) and len(new) != len(old):
        if len(new) > len(old):
            raise UserError(f"module list {name!r} grew from {len(old)} to {len(new)}; build the larger skeleton first")
        edits.append({"edit": "length", "module": name, "value": len(new)})
    if ours is None:
        before = _scalars(old)
        changed = {k: v for k, v in _scalars(new).items() if before.get(k, _MISSING) != v}
        if changed:
            edits.append({"edit": "attributes", "module": name, "values": changed})
    _compare_children(name, new, old, edits)


def _compare_children(name: str, new: nn.Module, old: nn.Module, edits: list[Edit]) -> None:
    children = dict(old.named_children())
    for child_name, child in new.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if child_name in children:
            _compare(path, child, children[child_name], edits)
        else:
            edits.append({"edit": "set", **_tree(path, child)})
    if not isinstance(new, nn.ModuleList):
        edits += [
            {"edit": "remove", "module": f"{name}.{key}" if name else key, "none": key in new._modules}
            for key, child in old._modules.items()
            if child is not None and new._modules.get(key) is None
        ]


def _built_anew(described: Edit) -> nn.Module:
    """What replaying a description gives: its children may differ from those that later methods put in their place."""
    with torch.device("meta"):
        return build_module(described["type"], described["config"])


def describable(model: nn.Module) -> bool:
    """Whether every module can be built again from its description alone."""
    if module_config(model) is None:
        return False
    return type(model) is not nn.Sequential or all(map(describable, model.children()))


def _tree(name: str, module: nn.Module) -> Edit:
    """A module with the children that its constructor does not build itself: those of an `nn.Sequential`."""
    described = module_config(module)
    if described is None:
        raise _unsavable(name, module)
    children = module.named_children() if type(module) is nn.Sequential else ()
    return {"module": name, **described, "children": [_tree(child_name, child) for child_name, child in children]}


def _unsavable(name: str, module: nn.Module) -> UserError:
    return UserError(
        f"module {name!r} became a {type(module).__name__}, which cannot be saved: give the class a rebuild_config() "
        "method that returns the arguments of its constructor"
    )


def _scalars(module: nn.Module) -> dict[str, Any]:
    """Public plain attributes, the sizes that surgery adjusts (head counts, block indices)."""
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and type(v) in plain}


# --- replaying -------------------------------------------------------------------------------------------------


def replay(skeleton: nn.Module, edits: list[Edit]) -> nn.Module:
    """Apply edits in place and return the model. Raises UserError on an edit that does not fit."""
    for edit in edits:
        try:
            _replay_one(skeleton, edit)
        except (KeyError, AttributeError, TypeError, IndexError) as error:
            raise UserError(f"edit {str(edit)[:120]} does not fit the architecture: {error}") from None
    return skeleton


def _replay_one(skeleton: nn.Module, edit: Edit) -> None:
    kind, name = edit["edit"], edit["module"]
    if kind == "set" and name:
        set_module(skeleton, name, _build_tree(edit))
    elif kind == "remove" and name:
        owner, _, child = name.rpartition(".")
        children = skeleton.get_submodule(owner)._modules
        del children[child]
        if edit["none"]:
            children[child] = None
    elif kind == "length":
        modules = skeleton.get_submodule(name)
        if not isinstance(modules, nn.ModuleList) or not 0 <= edit["value"] <= len(modules):
            raise UserError(f"an edit sets the length of {name!r} to {edit['value']}, which it cannot have")
        del modules[edit["value"] :]
    elif kind == "attributes":
        module = skeleton.get_submodule(name)
        known = _scalars(module)
        for key, value in edit["values"].items():
            if key not in known or type(value) not in (bool, int, float, str, type(None)):
                raise UserError(f"an edit sets {name}.{key}, which is not a plain attribute of that module")
            setattr(module, key, value)
    else:
        raise UserError(f"edit {kind!r} of {name!r} is unknown; was the artifact made by a newer version?")


def _build_tree(edit: Edit) -> nn.Module:
    module = build_module(edit["type"], edit["config"])
    for child in edit.get("children", []):
        module.add_module(child["module"], _build_tree(child))
    return module


def set_module(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` where the dotted `name` points in `model`."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    replacement.train(owner.training)
    owner._modules[child] = replacement
