"""Models are compared on the same images: as numbers, as a page, and from the command line."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
from browsing import open_page, pale_texts, set_colours
from samples import RGB
from simulated import write_data

from vovnet_zoo.evaluation.bootstrap import ap_interval, bootstrap_ap, interval
from vovnet_zoo.evaluation.compare import compare, format_comparison
from vovnet_zoo.evaluation.compare_page import differing_images, differing_settings, write_comparison
from vovnet_zoo.evaluation.matches import match
from vovnet_zoo.evaluation.runs import DETECTIONS, SKIPPED, VALIDATED, describe_annotations, read_runs, shown


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset, the rows of a model, and the rows of one that misses every fifth box of class 0, all of image 7."""
    folder = tmp_path_factory.mktemp("compare")
    dataset, rows = write_data(folder / "data", images=40, seed=8)
    worse = [row for i, row in enumerate(rows) if row["image_id"] != 7 and (row["category_id"] != 10 or i % 3)]
    return folder, dataset, rows, worse


@pytest.fixture(scope="module")
def runs(data):
    """Run folders of both models."""
    folder, dataset, rows, worse = data
    for name, found, lr in (("a", rows, 0.1), ("b", worse, 0.2)):
        (folder / name).mkdir()
        (folder / name / DETECTIONS).write_text(json.dumps(found))
        settings = {"data": str(folder / "data"), "val": None, "val_fraction": None, "lr": lr, "out": name}
        (folder / name / "run.json").write_text(json.dumps({"config": settings, "starts": []}))
        log = [{"step": i, "loss": lr / (i + 1)} for i in range(9)] + [{"step": i, "AP": lr * i} for i in (4, 8)]
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 9, "lo')
    return folder / "a", folder / "b"


@pytest.fixture
def run(run):
    """Run `vovnet-zoo compare ARGS` and return (exit status, stdout, stderr)."""
    return functools.partial(run, "compare")


def test_a_model_does_not_differ_from_itself(data):
    _, dataset, rows, _ = data
    itself = compare(dataset.annotations, {"a": rows, "b": list(reversed(rows))}, resamples=50)
    for model in itself.models:
        for difference in (model.difference, *model.class_differences):
            assert difference.value == 0 and difference.interval[:2] == (0, 0) and difference.may_be_luck
    assert not differing_images(itself).figures and (itself.errors()[0] == itself.errors()[1]).all()


def test_one_image_says_nothing_of_others(write_coco, tmp_path, run):
    """The interval of a class whose objects are all in one image is unknown, and a difference there may be luck."""
    box, moved = [1, 1, 20, 20], [6, 1, 20, 20]
    images = [{"id": i, "file_name": f"{i}.png", "width": RGB.width, "height": RGB.height} for i in range(1, 8)]
    every = [{"image_id": i, "category_id": 1, "bbox": box} for i in range(1, 8)]
    once = {"image_id": 3, "category_id": 2}
    categories = [{"id": 1, "name": "many"}, {"id": 2, "name": "once"}]
    rows = [*every, {**once, "bbox": box}]
    annotations = [{**row, "id": i, "area": 400, "iscrowd": 0} for i, row in enumerate(rows, 1)]
    _, file = write_coco({"images": images, "annotations": annotations, "categories": categories})
    right = [{**row, "score": 0.9} for row in rows]
    wrong = [*right[:-1], {**once, "bbox": moved, "score": 0.9}]
    many, one = compare(file, {"a": right, "b": wrong}, resamples=50).models[1].class_differences
    assert many.interval[:2] == (0, 0) and many.is_known
    assert one.value < -0.2 and one.interval[:2] == (-1, 1) and not one.is_known and one.may_be_luck
    assert ap_interval(bootstrap_ap(match(file, right), 50).per_class[1])[:2] == (-1, -1)
    for name, content in (("a", right), ("b", wrong)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    options = ("--val", file, "--val-images", tmp_path, "--out", tmp_path / "page.html")
    status, out, err = run(tmp_path / "a.json", tmp_path / "b.json", *options)
    (line,) = [x for x in out.splitlines() if x.startswith("once")]
    assert status == 0 and line.split()[-2:] == [f"{one.value:+.3f}", "-"], err
    page = (tmp_path / "page.html").read_text()
    assert f'<td class="">{one.value:+.3f}</td><td>–</td>' in page and "-1.000 to +1.000" not in page


def test_difference_is_that_of_both_aps_on_the_same_images(data):
    _, dataset, rows, worse = data
    found = compare(dataset.annotations, {"a": rows, "b": worse}, resamples=200)
    first, second = found.models
    aps = [match(dataset.annotations, x).metrics["AP"] for x in (rows, worse)]
    assert second.difference.value == pytest.approx(aps[1] - aps[0], abs=1e-12) and second.difference.value < -0.01
    samples = [bootstrap_ap(match(dataset.annotations, x), 200).overall for x in (rows, worse)]
    assert second.difference.interval == interval(samples[1].minus(samples[0]))
    assert second.difference.interval.high < 0 and not second.difference.may_be_luck
    paired, *apart = (x.high - x.low for x in (second.difference.interval, first.ap, second.ap))
    assert paired < 0.7 * np.hypot(*apart)  # the same images are drawn for both

    # the errors are counted at the thresholds, and the image of which the second model knows nothing comes first
    for model, errors in zip(found.models, found.errors(), strict=True):
        objects, choice = model.matches.true_counts.sum(), model.at_thresholds
        right = choice.recall * objects
        assert errors.sum() == pytest.approx(objects - right + right / choice.precision - right, abs=1e-6)
    gallery = differing_images(found)
    counts = found.errors()
    spread = abs(counts[0] - counts[1])
    images = [figure.image for figure in gallery.figures]
    assert images[::2] == images[1::2] and list(spread[images[::2]]) == sorted(spread, reverse=True)[: len(images) // 2]
    assert [figure.caption.split(":")[0] for figure in gallery.figures[:2]] == ["a", "b"]
    assert sum(box.is_subject for box in gallery.figures[0].boxes) == counts[0, images[0]]
    text = format_comparison(found)
    assert f"{second.difference.value:+.3f}" in text and "class 2" in text and "may be luck" in text


def test_a_class_without_objects_has_no_difference(data, tmp_path):
    _, dataset, rows, worse = data
    coco = json.loads(dataset.annotation_file.read_text())
    coco["annotations"] = [row for row in coco["annotations"] if row["category_id"] != 20]
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    found = compare(tmp_path / "instances.json", {"a": rows, "b": worse}, resamples=20)
    assert [x is None for x in found.models[1].class_differences] == [False, True, False]
    assert found.models[1].difference is not None and "-" in format_comparison(found)
    with pytest.raises(ValueError, match="results has 1 model:"):
        compare(tmp_path / "instances.json", {"a": rows})


def test_command_compares_run_folders_and_files(runs, data, run, tmp_path):
    folder, dataset, rows, worse = data
    status, out, err = run(*runs, "--out", tmp_path / "new" / "page.html")
    assert status == 0, err
    aps = [match(dataset.annotations, x).metrics["AP"] for x in (rows, worse)]
    assert f"{aps[0]:.3f}" in out and f"{aps[1] - aps[0]:+.3f}" in out and str(runs[1]) in out
    page = (tmp_path / "new" / "page.html").read_text()
    assert "Loss in training" in page and "<td>0.2</td>" in page and ">out<" not in page
    assert "data:image/jpeg" in page and "default-src 'none'" in page
    (runs[1] / SKIPPED).write_text("[7]")  # an image that one run could not read is left out for both
    assert run(*runs, "--out", tmp_path / "page.html")[0] == 0 and "39 of" in (tmp_path / "page.html").read_text()
    (runs[1] / SKIPPED).write_text("[7")
    with pytest.raises(ValueError, match="best_skipped.json is no list of image ids"):
        read_runs(runs)
    (runs[1] / SKIPPED).unlink()
    (tmp_path / "b.json").write_text(json.dumps(worse))
    options = ["--val", dataset.annotation_file, "--val-images", dataset.images_dir]
    status, out, err = run(runs[0], runs[0], tmp_path / "b.json", *options, "--out", tmp_path / "three.html")
    assert status == 0 and "+0.000  +0.000 to +0.000" in out and f"{runs[0]} (2)" in out, err


def test_command_refuses_in_one_line(runs, data, run, tmp_path, monkeypatch):
    folder, dataset, rows, _ = data
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "wrong.json").write_text(json.dumps([{"image_id": 1}]))
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    (other / "run.json").write_text(json.dumps({"config": {"data": str(tmp_path / "nosuch"), "val_fraction": None}}))
    out = ["--out", tmp_path / "page.html"]
    for line, message in (
        ([runs[0]], "needs two run folders or result files, or more"),
        ([runs[0], tmp_path / "nosuch"], "no such file or folder"),
        ([runs[0], folder / "data"], f"data has no {DETECTIONS}"),
        ([runs[0], tmp_path / "rows.json"], "rows.json does not say which images were scored"),
        ([runs[0], tmp_path / "wrong.json"], "wrong.json is no file of detections"),
        ([runs[0], dataset.annotation_file, "--data", folder / "data"], "it holds one object"),
        ([runs[0], other], "were scored on different images"),
        ([other, other], "nosuch"),
        ([*runs, "--split", "test"], "it is a split of --data"),
        ([*runs, "--val-images", folder], "it goes with --val"),
        ([*runs, "--data", folder / "data", "--val", dataset.annotation_file], "leave --data out"),
        ([*runs, "--difficult-as-crowd"], "goes with --data"),
    ):
        status, _, err = run(*line, *out)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert "is a folder" in run(*runs, "--out", tmp_path)[2]
    assert "is there already; give --overwrite" in run(*runs, "--out", tmp_path / "rows.json")[2]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows and not out[1].exists()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(*runs, *out)[2] == "vovnet-zoo: a page needs a package: pip install 'jinja2>=3.1'\n"


def test_changed_annotations_are_told(runs, data, run, tmp_path):
    """Once in the terminal and once on the page; a run of an earlier version knows them from its thresholds only."""
    _, dataset, _, _ = data
    first, second = (shutil.copytree(path, tmp_path / path.name) for path in runs)
    about = json.loads((first / "run.json").read_text())
    scored = describe_annotations(dataset)
    (first / "run.json").write_text(json.dumps(about | {"data": {VALIDATED: scored}}))
    (second / "best").mkdir()
    for sha256, is_told in (("b" * 64, True), (dataset.annotations_sha256, False)):
        chosen = {"sha256": sha256, "images": 40, "file": "instances_val.json"}
        (second / "best" / "thresholds.json").write_text(json.dumps(chosen))
        status, out, err = run(first, second, "--out", tmp_path / "page.html", "--overwrite")
        told = (
            f"The annotations have changed: {first} scored on {shown(scored)}; {second} scored on 40 images of "
            f"instances_val.json (SHA-256 bbbbbbbb..). All models are scored here on {shown(scored)}."
        )
        assert status == 0 and out.count(f"\n! {told}\n") == is_told == ("! " in out), err
        assert (tmp_path / "page.html").read_text().count(told) == is_told


def test_runs_with_their_own_split(runs, data, run, tmp_path):
    """A run that keeps a share of the training images for scoring has these in its folder."""
    folder, dataset, rows, _ = data
    own = tmp_path / "own"
    shutil.copytree(runs[0], own)
    settings = {"data": str(folder / "data"), "val_fraction": 0.5, "seed": 0, "drop_empty_classes": True}
    (own / "run.json").write_text(json.dumps({"config": settings}))
    coco = json.loads(dataset.annotation_file.read_text())
    for key, name in (("images", "id"), ("annotations", "image_id")):
        coco[key] = [row for row in coco[key] if row[name] <= 20]
    for path, content in (
        (own / "split" / "val.json", coco),
        (own / DETECTIONS, [row for row in rows if row["image_id"] <= 20 and row["category_id"] != 20]),
        (own / "best" / "config.json", {"class_names": ["class 0", "class 2"]}),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    status, out, err = run(own, own, "--out", tmp_path / "page.html")
    assert status == 0 and "class 2" in out and "class 1" not in out, err
    assert "20 of" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("width", [1400, 400])
def test_page_works_in_a_browser(runs, data, browser, tmp_path, width):
    _, dataset, rows, worse = data
    found = read_runs(runs)
    comparison = compare(dataset.annotations, {name: x.results for name, x in found.items()}, resamples=20)
    write_comparison(tmp_path / "page.html", comparison, dataset, found, {"machine": "<b>one</b>"})
    open_page(browser, (tmp_path / "page.html").as_uri(), width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for colours in ("dark", "light"):
        set_colours(browser, colours)
        assert pale_texts(browser, besides=".open, .stage") == []

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    figures = all_of(".gallery figure")
    assert len(figures) == len(differing_images(comparison).figures) and len(all_of(".chart")) == 4
    assert all(len(chart.find_elements("css selector", "polyline")) == 2 for chart in all_of(".chart"))
    aps = [row.find_elements("css selector", "td")[0].text for row in all_of("#model-table tbody tr")]
    assert aps == [f"{model.matches.metrics['AP']:.3f}" for model in comparison.models]
    browser.execute_script("document.querySelectorAll('#model-table thead button')[1].click()")
    browser.execute_script("document.querySelectorAll('#model-table thead button')[1].click()")
    assert aps[::-1] == [row.find_elements("css selector", "td")[0].text for row in all_of("#model-table tbody tr")]
    browser.execute_script("document.querySelector('.open').click()")
    assert browser.find_element("id", "zoom").is_displayed()
    assert str(runs[0]) in browser.find_element("css selector", "dialog output").text
    assert browser.get_log("browser") == []


def test_settings_that_differ(runs):
    found = read_runs(runs)
    assert differing_settings(found) == {"lr": ["0.1", "0.2"]}
    first, second = (found[str(path)] for path in runs)
    assert len(first.log) == 11 and np.isclose(second.log[-1]["AP"], 1.6)  # the line that was cut is left out
