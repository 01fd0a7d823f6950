import pytest
import torch
from launch import run_in_interpreter
from torchvision.ops import batched_nms

from vovnet_zoo.nms import class_nms, nms_fixed


def draw(generator: torch.Generator, kind: str, batch: int, count: int):
    """Boxes of one kind: spread out, crowded around few places, on a grid with many equal IoUs and scores, or in pairs
    whose IoU is 0.6 but for float32's rounding."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    if kind == "grid":
        low, size = (rand(batch, count, 2) * 10).floor(), (rand(batch, count, 2) * 6).floor()
        scores = (rand(batch, count) * 8).floor() / 8
    elif kind == "crowded":
        centers = rand(batch, 1 + count // 20, 2) * 400
        which = torch.randint(0, centers.shape[1], (batch, count), generator=generator)
        low = centers.gather(1, which[..., None].expand(-1, -1, 2)) + rand(batch, count, 2) * 8
        size, scores = 40 + rand(batch, count, 2) * 10, rand(batch, count)
    elif kind == "edge":
        size = 30 + rand(batch, (count + 1) // 2, 2) * 500
        size = torch.stack([size, size * torch.tensor([0.6, 1])], dim=2).flatten(1, 2)[:, :count]
        labels = torch.arange(count).div(2, rounding_mode="floor").expand(batch, -1)
        return torch.cat([torch.zeros_like(size), size], dim=-1), rand(batch, count), labels
    else:
        low, size, scores = rand(batch, count, 2) * 600, rand(batch, count, 2) * 200, rand(batch, count)
    labels = torch.randint(0, 1 + count // 100, (batch, count), generator=generator)
    scores = torch.where(rand(batch, count) < 0.1, -1.0, scores)  # no candidates
    return torch.cat([low, low + size], dim=-1), scores, labels


@pytest.mark.parametrize("kind", ["spread", "crowded", "grid"])
def test_nms_fixed_is_batched_nms(kind):
    """1,000 batches of each kind, of up to 3 images: the same boxes in the same order."""
    generator = torch.Generator().manual_seed(0)
    suppressed = full = 0
    for trial in range(1000):
        batch, count = trial % 4, (0, 1, 2, 30, 100, 250)[trial % 6]
        boxes, scores, labels = draw(generator, kind, batch, count)
        threshold = (0.3, 0.5, 0.6)[trial % 3]
        picked = nms_fixed(boxes, scores, labels, threshold, 40)
        assert picked.shape == (batch, 40)
        for b in range(batch):
            candidates = (scores[b] >= 0).nonzero().squeeze(1)
            kept = batched_nms(
                boxes[b, candidates].double(), scores[b, candidates].double(), labels[b, candidates], threshold
            )
            wanted = candidates[kept[:40]]
            assert picked[b, : len(wanted)].tolist() == wanted.tolist()
            assert (picked[b, len(wanted) :] == -1).all()
            suppressed += len(candidates) - len(kept)
            full += len(kept) >= 40
    assert suppressed > 2_000 and full > 50


def test_plus_one_suppresses_at_the_threshold():
    """Boxes that cover pixels 0..9 and 0..4 have an IoU of exactly 1/2, which the published convention suppresses."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    assert class_nms(boxes, scores, labels, 0.5, 3, plus_one=True).tolist() == [0]
    assert nms_fixed(boxes[None], scores[None], labels[None], 0.5, 3, plus_one=True).tolist() == [[0, -1, -1]]
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    assert class_nms(boxes, scores, labels, 0.5, 3).tolist() == [0, 1]
    assert nms_fixed(boxes[None], scores[None], labels[None], 0.5, 3).tolist() == [[0, 1, -1]]


def test_classes_do_not_meet():
    """A box suppresses none of another class, also where coordinates are below 0."""
    boxes = torch.tensor([[-50.0, -50, 50, 50], [1, 1, 101, 101], [0, 0, 10, 10]])
    assert class_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 0]), 0.5, 3).tolist() == [0, 1, 2]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="float32 .*float64"):
        nms_fixed(torch.zeros(1, 5, 4).double(), torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int64), 0.5, 10)


class OnMps(torch.Tensor):
    """A stand-in for a tensor on Apple's GPU, which has no float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if func is torch.Tensor.double or any(x is torch.float64 for x in (*args, *(kwargs or {}).values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_device_without_float64(monkeypatch):
    boxes, scores, labels = (x[0] for x in draw(torch.Generator().manual_seed(2), "crowded", 1, 100))
    wanted = class_nms(boxes, scores, labels, 0.5, 20)
    to = torch.Tensor.to

    def to_mps(x, *arguments, **options):
        if arguments and arguments[0] == torch.device("mps"):
            return x.as_subclass(OnMps)
        return to(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to_mps)
    found = class_nms(*(x.as_subclass(OnMps) for x in (boxes, scores, labels)), 0.5, 20)
    assert found.device.type == "mps" and found.cpu().tolist() == wanted.tolist()


def test_operator():
    boxes, scores, labels = draw(torch.Generator().manual_seed(1), "crowded", 2, 100)
    torch.library.opcheck(torch.ops.vovnet_zoo.nms_fixed, (boxes, scores, labels, 0.5, 20, False))


IN_THE_INTERPRETER = """
import torch
from test_nms import draw
from vovnet_zoo.kernels import nms_triton
from vovnet_zoo.nms import _class_nms_cuda, class_nms, nms_fixed
generator = torch.Generator().manual_seed(2)
sizes = {"spread": (1, 200, 100), "crowded": (2, 70, 12), "grid": (1, 70, 70), "edge": (1, 70, 70)}
for kind, (batch, count, most) in [*sizes.items(), ("spread", (0, 5, 3)), ("spread", (2, 0, 3)), ("spread", (1, 1, 3))]:
    boxes, scores, labels = draw(generator, kind, batch, count)
    nms_triton.MOST_COMPARISONS = 0 if kind == "crowded" else 2**28
    for plus_one, threshold in ((False, 0.6), (True, 0.5)):
        wanted = nms_fixed(boxes, scores, labels, threshold, most, plus_one)
        got = nms_triton.nms(boxes, scores, labels, threshold, most, plus_one)
        assert torch.equal(got, wanted), (kind, got, wanted)
for kind in ("spread", "grid"):
    boxes, scores, labels = draw(generator, kind, 1, 70)
    alone = boxes[0] - 100, scores[0], labels[0]  # with scores below 0, which are candidates here
    for plus_one in (False, True):
        wanted = class_nms(*alone, 0.6, 40, plus_one)
        assert torch.equal(_class_nms_cuda(*alone, 0.6, 40, plus_one), wanted), kind
"""


def test_triton_kernel_in_its_interpreter():
    """The GPU's kernel, run by Triton's interpreter on the CPU."""
    run_in_interpreter(IN_THE_INTERPRETER)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["spread", "crowded", "grid", "edge"])
def test_triton_kernel(kind):
    generator = torch.Generator().manual_seed(3)
    for count in (0, 1, 100, 1000, 5000):
        boxes, scores, labels = draw(generator, kind, 4, count)
        for plus_one in (False, True):
            wanted = nms_fixed(boxes, scores, labels, 0.6, 100, plus_one)
            got = nms_fixed(boxes.cuda(), scores.cuda(), labels.cuda(), 0.6, 100, plus_one)
            assert torch.equal(got.cpu(), wanted)
            alone = boxes[0] - 100, scores[0], labels[0]
            for dtype in (torch.float32, torch.float64):
                wanted = class_nms(alone[0].to(dtype), *alone[1:], 0.6, 300, plus_one)
                got = class_nms(alone[0].to("cuda", dtype), *(x.cuda() for x in alone[1:]), 0.6, 300, plus_one)
                assert got.device.type == "cuda" and torch.equal(got.cpu(), wanted)
