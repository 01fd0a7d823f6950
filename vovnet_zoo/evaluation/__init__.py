"""This package scores detectors: `coco_eval` computes COCO's average precision, `analysis` says what it hides."""

from ..results import to_coco_results
from .coco_eval import coco_metrics, format_table, gather_results, load_engine

__all__ = ["coco_metrics", "format_table", "gather_results", "load_engine", "to_coco_results"]
