"""`vovnet-zoo predict` writes what it finds as it goes, in every format, and loses nothing of it."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_python
from PIL import Image
from samples import draw_video

from vovnet_zoo import FCOS, predict, predict_files, sources
from vovnet_zoo.results import category_ids_of
from vovnet_zoo.video import Video


def start(*options, **settings) -> subprocess.Popen:
    """Start the command in a process, which answers Ctrl-C whether or not the tests do."""
    settings.setdefault("preexec_fn", functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "vovnet_zoo.cli", "predict", *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, **pipes, **settings)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]


def draw_images(folder, *names, size=(64, 48)):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", size, "gray").save(folder / name)
    return folder


def test_every_format(detector_folder, tmp_path):
    """Of images, one of them from two folders, and of a video."""
    images = [draw_images(tmp_path / "a", "x.png") / "x.png", draw_images(tmp_path / "b", "x.png", size=(50, 70))]
    clip = draw_video(tmp_path / "clip.mp4", 12, size=(64, 48))
    out, model = tmp_path / "out", FCOS.from_pretrained(detector_folder)
    options = dict(score_threshold=0.5, max_detections=4, flip=True)
    bad = predict_files.predict_files(
        model, [*images, clip], out, pictures="png", crops=True, labels=True, coco=tmp_path / "coco.json", **options
    )
    assert bad == 0
    found = predict(model, [*images, clip], **options)
    rows, coco = lines(out), json.loads((tmp_path / "coco.json").read_text())
    names = ["x", "x_2", *(f"clip/{i:06d}" for i in range(12))]
    pictures = ["x.png", "x_2.png", *["clip.mp4"] * 12]
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    assert len(found) == len(rows) == 14 and sum(len(x["boxes"]) for x in found) == len(coco) > 20
    for i, (row, wanted, name) in enumerate(zip(rows, found, names, strict=True)):
        assert (row["image"], row["picture"], row["image_id"]) == (wanted.source, pictures[i], i + 1)
        assert np.allclose(row["boxes"], wanted["boxes"]) and row["names"] == wanted.names
        mine = [x for x in coco if x["image_id"] == i + 1]
        assert [x["category_id"] - 1 for x in mine] == row["labels"] and np.allclose(
            [x["score"] for x in mine], row["scores"]
        )
        labels = np.loadtxt(out / "labels" / f"{name}.txt", ndmin=2)
        height, width = wanted.size
        x, y, w, h = (labels[:, 1:] * [width, height, width, height]).T
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        assert labels[:, 0].tolist() == row["labels"] and np.abs(boxes - row["boxes"]).max() < 1e-3
        for k, (box, label) in enumerate(zip(row["boxes"], row["names"], strict=True)):
            crop = Image.open(out / "crops" / label / f"{name}_{k}.png")
            assert abs(crop.width - (box[2] - box[0])) <= 2 and abs(crop.height - (box[3] - box[1])) <= 2
    assert sum(1 for _ in out.glob("crops/**/*.png")) == len(coco)
    drawn = list(Video(str(out / "clip.mp4")).read())
    assert len(drawn) == 12 and drawn[0].shape == (288, 384, 3)  # enlarged, so that labels can be read
    assert [row.get("seconds") for row in rows] == [None, None, *(pytest.approx(i / 10) for i in range(12))]
    plain = next(Video(str(clip)).read()).repeat(6, 0).repeat(6, 1).astype(int)
    assert np.abs(drawn[0] - plain).max() > 100 and (out / "x_2.png").is_file()


def test_folders_below_a_folder_stay(detector_folder, tmp_path, capsys):
    """So that the labels of all images are where YOLO looks for them; where they cannot be, that is said."""
    draw_images(tmp_path / "in", "x.png", "y.a.png", "x.bmp")
    draw_images(tmp_path / "in" / "cam 2", "x.png")
    model, out = FCOS.from_pretrained(detector_folder), tmp_path / "out"
    options = dict(labels=True, crops=True, recursive=True)
    assert predict_files.predict_files(model, [tmp_path / "in"], out, **options) == 0
    names = ["cam 2/x", "x", "x_2", "y.a"]
    labels = sorted(str(x.relative_to(out / "labels")) for x in (out / "labels").rglob("*.txt"))
    assert labels == [f"{name}.txt" for name in names]
    assert [row["picture"] for row in lines(out)] == [f"{name}.jpg" for name in names]
    assert all((out / f"{name}.jpg").is_file() for name in names) and (out / "crops" / "cat" / "cam 2").is_dir()
    error = capsys.readouterr().err
    assert "1 label file has another name" in error and "labels/x_2.txt is for" in error and "x.png" in error


def test_results_stay_in_their_folder(detector_folder, tmp_path, monkeypatch):
    """Also of images beside the folder that is looked at; and frames do not replace what a folder of their name has."""
    draw_images(tmp_path / "here", "x.png"), draw_images(tmp_path / "other", "y.png")
    monkeypatch.chdir(tmp_path / "here")
    model = FCOS.from_pretrained(detector_folder)
    images = [".", "../other/y.png", "../here/../other/y.png"]
    assert predict_files.predict_files(model, images, Path("out"), labels=True, recursive=True) == 0
    assert sorted(x.name for x in (tmp_path / "other").iterdir()) == ["y.png"]
    assert sorted(str(x.relative_to("out/labels")) for x in Path("out/labels").rglob("*.txt")) == [
        *("x.txt", "y.txt", "y_2.txt")
    ]
    draw_images(tmp_path / "here" / "clip", "000001.png")
    clip = draw_video(tmp_path / "here" / "clip.mp4", 3)
    with pytest.raises(ValueError, match="clip.mp4: the results of its frames and of the images in the folder clip"):
        predict_files.predict_files(model, [".", clip], Path("out2"), labels=True, recursive=True)


def test_an_image_is_decoded_once(detector_folder, tmp_path, monkeypatch):
    """For the network and for its picture and crops; twice where its pixels are too many to be kept."""
    names, decoded, read_image = ["a.png", "b.png", "c.png"], [], sources.read_image
    folder, model = draw_images(tmp_path / "in", *names), FCOS.from_pretrained(detector_folder)
    monkeypatch.setattr(sources, "read_image", lambda path: decoded.append(path.name) or read_image(path))
    for room, times in ((1 << 20, 1), (0, 2)):
        monkeypatch.setattr(predict_files, "KEPT_BYTES", room)
        predict_files.predict_files(model, [folder], tmp_path / f"{times}", pictures="png", crops=True)
        assert sorted(decoded) == sorted(times * names)
        decoded.clear()
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_ids(detector_folder, tmp_path):
    """Images whose names are numbers keep them, as COCO's do; COCO's classes have COCO's ids."""
    images = draw_images(tmp_path / "images", "000000000139.jpg", "000000000285.jpg")
    model = FCOS.from_pretrained(detector_folder)
    assert predict_files.predict_files(model, [images], tmp_path / "a", pictures="none", coco=tmp_path / "a.json") == 0
    assert {row["image_id"] for row in json.loads((tmp_path / "a.json").read_text())} == {139, 285}
    assert [row["image_id"] for row in lines(tmp_path / "a")] == [139, 285]
    assert (
        predict_files.image_ids(["a/1.jpg", "b/1.jpg"]) is None and predict_files.image_ids(["1.jpg", "a.jpg"]) is None
    )


def test_category_ids(detector_folder, tmp_path):
    """They are the dataset's, so that `eval_coco` and `compare` read the rows; COCO's classes have COCO's ids."""
    from vovnet_zoo.detectors import coco_class_names

    for names in coco_class_names(), tuple(coco_class_names()):
        ids = category_ids_of({"class_names": names, "num_classes": 80})
        assert (ids[0], ids[11], ids[79], len(ids)) == (1, 13, 90, 80)
    for names in ["cat", "dog"], None:
        assert category_ids_of({"class_names": names, "num_classes": 2, "category_ids": None}) == [1, 2]
    images = draw_images(tmp_path / "images", "1.jpg", "2.jpg")
    model, coco = FCOS.from_pretrained(detector_folder, category_ids=[7, 0]), tmp_path / "not" / "yet" / "there.json"
    predict_files.predict_files(model, [images], tmp_path / "out", pictures="none", coco=coco, score_threshold=0.0)
    wanted = [[7, 0][label] for line in lines(tmp_path / "out") for label in line["labels"]]
    assert [row["category_id"] for row in json.loads(coco.read_text())] == wanted and len(wanted) > 4


@pytest.mark.parametrize("options, least", [({}, 0.0), ({"tiles": 64}, 0.3), ({"flip": True}, 0.0)])
def test_what_scores_less_is_not_joined_over_windows(detector_folder, tmp_path, monkeypatch, options, least):
    """Else `--tiles` would give larger boxes than `predict`. Other options do not change what scores more."""
    seen = []

    def counted(*arguments, **options):
        seen.append(options["score_threshold"])
        return predict(*arguments, **options)

    monkeypatch.setattr(predict_files, "predict", counted)
    images = draw_images(tmp_path / "images", "1.png", size=(90, 70))
    model = FCOS.from_pretrained(detector_folder)
    predict_files.predict_files(model, [images], tmp_path / "out", pictures="none", score_threshold=0.3, **options)
    assert seen == [least]


def test_a_name_of_a_file_that_is_not_utf8(detector_folder, tmp_path, run):
    image = draw_images(tmp_path / "in", "x.png") / "x.png"
    try:
        image = image.rename(image.with_name(os.fsdecode(b"f\xfcr.png")))
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    status, _, err = run("predict", image, "--model", detector_folder, "--out", tmp_path / "out", "--score", "0.01")
    assert status == 0, err
    (row,) = lines(tmp_path / "out")
    assert row["image"] == str(image) and (tmp_path / "out" / row["picture"]).is_file()


def test_names_of_classes_that_are_no_names_of_folders():
    names = ["a/b", "A:b", "..", "собака", "犬", "", "x" * 300, "Con", "aux.x", "console"]
    expected = ["a_b", "A_b_2", "_", "собака", "犬", "__2", "x" * 100, "_Con", "_aux.x", "console"]
    assert predict_files.folder_names(names) == expected
    assert (
        predict_files.stem_of("https://x.org/a:b?c=d") == "a_b" and predict_files.stem_of("https://x.org/") == "image"
    )


@pytest.mark.parametrize("target", ["crops", "labels/clip", "clip.mp4", "coco.json", "classes.txt", "labels/x.txt"])
def test_nothing_is_written_over(detector_folder, tmp_path, target):
    """Old crops and labels never stay among new ones, and other files are replaced only with overwrite."""
    image = draw_images(tmp_path / "in", "x.png")
    clip = draw_video(tmp_path / "in" / "clip.mp4", 2)
    file = tmp_path / "out" / target / "old" if target in ("crops", "labels/clip") else tmp_path / "out" / target
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    model = FCOS.from_pretrained(detector_folder)
    options = dict(crops=True, labels=True, coco=tmp_path / "out" / "coco.json")
    for overwrite in (False, True):
        if overwrite and file.name != "old":
            continue
        with pytest.raises(ValueError, match="is there already|is not empty"):
            predict_files.predict_files(model, [image, clip], tmp_path / "out", overwrite=overwrite, **options)
        assert file.read_text() == "mine" and not (tmp_path / "out" / "detections.jsonl").exists()
    with pytest.raises(ValueError, match="other results are written there"):
        wrong = dict(options, coco=tmp_path / "new" / "detections.jsonl")
        predict_files.predict_files(model, [image], tmp_path / "new", **wrong)


def test_interrupted(detector_folder, tmp_path):
    """By a real Ctrl-C in the middle of a video: all files are whole, and nothing found is lost."""
    clip = draw_video(tmp_path / "clip.mp4", 3000, size=(64, 48))
    out = tmp_path / "out"
    process = start(clip, "--model", detector_folder, "--out", out, "--coco", tmp_path / "coco.json", "--labels")
    end = time.monotonic() + 120
    while not (out / "detections.jsonl").exists() or (out / "detections.jsonl").read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; what was found until now is in" in errors
    assert "Traceback" not in errors
    rows, coco = lines(out), json.loads((tmp_path / "coco.json").read_text())
    assert 20 <= len(rows) < 3000 and f"{len(rows)} images and frames of 1 source," in printed
    assert len(re.findall(r": (?:1 detection|\d+ detections)\n", printed)) in (len(rows), len(rows) - 1)
    written = {row["image_id"] for row in coco}
    assert set(range(1, len(rows) + 1)) <= written <= set(range(1, len(rows) + 2))
    frames = len(list(Video(str(out / "clip.mp4")).read()))
    assert len(rows) <= frames <= len(rows) + 1 and len(list(out.glob("labels/clip/*.txt"))) >= len(rows)


def test_a_lost_interrupt(detector_folder, tmp_path, monkeypatch):
    """Python loses an interrupt that comes while a library in C calls back; it counts at the next image."""
    real = predict_files.predict

    def losing(*arguments, **options):
        for number, found in enumerate(real(*arguments, **options)):
            if number == 2:
                with contextlib.suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
            yield found

    monkeypatch.setattr(predict_files, "predict", losing)
    folder = draw_images(tmp_path / "in", *(f"{i}.png" for i in range(6)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            predict_files.predict_files(FCOS.from_pretrained(detector_folder), [folder], tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(lines(tmp_path / "out")) == 2


def test_a_full_disk(detector_folder, tmp_path):
    """A limit on the size of files stands for it; the lines and rows that fitted are whole."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    clip = draw_video(tmp_path / "clip.mp4", 200, size=(64, 48))
    limit = 60_000
    options = ["--model", detector_folder, "--save-pictures", "none", "--coco", tmp_path / "coco.json"]
    process = start(
        clip, "--out", tmp_path / "out", *options,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "File too large" in errors and "Traceback" not in errors
    assert "coco.json" in errors or "detections.jsonl" in errors
    rows = lines(tmp_path / "out")
    ids = {row["image_id"] for row in json.loads((tmp_path / "coco.json").read_text())}
    assert 0 < len(rows) < 200 and set(range(1, len(rows) + 1)) <= ids <= set(range(1, len(rows) + 2))


@pytest.mark.parametrize("options", [["--out", "/proc/here"], ["--out", "OUT", "--coco", "/proc/coco.json"]], ids=str)
def test_a_place_that_cannot_be_written(run, detector_folder, tmp_path, options):  # noqa: F811
    """Nobody, root neither, can write there; it is one line."""
    if not Path("/proc/self").exists():
        pytest.skip("Linux has /proc")
    image = draw_images(tmp_path / "in", "x.png")
    places = (str(x).replace("OUT", str(tmp_path / "out")) for x in options)
    status, _, errors = run("predict", image, "--model", detector_folder, *places)
    assert status == 2 and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert errors.startswith(f"vovnet-zoo: {' '.join(options[-2:])} cannot be written (/proc: ")


def test_refused_options_leave_no_file(run, detector_folder, tmp_path):  # noqa: F811
    """The corrected command would be refused else, since its results were there already."""
    image = draw_images(tmp_path / "in", "x.png")
    out = tmp_path / "out"
    command = ["predict", image, "--model", detector_folder, "--out", out, "--scales"]
    status, _, errors = run(*command, "1", "1")
    assert status == 2 and "give different numbers" in errors and len(errors.splitlines()) == 1 and not out.exists()
    assert run(*command, "1")[0] == 0 and (out / "detections.jsonl").exists()


MEMORY = """
import sys
from pathlib import Path
from vovnet_zoo import FCOS, predict_files
def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024  # MiB
def run(images, out, **options):
    return predict_files.predict_files(model, [images], Path(out), labels=True, **options)
model = FCOS.from_pretrained(sys.argv[1])
run(Path(sys.argv[2]), sys.argv[4] + "/small", **OPTIONS)
before = peak()
bad = run(Path(sys.argv[3]), sys.argv[4] + "/large", **OPTIONS)
print("grown", peak() - before, "bad", bad)
"""


def grown(options: str, *arguments) -> tuple[float, int]:
    """Measure in a process how many MiB the peak of memory grows from a short to a long source."""
    code = f"import sys; sys.argv = {['-c', *map(str, arguments)]!r}\n" + MEMORY.replace("**OPTIONS", options)
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    _, mib, _, bad = result.stdout.splitlines()[-1].split()
    return float(mib), int(bad)


@pytest.mark.slow
def test_a_folder_of_1000(detector_folder, tmp_path):
    """Three of them are bad; 1,000 images of 0.75 MiB are not kept in memory."""
    few, many = draw_images(tmp_path / "few", "a.jpg", size=(512, 512)), tmp_path / "many"
    many.mkdir()
    for i in range(20):
        os.link(few / "a.jpg", few / f"{i}.jpg")
    for i in range(1000):
        os.link(few / "a.jpg", many / f"{i:04d}.jpg")
    for i in (0, 500, 999):
        (many / f"{i:04d}.jpg").unlink()
        (many / f"{i:04d}.jpg").write_bytes(b"bad")
    mib, bad = grown("batch_size=8, pictures='none', max_detections=5", detector_folder, few, many, tmp_path)
    rows = lines(tmp_path / "large")
    assert bad == 3 and len(rows) == 997 and len(list((tmp_path / "large" / "labels").iterdir())) == 997
    assert [row["image"] for row in rows] == [str(many / f"{i:04d}.jpg") for i in range(1000) if i not in (0, 500, 999)]
    assert mib < 60


@pytest.mark.slow
def test_a_video_of_300_frames(detector_folder, tmp_path):
    """With a video of the pictures; 300 frames of 0.9 MiB are not kept in memory."""
    few = draw_video(tmp_path / "few.mp4", 40, size=(640, 480))
    many = draw_video(tmp_path / "many.mp4", 300, size=(640, 480))
    mib, bad = grown("batch_size=4, max_detections=5", detector_folder, few, many, tmp_path)
    assert bad == 0 and len(lines(tmp_path / "large")) == 300
    assert len(list(Video(str(tmp_path / "large" / "many.mp4")).read())) == 300
    assert mib < 80


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("photo.jpg", "photo.png")]


@pytest.mark.parametrize("name", ["panorama.png", *SLOW])
def test_large_images_in_tiles(detector_folder, tmp_path, name):
    """A panorama of 20,000 x 400 pixels and a photo of 100 megapixels, with their pictures, in less than 2 GiB."""
    size = (20_000, 400) if name == "panorama.png" else (12_500, 8000)
    Image.effect_noise((500, 400), 80).convert("RGB").resize(size).save(tmp_path / name, compress_level=1)
    code = f"""
import sys
from vovnet_zoo import cli
sys.argv = ["vovnet-zoo", "predict", {str(tmp_path / name)!r}, "--model", {str(detector_folder)!r}, "--out",
    {str(tmp_path / "out")!r}, "--tiles", "1000", "--batch-size", "4", "--max-detections", "5"]
try:
    cli.main()
finally:
    print("MiB", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024)
"""
    result = run_python(code)
    assert result.returncode == 0 and not result.stderr, result.stderr
    (row,) = lines(tmp_path / "out")
    boxes = np.array(row["boxes"])
    assert len(boxes) > 20 and boxes[:, 2].max() > 0.9 * size[0] and boxes[:, 3].max() > 0.9 * size[1]
    assert float(result.stdout.split()[-1]) < 2048
