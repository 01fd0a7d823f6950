"""`parse_json` parses a large COCO JSON file quickly, by leaving out its polygons, which are most of it."""

import gc
import json
from collections.abc import Callable
from typing import Any

POLYGONS = b'"segmentation"'
IN_NUMBERS = b"0123456789.,+-eE \t\r\n"


def parse_json(data: bytes, replace: Callable[[dict], Any] | None = None) -> Any:
    """Parse JSON as `json.loads` does, except that lists of polygons are not looked at and are empty in the result.

    For COCO's 860,000 annotations that takes a sixth of the time and a third of the memory.

    Args:
        replace: is called with each JSON object, innermost first and otherwise in the order of the file; what it
            returns takes the place of the object.

    Raises:
        ValueError, RecursionError: as by `json.loads`.
    """
    short = without_polygons(data)
    text = short.decode(json.detect_encoding(short), "surrogatepass")
    del short
    # Millions of objects are made here, none of which is garbage; the collector would look for it again and again.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_hook=replace)
    except ValueError:
        json.loads(data)  # its error names the place in the file
        raise
    finally:
        if was_enabled:
            gc.enable()


def without_polygons(data: bytes) -> bytearray:
    """Replace the value of each key "segmentation" by an empty list, if it is a list of numbers or of such lists."""
    short, copied, begin = bytearray(), 0, 0
    while (begin := data.find(POLYGONS, begin)) >= 0:
        begin += len(POLYGONS)
        # Polygons hold no string, so they end at the last bracket before the next one.
        end = data.rfind(b"]", begin, following if (following := data.find(b'"', begin)) >= 0 else len(data)) + 1
        brackets = data[begin:end].translate(None, IN_NUMBERS)
        if brackets == b":[[]]" or _are_balanced(brackets):
            short += data[copied:begin] + b":[]"
            copied = begin = end
    return short + data[copied:]


def _are_balanced(brackets: bytes) -> bool:
    inner = brackets.removeprefix(b":")
    return brackets[:1] == b":" and not inner.strip(b"[]") and inner.count(b"[") == inner.count(b"]")
