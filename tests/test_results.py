"""The detections of one image: a dict that also knows names, draws itself, and turns into rows for COCO."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet_zoo import ImageDetections, predict
from vovnet_zoo.evaluation import to_coco_results


def found_in(path, **options):
    tensors = {
        "boxes": torch.tensor([[2.0, 3, 22, 33], [30, 10, 50, 20]]),
        "scores": torch.tensor([0.9, 0.2]),
        "labels": torch.tensor([1, 0]),
    }
    return ImageDetections(tensors, **{"source": str(path), "size": (40, 60), "class_names": ["cat", "dog"], **options})


def test_it_is_a_dict_with_facts(tiny_detector, tmp_path):
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "a.png")
    (found,) = predict(tiny_detector, tmp_path / "a.png")
    assert isinstance(found, dict) and list(found) == ["boxes", "scores", "labels"]
    assert found.source == str(tmp_path / "a.png") and found.size == (40, 60) and found.class_names == ["cat", "dog"]
    assert repr(found) == f"ImageDetections({tmp_path / 'a.png'}, 60 x 40 px, 0 boxes)"
    assert repr(found_in("a")) == "ImageDetections(a, 60 x 40 px, 2 boxes: dog 0.90, cat 0.20)"
    many = found_in("a")
    many.update({key: torch.cat([value, value]) for key, value in many.items()})
    assert repr(many) == "ImageDetections(a, 60 x 40 px, 4 boxes: dog 0.90, cat 0.20, dog 0.90, ..)"
    del many["scores"]
    assert repr(many).startswith("{'boxes': tensor(")
    for other in (copy.deepcopy(found_in("a")), pickle.loads(pickle.dumps(found_in("a")))):
        assert other.names == ["dog", "cat"] and torch.equal(other["boxes"], found_in("a")["boxes"])
    assert found_in("a", class_names=None).names == ["1", "0"]


def test_draw(tmp_path):
    """The detection above the display default is drawn, the other is not; the image comes from the file or the call."""
    Image.new("RGB", (60, 40), "black").save(tmp_path / "a.png")
    drawn = np.asarray(found_in(tmp_path / "a.png").draw(enlarge=1))
    assert drawn[33, 5:20].any(-1).all() and not drawn[20, 30:51].any()
    assert np.asarray(found_in(tmp_path / "a.png").draw(score_threshold=0.1, enlarge=1))[20, 30:51].any(-1).all()
    given = found_in("image 0").draw(np.zeros((40, 60, 3), np.uint8), enlarge=1)
    assert np.array_equal(np.asarray(given), drawn)
    with pytest.raises(ValueError, match="image 0 is no file .* draw"):
        found_in("image 0").draw()
    with pytest.raises(ValueError, match=r"an image of \(40, 60\) \(height, width\), not \(60, 40\)"):
        found_in("image 0").draw(np.zeros((60, 40, 3), np.uint8))


def test_what_a_notebook_shows(tmp_path):
    """It shows the picture of `draw`, not larger than a screen; where there is no file, the text."""
    for size in ((60, 40), (1500, 1200)):
        Image.new("RGB", size, "black").save(tmp_path / "a.png")
        found = found_in(tmp_path / "a.png", size=size[::-1])
        picture, wanted = Image.open(io.BytesIO(found._repr_png_())), found.draw()
        wanted.thumbnail((1000, 1000))
        assert np.array_equal(np.asarray(picture), np.asarray(wanted)) and max(picture.size) in (360, 1000)
    assert found_in("image 0")._repr_png_() is None


def test_draw_shows_what_a_chosen_threshold_lets_through(tiny_detector):
    """Without a threshold of the caller or of the config, a picture shows scores of 0.3 or more."""
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    chosen = [{"score_threshold": 0.01}, {"score_threshold": {"cat": 0.01}}, {"score_threshold": 0.01, "flip": True}]
    for options, least in [({}, 0.3), ({"score_threshold": 0}, 0.3), *((options, 0) for options in chosen)]:
        assert predict(tiny_detector, image, **options)[0].display_score == least
    config = tiny_detector.config
    config["thresholds"] = {"cat": 0.2}
    try:
        assert predict(tiny_detector, image)[0].display_score == 0
    finally:
        config["thresholds"] = None
    found = found_in("image 0", display_score=0)
    assert np.asarray(found.draw(np.zeros((40, 60, 3), np.uint8), enlarge=1))[20, 30:51].any(-1).all()


def test_to_coco():
    for plus_one in (False, True):
        found = found_in("a", plus_one=plus_one)
        rows = found.to_coco(7, [11, 12])
        assert rows == to_coco_results([found], [7], [11, 12], plus_one)
        assert rows[0]["bbox"] == [2, 3, 20 + plus_one, 30 + plus_one] and rows[0]["category_id"] == 12


def test_what_supervision_reads():
    """`supervision.Detections.from_transformers` reads these keys and calls these methods."""
    found = found_in("a")
    theirs = SimpleNamespace(
        xyxy=found["boxes"].cpu().detach().numpy(),
        confidence=found["scores"].cpu().detach().numpy(),
        class_id=found["labels"].cpu().detach().numpy().astype(int),
        names=[found.id2label[label] for label in found["labels"].tolist()],
    )
    assert theirs.xyxy.shape == (2, 4) and theirs.confidence.shape == theirs.class_id.shape == (2,)
    assert theirs.names == ["dog", "cat"]
