"""Tests share this picture, and these makers of samples, annotations, videos and a detector."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vovnet_zoo import FCOS, create_detector

Y, X = np.mgrid[:40, :60]
PICTURE = np.stack([X * 4, Y * 6, (X + Y) * 2], axis=-1).astype(np.uint8)  # [40, 60, 3], no symmetry
RGB = Image.fromarray(PICTURE)


def encode(image, format, orientation=None, **options):
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_sample(height, width, boxes):
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "image_id": 1,
        "orig_size": (height, width),
    }
    return tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)), target


def plain(boxes):
    return boxes.as_subclass(torch.Tensor)


def box(image_id=1, category_id=3, bbox=(1, 2, 10, 20), **more):
    bbox = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"id": 1, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def make_coco(annotations=(), images=3):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(images, 0, -1)],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def make_confident_detector() -> FCOS:
    """Make a small detector of 3 classes with random weights, which finds many boxes with unlike scores."""
    torch.manual_seed(0)
    model = create_detector(
        "fcos", backbone="resnet10t", num_classes=3, channels=64, num_convs=1, min_size=64, max_size=128, prior=0.3
    )
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.5)
    return model


def draw_video(path, count, size=(64, 48), rotation=None, rate=10):
    """Write a video whose frames are grey, each by 4 brighter than the one before, with a red left half."""
    av = pytest.importorskip("av", reason="videos need the extra `video`")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 40 + 4 * i % 160, np.uint8)
            pixels[:, : size[0] // 2] = (250, 10, 10)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def busy(model: FCOS, spread: float = 0.3, bias: float = -2.5) -> FCOS:
    """With classes that vary from place to place, and boxes of some strides, so that there is something to find."""
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=spread)
    torch.nn.init.constant_(model.head.cls_logits.bias, bias)
    torch.nn.init.constant_(model.head.box_distances.bias, 1.5)
    for module in model.modules():  # as after training: no batch norm is the identity
        if hasattr(module, "running_mean"):  # frozen ones too
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()
