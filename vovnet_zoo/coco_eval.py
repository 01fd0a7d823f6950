"""This is the former path of `vovnet_zoo.evaluation.coco_eval`, whose `coco_metrics` was called `evaluate`."""

from .evaluation.coco_eval import coco_metrics as evaluate
from .evaluation.coco_eval import format_table, gather_results, load_engine, to_coco_results

__all__ = ["evaluate", "format_table", "gather_results", "load_engine", "to_coco_results"]
