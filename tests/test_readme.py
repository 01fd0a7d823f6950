"""What the README and the guides name is there."""

import re

import pytest
from launch import ROOT

import vovnet_zoo

PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes" / "guides").glob("*.md"))]
FILES = sorted((ROOT / "tests").glob("test_*.py"))
TESTS = {name for file in FILES for name in re.findall(r"def (test_\w+)", file.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_files_and_links_exist(page):
    text = page.read_text()
    named = set(re.findall(r"`(test_\w+)`", text)) - {file.stem for file in FILES}
    assert named <= TESTS
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"\b(?:recipes|tests)/[\w/]+\.(?:py|md|png)", text):
        assert (ROOT / file).exists(), file


def test_every_guide_is_linked():
    linked = set(re.findall(r"\((recipes/guides/\w+\.md)\)", PAGES[0].read_text()))
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} == linked


def test_the_loop_of_the_guide_trains(tiny_coco, tiny_detector, monkeypatch):
    guide = (ROOT / "recipes" / "guides" / "training.md").read_text()
    code = re.search(r"## A loop of your own.*?```python\n(.*?)```", guide, re.DOTALL)[1]
    for typed, here in (('"DATA"', '"."'), ("(480, 640), 1066", "(64, 64), 96")):
        assert code.count(typed) == 1
        code = code.replace(typed, here)
    monkeypatch.chdir(tiny_coco)
    tiny_detector.save_pretrained("runs/quickstart/best")
    exec(code, {})
    model = vovnet_zoo.FCOS.from_pretrained("mine")
    assert model.class_names == ["red", "green"] and model.config["category_ids"] == [7, 12]
    before = tiny_detector.state_dict()
    assert not model.head.scales.equal(before["head.scales"])
