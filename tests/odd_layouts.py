"""These functions write the small dataset of `layouts` as people have theirs: moved, renamed, half broken."""

import json

import layouts
import numpy as np
from layouts import CLASSES, TRAIN, VAL, coco, save, save_voc, save_yolo, write
from pycocotools import mask

SPLITS = (("train", TRAIN), ("val", VAL))


def usual(root, change=lambda content: None, prefix=""):
    """Write COCO's layout, after a change of the content of its JSON files."""
    for split, pictures in SPLITS:
        content = coco(pictures, prefix=prefix)
        change(content)
        save(root / split, pictures)
        write(root / "annotations" / f"instances_{split}.json", content)


def named(root, name_of, folder="images"):
    """Write all images into a folder, and a JSON file for each split that calls them otherwise."""
    save(root / folder)
    for split, pictures in SPLITS:
        content = coco(pictures)
        for image in content["images"]:
            image["file_name"] = name_of(image["file_name"])
        write(root / f"{split}.json", content)


def rewrite(root, pattern, change):
    """Change the bytes of the files of a pattern."""
    for path in sorted(root.rglob(pattern)):
        path.write_bytes(change(path.read_bytes()))


def windows(data):
    return b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")


# ---- COCO -----------------------------------------------------------------------------------------------------------


def other_names(root):
    for folder, name, pictures in (("train", "labels.json", TRAIN), ("valid", "export 1.json", VAL)):
        save(root / folder / "images", pictures)
        write(root / folder / name, coco(pictures))


def by_date(root):
    for split, pictures in SPLITS:
        save(root / split / "2024" / "05", pictures)
        write(root / f"{split}Annotations.json", coco(pictures))


def another_machine(root):
    """The last names are the same in all folders."""
    for split, pictures in SPLITS:
        content = coco(pictures)
        for i, (picture, image) in enumerate(zip(pictures, content["images"], strict=True)):
            save(root / "photos" / split / f"cam{i}", [picture | {"name": "0.png"}])
            image["file_name"] = f"D:\\work\\{split}\\cam{i}\\0.png"
        write(root / f"{split}set.json", content)


def addresses(root):
    named(root, lambda name: f"https://host.example/bucket/{name}?signature=a/b&time=1")


def local_files(root):
    named(root, lambda name: f"/data/local-files/?d=images/{name}")


def encoded(root):
    named(root, lambda name: f"photos%20of%20me/{name}", "photos of me")


def upper_case(root):
    usual(root)
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_suffix(".PNG"))


def with_prefix(root):
    usual(root, prefix="set\\images\\")


def polygons(root):
    def change(content):
        for row in content["annotations"]:
            x, y, w, h = row.pop("bbox")
            row["segmentation"] = [[x, y, x + w, y, x + w, y + h], [x, y + h, x, y, x + 1, y]]

    usual(root, change)


def runs(root, compressed=True):
    def change(content):
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for row in content["annotations"]:
            x, y, w, h = row["bbox"]
            pixels = np.zeros(sizes[row["image_id"]], np.uint8, order="F")
            pixels[y : y + h, x : x + w] = 1
            flat = pixels.flatten(order="F")
            edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
            counts = mask.encode(pixels)["counts"].decode() if compressed else np.diff(edges, prepend=0).tolist()
            row |= {"bbox": [], "segmentation": {"size": list(pixels.shape), "counts": counts}}

    usual(root, change)


def runs_as_numbers(root):
    runs(root, compressed=False)


def text_ids(root):
    def change(content):
        for row in content["images"]:
            row["id"] = f"photo-{row['id']}"
        for row in content["categories"]:
            row["id"] = row["name"]
        for row in content["annotations"]:
            row["image_id"], row["category_id"] = f"photo-{row['image_id']}", CLASSES[row["category_id"] - 1]

    usual(root, change)


def lvis(root):
    """Images have an address and no file name."""

    def change(content):
        for row in content["images"]:
            row["coco_url"] = f"http://images.cocodataset.org/any2017/{row.pop('file_name')}"

    usual(root, change)


def number_texts(root):
    def change(content):
        for row in content["annotations"]:
            row["category_id"] = str(row["category_id"])
        for row in content["categories"]:
            row["id"] = str(row["id"])

    usual(root, change)


def without_sizes(root):
    usual(root, lambda content: [(image.pop("width"), image.pop("height")) for image in content["images"]])


def marked(root):
    usual(root)
    rewrite(root, "*.json", windows)


def decimal_ids(root):
    """Ids have been through a table that keeps them as decimals; one image has a text of digits."""

    def change(content):
        for row in [*content["images"], *content["categories"]]:
            row["id"] = float(row["id"])
        for row in content["annotations"]:
            row["image_id"] = float(row["image_id"])
        content["images"][0]["id"] = "1"

    usual(root, change)


# ---- YOLO -----------------------------------------------------------------------------------------------------------


def yolo(root, yaml=None, classes=None):
    for split, pictures in SPLITS:
        save_yolo(root / "images" / split, root / "labels" / split, pictures)
    write(root / ("data.yaml" if yaml else "classes.txt"), yaml or classes or "green\nred\n")


def yolo_windows(root):
    yolo(root)
    rewrite(root, "*.txt", windows)


def yolo_utf16(root):
    yolo(root)
    rewrite(root, "classes.txt", lambda data: data.decode().encode("utf-16"))


def yolo_many_names(root):
    names = "".join(f"  '{i}': {name}\n" for i, name in enumerate([*CLASSES, *"abcdefghi"]))
    yolo(root, f"train: images/train\nval: images/val\nnames:\n{names}")


def yolo_gap(root):
    yolo(root, "train: images/train\nval: images/val\nnames: {0: green, 3: red}\n")
    rewrite(
        root, "labels/*/*.txt", lambda data: b"\n".join(b"3" + x[1:] if x[:1] == b"1" else x for x in data.split(b"\n"))
    )


def yolo_elsewhere(root):
    path = "C:\\Users\\me\\set"
    yolo(root, f"path: {path}\ntrain: {path}\\images\\train\nval: /content/set/images/val\nnames: [green, red]\n")


def yolo_lists(root):
    layouts.yolo_lists(root)
    for split, pictures in SPLITS:
        write(root / f"{split}.txt", "".join(f"/content/set/images/{picture['name']}\r\n" for picture in pictures))
    rewrite(root, "val.txt", windows)


def yolo_confidence(root):
    yolo(root)
    rewrite(root, "labels/*/*.txt", lambda data: data.replace(b"\n", b" 0.9\n"))


def yolo_labelimg(root):
    for split, pictures in SPLITS:
        save_yolo(root / split, root / split, pictures)
        write(root / split / "classes.txt", "green\nred\n")


def yolo_cvat(root):
    for split, folder, pictures in (("train", "obj_train_data", TRAIN), ("valid", "obj_valid_data", VAL)):
        save_yolo(root / folder, root / folder, pictures)
        write(root / f"{split}.txt", "".join(f"data/{folder}/{picture['name']}\n" for picture in pictures))
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n")
    write(root / "obj.names", "green\nred\n")


def yolo_capitals(root):
    yolo(root)
    for name in ("images", "labels"):
        (root / name).rename(root / name.capitalize())


def yolo_upper_case(root):
    yolo(root)
    endings = iter(["TXT", "Txt", "txt"] * 4)
    for path in sorted(root.glob("labels/*/*.txt")):
        path.rename(path.with_suffix(f".{next(endings)}"))


def yolo_labelimg_upper_case(root):
    yolo_labelimg(root)
    for path in sorted(root.glob("*/0?.txt")):
        path.rename(path.with_suffix(".TXT"))


def yolo_fiftyone(root):
    yolo(root, "names: {0: green, 1: red}\npath: /elsewhere\ntrain: ./images/train/\nvalidation: ./images/val/\n")


def yolo_darknet(root):
    for split, pictures in (("train", TRAIN), ("valid", VAL)):
        save_yolo(root / split, root / split, pictures)
        write(root / split / "_darknet.labels", "green\nred\n")


# ---- Pascal VOC, Hugging Face, links --------------------------------------------------------------------------------


def voc_beside(root):
    """Lists name files with their endings; all lies in one folder."""
    save(root)
    save_voc(root)
    for split, pictures in SPLITS:
        write(root / "ImageSets" / f"{split}.txt", "".join(f"{picture['name']}\n" for picture in pictures))
    rewrite(root, "ImageSets/*.txt", windows)


def voc_spaces(root):
    for split, pictures in SPLITS:
        pictures = [picture | {"name": f"my photo {picture['name']}"} for picture in pictures]
        save(root / "JPEGImages", pictures)
        save_voc(root / "Annotations", pictures)
        write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{x['name'][:-4]}\n" for x in pictures))


def voc_folders(root, lists=False):
    """Each image lies in a folder of its own, and all have the same name."""
    for split, pictures in SPLITS:
        for picture in pictures:
            inner = f"{split}/{picture['name'][:-4]}"
            save(root / "images" / inner, [picture | {"name": "0.png"}])
            save_voc(root / "annotations" / inner, [picture | {"name": "0.png"}])
        if lists:
            names = [f"{split}/{picture['name'][:-4]}/0\n" for picture in pictures]
            write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(names))


def voc_listed_folders(root):
    voc_folders(root, lists=True)


def voc_years(root):
    """Two folders have their own lists, and together they are the dataset."""
    for part, year in ((slice(0, 4), "VOC2007"), (slice(4, 8), "VOC2012")):
        save(root / year / "JPEGImages", [*TRAIN[part], *VAL[part]])
        save_voc(root / year / "Annotations", [*TRAIN[part], *VAL[part]])
        for split, pictures in SPLITS:
            names = [f"{picture['name'][:-4]}\n" for picture in pictures[part]]
            write(root / year / "ImageSets" / "Main" / f"{split}.txt", "".join(names))


def voc_trainval(root):
    layouts.voc(root)
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    (root / "ImageSets" / "Main" / "val.txt").rename(root / "ImageSets" / "Main" / "test.txt")
    write(root / "ImageSets" / "Main" / "trainval.txt", "".join(f"{picture['name'][:-4]}\n" for picture in TRAIN))


def voc_upper_case(root):
    layouts.voc_roboflow(root)
    for path in sorted([*root.rglob("*.xml"), *root.rglob("*.png")]):
        path.rename(path.with_suffix(path.suffix.upper()))


def one_metadata(root):
    rows = []
    for split, pictures in SPLITS:
        save(root / split, pictures)
        for row in layouts.hf_rows(pictures):
            classes = [CLASSES[i] for i in row["objects"]["category"]]
            rows.append({"file_name": f"{split}/{row['file_name']}", "objects": row["objects"] | {"category": classes}})
    write(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def links(root):
    real = root.with_name("real")
    layouts.voc(real)
    root.mkdir()
    for path in real.iterdir():
        (root / path.name).symlink_to(path)
    (root / "again").symlink_to(root)
    for name in ("x.json", "x.xml", "x.yaml", "folder"):
        (root / name).symlink_to(root / "nowhere")


def link_to_it(root):
    layouts.usual(root.with_name("real"))
    root.mkdir()
    (root / "inside").symlink_to(root.with_name("real"))
