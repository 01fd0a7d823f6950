"""These functions draw one small dataset, and write it as the tools that people use write theirs."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["green", "red"]  # in the order of the alphabet, since VOC has no other


def draw(count: int = 12, seed: int = 0) -> list[dict]:
    """Draw pictures of noise with bright rectangles, the third without; boxes are [x, y, w, h] in whole pixels."""
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        height, width = 64 + 8 * (i % 2), 80 - 16 * (i % 3)
        pixels = np.array(Image.fromarray(rng.integers(0, 90, (6, 6, 3), dtype=np.uint8)).resize((width, height)))
        boxes = []
        for label in range(0 if i == 2 else 2):
            x, y = int(rng.integers(0, width - 21)), int(rng.integers(0, height - 25))
            pixels[y : y + 24, x : x + 20, label] = 255
            boxes.append((label, [x, y, 20, 24]))
        pictures.append({"name": f"{i:02d}.png", "pixels": pixels, "boxes": boxes})
    return pictures


PICTURES = draw()
TRAIN, VAL = PICTURES[:8], PICTURES[8:]


def save(folder: Path, pictures=PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        Image.fromarray(picture["pixels"]).save(folder / picture["name"])


def coco(pictures=PICTURES, prefix="", text_ids=False, first=1) -> dict:
    images, annotations = [], []
    for i, picture in enumerate(pictures, start=1):
        height, width, _ = picture["pixels"].shape
        images.append({"id": i, "file_name": prefix + picture["name"], "width": width, "height": height})
        for label, box in picture["boxes"]:
            row = {"id": len(annotations) + 1, "image_id": str(i) if text_ids else i, "category_id": first + label}
            annotations.append(row | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "segmentation": []})
    categories = [{"id": first + i, "name": name} for i, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# ---- COCO, by tool --------------------------------------------------------------------------------------------------


def usual(root):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        save(root / split, pictures)
        write(root / "annotations" / f"instances_{split}.json", coco(pictures))


def one_images_folder(root):
    save(root / "images")
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        write(root / "annotations" / f"instances_{split}2017.json", coco(pictures))
        write(root / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})


def other_words(root):
    for split, pictures in (("Training", TRAIN), ("VALIDATION", VAL)):
        save(root / "images" / split, pictures)
        write(root / "annotations" / f"instances_{split}.json", coco(pictures))


def roboflow(root, splits=("train", "valid")):
    for split, pictures in zip(splits, (TRAIN, VAL), strict=False):
        save(root / split, pictures)
        write(root / split / "_annotations.coco.json", coco(pictures))
    write(root / "README.roboflow.txt", "text")


def roboflow_test(root):
    roboflow(root, ("train", "test"))


def roboflow_train(root):
    roboflow(root, ("train",))


def cvat(root):
    save(root / "images")
    write(root / "annotations" / "instances_default.json", coco())


def cvat_folder(root):
    save(root / "images" / "default")
    write(root / "annotations" / "instances_default.json", coco())


def cvat_subsets(root):
    for split, pictures in (("Train", TRAIN), ("Validation", VAL)):
        save(root / "images" / split, pictures)
        write(root / "annotations" / f"instances_{split}.json", coco(pictures))


def label_studio(root, prefix="images\\"):
    save(root / "images")
    write(root / "result.json", coco(prefix=prefix, first=0))


def label_studio_server(root):
    label_studio(root, "/label-studio/data/media/upload/1/")


def labelme2coco(root):
    save(root / "photos")
    write(root / "trainval.json", coco(prefix="../work/photos/"))
    write(root / "photos" / "00.json", {"shapes": [], "imagePath": "00.png"})


def via(root):
    save(root)
    write(root / "via_export_coco.json", coco(text_ids=True))


def fiftyone(root):
    for split, pictures in (("train", TRAIN), ("validation", VAL)):
        save(root / split / "data", pictures)
        write(root / split / "labels.json", coco(pictures))


def fiftyone_single(root):
    save(root / "data")
    write(root / "labels.json", coco())


def mmdetection(root):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        save(root / split, pictures)
        write(root / "annotations" / f"{split}.json", coco(pictures))


def files_in_root(root):
    save(root / "images")
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        write(root / f"{split}_coco.json", coco(pictures))


def prefixed(root):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        save(root / "data" / split, pictures)
        write(root / f"{split}.json", coco(pictures, prefix=f"data/{split}/"))


def too_deep(root):
    usual(root / "my dataset")


def zipped(root):
    usual(root / "inside")
    shutil.make_archive(root.with_suffix(""), "zip", root / "inside")
    shutil.rmtree(root / "inside")
    shutil.move(root.with_suffix(".zip"), root / "set.zip")


def scattered(root):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        save(root / "pictures" / split, pictures)
        write(root / "labels of mine" / f"{split} 3.json", coco(pictures))


# ---- YOLO -----------------------------------------------------------------------------------------------------------


def save_yolo(images: Path, labels: Path, pictures=PICTURES, digits=17) -> None:
    save(images, pictures)
    labels.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        height, width, _ = picture["pixels"].shape
        rows = [
            f"{label} "
            + " ".join(f"{v:.{digits}g}" for v in ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height))
            for label, (x, y, w, h) in picture["boxes"]
        ]
        if rows:  # an image without objects has no file
            (labels / picture["name"]).with_suffix(".txt").write_text("\n".join(rows) + "\n")


def yolo(root):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        save_yolo(root / "images" / split, root / "labels" / split, pictures)
    write(
        root / "data.yaml", "path: ../elsewhere\ntrain: images/train\nval: images/val\nnames:\n  0: green\n  1: red\n"
    )


def yolo_roboflow(root):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        save_yolo(root / split / "images", root / split / "labels", pictures)
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [green, red]\n")


def yolo_lists(root):
    save_yolo(root / "images", root / "labels")
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        write(root / f"{split}.txt", "".join(f"./images/{picture['name']}\n" for picture in pictures))
    write(root / "set.yaml", "train: train.txt\nval: val.txt\nnames: [green, red]\n")


def yolo_label_studio(root):
    save_yolo(root / "images", root / "labels")
    write(root / "classes.txt", "green\nred\n")
    write(root / "notes.json", {"categories": [{"id": 0, "name": "red"}], "info": {}})


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------


def save_voc(folder: Path, pictures=PICTURES, one=1, shift=0.0, difficult=()) -> None:
    """Write XML files whose corners count pixels from 1 (`one` = 1), or are coordinates from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = picture["name"]
        for label, (x, y, w, h) in picture["boxes"]:
            node = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(node, "name").text = CLASSES[label]
            ElementTree.SubElement(node, "difficult").text = str(int(picture["name"] in difficult))
            box = ElementTree.SubElement(node, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + one, y + one, x + w, y + h), strict=True):
                ElementTree.SubElement(box, key).text = f"{value + shift:g}"
        (folder / picture["name"]).with_suffix(".xml").write_bytes(ElementTree.tostring(tree))


def voc(root, **more):
    save(root / "JPEGImages")
    save_voc(root / "Annotations", **more)
    for split, pictures in (("train", TRAIN), ("val", VAL), ("trainval", PICTURES), ("red_train", TRAIN)):
        write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{p['name'][:-4]}\n" for p in pictures))


def voc_roboflow(root):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        save(root / split, pictures)
        save_voc(root / split, pictures)


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def hf_rows(pictures) -> list[dict]:
    return [
        {
            "file_name": p["name"],
            "objects": {"bbox": [b for _, b in p["boxes"]], "category": [i for i, _ in p["boxes"]]},
        }
        for p in pictures
    ]


def imagefolder(root):
    for split, pictures in (("train", TRAIN), ("validation", VAL)):
        save(root / split, pictures)
        rows = hf_rows(pictures)
        for row in rows:
            row["objects"]["category"] = [CLASSES[i] for i in row["objects"]["category"]]
        write(root / split / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def hf_dataset(pictures):
    import datasets

    objects = {"bbox": [[datasets.Value("float32")]], "category": [datasets.ClassLabel(names=CLASSES)]}
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    rows = hf_rows(pictures)
    images = [Image.fromarray(picture["pixels"]) for picture in pictures]
    table = {"image": images, "objects": [row["objects"] for row in rows]}
    return datasets.Dataset.from_dict(table, features=features)


def hf_saved(root):
    import datasets

    datasets.DatasetDict({"train": hf_dataset(TRAIN), "validation": hf_dataset(VAL)}).save_to_disk(root)


def hf_parquet(root):
    (root / "data").mkdir(parents=True)
    for split, pictures in (("train", TRAIN), ("validation", VAL)):
        hf_dataset(pictures).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
