"""Import torchvision also where its compiled operators cannot be loaded.

PyPI's torchvision is linked against CUDA. On a CPU build of torch its operators do not load, and importing the
package then fails because it registers shape rules for ``nms`` and ``qnms``. Data sets use neither, so declaring
the two schemas is enough.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[Any] = []  # torch.library.Library objects: a schema disappears with the object that declared it


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its missing operators if that is what stops it.

    Where torchvision has its operators this is ``import torchvision`` and nothing else. May be called repeatedly.

    Returns
    -------
    ModuleType
        The package ``torchvision``.

    Raises
    ------
    RuntimeError
        If torchvision cannot be imported for any other reason, as it was raised.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        # Declared only after the failure: a working torchvision declares them itself, and twice is an error.
        missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
        if "torchvision::" not in str(error) or not missing:
            raise
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in missing:
        library.define(_SCHEMAS[name])
    _declared.append(library)
    return importlib.import_module("torchvision")
