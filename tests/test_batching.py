"""Batches of `predict`: the same detections as one image at a time, in order, with few images in memory."""

import itertools
import os
import threading

import numpy as np
import pytest
import torch
from launch import ROOT, run_python
from near import assert_same_detections
from PIL import Image
from samples import make_confident_detector
from torch._dynamo.utils import counters

from vovnet_zoo import inference, postprocess, predict
from vovnet_zoo.batching import group_alike, read_ahead
from vovnet_zoo.data import normalize

SIZES = [(50, 70), (70, 50), (64, 64), (52, 70), (200, 90), (33, 130), (64, 60), (51, 71)]  # some share a batch


@pytest.fixture(scope="module")
def model():
    return make_confident_detector()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    sizes = SIZES * 5
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.mark.parametrize("batch_size", [8, 32])
@pytest.mark.parametrize("workers", [0, 2])
def test_detections_do_not_depend_on_the_batch(model, images, batch_size, workers, monkeypatch):
    alone, batches = predict(model, images), []
    real = inference.detect_batch

    def counted(model, items, *arguments):
        batches.append(len(items))
        return real(model, items, *arguments)

    monkeypatch.setattr(inference, "detect_batch", counted)
    together = predict(model, images, batch_size=batch_size, workers=workers)
    assert sum(batches) == len(together) == len(images) and max(batches) >= 8 and len(batches) < 12
    for ours, theirs, image in zip(together, alone, images, strict=True):
        assert len(ours["boxes"]) > 5 and ours.size == tuple(image.shape[-2:]) and ours.source == theirs.source
        assert_same_detections(ours, theirs, size=max(ours.size))


def test_an_iterator_may_use_its_memory_again(model, images, tmp_path):
    """As cameras do, and loops over files that are closed after their turn."""
    images = [image for image in images if image.shape[1:] == (64, 64)]
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")

    def arrays():
        memory = np.empty((64, 64, 3), np.uint8)
        for image in images:
            memory[:] = image.permute(1, 2, 0).numpy()
            yield memory

    def tensors():
        memory = torch.empty(3, 64, 64, dtype=torch.uint8)
        for image in images:
            yield memory.copy_(image)

    def files():
        for number in range(len(images)):
            with Image.open(tmp_path / f"{number}.png") as image:
                yield image

    wanted = predict(model, images, batch_size=3)
    assert not torch.equal(wanted[0]["scores"], wanted[1]["scores"])
    for source in arrays, tensors, files:
        found = list(predict(model, source(), stream=True, batch_size=3))
        assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(found, wanted, strict=True)), source


def test_threads_of_a_process_keep_their_number(model, images):
    """`predict` in another thread computes with as many cores as in the first, and so do threads that come after it."""
    seen, before = [], torch.get_num_threads()

    def in_thread(function):
        thread = threading.Thread(target=lambda: seen.append(function()))
        thread.start()
        thread.join()
        return seen[-1]

    hook = model.head.register_forward_hook(lambda *rest: seen.append(torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        for workers in (2, 0):
            assert len(in_thread(lambda workers=workers: predict(model, images[:2], workers=workers))) == 2
            assert seen[-3:-1] == [3, 3] and in_thread(torch.get_num_threads) == 3 == torch.get_num_threads()
        assert list(read_ahead(range(9), lambda item: torch.get_num_threads(), 2, 4)) == [1] * 9
    finally:
        hook.remove()
        torch.set_num_threads(before)


def test_each_part_of_a_model_keeps_its_mode(images):
    """Also where several streams of one model are open: the last to end puts the modes back."""
    model = make_confident_detector()
    wanted = predict(model, images[:6])
    model.train()
    model.backbone.eval()
    modes = [part.training for part in model.modules()]
    predict(model, images[0])
    assert [part.training for part in model.modules()] == modes and len(set(modes)) == 2
    short, long = predict(model, images[:1], stream=True), predict(model, images[:6], stream=True)
    pairs = list(itertools.zip_longest(short, long))
    assert all(torch.equal(found["scores"], x["scores"]) for (_, found), x in zip(pairs, wanted, strict=True))
    assert [part.training for part in model.modules()] == modes
    started = predict(model, images[:6], stream=True)
    next(started)
    assert not model.training
    started.close()
    assert [part.training for part in model.modules()] == modes


def test_forgotten_streams_do_not_block():
    """The garbage collector ends them where it runs, which may be in the next call of `predict`."""
    code = """
import faulthandler, gc
faulthandler.dump_traceback_later(60, exit=True)
import torch
from samples import make_confident_detector
from vovnet_zoo import predict
from vovnet_zoo.inference import evaluating

gc.disable()
model = make_confident_detector().train()
stream = predict(model, [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 3, stream=True)
next(stream)
cycle = [stream]
cycle.append(cycle)
del stream, cycle
assert not model.training
real = model.eval
model.eval = lambda: (gc.collect(), real())
with evaluating(model):
    assert not any(part.training for part in model.modules())
print(all(part.training for part in model.modules()))
"""
    result = run_python(code, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("options", [{}, {"tiles": 48, "flip": True}])
def test_defaults_of_torch_change_nothing(model, images, options):
    """A default device of tensors, or a default type, is that of the user's own tensors."""
    (wanted,) = predict(model, images[4], **options)
    for default in torch.device("meta"), torch.float64:
        torch.set_default_dtype(default) if default == torch.float64 else torch.set_default_device(default)
        try:
            (found,) = predict(model, images[4], **options)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert all(found[key].dtype == x.dtype and torch.equal(found[key], x) for key, x in wanted.items())


def test_predict_is_network_and_postprocess(model):
    """Bitwise, for an image that needs no resizing."""
    image = torch.randint(0, 256, (3, 64, 100), dtype=torch.uint8)
    (found,) = predict(model, image)
    padded = torch.nn.functional.pad(image, (0, 28))[None]
    model.eval()
    with torch.no_grad():
        inputs = normalize(padded, torch.tensor([[64, 100]]), model.config["image_mean"], model.config["image_std"])
        (wanted,) = postprocess(model(inputs.contiguous(memory_format=torch.channels_last)), [(64, 100)])
    assert len(wanted["boxes"]) > 5
    torch.testing.assert_close(dict(found), wanted, rtol=0, atol=0)


def test_a_stream_reads_few_images_ahead(model, images):
    read = []

    def source():
        for image in images:
            read.append(image)
            yield image

    model.train()
    stream = predict(model, source(), stream=True, batch_size=2)
    assert read == []
    first = next(stream)
    assert not model.training and len(read) <= 5 * 2 + 3
    rest = list(stream)
    assert model.training and len(read) == len(images)
    model.eval()
    for ours, theirs in zip([first, *rest], predict(model, images), strict=True):
        assert_same_detections(ours, theirs, size=max(ours.size))


def test_a_closed_stream_leaves_no_thread(model, images):
    before = threading.active_count()
    model.train()
    stream = predict(model, images, stream=True, batch_size=2, workers=3)
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    assert threading.active_count() == before and model.training
    model.eval()


def test_bad_images_are_reported_and_left_out(model, images, tmp_path):
    paths = [tmp_path / f"{i:02}.png" for i in range(12)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    for i in (0, 5, 11):
        paths[i].write_bytes(b"not an image")
    with pytest.raises(ValueError, match="00.png"):
        predict(model, paths, batch_size=4)
    bad = []
    found = predict(model, paths, batch_size=4, on_error=lambda frame, error: bad.append((frame.name, str(error))))
    good = [str(path) for i, path in enumerate(paths) if i not in (0, 5, 11)]
    assert [x.source for x in found] == good
    assert [name for name, _ in bad] == [str(paths[i]) for i in (0, 5, 11)] and all(n in text for n, text in bad)


def test_precision_and_compile(model, monkeypatch):
    """Compiled, batches of any size share one graph; the network runs under autocast."""
    compiled_network, seen = inference.compiled_network, []
    sizes = [(160, 200), (200, 160), (160, 161), (300, 160)] * 2  # the smallest map is larger than one cell
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    model.config.update(min_size=160, max_size=320)
    monkeypatch.setattr(inference, "compiled_network", lambda: compiled_network("eager"))
    torch._dynamo.reset()
    counters.clear()
    exact = predict(model, images, batch_size=2)
    for ours, theirs in zip(predict(model, images, batch_size=2, compile=True), exact, strict=True):
        assert_same_detections(ours, theirs, size=max(ours.size))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    hook = model.head.cls_logits.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    predict(model, images[0], precision="bf16")
    predict(model, images[0])
    hook.remove()
    assert set(seen[:5]) == {torch.bfloat16} and set(seen[5:]) == {torch.float32}
    model.config.update(min_size=64, max_size=128)
    for wrong in (dict(precision="bf32"), dict(batch_size=0), dict(workers=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            predict(model, images[0], **wrong)


@pytest.mark.slow
def test_compiled_by_inductor(model):
    """Images of other sizes, in batches and alone, are found as without; it takes a minute."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(160, 200), (200, 160), (160, 161), (300, 160)] * 2
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    model.config.update(min_size=160, max_size=320)
    exact = predict(model, images, batch_size=2)
    for batch_size in (2, 1):
        found = predict(model, images, batch_size=batch_size, compile=True)
        for ours, theirs in zip(found, exact, strict=True):
            assert len(ours["boxes"]) > 5
            assert_same_detections(ours, theirs, size=max(ours.size))
    model.config.update(min_size=64, max_size=128)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_read_ahead(workers):
    taken, threads = [], torch.get_num_threads()

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def double(i):
        if i == 30:
            raise ValueError("thirty")
        return 2 * i

    results = read_ahead(items(), double, workers, ahead=5)
    for i in range(30):
        assert next(results) == 2 * i and len(taken) <= i + 6
    with pytest.raises(ValueError, match="thirty"):
        next(results)
    assert torch.get_num_threads() == threads


def test_group_alike():
    """Full groups, and none that waits for more than the window."""
    items = [*enumerate("abacabaabaaaaaaaaab")]
    numbers = [[number for number, _ in group] for group in group_alike(items, str, size=3, window=6)]
    assert sorted(sum(numbers, [])) == list(range(len(items)))
    assert all(len({items[number][1] for number in group}) == 1 and len(group) <= 3 for group in numbers)
    assert sum(len(group) == 3 for group in numbers) >= 4
    done = set()
    for group in numbers:
        oldest = min(set(range(len(items))) - done)
        assert max(group) <= oldest + 6
        done |= set(group)
