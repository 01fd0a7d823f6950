import pytest
import timm
import torch

import vovnet_zoo  # noqa: F401  (registers the backbones)
from vovnet_zoo.osa import save_no_concatenation
from vovnet_zoo.winograd import use_winograd


@pytest.mark.parametrize("name, blocks", [("vovnet39", 6), ("ese_vovnet39b", 6), ("vovnet27_slim", 4)])
@pytest.mark.parametrize("precision", ["float32", "bf16", "bf16 with float32 arithmetic"])
def test_same_results_less_kept(name, blocks, precision):
    torch.manual_seed(0)
    results = []
    for sparing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5).train()
        keys = list(model.state_dict())
        if precision.endswith("arithmetic"):
            use_winograd(model)
        if sparing:
            assert save_no_concatenation(model) == blocks
            assert list(model.state_dict()) == keys
        kept = {}  # each tensor once
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.update({x.data_ptr(): x}) or x, lambda x: x
            ),
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"),
        ):
            y = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        y.float().square().sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        weights = {p.data_ptr() for p in model.parameters()}
        results.append((y, gradients, sum(x.nbytes for pointer, x in kept.items() if pointer not in weights)))
    (y, gradients, kept), (sparing_y, sparing_gradients, sparing_kept) = results
    torch.testing.assert_close(sparing_y, y, rtol=0, atol=0)
    torch.testing.assert_close(sparing_gradients, gradients, rtol=1e-4, atol=1e-4 if precision == "float32" else 1e-2)
    assert sparing_kept < 0.98 * kept


def test_one_graph():
    model = timm.create_model("vovnet27_slim", features_only=True).train()
    save_no_concatenation(model)
    images = torch.randn(1, 3, 64, 64)
    wanted, got = model(images), torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(got, wanted)
    sum(x.sum() for x in got).backward()
