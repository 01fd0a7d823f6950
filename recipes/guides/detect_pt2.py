"""Detect objects with torch and numpy alone: python detect_pt2.py model.pt2 image.npy"""

import json
import sys

import numpy as np
import torch._inductor

model = torch._inductor.aoti_load_package(sys.argv[1])
facts = model.get_metadata()
names, size = json.loads(facts["config"])["class_names"], json.loads(facts["size"])

image = torch.from_numpy(np.load(sys.argv[2])).permute(2, 0, 1)[None]  # uint8 [1,3,H,W], red first
height, width = image.shape[2:]
rows, columns = size or (max(64, side + -side % 32) for side in (height, width))
images = torch.nn.functional.pad(image, (0, columns - width, 0, rows - height)).contiguous()  # as the file expects

found = model(images, torch.tensor([[height, width]]))
boxes, scores, labels, count = (x[0] for x in found)
for box, score, label in zip(boxes[:count], scores[:count], labels[:count], strict=True):
    name = names[label] if names else int(label)
    print(json.dumps([name, round(float(score), 4), [round(float(x), 2) for x in box]]))
