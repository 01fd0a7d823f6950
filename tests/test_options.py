"""Every option of the recipes is in its range, and is followed or refused, whatever a run starts from."""

import contextlib
import dataclasses
import json
import shutil
import time

import pytest
import torch
from launch import tiny_config
from test_faults import stop_after

import build
import eval_coco
import fitting
import loggers
import runtime
import step
import train_coco
import training_loop
from build import build_loader
from optim import set_lr
from presets import PRESETS, RANGES, TrainConfig, check_config, parse
from run_folder import FREE, load_checkpoint, save_checkpoint
from runtime import process_group
from step import compute_losses, find_targets
from training_run import is_due, set_up
from vovnet_zoo import create_detector, detectors

# ---- every option is followed or refused ----------------------------------------------------------------------------

OTHER = dict(  # another value of each field than `tiny_config` has
    draw_shapes=True, model="fcos_vovnet39_fpn", backbone="resnet10t", variant="published", channels=96, num_convs=2,
    init="other", pretrained_backbone=True, frozen_norm=True, min_size=(32, 48), max_size=64, test_size=96,
    augment="none", drop_empty=True, skip_bad_images=True, batch_size=2, accum=2, workers=1, steps=5, optimizer="adamw",
    lr=0.1, weight_decay=0.1, bias_lr_factor=2.0, decay_norms=False, schedule="cosine", milestones=(1,),
    warmup="constant", warmup_steps=3, warmup_factor=0.5, ema=0.5, clip_grad=1e-3, layer_decay=0.5, precision="bf16",
    compile=True, winograd=False, grad_checkpointing=True, seed=1, device="meta", eval_every=3, checkpoint_every=3,
    max_not_finite=3, allow_changes=True, zoom=(0.3, 2.0), train="copy", train_images="copy", val="copy",
    val_images="copy", val_fraction=0.25, drop_empty_classes=True, difficult_as_crowd=True, epochs=3.0, minutes=0.05,
    copy_paste=1.0, mosaic=1.0, mixup=1.0, color=0.5, blur=1.0, jpeg=1.0, augment_until=0.5, repeat_rare=1.0,
    evals=1, patience=1, seeds=2, loggers=("wandb",), checkpoint_minutes=3.0, tf32=False,
    cuda_graphs=False,
)  # fmt: skip
NETWORK = {"model", "backbone", "variant", "channels", "num_convs", "pretrained_backbone"}
# A named model has a backbone of its own; and checkpointing needs frozen norms.
# These go with other options.
ALONE = {"grad_checkpointing", "zoom", "augment_until", "train_images", "val_images"} | {"evals"}
LENGTHS = {"epochs", "minutes"}  # they say how many steps the run has
REFUSED = {
    "scratch": {"model"} | ALONE,
    "pretrained": {"model", "init"} | ALONE,
    "init": NETWORK | ALONE,
    "resume": OTHER.keys() - FREE | {"data", "accum", "train_images", "val_images", "epochs", "evals"} - {"out"},
}


@pytest.fixture
def config(tiny_coco, tmp_path, monkeypatch) -> TrainConfig:
    for split in ("train", "val"):
        file = tiny_coco / "annotations" / f"instances_{split}.json"
        coco = json.loads(file.read_text())
        coco["categories"].append({"id": 20, "name": "blue"})
        coco["annotations"][0]["difficult"] = 1
        file.write_text(json.dumps(coco))
    calls = []
    monkeypatch.setattr(build, "make_shapes", lambda data: calls.append("shapes"))
    monkeypatch.setattr(build, "use_winograd", lambda model: calls.append("winograd"))
    monkeypatch.setattr(step, "compiled", lambda f, **options: calls.append(f.__name__) or f)
    real = detectors.create_backbone

    def create_backbone(name, pretrained=False):
        body = real(name)
        for x in body.parameters() if pretrained else ():
            torch.nn.init.constant_(x, 0.01)
        return body

    monkeypatch.setattr(detectors, "create_backbone", create_backbone)
    monkeypatch.setattr(build, "create_backbone", create_backbone)
    monkeypatch.setattr(runtime, "find_device", any_device)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.TensorBoard)
    monkeypatch.setattr(fitting.Trial, "step_seconds", lambda *arguments: 1 / 3)
    monkeypatch.setattr(train_coco, "calls", calls, raising=False)
    return dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), eval_every=2, warmup_steps=2)


def any_device(name: str | None, index: int | None = None) -> torch.device:
    """Stand in for `find_device`, which refuses a device that holds no numbers; this machine may have no other."""
    return torch.device(name or "cpu")


def effects(config: TrainConfig) -> dict:
    """Collect what a configuration leads to."""
    check_config(config)
    train_coco.calls.clear()
    found = {}
    with process_group(config.device) as (_, _, device):
        found["device"] = str(device)
    found["seeds"] = train_coco.seed_configs(config) if config.seeds > 1 else []
    run = set_up(config, 0, 1, torch.device("cpu"))
    config = run.config
    run.progress.stale = 1
    found["ends"] = training_loop.has_stalled(run)
    with contextlib.closing(train_coco.RunLog(config.out / "log", config, 0)) as run_log:
        found["loggers"] = list(run_log.loggers.running)
    files = [str(dataset.annotation_file) for dataset in (run.train_set, run.val_set)]
    found["files"] = str(run.notes.path), files, run.train_set.skip_bad_images
    run.notes.close()
    found["data"] = len(run.train_set), len(run.val_set), run.train_set.class_names, run.train_set.num_boxes
    found["network"] = str(run.model), dict(run.model.config), sum(p.sum().item() for p in run.model.parameters())
    found["loss"] = {k: v for k, v in vars(run.criterion).items() if not k.startswith("_")}
    found["ema"] = run.ema and run.ema.decay
    groups = run.optimizer.param_groups
    found["optimizer"] = type(run.optimizer), [(g["weight_decay"], g["lr_factor"], len(g["params"])) for g in groups]
    found["rates"] = [set_lr(run.optimizer, config, step) for step in range(config.steps)]
    batches = build_loader(config, run.train_set, 0, 0, 1, torch.device("cpu"))
    parts = next(batches)
    found["batch"] = batches.workers, [{k: (x.shape, float(x.double().sum())) for k, x in p.items()} for p in parts]
    height, width = parts[0]["images"].shape[-2:]
    torch.manual_seed(0)
    targets, normalizers = find_targets(run.model, run.criterion, parts[0]["boxes"], parts[0]["labels"], height, width)
    losses = compute_losses(
        *(run.model, run.criterion, parts[0]["images"], parts[0]["sizes"], targets, normalizers, config.precision)
    )
    run.scaler.scale(sum(losses.values())).backward()
    losses = {name: x.item() for name, x in losses.items()}
    train_coco.update(run, 0, parts, losses, train_coco.clip_gradients(run).item())
    found["step"] = losses, sum(p.double().abs().sum().item() for p in run.model.parameters())
    found["due"] = []
    for run.progress.step in range(1, 8):
        found["due"] += [is_due(config.eval_every, run), run.saver.is_due(run.progress.step)]
    with pytest.MonkeyPatch.context() as patch:
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now + 60 * 4)
        found["due"].append(run.saver.is_due(8))
    with pytest.raises(RuntimeError, match="in a row"):
        for _ in range(100):
            training_loop.skip_step(run, 0, [], losses, 0.0)
    found["tf32"] = torch.backends.cudnn.allow_tf32
    on_a_gpu = dataclasses.replace(run, config=dataclasses.replace(config, compile=False), device=torch.device("cuda"))
    found["passes"] = type(train_coco.step_functions(on_a_gpu)[1])
    found["patience"] = run.progress.not_finite
    if config.compile:
        train_coco.train(dataclasses.replace(run, config=dataclasses.replace(config, steps=0)), None, None)
    found["calls"] = list(train_coco.calls)
    return found


@pytest.mark.parametrize("mode", list(REFUSED))
def test_every_option_changes_something_or_is_refused(config, tmp_path, monkeypatch, mode):
    assert OTHER.keys() | {"data", "out"} == {field.name for field in dataclasses.fields(TrainConfig)}
    start = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2)
    start.save_pretrained(tmp_path / "start")
    start.save_pretrained(tmp_path / "other")
    shutil.copytree(config.data / "annotations", tmp_path / "copy" / "annotations")
    for split in ("train", "val"):
        shutil.copytree(config.data / split, tmp_path / "copy" / split)
    copies = {}
    for split in ("train", "val"):
        copies |= {split: tmp_path / "copy" / "annotations" / f"instances_{split}.json"}
        copies |= {f"{split}_images": tmp_path / "copy" / split}
    other = OTHER | copies | {"data": tmp_path / "copy", "out": tmp_path / "elsewhere", "init": str(tmp_path / "other")}
    if mode == "pretrained":
        config, other = dataclasses.replace(config, pretrained_backbone=True), other | {"pretrained_backbone": False}
    if mode == "init":
        torch.nn.init.constant_(start.head.centerness.bias, 1.0)
        start.save_pretrained(tmp_path / "start")
        nothing = dict.fromkeys(("model", "backbone", "channels", "num_convs"))
        config = dataclasses.replace(config, init=str(tmp_path / "start"), **nothing)
    if mode == "scratch":
        other["init"] = None  # see the mode "init"
    if mode == "resume":
        stop_after(config, 2, monkeypatch)
        state = tmp_path / "state"
        shutil.copytree(config.out, state)
    before, refused, same = effects(config), set(), set()
    for name, value in other.items():
        if mode == "resume":  # `effects` writes there
            shutil.rmtree(config.out)
            shutil.copytree(state, config.out)
        try:
            found = effects(dataclasses.replace(config, **{name: value}))
        except ValueError as error:
            assert ("steps" if name in LENGTHS else name.split("_")[-1]) in str(error), (name, error)
            refused.add(name)
        else:
            same |= {name} if found == before else set()
    expected_same = {"allow_changes"}
    if mode == "scratch":
        expected_same.add("init")
    assert same == expected_same
    assert refused == REFUSED[mode] - {"data"}


def test_every_option_of_an_evaluation(tiny_coco, tiny_detector, tmp_path, monkeypatch):
    seen = []

    def score(model, dataset, rank, world_size, **options):
        where = str(next(model.parameters()).device)
        weights = None if where == "meta" else sum(p.sum().item() for p in model.parameters())
        data = str(dataset.annotation_file), str(dataset.images_dir), dataset.num_boxes
        seen.append((weights, dict(model.config), data, where, options | {"stop": None}))
        return [], {}

    monkeypatch.setattr(runtime, "find_device", any_device)
    monkeypatch.setattr(eval_coco, "score_dataset", score)
    monkeypatch.setattr(eval_coco, "format_table", lambda metrics: "")
    monkeypatch.setattr(eval_coco, "load_engine", lambda name: None)
    monkeypatch.setattr(eval_coco, "check_classes", lambda model, dataset: None)
    monkeypatch.setattr(runtime, "find_device", lambda name, index: torch.device(name))  # "meta" is refused otherwise
    stored = []
    monkeypatch.setattr(eval_coco, "save_thresholds", lambda folder, analysis, dataset: stored.append(folder))
    for name, bias in (("a", 0.0), ("b", 1.0)):
        model = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=0, num_classes=2, min_size=64)
        torch.nn.init.constant_(model.head.centerness.bias, bias)
        model.config["max_size"] = 100
        model.save_pretrained(tmp_path / name)
    file = tiny_coco / "annotations" / "instances_val.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0]["difficult"] = 1
    file.write_text(json.dumps(coco))
    shutil.copytree(tiny_coco / "annotations", tmp_path / "copy" / "annotations")
    for split in ("train", "val"):
        shutil.copytree(tiny_coco / split, tmp_path / "copy" / split)
    base = eval_coco.EvalConfig(model=str(tmp_path / "a"), data=tiny_coco, device="cpu")
    other = dict(
        model=str(tmp_path / "b"), data=tmp_path / "copy", split="train", out=tmp_path / "out.json", size=96, workers=1,
        report=tmp_path / "report.html", save_thresholds=True,
        device="meta", engine="faster", batch_size=2, precision="bf16", compile=True,
        tiles=64, overlap=0.5, flip=True, scales=(1.0, 1.5),
        val=tmp_path / "copy" / "annotations" / "instances_val.json", val_images=tmp_path / "copy" / "val",
        difficult_as_crowd=True, results=tmp_path / "results.json",
    )  # fmt: skip
    (tmp_path / "results.json").write_text("[]")
    monkeypatch.setattr(eval_coco, "coco_metrics", lambda *args, **options: seen.append("results"))
    # some go with others, or take the place of --data
    bases = {"val": dict(data=None, val=file), "val_images": dict(data=None, val=file), "overlap": dict(tiles=64)}
    without = {"results": dict(model="", device=None)}
    assert other.keys() == {field.name for field in dataclasses.fields(eval_coco.EvalConfig)}
    for name, value in other.items():
        of_this = dataclasses.replace(base, **bases.get(name, {}))
        for config in (of_this, dataclasses.replace(of_this, **{name: value}, **without.get(name, {}))):
            eval_coco.main(config)
        assert seen[-1] != seen[-2] or (name in ("out", "report") and value.is_file()) or stored, name
        assert len(stored) == (name == "save_thresholds") and not stored.clear()
    for wrong in (
        dict(size=101),
        dict(size=0),
        dict(size=64.5),
        dict(workers=-1),
        dict(batch_size=0),
        dict(engine="x"),
        dict(data="x"),
        dict(tiles=16),
        dict(overlap=0.5),
        dict(overlap=1.0, tiles=64),
        dict(scales=(1, 20)),
        dict(scales=(1, 1)),
        dict(scales=()),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            eval_coco.main(dataclasses.replace(base, **wrong))


def test_what_was_typed_with_init_counts():
    """A preset's network steps back for the network of --init; what the user types does not."""
    line = ["finetune", "--data", "x", "--init", "y"]
    config = parse(line)
    untouched = dict(model=None, backbone=None, variant=None, channels=None, num_convs=None, pretrained_backbone=False)
    assert {name: getattr(config, name) for name in untouched} == untouched
    assert config.lr is None and not config.frozen_norm
    assert parse([*line, "--channels", "128"]).channels == 128  # the preset's own number too
    assert parse(["v39_1x", *line[1:]]).variant is None
    assert parse(["v39_1x", *line[1:], "--variant", "published"]).variant == "published"
    assert parse(["v39_1x", *line[1:], "--frozen-norm"]).frozen_norm
    with pytest.raises(ValueError, match="--no-frozen-norm"):
        parse([*line, "--no-frozen-norm"])
    assert parse(line[:3]).channels == 128 and parse(line[:3]).model == "fcos_vovnet27_slim_fpn"


def test_init_can_freeze_norms(tiny_coco, tmp_path):
    """The start's statistics stay, and so do its detections in evaluation mode."""
    start = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2).eval()
    start.save_pretrained(tmp_path / "start")
    config = TrainConfig(data=tiny_coco, out=tmp_path / "run", init=str(tmp_path / "start"), frozen_norm=True)
    model = build.build_model(config, ["a", "b"], [1, 2], build.load_start(config)).eval()
    assert model.config["frozen_norm"] and not start.config["frozen_norm"]
    names = {k for k in start.state_dict() if k.startswith("head.cls_logits") or "num_batches" in k}
    ours, theirs = ({k: v for k, v in m.state_dict().items() if k not in names} for m in (model, start))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_checkpoints_from_before_options_were_refused(config, tmp_path, monkeypatch):
    """With --init they hold network options that had no effect; without, they hold what is now a default."""
    start = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2)
    start.save_pretrained(tmp_path / "start")
    nothing = dict.fromkeys(("model", "backbone", "channels", "num_convs"))
    config = dataclasses.replace(config, init=str(tmp_path / "start"), eval_every=None, **nothing)
    stop_after(config, 2, monkeypatch)
    state = load_checkpoint(config.out / "checkpoints")
    state["run"] |= {"model": "'fcos_vovnet39_fpn'", "backbone": "None", "channels": "256", "num_convs": "4"}
    save_checkpoint(config.out / "checkpoints", 3, state)
    assert set_up(config, 0, 1, torch.device("cpu")).progress.step == 3
    with pytest.raises(ValueError, match="--channels 96 does not fit"):
        set_up(dataclasses.replace(config, channels=96), 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_accum_changes_a_run_with_live_batch_norm(config, monkeypatch, frozen_norm):
    """A batch norm sees one part of the batch at a time. Checkpoints from before this was noticed go on."""
    config = dataclasses.replace(config, frozen_norm=frozen_norm, eval_every=None)
    stop_after(config, 2, monkeypatch)
    changed = dataclasses.replace(config, accum=2)
    if not frozen_norm:
        with pytest.raises(ValueError, match="accum: was 1, now 2"):
            set_up(changed, 0, 1, torch.device("cpu"))
        state = load_checkpoint(config.out / "checkpoints")
        del state["run"]["accum"]
        save_checkpoint(config.out / "checkpoints", 3, state)
    assert set_up(changed, 0, 1, torch.device("cpu")).progress.step == 3


# ---- ranges ---------------------------------------------------------------------------------------------------------

WRONG = {
    "checkpoint_every": [0, -1], "checkpoint_minutes": [0, -1, float("inf"), "5"],
    "accum": [0], "ema": [1.5, 1, 0], "eval_every": [-1, 0], "test_size": [0],
    "batch_size": [0, 2.5, "4", True], "workers": [-1], "steps": [0], "lr": [0, -1, float("nan"), float("inf")],
    "min_size": [(0, 64), (96, 64), (64,), 64, (64, 2000)], "max_size": [0, 32], "milestones": [(2, 1), (0,), (1, 1)],
    "weight_decay": [-1], "bias_lr_factor": [-1], "warmup_steps": [-1], "warmup_factor": [-0.1, 2], "clip_grad": [0],
    "layer_decay": [0, 1.5], "seed": [-1, 2**63], "max_not_finite": [0], "channels": [0, 1], "num_convs": [-1],
    "zoom": [(0, 1), (2, 1), (0.1, 2)], "schedule": ["cos"], "warmup": ["none"], "augment": ["mosaic"],
    "evals": [-1], "epochs": [0, -1], "minutes": [0], "patience": [0], "seeds": [0, None], "loggers": [("x",), "wandb"],
    **dict.fromkeys(("copy_paste", "mosaic", "mixup", "color", "blur", "jpeg", "repeat_rare"), [-0.1, 1.1, None]),
    "augment_until": [0, 1.5, 0.5], "precision": ["int8"], "val_fraction": [0, 1, -0.5], "variant": ["best"],
    "tf32": [1, None],
    "compile": [1, "yes"], "data": ["text"], "model": ["nosuch", "fcos"], "backbone": ["resnet18"], "device": [0],
}  # fmt: skip


def test_an_option_out_of_range_is_refused_before_anything_starts(tmp_path):
    """Nothing is read or written; the message names the option."""
    base = TrainConfig(data=tmp_path / "no data", out=tmp_path / "run")
    check_config(base)
    assert RANGES.keys() <= WRONG.keys()
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                train_coco.main(dataclasses.replace(base, **{name: value}))
    with pytest.raises(ValueError, match="milestones.*cosine"):
        check_config(dataclasses.replace(base, schedule="cosine", milestones=(5,)))
    for both in (dict(epochs=1.0, minutes=1.0), dict(evals=1, eval_every=1)):
        with pytest.raises(ValueError, match=f"{list(both)[0]} and .* both say"):
            check_config(dataclasses.replace(base, **both))
    with pytest.raises(ValueError, match="pretrained_backbone"):
        check_config(dataclasses.replace(base, init="x", pretrained_backbone=True))
    assert list(tmp_path.iterdir()) == []


def test_presets_are_in_range(tmp_path):
    for _, preset in PRESETS.values():
        check_config(dataclasses.replace(preset, data=tmp_path))
