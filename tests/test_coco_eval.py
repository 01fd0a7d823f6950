import json
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from vovnet_zoo.evaluation import coco_eval, matches
from vovnet_zoo.evaluation.matches import match


@pytest.fixture(scope="module")
def coco_mini():
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco-mini" / "annotations"
    if not folder.is_dir():
        pytest.skip("needs the shared data folder")
    return folder


def make_coco():
    """Two images, classes cat (id 3), dog (7) and bird (9, without ground truth)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in (5, 6)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "bird"}],
        "annotations": [
            {"image_id": 5, "category_id": 3, "bbox": [10, 10, 20, 20]},
            {"image_id": 5, "category_id": 7, "bbox": [50, 50, 100, 100]},
            {"image_id": 6, "category_id": 7, "bbox": [10, 10, 50, 50]},
        ],
    }


@pytest.fixture
def write(tmp_path):
    def write(coco):
        (tmp_path / "instances.json").write_text(json.dumps(coco))
        return tmp_path / "instances.json"

    return write


def ground_truth_results(coco, score=0.9):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": score}
        for a in coco["annotations"]
        if not a.get("iscrowd")
    ]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_ground_truth_scores_one(coco_mini, split, capsys):
    file = coco_mini / f"instances_{split}.json"
    coco = json.loads(file.read_text())
    metrics = coco_eval.coco_metrics(file, ground_truth_results(coco))
    assert capsys.readouterr().out == ""
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ARs", "ARm", "ARl"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-9), name
    present = {a["category_id"] for a in coco["annotations"] if not a["iscrowd"]}
    expected = {c["name"]: 1.0 if c["id"] in present else -1.0 for c in coco["categories"]}
    assert metrics["per_class"] == pytest.approx(expected, abs=1e-9)


def test_same_numbers_as_pycocotools(coco_mini, capsys):
    file = coco_mini / "instances_val2017.json"
    reference = COCO(file)
    rng, results = np.random.default_rng(0), []
    for row in ground_truth_results(reference.dataset):  # jittered, some missed, some doubled, some of a wrong class
        for _ in range(rng.integers(0, 3)):
            x, y, w, h = row["bbox"]
            dx, dy, dw, dh = rng.normal(0, 0.08, 4)
            box = [x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh)]
            category_id = row["category_id"] if rng.random() < 0.9 else 1
            results.append(row | {"bbox": box, "category_id": category_id, "score": float(rng.random())})
    run = COCOeval(reference, reference.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    before = json.dumps(reference.dataset)
    metrics = coco_eval.coco_metrics(file, results)
    per_class = metrics.pop("per_class")
    assert 0.1 < metrics["AP"] < 0.9
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert list(metrics) == names
    assert [metrics[name] for name in names] == pytest.approx(run.stats.tolist(), abs=1e-12)
    assert np.mean([ap for ap in per_class.values() if ap >= 0]) == pytest.approx(metrics["AP"], abs=1e-12)
    assert coco_eval.coco_metrics(reference, results)["AP"] == metrics["AP"]
    assert json.dumps(reference.dataset) == before

    subset = sorted(reference.imgs)[:40]
    run.params.imgIds = subset
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert coco_eval.coco_metrics(file, results, image_ids=subset)["AP"] == pytest.approx(run.stats[0], abs=1e-12)


def test_missing_keys_and_absent_classes(write):
    coco = make_coco()  # no info, area, iscrowd, annotation ids
    metrics = coco_eval.coco_metrics(write(coco), ground_truth_results(coco))
    assert metrics["per_class"] == pytest.approx({"cat": 1.0, "dog": 1.0, "bird": -1.0})
    assert [metrics[name] for name in ("AP", "APs", "APm", "APl")] == pytest.approx([1.0] * 4)
    coco["annotations"] = [a | {"id": 0, "iscrowd": None, "area": None} for a in coco["annotations"]]
    assert coco_eval.coco_metrics(write(coco), ground_truth_results(coco))["AP"] == pytest.approx(
        1.0
    )  # pycocotools: id 0 is no match
    coco["categories"][2]["name"] = "dog"
    assert coco_eval.coco_metrics(write(coco), [])["per_class"] == {"cat": 0.0, "dog (7)": 0.0, "dog (9)": -1.0}


def test_category_that_groups_others_is_no_class(write):
    coco = make_coco()
    coco["categories"] = [{"id": 0, "name": "pets"}, *[c | {"supercategory": "pets"} for c in coco["categories"]]]
    results = ground_truth_results(coco)
    assert list(coco_eval.coco_metrics(write(coco), results)["per_class"]) == ["cat", "dog", "bird"]
    results.append(results[0] | {"category_id": 0})
    assert coco_eval.coco_metrics(write(coco), results)["per_class"]["pets"] == -1


def test_crowd_regions_are_neither_missed_nor_wrong(write):
    coco = make_coco()
    coco["annotations"][1]["iscrowd"] = 1
    results = ground_truth_results(coco)
    inside = [{"image_id": 5, "category_id": 7, "bbox": [60, 60, 10, 10], "score": 0.99}]
    assert coco_eval.coco_metrics(write(coco), results)["AP"] == pytest.approx(1.0)
    assert coco_eval.coco_metrics(write(coco), results + inside)["AP"] == pytest.approx(1.0)
    coco["annotations"][1]["iscrowd"] = 0
    assert coco_eval.coco_metrics(write(coco), results + inside)["per_class"]["dog"] < 0.5


def test_no_results_or_no_ground_truth(write):
    coco = make_coco()
    metrics = coco_eval.coco_metrics(write(coco), [])
    assert metrics["AP"] == metrics["AR100"] == 0.0 and metrics["per_class"]["bird"] == -1.0
    for chosen in ([6], torch.tensor([6])):
        metrics = coco_eval.coco_metrics(write(coco), ground_truth_results(coco), image_ids=chosen)
        assert metrics["per_class"]["cat"] == -1.0
    results = ground_truth_results(coco)
    coco["annotations"] = []
    metrics = coco_eval.coco_metrics(write(coco), results)
    assert metrics["AP"] == metrics["AR100"] == -1.0


def test_max_dets(write):
    coco = make_coco()
    junk = [{"image_id": 6, "category_id": 7, "bbox": [100 + i, 100, 9, 9], "score": 0.99} for i in range(20)]
    results = ground_truth_results(coco) + junk
    metrics = coco_eval.coco_metrics(write(coco), results, max_dets=300)
    assert "AR300" in metrics and metrics["AR10"] < metrics["AR300"] == 1.0
    metrics = coco_eval.coco_metrics(write(coco), results, max_dets=5)
    assert [name for name in metrics if name.startswith("AR")] == ["AR1", "AR5", "ARs", "ARm", "ARl"]
    assert metrics["AR5"] == pytest.approx((1 + 0.5) / 2)


def test_unusable_ground_truth_is_left_out(write, caplog):
    coco = make_coco()
    results = ground_truth_results(coco)
    for bbox in (["1", "2", "3", "4"], None, [float("nan"), 1, 1, 1], [1, 2, 3]):
        coco["annotations"].append({"image_id": 5, "category_id": 3, "bbox": bbox})
    coco["annotations"] += [{"image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]}, "box", {"bbox": [1, 2, 3, 4]}]
    assert coco_eval.coco_metrics(write(coco), results)["AP"] == pytest.approx(1.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "instances.json: 7 unusable annotations" in caplog.text


@pytest.mark.parametrize("engine", ["pycocotools", "faster"])
def test_annotations_made_with_numpy_count(write, engine):
    """pycocotools takes them, so they must not be left out."""
    if engine == "faster":
        pytest.importorskip("hotcoco", reason="the engine needs the package hotcoco")
    coco, open_coco = make_coco(), COCO()
    results = ground_truth_results(coco)[:2]
    wanted = coco_eval.coco_metrics(write(coco), results)
    for row, kind in zip(coco["annotations"], (list, tuple, np.array), strict=True):
        row |= {"image_id": np.int64(row["image_id"]), "bbox": kind(np.array(row["bbox"], dtype=np.float32))}
    coco["categories"] = [row | {"id": np.int32(row["id"])} for row in coco["categories"]]
    open_coco.dataset = coco
    found = coco_eval.coco_metrics(open_coco, results, engine=engine)
    assert found.pop("per_class") == pytest.approx(wanted.pop("per_class")) and found == pytest.approx(wanted)
    assert isinstance(coco["annotations"][2]["bbox"], np.ndarray)


@pytest.mark.parametrize("box", [[5, 5, 0, 10], [5000, 5000, 10, 10]])
def test_boxes_that_cannot_be_found_are_missed(write, box):
    """pycocotools counts them, and check-data says so."""
    coco = make_coco()
    results = ground_truth_results(coco)
    coco["annotations"] += [a | {"id": 90 + i, "bbox": box, "area": 0} for i, a in enumerate(coco["annotations"])]
    assert coco_eval.coco_metrics(write(coco), results)["AP"] < 0.6


def test_wrong_results(write):
    coco = make_coco()
    file, good = write(coco), ground_truth_results(coco)
    nan = float("nan")
    for change, message in (
        ({"image_id": 4}, r"instances\.json: .* images .*\[4\]"),
        ({"category_id": 0}, r"instances\.json: .* categories .*\[0\]"),
        ({"score": nan}, "image 5 not finite"),
        ({"bbox": [1, 2, nan, 4]}, "image 5 not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            coco_eval.coco_metrics(file, [good[0] | change, *good])
    with pytest.raises(ValueError, match=r"instances\.json: .*\[77\]"):
        coco_eval.coco_metrics(file, good, image_ids=[5, 77])
    with pytest.raises(ValueError, match=r"none\.json"):
        coco_eval.coco_metrics(file.parent / "none.json", good)


def test_ids_that_are_texts(write):
    """Rows may have the texts of the file, or the integers for which they stand here."""
    coco = make_coco()
    numbers = ground_truth_results(coco)[1:]
    expected = coco_eval.coco_metrics(write(coco), numbers)
    for entry in (*coco["images"], *coco["annotations"]):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"img_{entry[key]}"
    for entry in (*coco["categories"], *coco["annotations"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = str(entry[key])
    file = write(coco)
    texts = ground_truth_results(coco)[1:]
    rows = coco_eval.with_numbers(texts, file)
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(1, 7), (2, 7)]
    assert coco_eval.with_texts(rows, file) == texts
    assert [coco_eval.coco_metrics(file, x) for x in (texts, rows)] == [expected, expected]
    assert len(match(file, texts).det_label) == 2
    with pytest.raises(ValueError, match=r"instances.json: has no images with the ids \['img_9'\] that results name"):
        coco_eval.coco_metrics(file, [texts[0] | {"image_id": "img_9"}])
    with pytest.raises(ValueError, match=r"has no categories with the ids \['x'\] that results name"):
        coco_eval.coco_metrics(file, [texts[0] | {"category_id": "x"}])


def test_to_coco_results():
    detections = [
        {
            "boxes": torch.tensor([[1.0, 2, 4, 6], [0, 0, 0.5, 200]]),
            "scores": torch.tensor([0.5, 0.25], dtype=torch.float16),
            "labels": torch.tensor([1, 0]),
        },
        {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    rows = coco_eval.to_coco_results(detections, torch.tensor([5, 6]), [3, 7])
    assert rows == [
        {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 5, "category_id": 3, "bbox": [0, 0, 0.5, 200], "score": 0.25},
    ]
    assert json.loads(json.dumps(rows)) == rows
    assert detections[0]["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 0.5, 200]]
    rows = coco_eval.to_coco_results(detections, [5, 6], [3, 7], plus_one=True)
    assert [row["bbox"] for row in rows] == [[1, 2, 4, 5], [0, 0, 1.5, 201]]
    assert coco_eval.to_coco_results([], [], [3, 7]) == []
    with pytest.raises(ValueError, match=r"image 5: labels 0\.\.1 do not fit the 1 category of category_ids"):
        coco_eval.to_coco_results(detections, [5, 6], [3])
    with pytest.raises(ValueError, match="2 detections for 1"):
        coco_eval.to_coco_results(detections, [5], [3, 7])


def test_to_coco_results_published():
    golden = load_file(Path(__file__).parent / "golden" / "golden_fcos_ops.safetensors")
    boxes, n = golden["boxes/flipped"], len(golden["boxes/flipped"])
    detections = [{"boxes": boxes, "scores": torch.ones(n), "labels": torch.zeros(n, dtype=torch.int64)}]
    rows = coco_eval.to_coco_results(detections, [1], [1], plus_one=True)
    torch.testing.assert_close(torch.tensor([row["bbox"] for row in rows]), golden["boxes/flipped_xywh"])


# ---- engines --------------------------------------------------------------------------------------------------------


def random_boxes(rng, n, low, high):
    """float64 [n, 4] xywh, sides log-uniform in (low, high)."""
    return np.concatenate([rng.uniform(0, 2 * high, (n, 2)), np.exp(rng.uniform(*np.log((low, high)), (n, 2)))], axis=1)


def random_set(rng, num_images, num_classes, most_truth, most_found):
    """COCO ground truth and result rows with ties, doubles, crowds, empty images, and areas given or missing."""
    coarse = rng.random() < 0.5  # IoU exactly on thresholds, equal scores
    image_ids = (rng.choice(3 * num_images, num_images, replace=False) + int(rng.choice([0, 2**60]))).tolist()
    category_ids = rng.choice(500, num_classes, replace=False).tolist()
    annotations, results = [], []
    for image_id in image_ids:
        n, m = rng.integers(0, [most_truth + 1, most_found + 1])
        truth, found = random_boxes(rng, n, 4, 300), random_boxes(rng, m, 4, 300)
        labels = rng.integers(0, max(1, num_classes - 1), n)  # the last class has no truth
        guesses = rng.choice(rng.choice(num_classes, 15), m)  # a detector sees some 15 classes in an image
        if n:
            near, of = rng.random(m) < 0.6, rng.integers(0, n, m)
            found = np.where(near[:, None], truth[of] * np.exp(rng.normal(0, 0.1, (m, 4))), found)
            guesses = np.where(near, labels[of], guesses)
        scores = rng.random(m)
        if coarse:
            truth, found, scores = np.round(truth / 8) * 8, np.round(found / 8) * 8, np.round(scores * 4) / 4
        for label, box in zip(labels, truth.tolist(), strict=True):
            row = {"image_id": image_id, "category_id": category_ids[label], "bbox": box}
            row |= {"iscrowd": int(rng.random() < 0.2)} if rng.random() < 0.5 else {}
            row |= {"area": rng.choice([box[2] * box[3] * 0.6, 0.0, 32.0**2, 96.0**2])} if rng.random() < 0.5 else {}
            row |= {"id": int(rng.integers(3))} if rng.random() < 0.5 else {}
            annotations.append(row)
        results += [
            {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(guesses, found.tolist(), scores.tolist(), strict=True)
        ]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 900, "height": 900} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        "annotations": annotations,
    }
    return coco, [results[i] for i in rng.permutation(len(results))]


def assert_same(metrics, expected, tolerance=1e-12):
    metrics, expected = metrics | metrics["per_class"], expected | expected["per_class"]
    assert list(metrics) == list(expected)
    assert metrics.pop("per_class").keys() == expected.pop("per_class").keys()
    assert metrics == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_faster_engine_has_the_same_numbers(write, seed):
    pytest.importorskip("hotcoco")
    rng, aps = np.random.default_rng(seed), []
    for _ in range(25):
        coco, results = random_set(rng, int(rng.integers(1, 12)), int(rng.integers(1, 6)), 8, 40)
        image_ids = [image["id"] for image in coco["images"]]
        subset = rng.permutation(image_ids)[: rng.integers(0, len(image_ids) + 1)].tolist()
        for options in ({}, {"max_dets": int(rng.choice([1, 5, 10, 11, 300]))}, {"image_ids": subset}):
            expected = coco_eval.coco_metrics(write(coco), results, **options)
            assert_same(coco_eval.coco_metrics(write(coco), results, engine="faster", **options), expected)
            aps.append(expected["AP"])
    assert len({round(ap, 3) for ap in aps}) > 20


def test_matches_do_not_depend_on_the_engine(write, monkeypatch):
    pytest.importorskip("hotcoco")
    rng, found = np.random.default_rng(0), 0
    for _ in range(12):
        coco, results = random_set(rng, int(rng.integers(1, 12)), int(rng.integers(1, 6)), 8, 40)
        image_ids, file = [image["id"] for image in coco["images"]], write(coco)
        for chosen in (None, image_ids[::2], []):
            both = []
            for engine in ("pycocotools", "faster"):
                monkeypatch.setattr(matches, "fastest_engine", lambda engine=engine: engine)
                both.append(vars(match(file, results, image_ids=chosen)))
            for name, wanted in both[0].items():
                np.testing.assert_equal(both[1][name], wanted, err_msg=name)
            found += (both[0]["det_true"] >= 0).sum()
    assert found > 500


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_faster_engine_on_real_ground_truth(coco_mini, split, capfd, caplog):
    pytest.importorskip("hotcoco")
    caplog.set_level(logging.INFO)
    file, rng = coco_mini / f"instances_{split}.json", np.random.default_rng(0)
    perfect = ground_truth_results(json.loads(file.read_text()))
    boxes = np.array([row["bbox"] for row in perfect]) * np.exp(rng.normal(0, 0.1, (len(perfect), 4)))
    jittered = [row | {"bbox": b, "score": float(rng.random())} for row, b in zip(perfect, boxes.tolist(), strict=True)]
    for results in (perfect, jittered, perfect + jittered, []):
        expected = coco_eval.coco_metrics(file, results)
        assert_same(coco_eval.coco_metrics(file, results, engine="faster"), expected)
    assert "".join(capfd.readouterr()) == caplog.text == ""


def test_engines_see_only_what_coco_defines(write):
    pytest.importorskip("hotcoco")
    coco = make_coco()
    results = ground_truth_results(coco)[1:]
    expected = coco_eval.coco_metrics(write(coco), results)
    strange = {"ignore": 1, "is_crowd": 1, "drop": True, "lvis_mark": True, "score": None}
    coco["annotations"] = [strange | row for row in coco["annotations"]]
    results = [strange | {"area": 1e9, "iscrowd": 1, "id": 0} | row for row in results]
    for engine in ("pycocotools", "faster"):
        assert_same(coco_eval.coco_metrics(write(coco), results, engine=engine), expected)


def test_unknown_or_missing_engine(write, monkeypatch):
    coco = make_coco()
    with pytest.raises(ValueError, match="the engine's name is 'pycocotools' or 'faster', not 'fast'"):
        coco_eval.coco_metrics(write(coco), [], engine="fast")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match="pip install 'hotcoco"):
        coco_eval.coco_metrics(write(coco), [], engine="faster")


def test_the_faster_engine_in_a_forked_process(write, monkeypatch):
    """hotcoco would wait without end for its threads, which the copy of a process lacks."""
    pytest.importorskip("hotcoco")
    file = write(make_coco())
    coco_eval.coco_metrics(file, [], engine="faster")

    def use_it(pipe):
        try:
            coco_eval.coco_metrics(file, [], engine="faster")
        except RuntimeError as error:
            pipe.send((str(error), coco_eval.fastest_engine()))

    ours, theirs = mp.Pipe()
    process = mp.get_context("fork").Process(target=use_it, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(30), "it hangs"
    message, chosen = ours.recv()
    process.join()
    assert "'spawn' or 'forkserver', or use engine 'pycocotools'" in message and chosen == "pycocotools"
    assert coco_eval.fastest_engine() == "faster"


@pytest.mark.slow
def test_speed_of_the_engines(write, capsys):
    """A set the size of COCO val2017: 5,000 images, 80 classes, about 36,000 boxes, 500,000 results."""
    pytest.importorskip("hotcoco")
    rng = np.random.default_rng(0)
    coco, results = random_set(rng, 5000, 80, 14, 200)
    results.sort(key=lambda row: row["image_id"])
    file, seconds, metrics = write(coco), {"pycocotools": [], "faster": []}, {}
    for _ in range(3):
        for engine, times in seconds.items():
            began = time.perf_counter()
            metrics[engine] = coco_eval.coco_metrics(file, results, engine=engine)
            times.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"\n{len(coco['annotations'])} boxes, {len(results)} results, AP {metrics['faster']['AP']:.3f}")
        for engine, times in seconds.items():
            print(f"{engine:>11}: {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})")
    assert_same(metrics["faster"], metrics["pycocotools"])
    assert min(seconds["pycocotools"]) > 2 * max(seconds["faster"])


# ---- ranks ----------------------------------------------------------------------------------------------------------


def row(image_id, score):
    return {"image_id": image_id, "category_id": 1, "bbox": [0.0, 0.0, 1.0, 1.0], "score": score}


GATHERS = [  # per rank (rows, image ids), and what rank 0 gets
    # different numbers; image 2 on both ranks, image 4 on both but only the second found something in it
    ([([row(1, 0.1), row(2, 0.2)], [1, 2, 4]), ([row(2, 0.9), row(3, 0.3), row(4, 0.4)], [2, 3, 4])], [0.1, 0.2, 0.3]),
    ([([], []), ([row(3, 0.3)], [3])], [0.3]),
    ([([row(1, 0.1)], [1]), ([], [])], [0.1]),
    ([([], []), ([], [])], []),
    ([([], [1]), ([row(3, 0.3)], [3, 3])], "rank 1 .* more than once"),
    ([([], [1]), ([row(3, 0.3)], [2])], "rank 1 .* does not list"),
]


def gather_worker(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for parts, expected in GATHERS:
        if rank == 0 and isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                coco_eval.gather_results(*parts[rank])
            continue
        rows = coco_eval.gather_results(*parts[rank])
        assert (rows is None) if rank else ([r["score"] for r in rows] == expected)
    dist.destroy_process_group()


def test_gather_results_two_processes(tmp_path):
    mp.start_processes(gather_worker, args=(tmp_path / "rendezvous",), nprocs=2, start_method="fork")


def test_gather_results_alone():
    rows = [row(1, 0.1), row(2, 0.2)]
    assert coco_eval.gather_results(rows, torch.tensor([1, 2, 3])) == rows


def test_format_table(write):
    coco = make_coco()
    results = ground_truth_results(coco)[:2]
    lines = coco_eval.format_table(coco_eval.coco_metrics(write(coco), results), per_class=True).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert lines[1].split()[3:6] == ["1.000", "0.000", "1.000"] and len(lines[0]) == len(lines[1])
    assert [line.split() for line in lines[2:]] == [["1.000", "cat"], ["0.505", "dog"], ["-", "bird"]]


@pytest.mark.parametrize("area", [-1, 1e11, 10**400, float("nan"), float("inf"), True, "big", None])
def test_absurd_area_does_not_hide_ground_truth(write, area):
    coco = make_coco()
    expected = coco_eval.coco_metrics(write(coco), ground_truth_results(coco))
    for annotation in coco["annotations"]:
        annotation["area"] = area
    assert coco_eval.coco_metrics(write(coco), ground_truth_results(coco)) == expected
