"""An index of a COCO JSON file gives the boxes that the annotations give one by one, and is kept for large files."""

import json
import logging
import multiprocessing
import os
import time

import numpy as np
import pytest
from samples import box, make_coco
from test_data_annotations import BAD_ANNOTATIONS

from vovnet_zoo.data import CocoDataset, entries_by_id, index, read_annotations, usable_boxes
from vovnet_zoo.data.index import make_index, open_index
from vovnet_zoo.data.parse import parse_json

ODD = [
    box(1.0, 3.0), box(True, 3), box(1, 3, iscrowd=1), box(2, 7, iscrowd="1"), box(3, 7, (1, 2, 3.5, 4), iscrowd=True),
    box(bbox=(-5, 2, 20, 4)), box(2**70), box(1, -(2**63)), box(2, 3, (0, 0, 1e40, 1)), box(99, "x", (1, 2)),
]  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keep the indices of small files too, in a folder that is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "KEPT_BYTES", 0)
    monkeypatch.setattr(index, "CLOCK_NS", 0)
    return tmp_path / "cache" / "vovnet_zoo" / "annotations"


def one_by_one(path, plus_one=False):
    """What the annotations of a file give without an index, in the order of the images, and the numbers of problems."""
    coco = read_annotations(path)
    images, categories = (
        entries_by_id(coco[k], k, t, path) for k, t in (("images", "file_name"), ("categories", "name"))
    )
    sizes = np.array([(image["height"], image["width"]) for image in images])
    ids = [{entry["id"]: i for i, entry in enumerate(entries)} for entries in (images, categories)]
    owners, labels, boxes, problems = usable_boxes(coco["annotations"], *ids, sizes, plus_one)
    order = np.argsort(owners, kind="stable")
    return owners[order], labels[order], boxes[order], {kind: len(where) for kind, where in problems.items()}


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("rows", [[], ODD, [*sum(BAD_ANNOTATIONS.values(), []), *ODD, box(2, 7)] * 3])
def test_equal_to_the_annotations_one_by_one(write_coco, monkeypatch, rows, plus_one):
    monkeypatch.setattr(index, "BLOCK", 4)
    _, path = write_coco(make_coco(rows))
    *arrays, problems = open_index(path).usable_boxes([3, 7], plus_one)
    *others, counts = one_by_one(path, plus_one)
    for ours, theirs in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    assert {kind: len(where) for kind, where in problems.items()} == counts
    crowds = [row for row in rows if isinstance(row, dict) and row.get("iscrowd")]
    assert open_index(path).num_crowds == len(crowds)


def test_a_user_without_a_home(write_coco, kept, monkeypatch, caplog):
    """A file is parsed at each start, and a line of the log says how to change that."""
    _, path = write_coco(make_coco([box()]))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pathlib.os.path.expanduser", lambda path: path)
    with caplog.at_level(logging.INFO):
        assert len(open_index(path).image_ids) == 3
    assert "instances.json is parsed at each start: this user has no home folder; name" in caplog.text


def test_what_only_looks_like_an_annotation(write_coco):
    coco = make_coco([box(), box(2)])
    coco["images"][0]["note"] = box(3)
    coco["annotations"][1]["parts"] = [box(3)]
    _, path = write_coco({"more": [box()], **coco})
    assert [values.tolist() for values in open_index(path).usable_boxes([3, 7])[:2]] == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    "text",
    [
        '{"segmentation": [[1, 2.5e3], [-3]], "a": {"segmentation": []}}',
        '{"a": "\\"segmentation\\": [1]", "segmentation": [1, 2]}',
        '[{"segmentation": {"counts": [1, 2], "size": [3, 4]}}, {"segmentation": [[1, 2]]}]',
        '{"segmentation": null, "b": [{"segmentation": "x"}, {"segmentation": [[1], [2, 3]]}]}',
        '{"segmentation": ["1"], "segmentation\\u00e9": [1], "\\u00e9": "é😀"}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_polygons_are_left_out_and_nothing_else(text, encoding):
    def without(value):
        if isinstance(value, dict):
            lists = {
                k for k, v in value.items() if k == "segmentation" and isinstance(v, list) and '"' not in json.dumps(v)
            }
            return {k: [] if k in lists else without(v) for k, v in value.items()}
        return [without(v) for v in value] if isinstance(value, list) else value

    found, whole = parse_json(text.encode(encoding)), json.loads(text)
    assert without(found) == without(whole)
    assert json.dumps(found, ensure_ascii=False).count("[1") <= text.count("[1")


@pytest.mark.parametrize(
    "text", ['{"segmentation": [[1, 2]], "a": }', '{"segmentation": [[1], "a": 1}', "{", '{"segmentation": [1']
)
def test_an_error_names_the_place_in_the_file(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        parse_json(text.encode())
    assert str(found.value) == str(expected.value)


def refuse(path):
    raise PermissionError(1, "Operation not permitted", str(path))


def test_a_large_file_is_parsed_once(write_coco, kept, monkeypatch):
    folder, path = write_coco(make_coco([box(), box(2, 7)]))
    parsed = []
    monkeypatch.setattr(index, "make_index", lambda *args: parsed.append(args) or make_index(*args))
    datasets = [CocoDataset(folder, path) for _ in range(3)]
    assert len(parsed) == 1 and len({dataset.annotations_sha256 for dataset in datasets}) == 1
    assert isinstance(datasets[1].sizes.base, np.memmap)

    # A file that is the same, elsewhere or with another time stamp, has the same index.
    os.utime(path)
    (folder / "copy.json").write_bytes(path.read_bytes())
    for same in (path, folder / "copy.json"):
        assert CocoDataset(folder, same)._boxes.tolist() == datasets[0]._boxes.tolist()
    assert len(parsed) == 1

    # A file that has changed is parsed again, even with the size and the time stamp of before.
    before = path.stat()
    path.write_text(path.read_text().replace("[1, 2, 10, 20]", "[1, 2, 10, 21]"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changed = CocoDataset(folder, path)
    assert changed._boxes.tolist() == [[1, 2, 11, 23]] * 2 and len(parsed) == 2
    assert changed.annotations_sha256 != datasets[0].annotations_sha256

    # One that another user made is read, though its time stamp cannot be set.
    with monkeypatch.context() as patch:
        patch.setattr(index.os, "utime", refuse)
        assert CocoDataset(folder, path)._boxes.tolist() == changed._boxes.tolist() and len(parsed) == 2

    # A damaged index is made anew.
    for file in kept.glob("*-*/xywh.npy"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert CocoDataset(folder, path)._boxes.tolist() == changed._boxes.tolist() and len(parsed) == 3


def test_a_file_that_has_just_changed_is_read_again(write_coco, kept, monkeypatch):
    monkeypatch.setattr(index, "CLOCK_NS", 60_000_000_000)
    _, path = write_coco(make_coco([box()]))
    open_index(path)
    assert [note.read_text() for note in kept.glob("*.json")] == [""]


def test_few_indices_are_kept(write_coco, kept, monkeypatch):
    monkeypatch.setattr(index, "KEPT_FILES", 2)
    for n in (1, 2, 3, 4):
        open_index(write_coco(make_coco([box()] * n))[1])
        time.sleep(0.01)
    assert len(list(kept.glob("*-*/"))) == 2
    assert len(open_index(write_coco(make_coco([box()] * 4))[1]).owners) == 4


def test_a_cache_that_cannot_be_written(write_coco, tmp_path, kept):
    (tmp_path / "cache").write_text("a file")
    folder, path = write_coco(make_coco([box()]))
    assert CocoDataset(folder, path).num_boxes == 1


def test_four_processes_at_once_parse_once(write_coco, kept):
    _, path = write_coco(make_coco([box()] * 1000))
    context, make = multiprocessing.get_context("fork"), index.make_index
    said, all_there = context.SimpleQueue(), context.Barrier(4)

    def open_it():
        index.make_index = lambda *arguments: said.put("parsed") or make(*arguments)
        all_there.wait(100)
        said.put(len(open_index(path).owners))

    jobs = [context.Process(target=open_it) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(100)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert sorted(str(said.get()) for _ in range(5)) == ["1000"] * 4 + ["parsed"] and said.empty()
