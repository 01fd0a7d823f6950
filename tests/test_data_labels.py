"""Labels, classes and crowd regions that would be learnt as nothing are refused, or named in one line."""

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from launch import ROOT
from samples import box, make_coco, make_sample
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vovnet_zoo
from vovnet_zoo import FCOSLoss, Predictions
from vovnet_zoo.data import CocoDataset, collate, idle_categories
from vovnet_zoo.fcos import make_points

# ---- labels ---------------------------------------------------------------------------------------------------------


def relabel(labels):
    def transform(image, target):
        return image, target | {"labels": torch.as_tensor(labels)}

    return transform


@pytest.mark.parametrize("labels", [[2], [-1], [0.0], [True], [0, 1], []])
def test_a_sample_with_wrong_labels_is_named(write_coco, labels):
    """After transforms in the dataset, and in `collate` for samples from elsewhere."""
    arguments = write_coco(make_coco([box()]))
    dataset = CocoDataset(*arguments, transforms=relabel([1]))
    assert dataset[0][1]["labels"].tolist() == [1]
    with pytest.raises(ValueError, match=r"1\.png: after the transforms, .*label"):
        CocoDataset(*arguments, transforms=relabel(labels))[0]
    image, target = make_sample(40, 60, [(1, 2, 3, 4)])
    assert collate([(image, target)], num_classes=2)["labels"].tolist() == [[0]]
    with pytest.raises(ValueError, match="image 77: .*label"):
        collate([(image, target), (image, target | {"image_id": 77, "labels": torch.as_tensor(labels)})], num_classes=2)


def test_collate_without_the_number_of_classes():
    sample, target = make_sample(40, 60, [(1, 2, 3, 4)])
    assert collate([(sample, target | {"labels": torch.tensor([91])})])["labels"].tolist() == [[91]]


def losses_of(labels, criterion=None, device="cpu"):
    points, strides = make_points([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], [8, 16, 32, 64, 128], device)
    n = len(points)
    preds = Predictions(
        torch.zeros(1, n, 3, device=device), torch.ones(1, n, 4, device=device), torch.zeros(1, n, device=device),
        points, strides,
    )  # fmt: skip
    boxes = torch.tensor([[[8.0, 8, 40, 40]] * len(labels)], device=device)
    criterion = FCOSLoss() if criterion is None else criterion
    return criterion(preds, boxes, torch.tensor([labels], device=device))


def test_the_loss_refuses_labels_that_are_no_classes():
    assert losses_of([0, 2, -1])["loss_cls"] > 0
    for wrong in ([1, 2, 3], [-2], [2**40]):
        with pytest.raises(ValueError, match=r"labels must be 0\.\.2, and -1"):
            losses_of(wrong)
    with pytest.raises(ValueError, match="labels must be a whole tensor"):
        losses_of([1.0])
    criterion = FCOSLoss()
    points, strides = make_points([(8, 8)], [8], "cpu")
    preds = Predictions(torch.zeros(1, 64, 3), torch.ones(1, 64, 4), torch.zeros(1, 64), points, strides)
    targets = criterion.assign(points, strides, torch.tensor([[[8.0, 8, 40, 40]]]), torch.tensor([[3]]))
    with pytest.raises(ValueError, match=r"labels must be 0\.\.2, and"):
        criterion.compare(preds, targets, criterion.normalizers(targets))


def test_the_loss_in_one_graph_refuses_them_too():
    torch._dynamo.reset()
    criterion = torch.compile(FCOSLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses_of([0, 2, -1], criterion), losses_of([0, 2, -1]))
    with pytest.raises(RuntimeError, match=r"labels must be 0\.\.2, and -1"):
        losses_of([1, 3, -1], criterion)


def test_the_check_asks_a_gpu_for_nothing():
    """With tensors that have no values, an operation whose result the CPU waits for would raise."""
    with FakeTensorMode():
        vovnet_zoo.loss.check_labels(torch.zeros(2, 3, dtype=torch.int64, device="cuda"), 3)
        with pytest.raises(DataDependentOutputException):
            vovnet_zoo.loss.check_labels(torch.zeros(2, 3, dtype=torch.int64), 3)


@pytest.mark.gpu
def test_the_check_does_not_wait_for_a_gpu():
    expected = losses_of([0, 2, -1])
    losses_of([0, 2, -1], device="cuda")
    labels = torch.tensor([[0, 2, -1]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        vovnet_zoo.loss.check_labels(labels, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for criterion in (FCOSLoss(), torch.compile(FCOSLoss(), fullgraph=True)):
        found = losses_of([0, 2, -1], criterion, "cuda")
        torch.testing.assert_close({k: x.cpu() for k, x in found.items()}, expected)
    # in a process of its own, since a GPU answers a process no more after this
    code = "import torch, vovnet_zoo.loss as loss; loss.check_labels(torch.tensor([[1, 3, -1]], device='cuda'), 3)"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; torch.cuda.synchronize()"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode and "device-side assert" in result.stderr, result.stderr


# ---- categories that are no classes ---------------------------------------------------------------------------------


def categories(*rows):
    return [{"id": i, "name": name, **({"supercategory": above} if above else {})} for i, name, above in rows]


def test_a_grouping_category_is_no_class(write_coco, caplog):
    """Roboflow's category of id 0, whose name is the supercategory of the others."""
    coco = make_coco([box()])
    coco["categories"] = categories((0, "pets", "none"), (3, "cat", "pets"), (7, "dog", "pets"))
    dataset = CocoDataset(*write_coco(coco))
    assert (dataset.class_names, dataset.category_ids) == (["cat", "dog"], [3, 7])
    assert dataset[0][1]["labels"].tolist() == [0] and dataset.problems == {}
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "no class is made of pets (id 0), which has no annotations"
    ]
    assert CocoDataset(*write_coco(coco), known_classes=["pets", "cat", "dog"]).class_names == ["pets", "cat", "dog"]
    coco["annotations"].append(box(category_id=0))
    assert CocoDataset(*write_coco(coco)).class_names == ["pets", "cat", "dog"]


@pytest.mark.parametrize(
    ("rows", "idle"),
    [
        ([(0, "cells", "none"), (1, "cells", "cells"), (2, "wbc", "cells")], [0]),  # a class of the project's name
        ([(0, "_background_", None), (1, "cat", None)], [0]),  # labelme
        ([(1, "cat", None), (9, "Background", None)], [9]),
        ([(1, "person", "person"), (2, "car", "vehicle")], []),  # COCO names its first group like its only class
        ([(1, "cat", None), (2, "dog", None)], []),
        ([(1, "cat", ["odd"]), (2, "dog", 7)], []),
        ([(0, "background", None)], []),  # nothing would be left
        ([(0, "a", "b"), (1, "cat", "a"), (5, "b", "none")], [0, 5]),  # two levels
    ],
)
def test_categories_that_are_no_classes(rows, idle):
    assert [
        c["id"] for c in idle_categories(categories(*rows), [{"category_id": 1}, None, {"category_id": []}])
    ] == idle


# ---- crowd regions --------------------------------------------------------------------------------------------------


def test_annotations_that_are_all_crowd_regions(write_coco, caplog):
    """Exporters of masks write iscrowd 1 on everything."""
    with pytest.raises(ValueError, match="instances.json: all its annotations \\(2\\) are crowd regions.*'iscrowd': 0"):
        CocoDataset(*write_coco(make_coco([box(iscrowd=1), box(2, iscrowd="1")])))
    assert len(CocoDataset(*write_coco(make_coco([box(), box(2, iscrowd=1)])))) == 3 and not caplog.records
    dataset = CocoDataset(*write_coco(make_coco([box(), box(2, iscrowd=1), box(3, iscrowd=1)])))
    assert dataset.num_boxes == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "most annotations, 2 of 3, are crowd regions" in record.getMessage()


def test_no_annotations_at_all_are_no_crowd_regions(write_coco):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CocoDataset(*write_coco(make_coco())).num_boxes == 0
