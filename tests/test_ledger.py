"""The ledger tells the truth about what the library builds, and everyone who shows its rows shows the same."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from launch import HEAVY, run_light
from torch.utils.flop_counter import FlopCounterMode

import vovnet_zoo
from vovnet_zoo import cli, detectors, hub, ledger, publish, vovnet
from vovnet_zoo.files import hash_file
from vovnet_zoo.ledger import BACKBONE_WEIGHTS, BACKBONES, DETECTOR_WEIGHTS, DETECTORS, Measured, Weights

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {**BACKBONE_WEIGHTS, **DETECTOR_WEIGHTS}
TIMMS_OWN = [name for name in BACKBONES if name not in vovnet.model_cfgs]


def test_every_name_has_an_architecture_and_weights():
    assert set(BACKBONES) >= set(vovnet.model_cfgs) and all(timm.is_model(name) for name in BACKBONES)
    assert set(DETECTORS) == set(detectors.DETECTORS)
    assert {key.split(".")[0] for key in BACKBONE_WEIGHTS} == set(BACKBONES)
    assert {key.split(".")[0] for key in DETECTOR_WEIGHTS} == set(DETECTORS)
    assert vovnet.WEIGHTS.keys() == {key for key in BACKBONE_WEIGHTS if key.split(".")[0] not in TIMMS_OWN}
    for name, row in DETECTORS.items():
        assert row.text.endswith(f" {detectors.DETECTORS[name]['backbone']}")


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_row_is_complete(key):
    row = WEIGHTS[key]
    assert row.state in ledger.STATES and re.fullmatch(r"\w+\.\w+", key)
    assert bool(row.url) == (row.state in ("url", "gone"))
    assert not row.url or row.url.startswith("https://")
    assert re.fullmatch("([0-9a-f]{40})?", row.sha1) and re.fullmatch("([0-9a-f]{64})?", row.sha256)
    if row.state == "url":  # what is downloaded must be what was meant
        assert (row.sha1 and row.sha1[:8] in row.url) or (row.sha256 and row.sha256[:8] in row.url)
    if row.state != "unpublished":
        assert row.data and row.publisher, "say what the weights were trained on, and who published them"
    if ledger.STATES[row.state] == "can be had":
        assert row.license != "not stated" and row.score, "say under which license, and how good they are"


@pytest.mark.parametrize("name", [*BACKBONES, *DETECTORS])
def test_counts_are_those_of_the_built_model(name):
    architecture = {**BACKBONES, **DETECTORS}[name]
    with torch.device("meta"), torch.inference_mode():
        model = (timm.create_model(name) if name in BACKBONES else vovnet_zoo.create_detector(name)).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *architecture.size))
    assert sum(x.numel() for x in model.parameters()) == architecture.parameters
    assert round(counter.get_total_flops() / 1e9, 2) == architecture.gflops


@pytest.mark.parametrize("name", TIMMS_OWN)
def test_rows_of_timms_own_weights_are_timms(name):
    (key,) = (key for key in BACKBONE_WEIGHTS if key.split(".")[0] == name)
    cfg = timm.get_pretrained_cfg(name)
    assert key == f"{name}.{cfg.tag}" and cfg.hf_hub_id == f"timm/{key}"
    assert (BACKBONE_WEIGHTS[key].state, BACKBONE_WEIGHTS[key].license) == ("timm", cfg.license)


def test_timm_knows_the_rows():
    for key, row in vovnet.WEIGHTS.items():
        cfg = timm.get_pretrained_cfg(key)
        assert cfg.license == row.license and row.score in " ".join(cfg.notes)
        assert (cfg.mean, cfg.std, cfg.input_size[1:], cfg.url or "") == (
            row.mean, row.std, row.size, row.url if row.state == "url" else "",
        )  # fmt: skip


def test_the_table_of_the_guide():
    """`vovnet-zoo list --markdown` prints it."""
    assert ledger.markdown() in (ROOT / "recipes" / "guides" / "weights.md").read_text()


def test_list():
    result, imported = run_light("-m", "vovnet_zoo.cli", "list", "--json")
    assert not imported & HEAVY and result.returncode == 0
    rows = {row.pop("name"): row for row in json.loads(result.stdout)}
    assert list(rows) == list(WEIGHTS) and len({frozenset(row) for row in rows.values()}) == 1
    assert rows["fcos_vovnet39_fpn.fcos_1x_coco"].items() >= {
        "kind": "detector",
        "architecture": "FCOS with a feature pyramid on vovnet39",
        "parameters": 30_036_954,
        "gflops": 556.25,
        "gflops_at": [800, 1344],
        "state": "reported gone",
        "source": "https://dl.dropbox.com/s/8n0wyypfggliplw/FCOS-V-39-FPN-1x.pth?dl=1",
        "weights_license": "not stated",
        "code_license": "apache-2.0",
        "training_data": "ImageNet-1k, then COCO train2017",
        "published_score": "COCO val2017 AP 37.7",
        "publisher": "the authors",
        "measured": None,
    }.items()  # fmt: skip
    assert rows["ese_vovnet39b.ra_in1k"]["source"] == "https://huggingface.co/timm/ese_vovnet39b.ra_in1k"
    assert rows["vovnet93.in1k"]["state"] == "not published" and rows["vovnet93.in1k"]["source"] == ""


def test_the_text_of_the_list_says_what_the_json_says(capsys, monkeypatch):
    measured = Measured("COCO val2017", {"AP": 0.377, "AP50": 0.5}, "eval_coco.py --data COCO")
    monkeypatch.setitem(DETECTOR_WEIGHTS, "fcos_vovnet39_fpn.fcos_1x_coco", Weights("hub", measured=measured))
    cli.run_list(cli.ListModels())
    blocks = dict(zip(WEIGHTS, re.split(r"\n(?! )", capsys.readouterr().out.rstrip()), strict=True))
    for row in ledger.rows():
        for key, value in row.items():
            shown = f"{value:,}" if key == "parameters" else "x".join(map(str, value)) if key == "gflops_at" else value
            if row["state"] != "not published" and key not in ("kind", "measured"):
                assert str(shown) in blocks[row["name"]], key
    block = blocks["fcos_vovnet39_fpn.fcos_1x_coco"]
    assert "https://huggingface.co/vovnet-zoo/fcos_vovnet39_fpn.fcos_1x_coco" in block
    assert "AP 0.377, AP50 0.500 on COCO val2017 (eval_coco.py --data COCO)" in block
    cli.run_list(cli.ListModels(names=("vovnet93",)))
    assert capsys.readouterr().out.count("vovnet93") > 3
    with pytest.raises(ValueError, match="no weights have 'resnet900' in their name"):
        cli.run_list(cli.ListModels(names=("resnet900",)))


# ---- model cards


def test_a_card_has_the_facts_of_its_row(tmp_path, monkeypatch):
    """A file whose hash is in the ledger is known, and a score that was measured is in the Hub's form too."""
    torch.manual_seed(0)
    torch.save(timm.create_model("vovnet27_slim").state_dict(), tmp_path / "w.pth")
    measured = Measured("ImageNet-1k val", {"top-1": 71.25}, "validate.py")
    key = "vovnet27_slim.pytorchcv_in1k"
    row = Weights("url", "https://x/w.pth", sha256=hash_file(tmp_path / "w.pth"), license="mit", score="top-5 9 %",
                  data="ImageNet-1k", publisher="pytorchcv", measured=measured)  # fmt: skip
    monkeypatch.setitem(BACKBONE_WEIGHTS, key, row)
    publish.convert_file(tmp_path / "w.pth", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / hub.CARD)
    for text in (key, "top-5 9 % (pytorchcv)", "| training data | ImageNet-1k |", "| measured | top-1 71.250"):
        assert text in card.text
    assert card.data.license == "mit" and card.data.model_name == "out"
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name) == ("image-classification", "ImageNet-1k val")
    assert (result.metric_type, result.metric_value) == ("top-1", 71.25)


def test_the_card_of_a_training_has_its_scores_in_the_hubs_form(tiny_detector, tmp_path):
    tiny_detector.save_pretrained(tmp_path / "best")
    about = dict(command=["train_coco.py", "finetune"], versions={"torch": "2.15"}, machine="x86, 2 cores")
    (tmp_path / "run.json").write_text(json.dumps({"starts": [about]}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict(step=1, AP=0.25, AP50=0.5)) + "\n")
    facts = publish.training_facts(tmp_path, "best")
    card = publish.checked_card(tmp_path / "best", repo_id="someone/tiny", **facts)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"AP": 0.25, "AP50": 0.5}
    assert card.data.model_name == "tiny" and "AP 0.250, AP50 0.500" in card.text
    assert not publish.checked_card(tmp_path / "best").data.eval_results  # nothing was measured


# ---- errors


@pytest.mark.parametrize("name", [*(name for name in vovnet.model_cfgs), *DETECTORS])
def test_an_error_says_in_one_line_what_there_is_instead(name, monkeypatch):
    monkeypatch.delenv(ledger.ORGANISATION_VARIABLE, raising=False)
    create = timm.create_model if name in BACKBONES else vovnet_zoo.create_detector
    table = BACKBONE_WEIGHTS if name in BACKBONES else DETECTOR_WEIGHTS
    with pytest.raises(ValueError, match=f"'{name}' has no weights called 'nonsense'; there are ") as error:
        create(f"{name}.nonsense", pretrained=True)
    keys = [key for key in table if key.split(".")[0] == name]
    for key in keys:
        assert f"{key} ({ledger.STATES[table[key].state]})" in str(error.value)
    if any(ledger.available(key, table) for key in keys):
        return
    with pytest.raises(ValueError, match=f"^no weights of '{name}[^']*' can be had") as error:
        create(name, pretrained=True)
    message = str(error.value)
    assert "\n" not in message and "vovnet-zoo convert FILE.pth FOLDER" in message
    assert ledger.ORGANISATION_VARIABLE in message
    assert ("train a preset" in message) == (name in DETECTORS)
    there = vovnet.WEIGHTS if name in BACKBONES else table  # timm's own are other networks
    assert all(key in message for key in there if ledger.available(key, table))
    assert all(key in message for key in keys if table[key].state == "gone")


def test_a_tag_without_pretrained():
    with pytest.raises(ValueError, match="add pretrained=True, or leave '.fcos_1x_coco' out"):
        vovnet_zoo.create_detector("fcos_vovnet39_fpn.fcos_1x_coco")
