"""This library has VoVNet backbones for timm, and FCOS detectors on any timm backbone."""

from . import vovnet as vovnet  # the import registers the backbones with timm
from .compiled import compile_detector
from .detectors import create_detector, list_detectors
from .draw import draw_detections
from .fcos import FCOS, Predictions
from .inference import postprocess, predict
from .loss import FCOSLoss, assign_targets
from .results import ImageDetections
from .version import __version__

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
    "list_detectors",
    "postprocess",
    "predict",
]
