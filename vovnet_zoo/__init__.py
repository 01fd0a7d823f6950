"""This library has VoVNet backbones for timm, and FCOS detectors on any timm backbone.

The import of `vovnet_zoo` takes milliseconds: a name of the library is imported when it is first used, and the
backbones are registered with timm as the last step of timm's own import, or at once if timm is imported already.
"""

import sys
from typing import TYPE_CHECKING

from .import_hook import after_import
from .version import __version__

if TYPE_CHECKING:  # what type checkers and editors read; PUBLIC says the same to Python
    from . import vovnet as vovnet
    from .compiled import compile_detector
    from .detectors import create_detector, list_detectors
    from .draw import draw_detections
    from .export import export_detector
    from .fcos import FCOS, Predictions
    from .inference import postprocess, predict
    from .load import load_detector
    from .loss import FCOSLoss, assign_targets
    from .results import ImageDetections
else:
    PUBLIC = {  # public name -> its module
        "compile_detector": "compiled",
        "create_detector": "detectors",
        "list_detectors": "detectors",
        "draw_detections": "draw",
        "export_detector": "export",
        "FCOS": "fcos",
        "Predictions": "fcos",
        "postprocess": "inference",
        "predict": "inference",
        "load_detector": "load",
        "FCOSLoss": "loss",
        "assign_targets": "loss",
        "ImageDetections": "results",
    }

    def __getattr__(name):
        """Import a public name, or a module of the library, when it is first used (PEP 562)."""
        if name in PUBLIC:
            globals()[name] = getattr(_import(PUBLIC[name]), name)
            return globals()[name]
        if not name.startswith("_"):
            try:
                return _import(name)
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":  # a package that the module needs
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *PUBLIC, "vovnet"})


__all__ = [
    "FCOS",
    "FCOSLoss",
    "ImageDetections",
    "Predictions",
    "__version__",
    "assign_targets",
    "compile_detector",
    "create_detector",
    "draw_detections",
    "export_detector",
    "list_detectors",
    "load_detector",
    "postprocess",
    "predict",
]


def _import(module: str) -> object:
    """Import a module of the library as the import statement does.

    Where threads import modules that import each other, the statement goes on, and importlib.import_module raises.
    """
    __import__(f"{__name__}.{module}")
    return sys.modules[f"{__name__}.{module}"]


after_import("timm", lambda: _import("vovnet"))
