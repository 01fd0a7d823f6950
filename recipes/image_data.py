"""Images with one label each, read by timm, come in batches that depend on the configuration and the step only."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import Compose, InterpolationMode, TrivialAugmentWide

from build import collate_parts
from imagenet_presets import ClassifierConfig, ScheduledConfig
from loading import Batches
from runtime import StopSignal
from training_loop import seed_of
from vovnet_zoo.data import TrainSampler
from vovnet_zoo.words import counted

PACKAGES = {"wds/": "webdataset", "hfds/": "datasets"}  # what timm's readers of these need
Sample = tuple[Tensor, int, int]  # uint8 [3,H,W], label, the seed that it was augmented with


# ---- a split of the data --------------------------------------------------------------------------------------------


class Images(Dataset):
    """These images of a split can be read in any order. A key is an index, or (index, seed) in training."""

    def __init__(self, reader, transform: Callable):
        self.reader, self.transform = reader, transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Read and transform an image; `ValueError`, with its name, where it cannot be read."""
        index, seed = key if isinstance(key, tuple) else (key, 0)
        file, label = self.reader[index]
        try:
            with file:
                image = Image.open(file).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.reader.filename(index)} cannot be read as an image: {error}") from error
        with seeded(seed):
            return self.transform(image), int(label), seed


class Stream(IterableDataset):
    """These images of a split can only be read from the first to the last; each worker reads its own shards.

    The order depends on the epoch, the seed, and the numbers of processes and workers.
    """

    def __init__(self, source: IterableDataset, transform: Callable):
        self.source, self.reader, self.transform, self.seeds = source, source.reader, transform, (0,)

    def __len__(self) -> int:
        return self.reader.num_samples

    def set_epoch(self, *seeds: int, epoch: int) -> None:
        """Choose the order of the next pass, and the seeds of its augmentation."""
        self.seeds = (*seeds, epoch)
        self.reader.set_epoch(epoch)
        self.reader.ds = None  # timm's reader then shuffles as if this epoch were its first

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for place, (image, label) in enumerate(self.source):
            seed = seed_of(*self.seeds, worker.id if worker else 0, place)
            with seeded(seed):
                sample = self.transform(image), int(label), seed
            yield sample


def open_split(config: ClassifierConfig, split: str, transform: Callable, world_size: int = 1) -> Images | Stream:
    """Open a split of the data through timm's readers.

    `ValueError` where it cannot be opened, or a package is missing.
    """
    kind = config.dataset.partition("/")[0] + "/" if config.dataset else ""
    if kind not in ("", *PACKAGES):
        raise ValueError(f"dataset={config.dataset!r}: give wds/ or hfds/NAME, or leave it out for folders and .tar")
    if kind and importlib.util.find_spec(PACKAGES[kind]) is None:
        raise ValueError(f"dataset={config.dataset!r} needs the package {PACKAGES[kind]}: pip install {PACKAGES[kind]}")
    root, training = config.data, split == config.train_split
    if not kind:
        root = next((path for path in (root / f"{split}.tar", root / split) if path.exists()), None)
        if not config.data.is_dir():
            raise ValueError(f"{config.data}: no such folder")
        if root is None:
            raise ValueError(
                f"{config.data} has no folder {split}/ and no {split}.tar; put the images there, in a folder for each "
                "class"
            )
    try:
        source = create_dataset(
            config.dataset,
            root=str(root),
            split=split,
            search_split=False,
            is_training=training,
            batch_size=config.batch_size // world_size,
            seed=config.seed,
        )
    except (AssertionError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{root}: timm cannot read the split {split!r}: {error}") from error
    return Stream(source, transform) if kind == "wds/" else Images(source.reader, transform)


def class_names_of(split: Images | Stream) -> list[str]:
    """List the names of the classes by label; a stream of numbers has the names "0", "1" and so on.

    `ValueError` where a stream does not tell the number of classes.
    """
    reader = split.reader
    to_index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if to_index:
        return sorted(to_index, key=to_index.__getitem__)
    if count := getattr(reader, "info", {}).get("num_classes"):
        return [str(i) for i in range(count)]
    raise ValueError("the data do not tell how many classes they have; add num_classes to _info.json beside the shards")


def describe_split(split: Images | Stream) -> str:
    """Return a hash of what a split holds, and words: its names and labels, or the numbers that its reader knows."""
    reader, about = split.reader, [len(split), class_names_of(split)]
    if isinstance(split, Stream):
        about += [list(map(str, reader.split_info.filenames))]
    elif not hasattr(reader, "dataset"):  # of Hugging Face, whose names are not known without reading the images
        labels = reader.targets if hasattr(reader, "targets") else [label for _, label in reader.samples]
        about += [reader.filenames(), [int(label) for label in labels]]
    words = f"{counted(len(split), 'image')} of {counted(len(class_names_of(split)), 'class')}"
    return f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()} {words}"


# ---- transforms -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms draw from (Python, NumPy and torch), and put them back at the end."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def train_transform(config: ClassifierConfig, mean: tuple[float, ...]) -> Callable:
    """Make timm's training transform, of PIL images to uint8 [3,H,W]."""
    policy = config.auto_augment
    crop, augment, to_tensor = create_transform(
        config.train_size,
        is_training=True,
        scale=(config.min_scale, 1.0),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=None if policy == "ta_wide" else policy,
        interpolation=config.train_interpolation,
        mean=mean,
        use_prefetcher=True,
        separate=True,
    )
    if policy == "ta_wide":  # timm has no such policy
        augment = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    steps = [crop, augment, to_tensor]
    if config.erase:
        steps.append(functools.partial(erase, RandomErasing(config.erase, device="cpu"), mean))
    return Compose(steps)


def erase(eraser: RandomErasing, mean: tuple[float, ...], image: Tensor) -> Tensor:
    """Erase to the mean colour. timm's eraser writes 0, the mean of normalised images; these are not normalised yet."""
    kept = eraser(torch.ones(image.shape)).bool()
    colour = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)
    return torch.where(kept, image, colour[:, None, None])


def eval_transform(config: ClassifierConfig) -> Callable:
    """Make timm's evaluation transform, of PIL images to uint8 [3,H,W]."""
    return create_transform(
        config.test_size, crop_pct=config.crop_pct, interpolation=config.interpolation, use_prefetcher=True
    )


# ---- batches --------------------------------------------------------------------------------------------------------


def collate(samples: list[Sample], mix: FastCollateMixup | None = None) -> dict[str, Tensor]:
    """Make a batch of images uint8 [B,3,H,W] and labels int64 [B], or [B,K] if they are mixed.

    Each pair of neighbours is mixed by itself, with its own seed: the result does not depend on the size of the part.
    """
    if mix is None:
        images, labels, _ = zip(*samples, strict=True)
        return {"images": stack(images), "labels": torch.tensor(labels)}
    pairs = []
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        with seeded(seed_of(first[2], second[2])):
            pairs.append(mix([first[:2], second[:2]]))
    images, labels = zip(*pairs, strict=True)
    return {"images": stack([image for pair in images for image in pair]), "labels": torch.cat(labels)}


def stack(images) -> Tensor:
    """Stack images channels last in memory, as a network with Winograd or cuDNN wants them."""
    return torch.stack(list(images)).contiguous(memory_format=torch.channels_last)


def train_batches(
    config: ScheduledConfig,
    split: Images | Stream,
    num_classes: int,
    start_step: int,
    rank: int,
    world_size: int,
    stop: StopSignal | None = None,
    device: torch.device | None = None,
) -> Iterator[list[dict[str, Tensor]]]:
    """Give, for each step from `start_step` on, this process's share of the batch in `config.accum` parts.

    They are in pinned memory if they are to be copied to a GPU, `device`.
    """
    mix = None
    if config.mixup or config.cutmix:
        mix = FastCollateMixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)
    options = dict(
        collate_fn=functools.partial(collate_parts, count=config.accum, collate=functools.partial(collate, mix=mix)),
        workers=config.workers,
        stop=stop,
        pin_memory=device is not None and device.type == "cuda",
    )
    if isinstance(split, Images):
        sampler = TrainSampler(
            np.ones(len(split)),
            config.batch_size,
            num_steps=config.steps,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
            repeats=config.repeats,
        )
        yield from Batches(split, batch_sampler=sampler, **options)
        return
    share, per_epoch = config.batch_size // world_size, int(len(split) // config.batch_size)
    for epoch in itertools.count(start_step // per_epoch):
        split.set_epoch(config.seed, rank, epoch=epoch)
        generator = torch.Generator().manual_seed(seed_of(config.seed, rank, epoch))  # of the workers' seeds
        batches = Batches(split, batch_size=share, drop_last=True, generator=generator, **options)
        skip = start_step - epoch * per_epoch if epoch == start_step // per_epoch else 0
        yield from itertools.islice(batches, skip, per_epoch)


def eval_batches(
    config: ClassifierConfig, split: Images | Stream, rank: int, world_size: int, stop: StopSignal | None = None
) -> Iterator[dict[str, Tensor]]:
    """Give this process's part of a split once, in batches whose sizes may differ."""
    size = max(1, config.batch_size // (world_size * config.accum))
    options = dict(batch_size=size, collate_fn=collate, workers=config.workers, stop=stop)
    if isinstance(split, Images):
        mine = torch.utils.data.Subset(split, range(rank, len(split), world_size))
        yield from Batches(mine, **options)
        return
    # every process reads the whole stream, since shards cannot be shared out without losing or doubling images
    split.set_epoch(0, epoch=0)
    split.reader.dist_rank, split.reader.dist_num_replicas = 0, 1
    yield from itertools.islice(Batches(split, **options), rank, None, world_size)


def check_data(config: ClassifierConfig, train: Images | Stream, val: Images | Stream, world_size: int) -> None:
    """Raise `ValueError` where the configuration and the data do not go together."""
    if (ours := class_names_of(train)) != (theirs := class_names_of(val)):
        raise ValueError(f"{config.data}: the splits have different classes: train {ours}, val {theirs}")
    divisor = world_size * config.accum * (2 if config.mixup or config.cutmix else 1)
    if config.batch_size % divisor:
        pairs = ", in pairs of images to mix" if config.mixup or config.cutmix else ""
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared out over {counted(world_size, 'process')} x "
            f"{counted(config.accum, 'part')}{pairs}; give a multiple of {divisor}"
        )
    if isinstance(train, Stream):
        readers = world_size * max(1, config.workers)
        if (shards := len(train.reader.split_info.filenames)) < readers:
            raise ValueError(
                f"{config.data}: {config.train_split!r} has {counted(shards, 'shard')}, too few for "
                f"{counted(world_size, 'process')} x {counted(config.workers, 'worker')}; lower --workers"
            )
        if config.repeats > 1:
            raise ValueError(f"repeats={config.repeats}: a stream (wds/) gives each image once; give --repeats 1")
    if len(train) < config.batch_size and isinstance(train, Stream):
        raise ValueError(
            f"{config.data}: {counted(len(train), 'image')} in {config.train_split!r}, fewer than batch_size"
        )


def steps_per_epoch(config: ClassifierConfig, train: Images | Stream) -> float:
    """Return the number of steps in an epoch; a stream leaves out the images that do not fill a batch."""
    per_epoch = len(train) / config.batch_size
    return math.floor(per_epoch) if isinstance(train, Stream) else per_epoch
