"""A number and its noun agree in every message."""

from vovnet_zoo.words import counted


def test_numbers_with_their_nouns():
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    plurals = [counted(3, noun) for noun in ("box", "class", "category", "day", "batch")]
    assert counted(2.0, "epoch", form="g") == "2 epochs"
    assert plurals == ["3 boxes", "3 classes", "3 categories", "3 days", "3 batches"]
    assert [counted(n, "image is", "images are") for n in (1, 2)] == ["1 image is", "2 images are"]
    assert counted(1.004, "epoch", form=".3g") == "1 epoch" and counted(1200, "step", form=",") == "1,200 steps"
