"""Type checkers see what users of the library pass and get; `mypy` on the package itself is a step of `.ci/run`."""

import subprocess
import sys
from pathlib import Path

import pytest
import user_script

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = [
    'vovnet_zoo.predict(model, "x.jpg", score_treshold=0.5)',
    "vovnet_zoo.postprocess(model(images), [(64, 64)], nms_treshold=0.5)",
    "vovnet_zoo.compile_detector(model, (64, 64), score_threshold='high')",
    'vovnet_zoo.create_detector("fcos_vovnet39_fpn", chanels=64)',
    'vovnet_zoo.create_detector("fcos_vovnet39_fpn", variant="publisht")',
    "vovnet_zoo.FCOSLoss(centre_radius=1.5)",
    "model(images).boxes",
    "vovnet_zoo.predct(model, images)",
    'model.config["class_name"]',
    "vovnet_zoo.FCOSLoss()(model(images), images, images).loss",
]


def test_the_users_script_runs(tiny_coco, tmp_path):
    names = user_script.main(tiny_coco, tmp_path / "out")
    assert names and set(names) <= {"red", "green"}


@pytest.mark.slow
def test_mistakes_are_seen(tmp_path):
    """Each of these lines, and nothing else, is an error to mypy."""
    head = "import torch, vovnet_zoo\nmodel = vovnet_zoo.create_detector('fcos_vovnet39_fpn')\n"
    (tmp_path / "script.py").write_text(head + "images = torch.zeros(1, 3, 64, 64)\n" + "\n".join(MISTAKES) + "\n")
    line = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "script.py"]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500).stdout
    wrong = [int(text.split(":")[1]) for text in found.splitlines() if ": error:" in text]
    assert sorted(set(wrong)) == list(range(4, 4 + len(MISTAKES))), found
