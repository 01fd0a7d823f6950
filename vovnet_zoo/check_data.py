"""This is the former path of `vovnet_zoo.data.check`."""

from .data.check import Finding, Report, check_dataset, inspect_image, main, run_parallel

__all__ = ["Finding", "Report", "check_dataset", "inspect_image", "main", "run_parallel"]
