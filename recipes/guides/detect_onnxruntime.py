"""Detect objects with ONNX Runtime and numpy alone: python detect_onnxruntime.py model.onnx image.npy"""

import json
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = {key: json.loads(x) for key, x in session.get_modelmeta().custom_metadata_map.items()}
names, size = facts["config"]["class_names"], facts["size"]

image = np.load(sys.argv[2])  # uint8 [H,W,3], red first
height, width, _ = image.shape
rows, columns = size or (max(64, side + -side % 32) for side in (height, width))
padded = np.pad(image, ((0, rows - height), (0, columns - width), (0, 0)))
images = np.ascontiguousarray(padded.transpose(2, 0, 1)[None])  # [1,3,H,W]

found = session.run(None, {"images": images, "sizes": np.array([[height, width]])})
boxes, scores, labels, count = (x[0] for x in found)
for box, score, label in zip(boxes[:count], scores[:count], labels[:count], strict=True):
    name = names[label] if names else int(label)
    print(json.dumps([name, round(float(score), 4), [round(float(x), 2) for x in box]]))
