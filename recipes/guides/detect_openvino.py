"""Detect objects with OpenVINO and numpy alone: python detect_openvino.py model.xml image.npy"""

import json
import sys

import numpy as np
import openvino

model = openvino.Core().read_model(sys.argv[1])
facts = {key: json.loads(str(x)) for key, x in model.get_rt_info(["vovnet_zoo"]).value.items()}
names, size = facts["config"]["class_names"], facts["size"]
# without this line, a CPU with bfloat16 units computes in bfloat16, and the certificate does not hold
run = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

image = np.load(sys.argv[2])  # uint8 [H,W,3], red first
height, width, _ = image.shape
rows, columns = size or (max(64, side + -side % 32) for side in (height, width))
padded = np.pad(image, ((0, rows - height), (0, columns - width), (0, 0)))
images = np.ascontiguousarray(padded.transpose(2, 0, 1)[None])  # [1,3,H,W]

found = run([images, np.array([[height, width]])])
boxes, scores, labels, count = (found[i][0] for i in range(4))
for box, score, label in zip(boxes[:count], scores[:count], labels[:count], strict=True):
    name = names[label] if names else int(label)
    print(json.dumps([name, round(float(score), 4), [round(float(x), 2) for x in box]]))
