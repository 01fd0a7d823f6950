"""The ImageNet recipe, on a few tiny images: what it learns, its exact resume, and the detector that starts from it."""

import dataclasses
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pytest
import timm
import torch
import tyro
from checkpoints import open_with_timm
from launch import command, fork, losses, rows, train_command
from PIL import Image
from test_resume import send_all, wait_for_step
from timm.data import FastCollateMixup

import image_data
import imagenet_presets
import loading
import presets
import train_coco
import train_imagenet
from classifier_run import create_loss
from image_data import Images, Stream, collate, open_split, seeded, train_batches, train_transform
from imagenet_presets import PRESETS, ClassifierConfig, count_steps
from optim import create_optimizer, lr_factor
from run_folder import list_checkpoints
from vovnet_zoo import FCOS, create_detector, publish
from vovnet_zoo.classifiers import load_classifier, save_classifier
from vovnet_zoo.data import TrainSampler

CLASSES = ["blue", "green", "red"]
TINY = "--model test_resnet --train-size 32 --test-size 32 --batch-size 8 --workers 0 --epochs 3 --device cpu"
MIXED = "--mixup 0.2 --cutmix 1.0 --auto-augment rand-m6-mstd0.5-inc1 --erase 0.5 --train-interpolation random"
MEAN = (0.485, 0.456, 0.406)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Write 24 noisy images of three colours to learn from, and 9 held out."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (40 + 4 * i, 48, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def arguments(data, out, options=""):
    return ["small", "--data", str(data), "--out", str(out), *TINY.split(), *options.split()]


def configure(data, out, options=""):
    return tyro.extras.overridable_config_cli(PRESETS, args=arguments(data, out, options))


def train_here(data, out, options=""):
    return train_imagenet.main(configure(data, out, options))


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_and_the_detector_that_starts_from_it(folder, tmp_path, capsys):
    out, best = tmp_path / "run", tmp_path / "run" / "best"
    metrics = train_here(folder, out, "--epochs 12 --eval-epochs 6")
    assert metrics["top1"] >= 8 / 9 and metrics["top5"] == 1.0
    assert "top-1" in capsys.readouterr().out
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 37))
    assert [row["step"] for row in rows(out) if "top1" in row] == [18, 36]
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait_s"} <= rows(out)[0].keys()
    assert losses(out)[-1] < 0.7 * losses(out)[0]

    # timm opens the folder, and finds there what the images have to look like.
    net = open_with_timm(best).eval()
    cfg = net.pretrained_cfg
    assert cfg["label_names"] == CLASSES and list(cfg["input_size"]) == [3, 32, 32] and cfg["crop_pct"] == 1.0
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    images = [Image.open(path) for path in sorted((folder / "val").rglob("*.png"))]
    with torch.no_grad():
        guesses = net(torch.stack([transform(image) for image in images])).argmax(1)
    assert (guesses == torch.arange(9) // 3).double().mean() == metrics["top1"]

    # A detector starts from the folder, and does not need it any more.
    card = str(publish.checked_card(best, repo_id="me/net", **publish.training_facts(out, "best")))
    assert "top1 " in card and "train_imagenet.py small" not in card and "test_resnet" in card
    by_folder = create_detector("fcos", pretrained_backbone=best, num_classes=2, channels=64, num_convs=1)
    by_name = create_detector("fcos", backbone=f"local-dir:{best}", num_classes=2, channels=64, num_convs=1)
    assert by_folder.config == by_name.config and by_folder.config["backbone"] == "test_resnet"
    kept = {f"{len(x.shape)}{x.double().sum():.12e}" for x in net.state_dict().values()}
    for detector in (by_folder, by_name):
        body = detector.backbone.state_dict()
        assert len(body) > 50 and {f"{len(x.shape)}{x.double().sum():.12e}" for x in body.values()} <= kept
    by_folder.save_pretrained(tmp_path / "detector")
    shutil.rmtree(best)
    assert FCOS.from_pretrained(tmp_path / "detector").config["backbone"] == "test_resnet"


def test_train_coco_starts_from_the_folder_and_goes_on_without_it(folder, tiny_coco, tmp_path):
    train_here(folder, tmp_path / "classifier", "--epochs 1")
    source = tmp_path / "classifier" / "best"
    line = [str(x) for x in train_command(tiny_coco, tmp_path / "run")[2:]]
    line += [
        "--backbone",
        f"local-dir:{source}",
        "--pretrained-backbone",
        "--lr",
        "1e-12",
        "--weight-decay",
        "0",
        "--frozen-norm",
        "--workers",
        "0",
    ]
    for steps, options in (("1", []), ("2", ["--allow-changes"])):
        config = presets.parse([*line, "--steps", steps, *options])
        train_coco.main(config)
        if source.exists():
            weights = load_classifier(source)[0].state_dict()
            shutil.rmtree(source)
    detector = FCOS.from_pretrained(tmp_path / "run" / "last")
    assert detector.config["backbone"] == "test_resnet"
    torch.testing.assert_close(detector.backbone.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(folder, tmp_path, name):
    """With a tiny network and small images; the rest is the preset's."""
    line = [name, "--data", str(folder), "--out", str(tmp_path / "run"), *TINY.split(), "--epochs", "1"]
    metrics = train_imagenet.main(tyro.extras.overridable_config_cli(PRESETS, args=line))
    assert metrics["top5"] == 1.0 and len(losses(tmp_path / "run")) == 3
    assert all(0 < loss < 3 for loss in losses(tmp_path / "run"))
    assert (load_classifier(tmp_path / "run" / "last")[2]["crop_pct"]) == PRESETS[name][1].crop_pct


# ---- the same result, whatever happens ------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_started_again(folder, tmp_path, processes):
    """kill -9 of the run and its data loading worker; Mixup, RandAugment, erasing, EMA and LAMB have their states."""
    options = f"{MIXED} --workers 1 --checkpoint-every 2 --optimizer lamb --eval-epochs 2 --loss binary --epochs 4"
    out = tmp_path / "run"
    line = command("train_imagenet.py", arguments(folder, out, options), processes)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        wait_for_step(out, 5, job)
        send_all(out, signal.SIGKILL)
        printed = job.communicate(timeout=100)[0]
    assert job.returncode == -signal.SIGKILL, f"it was done before the signal: {printed}"
    done = len(losses(out))
    for folder_of_run in (out, tmp_path / "undisturbed"):
        if processes == 1:
            train_here(folder, folder_of_run, options.replace("--workers 1", "--workers 0"))
        else:
            line = command("train_imagenet.py", arguments(folder, folder_of_run, options), processes)
            subprocess.run(line, check=True, timeout=240)
    assert 4 < done < 12 and losses(out) == losses(tmp_path / "undisturbed") and len(losses(out)) == 12
    for name in ("last", "best"):
        ours, theirs = (load_classifier(run / name)[0].state_dict() for run in (out, tmp_path / "undisturbed"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    about = json.loads((out / "run.json").read_text())
    assert about["config"]["steps"] == 12 and [start["step"] for start in about["starts"]][0] == 0


def train_rank(rank, folder, out, options):
    train_here(folder, out, options)


def test_two_processes_and_two_parts_are_as_one(folder, tmp_path):
    """Batch norms fixed, all augmentation on: the images, their pairs to mix, losses and weights are the same."""
    options = f"{MIXED} --frozen-norm --no-winograd --optimizer momentum --lr 0.01 --eval-epochs 3 --smoothing 0.1"
    train_here(folder, tmp_path / "one", options)
    train_here(folder, tmp_path / "parts", options + " --accum 2")
    fork(2, train_rank, folder, tmp_path / "two", options)
    one, *others = (load_classifier(tmp_path / run / "last")[0].state_dict() for run in ("one", "parts", "two"))
    for run, weights in zip(("parts", "two"), others, strict=True):
        torch.testing.assert_close(losses(tmp_path / run), losses(tmp_path / "one"), rtol=1e-5, atol=0)
        for key, x in one.items():
            scale = x.double().abs().max().item()
            torch.testing.assert_close(weights[key], x, rtol=0, atol=1e-5 * scale, msg=f"{run} {key}")
        assert rows(tmp_path / run)[-1]["top1"] == rows(tmp_path / "one")[-1]["top1"]


def test_batches_depend_on_the_step_only(folder):
    """Not on where the run starts, nor on the numbers of processes and workers; global generators stay as they are."""
    config = count_steps(configure(folder, "run", MIXED + " --repeats 3 --color-jitter 0.4"), 3)
    split = open_split(config, "train", train_transform(config, MEAN))
    states = random.getstate(), np.random.get_state()[1].copy()
    whole = list(train_batches(config, split, 3, 0, 0, 1))
    later = list(train_batches(dataclasses.replace(config, workers=1), split, 3, 4, 0, 1))
    halves = [list(train_batches(config, split, 3, 0, rank, 2)) for rank in range(2)]
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert len(whole) == config.steps == 9 and len(later) == 5
    for name in ("images", "labels"):
        for ours, theirs in zip(later, whole[4:], strict=True):
            assert torch.equal(ours[0][name], theirs[0][name])
        for first, second, theirs in zip(*halves, whole, strict=True):
            assert torch.equal(torch.cat([first[0][name], second[0][name]]), theirs[0][name])
    pixels = torch.stack([part["images"].float().mean((1, 2, 3)) for (part,) in whole]).flatten()
    assert len(pixels.unique()) > 0.9 * len(pixels)  # each repetition of an image is augmented by itself
    other = next(train_batches(dataclasses.replace(config, seed=1), split, 3, 0, 0, 1))
    assert not torch.equal(other[0]["images"], whole[0][0]["images"])


def test_repeats_in_the_sampler():
    plain, repeated = (
        list(itertools.chain(*TrainSampler([1.0] * 12, 4, num_steps=6, repeats=repeats))) for repeats in (1, 3)
    )
    assert sorted(index for index, _ in plain[:12]) == list(range(12))
    for start in (0, 12):
        epoch = repeated[start : start + 12]
        assert [index for index, _ in epoch] == [index for index, _ in plain[start : start + 4] for _ in range(3)]
    assert len(set(repeated)) == len(repeated)  # no (index, seed) twice


def test_changed_data_are_noticed(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    train_here(data, tmp_path / "run", "--epochs 1")
    moved = shutil.move(data, tmp_path / "moved")
    train_here(moved, tmp_path / "run", "--epochs 1")  # another place is no change
    (moved / "train" / "red" / "0.png").rename(moved / "train" / "blue" / "99.png")
    with pytest.raises(ValueError, match=r"another run .*train: was 24 images of 3 classes \(SHA-256 \w{8}\.\.\), now"):
        train_here(moved, tmp_path / "run", "--epochs 1")


# ---- options --------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "train_size": [0, 2.5], "test_size": [0], "batch_size": [0, "4"], "accum": [0], "repeats": [0], "epochs": [0],
    "milestone_epochs": [(0,), (2, 1)], "eval_epochs": [0], "checkpoint_every": [0], "max_not_finite": [0],
    "workers": [-1], "weight_decay": [-1], "warmup_epochs": [-1], "color_jitter": [-1], "mixup": [-1], "cutmix": [-1],
    "lr": [0, float("nan")], "clip_grad": [0], "crop_pct": [0, 2], "min_scale": [0, 2], "hflip": [2], "erase": [-1],
    "warmup_factor": [2], "drop_path": [1], "smoothing": [1], "ema": [1], "target_threshold": [0, 0.5], "seed": [-1],
    "schedule": ["x"], "precision": ["int8"], "loggers": [("x",)], "interpolation": ["x"], "compile": [1],
}  # fmt: skip


def test_an_option_out_of_range_is_refused_before_anything_starts(tmp_path):
    base = ClassifierConfig(data=tmp_path / "none", out=tmp_path / "run", schedule="multistep")
    assert imagenet_presets.RANGES.keys() <= OUT_OF_RANGE.keys()
    for name, values in OUT_OF_RANGE.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                train_imagenet.main(dataclasses.replace(base, **{name: value}))
    with pytest.raises(ValueError, match="milestone_epochs.*cosine"):
        train_imagenet.main(dataclasses.replace(base, schedule="cosine", milestone_epochs=(5,)))
    assert list(tmp_path.iterdir()) == []
    for _, preset in PRESETS.values():
        imagenet_presets.check_config(dataclasses.replace(preset, data=tmp_path))


@pytest.mark.usefixtures("forked")
def test_a_batch_that_is_lost_ends_a_run(folder, tmp_path, monkeypatch):
    """A worker that gives nothing is found out, as in a detector's training, and the finished steps are saved."""
    monkeypatch.setattr(loading, "POLL_S", 0.1)
    monkeypatch.setattr(loading, "STUCK_S", 1.0)
    real = image_data.collate

    def hang_later(samples, mix=None):
        if samples[0][2] in later:
            time.sleep(60)
        return real(samples, mix)

    config = configure(folder, tmp_path / "run", "--workers 1")
    sampler = TrainSampler([1.0] * 24, 8, num_steps=9, seed=config.seed)
    later = {key[1] for key in list(sampler)[2]}
    monkeypatch.setattr(image_data, "collate", hang_later)
    with pytest.raises(RuntimeError, match="no batch came for"):
        train_imagenet.main(config)
    assert len(losses(config.out)) == 2 and list_checkpoints(config.out / "checkpoints")


# ---- images, labels and losses --------------------------------------------------------------------------------------


def test_pairs_are_mixed_as_timm_mixes_them():
    samples = [(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), i % 3, 100 + i) for i in range(6)]
    mix = FastCollateMixup(0.4, 1.0, label_smoothing=0.1, num_classes=3)
    batch = collate(samples, mix)
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (6, 3, 8, 8)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(6))
    for i in range(0, 6, 2):  # in a pair, the labels mix as far as the images do
        (first, a, seed), (second, b, other) = samples[i : i + 2]
        with seeded(image_data.seed_of(seed, other)):
            images, labels = mix([(first, a), (second, b)])
        assert torch.equal(batch["images"][i : i + 2], images) and torch.equal(batch["labels"][i : i + 2], labels)
        part = (labels[0, a] - 0.1 / 3) / 0.9  # of the first in the first
        assert 0 <= part <= 1 and not torch.equal(images[0], second)
    assert collate(samples)["labels"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("options", ["", MIXED, "--auto-augment ta_wide --color-jitter 0.4 --hflip 0"])
def test_training_images(folder, options):
    config = configure(folder, "run", options)
    images = open_split(config, "train", train_transform(config, MEAN))
    (first, label, _), (again, _, _), (other, _, _) = images[(5, 1)], images[(5, 1)], images[(5, 2)]
    assert first.dtype == torch.uint8 and first.shape == (3, 32, 32) and label == 0
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_erased_pixels_have_the_mean_colour(folder):
    config = configure(folder, "run", "--erase 1 --hflip 0 --min-scale 1")
    plain = dataclasses.replace(config, erase=0.0)
    erased, whole = (open_split(c, "train", train_transform(c, MEAN))[(3, 7)][0] for c in (config, plain))
    changed = (erased != whole).any(0)
    assert 0.02 < changed.double().mean() < 0.5
    assert (erased[:, changed].T == torch.tensor([124, 116, 104])).all()


def test_losses_are_those_of_the_recipes():
    logits, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 2, 2])
    a3, tv2, small, authors = (create_loss(PRESETS[name][1]) for name in ("rsb_a3", "tv2", "small", "authors"))
    torch.testing.assert_close(authors(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(small(logits, labels), smooth)
    soft = torch.nn.functional.one_hot(labels, 5) * 0.7 + torch.nn.functional.one_hot(labels.flip(0), 5) * 0.3
    torch.testing.assert_close(tv2(logits, soft), torch.nn.functional.cross_entropy(logits, soft))
    hard = (soft > 0.2).float()
    torch.testing.assert_close(a3(logits, soft), torch.nn.functional.binary_cross_entropy_with_logits(logits, hard))


def test_presets_count_their_epochs_and_make_their_optimizers():
    model = timm.create_model("test_resnet")
    kinds = {"rsb_a3": timm.optim.Lamb, "rsb_a2": timm.optim.Lamb, "tv2": torch.optim.SGD, "authors": torch.optim.SGD}
    images = 1_281_167
    for name, (_, preset) in PRESETS.items():
        config = count_steps(preset, images / preset.batch_size)
        assert config.steps == int(preset.epochs * images / preset.batch_size)
        optimizer = create_optimizer(model, config)
        assert isinstance(optimizer, kinds.get(name, torch.optim.Optimizer)) and len(optimizer.param_groups) == 2
        factors = [lr_factor(config, step) for step in (0, config.warmup_steps, config.steps - 1)]
        assert factors[0] == (0.01 if config.warmup_steps else 1.0) and factors[1] == 1.0 and factors[2] < 0.011
    config = count_steps(PRESETS["authors"][1], 5004.5)
    assert config.milestones == (150135, 300270) and config.steps == 450405
    assert [round(lr_factor(config, step), 6) for step in (150134, 150135, 300270)] == [1, 0.1, 0.01]


def test_starting_from_a_classifier(folder, tmp_path):
    """Its last layer is kept where the number of classes is the same, and mean and std are taken from the start."""
    torch.manual_seed(5)
    for classes in (3, 7):
        net, start = timm.create_model("test_resnet", num_classes=classes), tmp_path / f"start{classes}"
        save_classifier(net, "test_resnet", start, cfg=dict(mean=[0.1] * 3, std=[0.3] * 3))
        train_here(
            folder, tmp_path / f"run{classes}", f"--init {start} --epochs 1 --lr 1e-30 --weight-decay 0 --frozen-norm"
        )
        trained, name, cfg = load_classifier(tmp_path / f"run{classes}" / "last")
        assert name == "test_resnet" and cfg["mean"] == [0.1] * 3 and cfg["std"] == [0.3] * 3
        same = {key for key, x in trained.state_dict().items() if torch.equal(x, net.state_dict()[key])}
        assert trained.state_dict().keys() - same == (set() if classes == 3 else {"fc.weight", "fc.bias"})
    with pytest.raises(ValueError, match="is a test_resnet, not a vovnet39"):
        train_here(folder, tmp_path / "other", f"--init {tmp_path / 'start3'} --model vovnet39")


# ---- other kinds of data, and what is wrong with them ---------------------------------------------------------------


def test_tar_files_are_read_as_folders_are(folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for path in sorted((folder / split).rglob("*.png")):
                tar.add(path, path.relative_to(folder / split))
    config = configure(tmp_path, "run")
    for split in ("train", "val"):
        packed = open_split(config, split, np.asarray)
        plain = open_split(dataclasses.replace(config, data=folder), split, np.asarray)
        assert image_data.class_names_of(packed) == image_data.class_names_of(plain) == CLASSES
        assert len(packed) == len(plain)
        for i in range(len(plain)):
            assert packed[i][1] == plain[i][1] and (packed[i][0] == plain[i][0]).all()


@pytest.fixture
def shards(folder, tmp_path):
    """Write two shards of WebDataset for training and one for validation."""
    pytest.importorskip("webdataset", reason="timm reads wds/ with webdataset")
    info = {}
    for split, count in (("train", 2), ("val", 1)):
        paths = sorted((folder / split).rglob("*.png"))
        names, lengths = [f"{split}-{i}.tar" for i in range(count)], []
        for i, name in enumerate(names):
            with tarfile.open(tmp_path / name, "w") as tar:
                for number, path in enumerate(paths[i::count]):
                    tar.add(path, f"{number:04d}.png")
                    (tmp_path / "cls").write_text(str(CLASSES.index(path.parent.name)))
                    tar.add(tmp_path / "cls", f"{number:04d}.cls")
            lengths.append(len(paths[i::count]))
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(paths))
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info, "num_classes": 3}))
    return tmp_path


def test_webdataset_goes_on_exactly(shards, tmp_path):
    config = count_steps(configure(shards, tmp_path / "run", "--dataset wds/ --workers 2 " + MIXED), 3)
    split = open_split(config, "train", train_transform(config, MEAN))
    assert isinstance(split, Stream) and image_data.steps_per_epoch(config, split) == 3
    for workers in (2, 0):
        config = dataclasses.replace(config, workers=workers)
        whole = list(itertools.islice(train_batches(config, split, 3, 0, 0, 1), 9))
        later = list(itertools.islice(train_batches(config, split, 3, 4, 0, 1), 5))
        for ours, theirs in zip(later, whole[4:], strict=True):
            assert torch.equal(ours[0]["images"], theirs[0]["images"])
            assert torch.equal(ours[0]["labels"], theirs[0]["labels"])
        assert not torch.equal(whole[0][0]["images"], whole[3][0]["images"])  # each epoch is another
    metrics = train_here(shards, tmp_path / "run", "--dataset wds/ --epochs 1")
    assert metrics["top5"] == 1.0 and len(losses(tmp_path / "run")) == 3
    scored = open_split(config, "val", np.asarray)
    for world_size in (1, 2):
        parts = [
            batch["labels"]
            for rank in range(world_size)
            for batch in image_data.eval_batches(
                dataclasses.replace(config, workers=0, batch_size=4),
                open_split(config, "val", image_data.eval_transform(config)),
                rank,
                world_size,
            )
        ]
        assert (
            sorted(torch.cat(parts).tolist()) == sorted(label for _, label, _ in scored) == [0] * 3 + [1] * 3 + [2] * 3
        )


def test_hugging_face_datasets(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="timm reads hfds/ with datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        paths = sorted((folder / ("val" if split == "validation" else split)).rglob("*.png"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
            "label": [CLASSES.index(path.parent.name) for path in paths],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    options = f"--dataset hfds/{tmp_path / 'set'} --val-split validation"
    config = configure(tmp_path / "cache", "run", options)
    images = open_split(config, "validation", np.asarray)
    assert isinstance(images, Images) and len(images) == 9 and image_data.class_names_of(images) == CLASSES
    assert [label for _, label, _ in images] == [0] * 3 + [1] * 3 + [2] * 3
    assert train_here(tmp_path / "cache", tmp_path / "run", options + " --epochs 1")["top5"] == 1.0


WRONG = {
    "has no folder train/ and no train.tar; put the images there": "--data-is-elsewhere",
    "has no folder validation/": "--val-split validation",
    "needs the package webdataset: pip install webdataset": "--dataset wds/",
    "needs the package datasets: pip install datasets": "--dataset hfds/imagenet-1k",
    "give wds/ or hfds/NAME": "--dataset tfds/imagenet",
    "batch_size=5 cannot be shared out over 1 process x 5 parts, in pairs": "--batch-size 5 --accum 5 --mixup 0.2",
    "did you mean vovnet39": "--model vovnet399",
    "has no config.json": "--init nowhere",
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes(folder, tmp_path, monkeypatch, message):
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: None)
    options = WRONG[message]
    data = tmp_path if "elsewhere" in options else folder
    with pytest.raises(ValueError, match=message):
        train_here(data, tmp_path / "run", options.replace("--data-is-elsewhere", ""))


def test_an_image_that_cannot_be_read_is_named(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "train" / "green" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="green/3.png cannot be read as an image"):
        train_here(data, tmp_path / "run")


def test_missing_weights_have_a_command_that_makes_them():
    for name in ("vovnet75", "vovnet93"):
        with pytest.raises(ValueError, match=f"train_imagenet.py rsb_a3 --model {name} --data ROOT") as error:
            timm.create_model(name, pretrained=True)
        line = re.search(r"train_imagenet.py (.*?)\)", str(error.value))[1].split()
        assert tyro.extras.overridable_config_cli(PRESETS, args=line).model == name


# ---- longer ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits(tmp_path):
    """VoVNet-27-slim learns scikit-learn's digits to 97 % in minutes on a CPU."""
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the digits").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for place, i in enumerate(order.tolist()):
        folder = tmp_path / ("val" if place < 360 else "train") / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 255 / 16).round().astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    options = "small --hflip 0 --train-size 32 --test-size 32 --epochs 6 --workers 0 --device cpu".split()
    line = [*options, "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert train_imagenet.main(tyro.extras.overridable_config_cli(PRESETS, args=line))["top1"] >= 0.97
    net, name, _ = load_classifier(tmp_path / "run" / "best")
    detector = create_detector("fcos_vovnet27_slim_fpn", pretrained_backbone=tmp_path / "run" / "best")
    assert name == detector.config["backbone"] == "vovnet27_slim"
    assert torch.equal(detector.backbone.state_dict()["stem_0.conv.weight"], net.state_dict()["stem.0.conv.weight"])


def test_a_compiled_step_is_one_graph_and_the_same(folder):
    """The network and the loss, with the images as they come from the loader."""
    config: ClassifierConfig = configure(folder, "run")
    model, criterion = timm.create_model("test_resnet", num_classes=3).train(), create_loss(config)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    cfg = {"mean": list(MEAN), "std": [0.229, 0.224, 0.225]}
    eager = train_imagenet.compute_loss(model, criterion, images, labels, cfg, "bf16")
    compiled = torch.compile(train_imagenet.compute_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(model, criterion, images, labels, cfg, "bf16"), eager)
