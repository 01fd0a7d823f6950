"""torch.hub: from a copy of the repository, in a fresh process with only hubconf's dependencies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vovnet_zoo.detectors import DETECTORS
from vovnet_zoo.vovnet import model_cfgs

ROOT = Path(__file__).parents[1]

# Hides every installed package that hubconf's dependencies do not themselves depend on.
ONLY_DEPENDENCIES = """
import importlib.metadata as md, re, sys
name = lambda text: re.match(r"[\\w.-]+", text)[0].lower().replace("_", "-").replace(".", "-")
wanted, todo = set(), ["torch", "torchvision", "timm", "huggingface-hub", "safetensors"]
while todo:
    if (one := name(todo.pop())) not in wanted:
        wanted.add(one)
        try:
            todo += [r for r in md.requires(one) or [] if "extra ==" not in r]
        except md.PackageNotFoundError:
            pass  # of another platform
for module, owners in md.packages_distributions().items():
    if module != "vovnet_zoo" and not wanted & {name(owner) for owner in owners}:
        sys.modules.setdefault(module, None)
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]  # this checkout, if it is installed
sys.path = [p for p in sys.path if p != CHECKOUT]
assert sys.modules["tyro"] is None and sys.modules["pycocotools"] is None
"""


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """Where torch.hub would have unpacked the zip of someone/vovnet's main branch."""
    folder = tmp_path_factory.mktemp("torch_home") / "hub" / "someone_vovnet_main"
    shutil.copytree(ROOT / "vovnet_zoo", folder / "vovnet_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", folder)
    return folder


def run(code, hub_folder):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TORCH_HOME": str(hub_folder.parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"CHECKOUT = {str(ROOT)!r}\n" + ONLY_DEPENDENCIES + code],
        env=environment,
        cwd=hub_folder.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_load(hub_folder):
    out = run(
        f"""
import torch
folder = {str(hub_folder)!r}
x = torch.zeros(1, 3, 64, 64)
with torch.inference_mode():
    print(torch.hub.load(folder, "vovnet39", source="local").eval()(x).shape)
    print(len(torch.hub.load(folder, "vovnet27_slim", source="local", features_only=True).eval()(x)))
    model = torch.hub.load(folder, "fcos_vovnet39_fpn", source="local", num_classes=3, variant="published").eval()
    print(type(model).__name__, model.config["num_classes"], model(x).logits.shape[-1])
    model = torch.hub.load(folder, "fcos", source="local", backbone="test_resnet", num_classes=3, channels=64)
    print(type(model).__name__, model.config["backbone"])
import vovnet_zoo
print(vovnet_zoo.__file__)
try:
    torch.hub.load(folder, "fcos_vovnet39_fpn", source="local", pretrained=True)
except ValueError as error:
    print(error)
""",
        hub_folder,
    )
    assert "torch.Size([1, 1000])" in out and "\n5\n" in out and "FCOS 3 3" in out and "FCOS test_resnet" in out
    assert str(hub_folder) in out and "no weights of 'fcos_vovnet39_fpn' can be had" in out


def test_list_and_help(hub_folder):
    names = [*model_cfgs, *DETECTORS, "fcos"]
    out = run(
        f"""
import torch
options = dict(skip_validation=True, trust_repo=True)
print(sorted(torch.hub.list("someone/vovnet:main", **options)) == sorted({names}))
for name in {names}:
    print("##", name, torch.hub.help("someone/vovnet:main", name, **options))
""",
        hub_folder,
    )
    assert out.splitlines()[0] == "True"
    helps = dict(part.split(" ", 1) for part in out.split("## ")[1:])
    assert list(helps) == names
    for name, text in helps.items():
        assert "Args:" in text and "pretrained" in text and "None" not in text, name
    assert "22.6 M parameters" in helps["vovnet39"] and "among pytorchcv_in1k (can be had)," in helps["vovnet39"]
    assert "trained weights: tv_coco (can be had)," in helps["fcos_resnet50_fpn"]
    assert "vovnet93" in helps["fcos_vovnet93_fpn"]
