"""Makes torchvision importable beside a torch without CUDA."""

from __future__ import annotations

import sys

import torch

_libraries: list[torch.library.Library] = []


def prepare_torchvision() -> None:
    """Make `import torchvision` work where its wheel wants CUDA and torch has none.

    Such a torchvision stops at its missing compiled operators `nms` and `qnms`. Declaring them is
    enough for its transforms, which is all the processors use.
    """
    if torch.version.cuda is not None or _imports_torchvision():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # its end would take the declarations with it
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _imports_torchvision():
        raise RuntimeError("torchvision does not import")


def _imports_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        return False
    return True
