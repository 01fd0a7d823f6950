"""The report is one page that needs no network, and works in a browser; eval_coco.py and a training run write it."""

import json
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import layouts
import numpy as np
import pytest
from browsing import open_page, pale_texts, set_colours
from launch import train_here
from PIL import Image
from simulated import write_data

import eval_coco
import reporting
import train_coco
from vovnet_zoo import FCOS, create_detector
from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.evaluation import coco_metrics
from vovnet_zoo.evaluation.analysis import analyse
from vovnet_zoo.evaluation.compare import compare
from vovnet_zoo.evaluation.compare_page import write_comparison
from vovnet_zoo.evaluation.report import write_report
from vovnet_zoo.evaluation.runs import DETECTIONS
from vovnet_zoo.evaluation.thresholds import at_thresholds, class_thresholds
from vovnet_zoo.inference import choose_thresholds


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page, and the analysis that it shows."""
    folder = tmp_path_factory.mktemp("page")
    dataset, rows = write_data(folder / "data", images=40, seed=8)
    analysis = analyse(dataset.annotation_file, rows, resamples=50)
    log = [{"step": i, "loss": 1 / (i + 1)} for i in range(300)] + [{"step": i, "AP": i / 300} for i in (100, 200)]
    facts, commands = {"machine": "<b>one</b>"}, [("Detect:", "vovnet-zoo predict photos")]
    path = folder / "report.html"
    write_report(
        path, analysis, dataset, title="a <model>", train_set=dataset, rows=log, facts=facts, commands=commands
    )
    return path, analysis


def test_page_is_whole_and_needs_no_network(page):
    path, analysis = page
    text = path.read_text()
    assert "a &lt;model&gt;" in text and "<b>one</b>" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and not re.search(r"url\(|@import|fetch\(", text)
    assert "default-src 'none'" in text
    for title in (
        "Classes",
        "Worst misses",
        "Worst false detections",
        "Probable label errors",
        "How to go on",
        "Losses",
    ):
        assert title in text
    assert f"{analysis.metrics['AP']:.3f}" in text and f"{analysis.at_thresholds.f1:.3f}" in text
    assert text.count("data:image/jpeg") > 10


def test_page_of_500_large_images_is_small_and_quick(tmp_path):
    dataset, rows = write_data(tmp_path, images=500, noise=True)  # noise is what JPEG compresses worst
    start = time.process_time()
    write_report(tmp_path / "report.html", analyse(dataset.annotation_file, rows), dataset, title="large")
    assert time.process_time() - start < 20
    assert 1_000_000 < (tmp_path / "report.html").stat().st_size < 8_000_000


def test_page_without_images_and_without_results(tmp_path):
    dataset, rows = write_data(tmp_path, images=6)
    shutil.rmtree(tmp_path / "val")
    for found in (rows, []):
        write_report(
            tmp_path / "report.html", analyse(dataset.annotation_file, found, resamples=5), dataset, title="none"
        )
        text = (tmp_path / "report.html").read_text()
        assert "data:image/jpeg" not in text and "Worst misses" in text


def test_a_table_of_hugging_face_has_the_photos_of_its_files(tmp_path):
    pytest.importorskip("datasets")
    counts = []
    for make in (layouts.usual, layouts.hf_parquet):
        make(tmp_path / make.__name__)
        dataset = CocoDataset(*find_split(tmp_path / make.__name__, "val"))
        analysis = analyse(dataset.annotations, [], resamples=5)
        first = compare(dataset.annotations, {"a": [], "b": seen(dataset)}, resamples=5)
        write_report(tmp_path / "report.html", analysis, dataset, title="all missed")
        write_comparison(tmp_path / "compare.html", first, dataset, {}, {})
        pages = [(tmp_path / name).read_text() for name in ("report.html", "compare.html")]
        counts.append([page.count("data:image/jpeg") for page in pages])
    assert counts[0] == counts[1] and min(counts[0]) >= 3


def seen(dataset):
    """Make a detection of each object."""
    rows = []
    for i, label, (x1, y1, x2, y2) in zip(*(x.tolist() for x in dataset.all_boxes()), strict=True):
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.9}
        rows.append({"image_id": int(dataset.image_ids[i]), "category_id": dataset.category_ids[label], **box})
    return rows


@pytest.mark.parametrize("width", [1400, 400])
def test_page_works_in_a_browser(page, browser, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    path, analysis = page
    open_page(browser, path.as_uri(), width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
    for colours in ("dark", "light"):
        set_colours(browser, colours)
        assert pale_texts(browser, besides=".open, .stage") == []

    def all_of(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    # A filter shows the rows, lines and figures of one class.
    figures = all_of(".gallery figure")
    Select(browser.find_element(By.ID, "class")).select_by_visible_text("class 1")
    assert [row.is_displayed() for row in all_of("#class-table tbody tr")] == [False, True, False]
    shown = [figure.is_displayed() for figure in figures]
    assert shown == ["1" in figure.get_attribute("data-classes").split() for figure in figures]
    assert 0 < sum(shown) < len(shown)
    Select(browser.find_element(By.ID, "class")).select_by_index(0)
    assert all(figure.is_displayed() for figure in figures)

    # The title of a column sorts the table, by the keyboard too.
    def column(number):
        return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in all_of("#class-table tbody tr")]

    title = all_of("#class-table thead button")[2]
    title.click()
    first = column(2)
    assert first == sorted(first, reverse=True) and len(set(first)) == 3
    title.send_keys(Keys.ENTER)
    assert column(2) == first[::-1]

    # A picture opens by the keyboard, grows, gives way to the next one, and closes.
    def view():
        return [
            float(x) for x in browser.find_element(By.CSS_SELECTOR, ".stage svg").get_dom_attribute("viewBox").split()
        ]

    opener = all_of(".open")[0]
    opener.send_keys(Keys.ENTER)
    dialog = browser.find_element(By.ID, "zoom")
    assert dialog.is_displayed() and view() == [0, 0, 200, 200]
    active = browser.switch_to.active_element
    active.send_keys("+")
    assert view() == pytest.approx([20, 20, 160, 160])
    active.send_keys(Keys.ARROW_RIGHT)
    assert view() == pytest.approx([36, 20, 160, 160])
    before = browser.find_element(By.CSS_SELECTOR, "dialog output").text
    active.send_keys("n")
    assert browser.find_element(By.CSS_SELECTOR, "dialog output").text != before and view() == [0, 0, 200, 200]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert "open" in browser.switch_to.active_element.get_attribute("class")
    assert browser.get_log("browser") == []

    # The confusion matrix adds up to the objects.
    rows = [
        [int(x.text or 0) for x in row.find_elements(By.TAG_NAME, "td")] for row in all_of("#confusion-table tbody tr")
    ]
    assert sum(map(sum, rows[:-1])) == analysis.matches.true_counts.sum()


def test_photos_are_drawn(page, browser):
    open_page(browser, page[0].as_uri(), 1000)
    browser.execute_script("document.querySelector('.open').click()")
    name = browser.find_element("css selector", "dialog output").text.split(", ")[-1]
    grey = int(name.removesuffix(".png"))  # the image has one grey, its number
    browser.save_screenshot(str(page[0].with_name("shot.png")))
    pixels = np.asarray(Image.open(page[0].with_name("shot.png")).convert("RGB")).astype(int)
    assert (abs(pixels - grey).max(axis=2) <= 2).mean() > 0.2


# ---- the recipes that write it


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A saved model, a dataset, and an evaluation that finds the simulated rows."""
    dataset, rows = write_data(tmp_path / "data", images=30, seed=9)
    options = dict(channels=64, num_convs=0, class_names=dataset.class_names, min_size=64, max_size=96)
    create_detector("fcos", backbone="test_resnet", num_classes=3, **options).save_pretrained(tmp_path / "model")
    metrics = {"AP": 0.5}
    monkeypatch.setattr(eval_coco, "score_dataset", lambda *args, **kwargs: (rows, metrics))
    config = eval_coco.EvalConfig(model=str(tmp_path / "model"), data=tmp_path / "data", device="cpu")
    return config, dataset, rows


def test_eval_coco_stores_thresholds_and_writes_a_report(saved, tmp_path):
    config, dataset, rows = saved
    eval_coco.main(replace(config, save_thresholds=True, report=tmp_path / "new" / "report.html"))
    analysis = analyse(dataset.annotation_file, rows, resamples=1)
    model = FCOS.from_pretrained(tmp_path / "model")
    assert model.config["thresholds"] == class_thresholds(analysis.matches) and len(model.config["thresholds"]) == 3
    least = choose_thresholds(model, {}).score_threshold  # what predict uses
    assert least.tolist() == pytest.approx(list(model.config["thresholds"][name] for name in dataset.class_names))
    about = json.loads((tmp_path / "model" / "thresholds.json").read_text())
    assert about["file"] == "instances_val.json" and about["images"] == 30
    assert about["f1"] == at_thresholds(analysis.matches, model.config["thresholds"]).f1
    page = (tmp_path / "new" / "report.html").read_text()
    assert f"{about['f1']:.3f}" in page and "trained on" in page and "vovnet-zoo predict" in page


def test_eval_coco_scores_detections_of_any_detector(saved, tmp_path, capsys):
    """A file of detections has the scores and the page of the model that found them, but no commands to go on with."""
    config, dataset, rows = saved
    file = tmp_path / "found.json"
    file.write_text(json.dumps(rows))
    config = replace(config, model="", results=file, device=None)
    metrics = eval_coco.main(replace(config, report=tmp_path / "report.html"))
    assert metrics == coco_metrics(dataset.annotation_file, rows) and f"{metrics['AP']:.3f}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert f"{metrics['AP']:.3f}" in page and "found.json" in page and "vovnet-zoo predict" not in page
    assert eval_coco.main(replace(config, data=None, val=dataset.annotation_file)) == metrics
    for wrong, message in [
        (dict(model="x"), "--model, or a file of its detections as --results, and not both"),
        (dict(results=None), "give a detector as --model, or a file of its detections as --results$"),
        (
            dict(tiles=64, out=tmp_path / "x.json"),
            "found.json: its detections are there already; leave out --out, --tiles",
        ),
        (dict(results=dataset.annotation_file), "is no file of detections"),
        (dict(results=tmp_path / "nosuch.json"), "no such file or folder: .*nosuch.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            eval_coco.main(replace(config, **wrong))


def test_eval_coco_refuses_what_cannot_be_written(saved, tmp_path, monkeypatch):
    config, dataset, _ = saved
    with pytest.raises(ValueError, match="--report .* is a folder; give the name of a file, such as .*report.html"):
        eval_coco.main(replace(config, report=tmp_path))
    with pytest.raises(ValueError, match="org/name is no folder of a saved model"):
        eval_coco.main(replace(config, model="org/name", save_thresholds=True))
    for other in (dict(size=80), dict(tiles=64), dict(flip=True), dict(scales=(1.0, 1.5))):
        with pytest.raises(ValueError, match="leave out --size"):
            eval_coco.main(replace(config, save_thresholds=True, **other))
    before = (tmp_path / "model" / "config.json").read_bytes()
    monkeypatch.setattr(eval_coco, "score_dataset", lambda *args, **kwargs: ([], {"AP": 0.0}))
    with pytest.raises(ValueError, match="instances_val.json: no detection is right"):
        eval_coco.main(replace(config, save_thresholds=True))
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match="pip install 'hotcoco"):
        eval_coco.main(replace(config, report=tmp_path / "report.html"))


def test_a_run_ends_with_a_report_of_its_best_model(tiny_coco, tmp_path, monkeypatch, capsys):
    scored = iter([0.4, 0.3])

    def score(model, dataset, *args, **kwargs):
        """Results that are right with a threshold, the first ones better than the second."""
        ap = next(scored)
        rows = [
            {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": ap}
            for row in json.loads(dataset.annotation_file.read_text())["annotations"]
        ]
        return rows, {"AP": ap, "AP50": ap, "AP75": ap, "per_class": {}}

    monkeypatch.setattr(train_coco, "score_dataset", score)
    out = tmp_path / "run"
    train_here(tiny_coco, out, "--steps 4 --eval-every 2 --workers 0")
    assert {row["score"] for row in json.loads((out / DETECTIONS).read_text())} == {0.4}  # of the best
    assert FCOS.from_pretrained(out / "best").config["thresholds"] == {
        "red": pytest.approx(0.2),
        "green": pytest.approx(0.2),
    }
    assert FCOS.from_pretrained(out / "last").config["thresholds"] is None
    text = (out / "report.html").read_text()
    assert "Losses of the run" in text and str(out / "best") in text

    # An error in the report does not harm a run that is complete.
    shutil.rmtree(out)
    scored = iter([0.4, 0.3])
    monkeypatch.setattr(reporting, "write_page", None)
    train_here(tiny_coco, out, "--steps 4 --eval-every 2 --workers 0")
    assert "its report could not be written" in capsys.readouterr().err and Path(out / "best" / "config.json").is_file()


@pytest.mark.parametrize("write", [layouts.usual, layouts.yolo, layouts.voc])
def test_the_train_split_beside_what_was_scored(tmp_path, write):
    """It is not opened twice where it was scored itself."""
    write(tmp_path)
    train, val = (CocoDataset(*find_split(tmp_path, word)) for word in ("train", "val"))
    assert reporting.find_train_set(tmp_path, train) is None
    found = reporting.find_train_set(tmp_path, val)
    assert found is not None and found.file_names.tolist() == train.file_names.tolist()
