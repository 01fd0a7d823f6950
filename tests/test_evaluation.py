"""The analysis of results agrees with pycocotools' own matches, and finds what was planted."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from simulated import simulate, simulate_matches

from vovnet_zoo.data import CocoDataset
from vovnet_zoo.evaluation.analysis import analyse
from vovnet_zoo.evaluation.bootstrap import (
    GROUPS,
    Resampled,
    ap_interval,
    bootstrap_ap,
    groups_of,
    interval,
    weighted_ap,
)
from vovnet_zoo.evaluation.coco_eval import coco_metrics
from vovnet_zoo.evaluation.errors import calibration, confusion_matrix, error_kinds
from vovnet_zoo.evaluation.label_errors import label_errors
from vovnet_zoo.evaluation.matches import match
from vovnet_zoo.evaluation.statistics import dataset_statistics
from vovnet_zoo.evaluation.thresholds import (
    any_right,
    at_thresholds,
    best_f1,
    class_thresholds,
    curve,
    for_precision,
    for_recall,
    is_kept,
)


@pytest.fixture
def write(tmp_path):
    def write(coco):
        (tmp_path / "instances.json").write_text(json.dumps(coco))
        return tmp_path / "instances.json"

    return write


def coco_of(coco):
    index = COCO()
    index.dataset = coco
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def pycocotools_run(coco, rows, image_ids=None):
    """What pycocotools itself says, without our code."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_of(copy.deepcopy(coco))
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(rows)), "bbox")
        if image_ids is not None:
            run.params.imgIds = image_ids
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("image_ids", [None, [2, 5, 6, 7, 20]])
@pytest.mark.parametrize("coarse", [False, True])
def test_matches_are_those_of_pycocotools(write, coarse, image_ids):
    coco, rows = simulate(crowd=0.1, coarse=coarse)
    run = pycocotools_run(coco, rows, image_ids)
    image_of = {image["id"]: i for i, image in enumerate(coco["images"] if image_ids is None else image_ids)} if (
        image_ids is None
    ) else {image_id: i for i, image_id in enumerate(image_ids)}  # fmt: skip
    matches = match(write(coco), rows, image_ids=image_ids)

    expected, boxes = set(), {row["id"]: tuple(row["bbox"]) for row in coco["annotations"]}
    for entry in run.evalImgs:
        if entry and entry["aRng"] == [0, 1e10]:
            for d, det in enumerate(entry["dtIds"]):
                for t in range(10):
                    found = boxes.get(int(entry["dtMatches"][t, d]))
                    key = (image_of[entry["image_id"]], tuple(rows[det - 1]["bbox"]), t)
                    expected.add((*key, found, bool(entry["dtIgnore"][t, d])))
    got = set()
    for d in range(len(matches.det_score)):
        for t in range(10):
            found = matches.det_true[t, d]
            box = tuple(matches.true_box[found]) if found >= 0 else None
            got.add((int(matches.det_image[d]), tuple(matches.det_box[d]), t, box, not matches.det_counts[t, d]))
    assert got == expected and len(got) > 100
    assert matches.metrics["AP"] == pytest.approx(run.stats[0], abs=1e-12)
    mean = np.mean([row["AP"] for row in matches.class_metrics.values()])
    assert mean == pytest.approx(run.stats[0], abs=1e-9)
    assert np.mean([row["AR"] for row in matches.class_metrics.values()]) == pytest.approx(run.stats[8], abs=1e-9)


@pytest.mark.parametrize("crowd", [0.0, 0.15])
def test_ap_of_drawn_images_is_that_of_pycocotools_on_copies(write, crowd):
    coco, rows = simulate(seed=1, images=30, crowd=crowd)
    matches = match(write(coco), rows)
    whole = weighted_ap(matches, np.ones((1, 30), dtype=int))
    assert whole.overall[0] == pytest.approx(matches.metrics["AP"], abs=1e-9)
    assert whole.per_class[0] == pytest.approx(list(matches.metrics["per_class"].values()), abs=1e-9)

    for weights in np.random.default_rng(0).integers(0, 3, (5, 30)):
        drawn, found = {**coco, "images": [], "annotations": []}, []
        for image, times in zip(coco["images"], weights, strict=True):
            for number in range(times):
                copied = image["id"] + 1000 * number
                drawn["images"].append({**image, "id": copied})
                for row in coco["annotations"]:
                    if row["image_id"] == image["id"]:
                        new = {**row, "image_id": copied, "id": len(drawn["annotations"]) + 1}
                        drawn["annotations"].append(new)
                found += [{**row, "image_id": copied} for row in rows if row["image_id"] == image["id"]]
        expected = coco_metrics(write(drawn), found)
        samples = weighted_ap(matches, weights[None])
        assert samples.overall[0] == pytest.approx(expected["AP"], abs=1e-9)
        assert samples.per_class[0] == pytest.approx(list(expected["per_class"].values()), abs=1e-9)


def test_interval_of_a_model_and_of_a_difference(write):
    coco, rows = simulate(seed=2)
    matches = match(write(coco), rows)
    a, b = (bootstrap_ap(matches, 200, seed=1).overall for _ in range(2))
    ap = matches.metrics["AP"]
    assert interval(a.minus(b))[:2] == (0, 0) and a.value == pytest.approx(ap, abs=1e-9)
    whole, half = interval(a), interval(a, confidence=0.5)
    assert ap_interval(a) == whole
    assert whole.low < half.low < ap < half.high < whole.high < whole.low + 0.3
    better = [{**row, "score": row["score"] / 2} if i % 3 else row for i, row in enumerate(rows)]
    other = bootstrap_ap(match(write(coco), better), 200, seed=1).overall
    paired, apart = np.std(a.drawn - other.drawn), np.hypot(np.std(a.drawn), np.std(other.drawn))
    assert paired < 0.8 * apart  # the same images are drawn for both
    low, high, _ = interval(a.minus(other))
    assert high - low < 0.8 * np.hypot(*(x.high - x.low for x in (whole, interval(other))))

    # Each set without an image belongs to the image that is left out.
    without = np.ones((1, 40), dtype=int) - (np.arange(40) == 7)
    assert a.left_out[7] == weighted_ap(matches, without).overall[0] and len(a.left_out) == 40


def test_interval_of_a_mean():
    """The mean of numbers has a known interval; groups of images give nearly the same."""
    x = np.random.default_rng(0).normal(0.5, 0.1, 500)

    def means(x):
        group = groups_of(len(x))
        left_out = np.array([x[group != i].mean() for i in range(group.max() + 1)])
        return Resampled(x.mean(), np.array([x.mean()] * 3), left_out, len(x))

    few = x[:20]
    error = few.std(ddof=1) / 20**0.5
    expected = few.mean() - 2.0930 * error, few.mean() + 2.0930 * error  # of 19 degrees of freedom
    assert interval(means(few))[:2] == pytest.approx(expected, abs=1e-3 * error)
    assert len(means(x).left_out) == GROUPS == 200  # of 2 or 3 numbers
    low, high, _ = interval(means(x))
    assert high - low == pytest.approx(2 * 1.972 * x.std(ddof=1) / 500**0.5, rel=0.1)

    # Where the drawn images have a higher AP, the interval moves down; it never loses the value, and AP is 0 to 1.
    moved = means(few)._replace(drawn=few.mean() + np.array([0.01, 0.03, np.nan]))
    assert interval(moved).low == pytest.approx(expected[0] - 0.02, abs=1e-3 * error)
    assert interval(moved).high >= few.mean()
    assert ap_interval(means(few / 100)._replace(drawn=np.array([0.5]))).low == 0
    wide = means(np.array([-0.9, 0.9]))
    assert interval(wide)[:2] == (-1, 1) and ap_interval(wide)[:2] == (0, 1)
    one_image_has_all = Resampled(0.9, np.array([0.8, 0.9]), np.array([np.nan, 0.9]), 2)
    nothing = Resampled(np.nan, np.array([np.nan]), np.array([np.nan]), 2)
    for unknown in (one_image_has_all, nothing):
        assert interval(unknown)[:2] == (-1, 1) and ap_interval(unknown)[:2] == (-1, -1)


@pytest.mark.slow
def test_interval_covers_the_truth():
    """Of intervals of plain percentiles, 87 % hold the truth here."""

    def ap_of(matches):
        return weighted_ap(matches, np.ones((1, len(matches.images)), dtype=int)).overall[0]

    truth, covered = np.mean([ap_of(simulate_matches(10**6 + i, 50_000, classes=5)) for i in range(4)]), []
    for seed in range(400):
        found = ap_interval(bootstrap_ap(simulate_matches(seed, 50, classes=5), 200, seed).overall)
        covered.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98  # 0.95, give or take 2.7 standard deviations of 400 draws


@pytest.mark.parametrize("coarse", [False, True])
def test_thresholds_are_the_best_of_all(write, coarse):
    coco, rows = simulate(seed=3, crowd=0.1, coarse=coarse)
    file = write(coco)
    matches = match(file, rows)

    def counted(least):
        """Right, kept and objects, when pycocotools sees only the rows that are kept."""
        run = pycocotools_run(coco, [row for row in rows if row["score"] >= least[row["category_id"]]])
        entries = [entry for entry in run.evalImgs if entry and entry["aRng"] == [0, 1e10]]
        right = sum(((e["dtMatches"][0] > 0) & (e["dtIgnore"][0] == 0)).sum() for e in entries)
        kept = sum((e["dtIgnore"][0] == 0).sum() for e in entries)
        objects = sum((e["gtIgnore"] == 0).sum() for e in entries)
        return right, kept, objects

    for label, name in enumerate(matches.class_names):
        points, category = curve(matches, label), 10 * label + 10
        assert list(points.score) == sorted({row["score"] for row in rows if row["category_id"] == category})[::-1]
        best = best_f1(points)
        other = {c: 2.0 for c in (10, 20, 30)}  # no row of another class is kept
        objects = sum(row["category_id"] == category and not row["iscrowd"] for row in coco["annotations"])
        f1 = []
        for score in points.score[:: 1 if coarse else 5]:
            right, kept, _ = counted(other | {category: score})
            f1.append(2 * right / (kept + objects))
        right, kept, _ = counted(other | {category: best.score})
        assert best.f1 == pytest.approx(2 * right / (kept + objects), abs=1e-12) and best.f1 >= max(f1) - 1e-12
        assert (best.precision, best.recall) == pytest.approx((right / kept, right / objects))
        assert class_thresholds(matches)[name] == best.score
    thresholds = class_thresholds(matches)
    right, kept, objects = counted({10 * i + 10: thresholds[name] for i, name in enumerate(matches.class_names)})
    assert at_thresholds(matches, thresholds).f1 == pytest.approx(2 * right / (kept + objects), abs=1e-12)
    assert at_thresholds(matches, thresholds).f1 >= best_f1(curve(matches)).f1 - 0.02


def test_thresholds_for_a_precision_and_a_recall(write):
    coco, rows = simulate(seed=4)
    points = curve(match(write(coco), rows))
    precise, complete = for_precision(points, 0.9), for_recall(points, 0.8)
    assert precise.precision >= 0.9 and complete.recall >= 0.8
    assert not ((points.precision >= 0.9) & (points.recall > precise.recall)).any()
    assert ((points.recall >= 0.8) & (points.score > complete.score)).sum() == 1
    assert for_recall(points, 1.0) is None and for_precision(points, 0.0).recall == points.recall[-1]
    for wish in (for_precision, for_recall):
        with pytest.raises(ValueError, match="1.5"):
            wish(points, 1.5)


def test_a_threshold_lies_between_scores_in_float32(write):
    coco, _ = simulate(images=1)
    box = [10.0, 10.0, 50.0, 50.0]
    coco["annotations"] = [{"id": 1, "image_id": 1, "category_id": 10, "bbox": box, "area": 2500.0, "iscrowd": 0}]
    above = float(np.float32(0.7))
    for below in (float(np.nextafter(np.float32(0.7), np.float32(0))), 0.2):
        rows = [{"image_id": 1, "category_id": 10, "bbox": box, "score": above}]
        rows += [{"image_id": 1, "category_id": 10, "bbox": [0.0, 100.0, 20.0, 20.0], "score": below}]
        matches = match(write(coco), rows)
        score = best_f1(curve(matches, 0)).score
        assert np.float32(below) < np.float32(score) <= np.float32(above)
        assert is_kept(matches, {"class 0": score}).tolist() == [True, False]
        # a class that nothing was found of gets the threshold of all classes
        assert class_thresholds(matches) == {f"class {i}": score for i in range(3)}
    assert class_thresholds(match(write(coco), [])) == {f"class {i}": 0.5 for i in range(3)}
    assert not any_right(match(write(coco), [])) and any_right(matches)


@pytest.mark.parametrize("crowd", [0.0, 0.1])
def test_confusions_add_up(write, crowd):
    coco, rows = simulate(seed=5, crowd=crowd)
    matches = match(write(coco), rows)
    thresholds = class_thresholds(matches)
    matrix = confusion_matrix(matches, thresholds)
    kept = is_kept(matches, thresholds) & matches.det_counts[0]
    for label in range(3):
        assert matrix[label].sum() == (matches.true_counts & (matches.true_label == label)).sum()
        assert matrix[:, label].sum() == (kept & (matches.det_label == label)).sum()
    assert matrix[3, 3] == 0 and np.diag(matrix)[:3].sum() > 0.5 * matrix[:3].sum()


def test_planted_errors_are_sorted_into_kinds(write):
    coco, _ = simulate(seed=6, images=60)
    grid = [[20.0, 20.0, 40.0, 40.0], [120.0, 20.0, 40.0, 40.0], [20.0, 120.0, 40.0, 40.0]]  # boxes far apart
    coco["annotations"] = [
        {**{"id": 3 * i + k, "image_id": i, "category_id": 10 * k + 10}, **{"bbox": box, "area": 1600.0, "iscrowd": 0}}
        for i in range(1, 61)
        for k, box in enumerate(grid)
    ]
    perfect = [
        {**{k: row[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for row in coco["annotations"]
    ]
    file = write(coco)
    assert all(kind == (0, 0) for kind in error_kinds(match(file, perfect)).values())

    rows = copy.deepcopy(perfect)
    rows[0]["category_id"] = 30  # an object of class 10
    rows[4]["bbox"] = [140.0, 20.0, 40.0, 40.0]  # IoU 1/3
    rows[7] = {**rows[7], "bbox": [140.0, 20.0, 40.0, 40.0], "category_id": 10}
    rows.append({**rows[10], "score": 0.8})
    rows.append({"image_id": 5, "category_id": 10, "bbox": [150.0, 150.0, 30.0, 30.0], "score": 0.95})
    del rows[20]
    matches = match(file, rows)
    kinds = error_kinds(matches)
    expected = dict(classification=1, localisation=1, both=1, duplicate=1, background=1)
    assert {name: kinds[name].errors for name in expected} == expected
    assert kinds["missed"].errors == 2  # the one of which there is no row, and the one of "both"
    assert all(0 <= kind.ap_lost < 0.1 for kind in kinds.values()) and kinds["classification"].ap_lost > 0


def test_calibration_error_is_the_mean_distance(write):
    coco, rows = simulate(seed=7)
    matches = match(write(coco), rows)
    found, right = calibration(matches), matches.is_right[0]
    bins = np.minimum((matches.det_score * 10).astype(int), 9)
    distance = 0.0
    for i in range(10):
        chosen = bins == i
        assert found.detections[i] == chosen.sum()
        if chosen.any():
            assert found.score[i] == pytest.approx(matches.det_score[chosen].mean())
            assert found.right[i] == pytest.approx(right[chosen].mean())
            distance += chosen.sum() * abs(right[chosen].mean() - matches.det_score[chosen].mean())
    assert found.error == pytest.approx(distance / len(bins))


@pytest.mark.parametrize("careless", [0, 20])
@pytest.mark.parametrize("seed", range(3))
def test_planted_label_errors_are_listed_first(write, seed, careless):
    """They are found too where most objects of some images were left out, of which each would be as suspicious."""
    coco, rows = simulate(seed=seed, images=80)
    rng = np.random.default_rng(seed)
    coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] > careless or rng.random() < 0.3]
    found = {tuple(row["bbox"]) for row in coco["annotations"] if best_score(row, rows) > 0.6}
    chosen = rng.permutation([i for i, row in enumerate(coco["annotations"]) if tuple(row["bbox"]) in found])[:10]
    removed = [coco["annotations"][i] for i in chosen[:5]]
    swapped = [coco["annotations"][i] for i in chosen[5:]]
    for row in swapped:
        row["category_id"] = row["category_id"] % 30 + 10
    coco["annotations"] = [row for row in coco["annotations"] if row not in removed]
    matches = match(write(coco), rows)
    hits = 0
    for error in label_errors(matches)[:20]:
        image_id = matches.images[error.image]["id"]
        if error.kind == "other class":
            box = matches.true_box[error.true].tolist()
            hits += any(row["image_id"] == image_id and row["bbox"] == box for row in swapped)
        if error.kind == "no annotation":
            boxes = [row["bbox"] for row in removed if row["image_id"] == image_id]
            hits += (
                bool(boxes) and mask.iou(matches.det_box[[error.det]], np.array(boxes), [0] * len(boxes)).max() > 0.5
            )
    assert hits >= 7


def best_score(row, rows):
    """The best score of a row of the same image and class with an IoU of at least 0.5."""
    same = [r for r in rows if (r["image_id"], r["category_id"]) == (row["image_id"], row["category_id"])]
    fit = [r["score"] for r in same if mask.iou(np.array([r["bbox"]]), np.array([row["bbox"]]), [0])[0, 0] >= 0.5]
    return max(fit, default=0)


def test_nothing_found_and_nothing_to_find(write):
    coco, rows = simulate(images=5)
    nothing = analyse(write(coco), [], resamples=10)
    objects = len(coco["annotations"])
    assert nothing.kinds["missed"].errors == objects and nothing.confusion[:-1, -1].sum() == objects
    assert nothing.at_thresholds.f1 == 0 and nothing.ap[:2] == (0, 0)
    empty = analyse(write({**coco, "annotations": []}), rows, resamples=10)
    assert empty.ap[:2] == (-1, -1) and empty.metrics["AP"] == -1
    assert empty.confusion[-1].sum() == is_kept(empty.matches, empty.thresholds).sum()


def test_dataset_statistics(tiny_coco):
    found = dataset_statistics(CocoDataset(tiny_coco / "train", tiny_coco / "annotations" / "instances_train.json"))
    assert (found.images, found.empty, found.class_names) == (8, 1, ["red", "green"])
    assert found.boxes == found.images_of_class == [7, 7] and found.sizes == [14, 0, 0]
    assert found.places.sum() == 14
    assert found.places[:, 6:].sum() == 5 and found.places[:2].sum() == 0  # of green boxes; no box is so high
