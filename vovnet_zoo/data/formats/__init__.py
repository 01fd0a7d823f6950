"""Each module here recognises the datasets of one format, and reads them as the content of a COCO JSON file.

An entry of `FORMATS` is a function that takes a dataset's folder and returns its splits by name ("train", "val",
"test", or "" for a dataset that is not split), or {} where the folder holds another format.
"""

from collections.abc import Callable
from pathlib import Path

from .huggingface import find_tables
from .imagefolder import find_imagefolder
from .places import Split
from .voc import find_voc
from .yolo import find_yolo

FORMATS: tuple[Callable[[Path], dict[str, list[Split]]], ...] = (find_imagefolder, find_tables, find_yolo, find_voc)
