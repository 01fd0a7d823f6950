"""The FCOS network (arXiv 1904.01355 and 2006.09214) turns images into `Predictions`: backbone -> FPN -> head."""

from __future__ import annotations

import math
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .arguments import check_choice, check_flag, check_number, check_tensor, is_number
from .backbone import Backbone, backbone_maps, create_backbone, depth_below_top, probe_channels
from .config import (
    DEFAULTS,
    RANGES,
    THRESHOLDS,
    VARIANTS,
    BoxLoss,
    CenternessOn,
    DetectorConfig,
    Distance,
    Matching,
    Points,
    Resize,
    Thresholds,
)
from .hub import StrictHubMixin
from .words import counted_classes


class FCOS(
    nn.Module,
    StrictHubMixin,
    library_name="vovnet_zoo",
    license="apache-2.0",
    pipeline_tag="object-detection",
    tags=["fcos", "vovnet", "timm"],
    paper_url="https://arxiv.org/abs/1904.01355",
):
    """This fully convolutional one-stage detector stands on a timm backbone.

    The network takes tensors and returns tensors; `predict` resizes and normalises images, `postprocess` does NMS.
    The arguments together are the model's `config`, which `save_pretrained` writes as JSON.

    Args:
        backbone: timm model that gives feature maps at strides 8, 16 and 32.
        num_classes: foreground classes K.
        class_names: K names, in label order; None where unknown.
        category_ids: K ids that the dataset gives the classes, in label order; None where unknown.
        channels: width of the FPN and of the head, a multiple of 32 from 64 on.
        num_convs: convolutions in each tower of the head.
        distance: how the head's output becomes distances in pixels, `s` a learned scale per level:
            "relu": `relu(s * x) * stride` (arXiv 2006.09214); "exp": `exp(s * x)` (arXiv 1904.01355, section 3.1).
        centerness_on: the tower that predicts centerness, "box" (2006.09214) or "cls" (1904.01355).
        frozen_norm: the backbone's batch norms are fixed affine maps (buffers), not trained.
        prior: initial foreground probability of every class (RetinaNet, arXiv 1708.02002, section 4.1).
        image_mean, image_std: per RGB channel, for pixels in 0..1; None takes the numbers of the backbone.
        min_size, max_size: `predict` resizes the shorter side of an image to `min_size` pixels, unless the longer side
            would exceed `max_size`.
        thresholds: class name -> score, in 0..1: `predict` leaves out a detection of this class that scores less,
            unless it gets another `score_threshold`. For a class that is not named, the `score_threshold` below counts.
        resize: how images are resized, see `resize_image` and `resize_size`.
        points: where the cells of a map are in the image, see `make_points`.
        plus_one: boxes follow the published pixel convention in data, loss, NMS and results: a box covers the pixels
            x1..x2, so its width is x2 - x1 + 1.
        keep_empty: boxes without a pixel, as in the padding, are detections too.
        candidate_threshold, score_threshold, nms_threshold, topk, max_detections: the fields of `Thresholds` that
            `predict` and `compile_detector` use unless told otherwise.
        center_radius, matching, box_loss, weigh_boxes, add_images: `FCOSLoss.of(model)` measures the errors of this
            detector by them.

    Raises:
        ValueError: an argument has another type or is out of range (see `RANGES`), or the backbone is unknown or has no
            maps at strides 8, 16, 32.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        channels: int = 256,
        num_convs: int = 4,
        distance: Distance = DEFAULTS["distance"],
        centerness_on: CenternessOn = DEFAULTS["centerness_on"],
        frozen_norm: bool = False,
        prior: float = 0.01,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        thresholds: Mapping[str, float] | None = None,
        resize: Resize = DEFAULTS["resize"],
        points: Points = DEFAULTS["points"],
        plus_one: bool = DEFAULTS["plus_one"],
        keep_empty: bool = DEFAULTS["keep_empty"],
        candidate_threshold: float = THRESHOLDS.candidate_threshold,
        score_threshold: float = cast(float, THRESHOLDS.score_threshold),
        nms_threshold: float = THRESHOLDS.nms_threshold,
        topk: int = THRESHOLDS.topk,
        max_detections: int = THRESHOLDS.max_detections,
        center_radius: float | None = DEFAULTS["center_radius"],
        matching: Matching = DEFAULTS["matching"],
        box_loss: BoxLoss = DEFAULTS["box_loss"],
        weigh_boxes: bool = DEFAULTS["weigh_boxes"],
        add_images: bool = DEFAULTS["add_images"],
    ):
        super().__init__()
        config: dict[str, Any] = dict(
            backbone=backbone,
            num_classes=num_classes,
            class_names=class_names,
            category_ids=category_ids,
            channels=channels,
            num_convs=num_convs,
            distance=distance,
            centerness_on=centerness_on,
            frozen_norm=frozen_norm,
            prior=prior,
            image_mean=image_mean,
            image_std=image_std,
            min_size=min_size,
            max_size=max_size,
            thresholds=thresholds,
            resize=resize,
            points=points,
            plus_one=plus_one,
            keep_empty=keep_empty,
            candidate_threshold=candidate_threshold,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            topk=topk,
            max_detections=max_detections,
            center_radius=center_radius,
            matching=matching,
            box_loss=box_loss,
            weigh_boxes=weigh_boxes,
            add_images=add_images,
        )
        check_config(config)
        body = create_backbone(backbone)
        for key in ("mean", "std"):
            if config[f"image_{key}"] is None:
                config[f"image_{key}"] = list(body.pretrained_cfg[key])
        self.config = cast(DetectorConfig, config)
        self._hub_mixin_config = config  # the mixin's own lacks the mean and std that came from the backbone

        in_channels = probe_channels(body, backbone)
        self.strides = [8, 16, 32, 64, 128]
        self.backbone: Backbone = freeze_batch_norm_2d(body) if frozen_norm else body
        if frozen_norm and batch_norms(self.backbone):
            raise ValueError(
                f"frozen_norm=True: backbone {backbone!r} has batch norms other than 2-dimensional ones, which would "
                "be trained on; leave frozen_norm out, or choose another backbone"
            )
        self.fpn = FeaturePyramidNetwork(in_channels, channels, extra_blocks=ExtraLevels(channels, channels))
        self.head = FCOSHead(channels, num_classes, num_convs, self.strides, distance, centerness_on, prior)

    @property
    def class_names(self) -> list[str] | None:
        """Return the K names in label order; None where unknown."""
        return self.config["class_names"]

    @property
    def num_classes(self) -> int:
        """Return the number of foreground classes, K."""
        return self.config["num_classes"]

    def __repr__(self) -> str:
        config, classes = self.config, counted_classes(self.num_classes, self.class_names)
        millions = sum(p.numel() for p in self.parameters()) / 1e6
        return f"FCOS({config['backbone']}, {classes}, short side {config['min_size']} px, {millions:.1f}M parameters)"

    def forward(self, images: Tensor) -> Predictions:
        """Predict classes, boxes and centerness at every location.

        Args:
            images: [B,3,H,W], normalised with the mean and std of `config`, zero-padded so that 32 divides H and W.
        """
        cls, reg, ctr = self.forward_head(self.forward_features(images))
        points, strides = self.make_points([x.shape[-2:] for x in cls], images.shape[-2:], images.device)
        return Predictions(
            logits=torch.cat([x.flatten(2).transpose(1, 2) for x in cls], dim=1),  # [B,P,K]
            distances=torch.cat([x.flatten(2).transpose(1, 2) for x in reg], dim=1),  # [B,P,4]
            centerness=torch.cat([x.flatten(1) for x in ctr], dim=1),  # [B,P]
            points=points,
            strides=strides,
        )

    def make_points(
        self, sizes: Sequence[Sequence[int]], input_size: Sequence[int], device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Compute the locations of this detector, see `make_points`.

        Args:
            sizes: (h, w) of each map.
            input_size: (H, W) of the network input, padding included.

        Raises:
            ValueError: there are not as many sizes as levels, or one is no pair.
        """
        if not isinstance(sizes, list | tuple) or len(sizes) != len(self.strides) or not all(map(is_pair, sizes)):
            raise ValueError(f"sizes must be the (h, w) of {len(self.strides)} maps, got {reprlib.repr(sizes)}")
        if not is_pair(input_size):
            raise ValueError(f"input_size must be (H, W), got {reprlib.repr(input_size)}")
        corner = self.config["points"] == "corner"
        return make_points(sizes, self.strides, device, input_size if corner else None)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the pyramid's maps P3..P7, [B,C,H/8,W/8] .. [B,C,H/128,W/128] (each size is rounded up)."""
        hint = "; vovnet_zoo.predict(model, images) takes images of any kind and size"
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            hint += ", and vovnet_zoo.data.normalize turns a batch of bytes into floating point"
        check_tensor("images", images, ("B", 3, "H", "W"), why=hint)
        maps = backbone_maps(self.backbone, images)
        return list(self.fpn(OrderedDict(zip(("c3", "c4", "c5"), maps, strict=True))).values())

    if TYPE_CHECKING:  # nn.Module's own says that any arguments give any result

        def __call__(self, images: Tensor) -> Predictions: ...

    @classmethod
    def complete_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Add the conventions to a configuration that was saved before they were arguments of `FCOS`.

        A detector with the published head was trained with the published loss. Its boxes follow the published pixel
        convention if it was converted, which the published pixel range 0..255 tells; trainings here did not use it.
        """
        published = VARIANTS["published"]
        if any(config.get(key) != published[key] for key in ("distance", "centerness_on")):
            return config
        converted = config.get("image_std") == [1 / 255] * 3
        loss = {key: published[key] for key in ("center_radius", "box_loss", "add_images")}
        return {"plus_one": converted, **loss, **config}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the backbone's stages and of the head's towers for the backward pass.

        Raises:
            ValueError: the backbone has batch norms that are trained, which would count every batch twice, or timm
                cannot do this for the backbone.
        """
        check_flag("enable", enable)
        if enable and batch_norms(self.backbone):
            raise ValueError(
                "checkpointing runs a stage twice, so its batch norms would count every batch twice; "
                "use it with frozen_norm=True"
            )
        try:
            self.backbone.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            if enable:
                name = self.config["backbone"]
                raise ValueError(f"timm has no gradient checkpointing for the feature maps of {name!r}") from error
        self.head.grad_checkpointing = enable

    def reset_classifier(
        self, num_classes: int, class_names: Sequence[str] | None = None, category_ids: Sequence[int] | None = None
    ) -> None:
        """Let the detector learn other classes: their last convolution is a new one, and all else stays.

        A class that the detector has by its name keeps its weights. The arguments are those of `FCOS`; `config` holds
        them then, and no `thresholds`. Make the optimizer afterwards.

        Raises:
            ValueError: an argument is out of range, or there is not one name and one id for each class.
        """
        config: dict[str, Any] = {**self.config, "num_classes": num_classes, "class_names": class_names}
        config |= {"category_ids": category_ids, "thresholds": None}
        check_config(config)
        old, rows = self.head.cls_logits, shared_classes(self.class_names, config["class_names"])
        new = nn.Conv2d(config["channels"], config["num_classes"], 3, padding=1).to(old.weight)
        nn.init.normal_(new.weight, std=0.01)  # as FCOSHead does
        nn.init.constant_(new.get_parameter("bias"), prior_bias(config["prior"]))
        with torch.no_grad():
            for now, before in rows:
                for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
                    ours[now] = theirs[before]
        self.head.cls_logits = new
        self.config = cast(DetectorConfig, config)
        self._hub_mixin_config = config  # which save_pretrained writes

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function by which timm's optimizers with `layer_decay` group the parameters, the first part first.

        It maps the name of a parameter to the number of its group, see `depth_below_top`: 0 is the group of FPN and
        head, and the backbone's parts before it have negative numbers. The groups are the same with `coarse`.
        """
        check_flag("coarse", coarse)
        depths = {f"backbone.{name}": depth for name, depth in depth_below_top(self.backbone).items()}
        return lambda name: -depths.get(name, 0)

    def forward_head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run the head on the maps of `forward_features`, and return three lists over the levels.

        Returns:
            class logits [B,K,h,w].
            distances (left, top, right, bottom) [B,4,h,w] in pixels of the network input.
            centerness logits [B,1,h,w].

        Raises:
            ValueError: there are not as many maps as levels, or one is not [B,C,h,w].
        """
        if not isinstance(features, list | tuple) or len(features) != len(self.strides):
            raise ValueError(f"features must be the {len(self.strides)} maps that forward_features returns, as a list")
        for features_of_level in features:
            check_tensor("features", features_of_level, ("B", self.config["channels"], "h", "w"))
        return self.head(features)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """List the batch norms in a module that are not fixed, of any number of dimensions."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


PROBABILITIES = ("candidate_threshold", "score_threshold", "nms_threshold")
SWITCHES = ("frozen_norm", "plus_one", "keep_empty", "weigh_boxes", "add_images")
CHOICES: dict[str, tuple[str, ...]] = {
    "distance": get_args(Distance),
    "centerness_on": get_args(CenternessOn),
    "resize": get_args(Resize),
    "points": get_args(Points),
    "matching": get_args(Matching),
    "box_loss": get_args(BoxLoss),
}


def check_config(config: dict[str, Any]) -> None:
    """Check the arguments of `FCOS`, and turn sequences and numbers into lists and numbers that JSON knows.

    Raises:
        ValueError: an argument has another type than documented or is out of range; the message names it.
    """
    if not isinstance(config["backbone"], str):
        got = type(config["backbone"]).__name__  # the text of a module has many lines
        own = "timm.models.register_model gives a network of your own a name"
        raise ValueError(f"backbone must be the name of a timm model, got {got}; {own}")
    for name, (lowest, highest, why) in RANGES.items():
        check_number(name, config[name], lowest, highest, whole=True, why=why)
        config[name] = int(config[name])
    if config["channels"] % 32:
        raise ValueError(f"channels={config['channels']}: the head's GroupNorm has 32 groups; give 64, 96 ..")
    for name in SWITCHES:
        check_flag(name, config[name])
    for name, choices in CHOICES.items():
        check_choice(name, config[name], choices)
    check_radius(config["center_radius"])
    for name in PROBABILITIES:
        check_number(name, config[name], 0, 1)
        config[name] = float(config[name])
    if not is_number(config["prior"], 1e-12, 1 - 1e-12):
        raise ValueError(f"prior={reprlib.repr(config['prior'])}: give a probability above 0 and below 1")
    config["prior"] = float(config["prior"])
    for name, least in (("image_mean", -1000.0), ("image_std", 1e-6)):
        value = config[name]
        if value is not None:
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable) or len(value := list(value)) != 3:
                raise ValueError(f"{name}={reprlib.repr(value)}: give 3 numbers, for red, green and blue")
            if not all(is_number(number, least, 1000) for number in value):
                raise ValueError(f"{name}={reprlib.repr(value)}: give 3 numbers from {least} to 1000")
            config[name] = [float(number) for number in value]
    names = config["class_names"]
    if names is not None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(x, str) for x in names):
            raise ValueError(f"class_names={reprlib.repr(names)}: give a list of names")
        if len(names) != config["num_classes"]:
            raise ValueError(
                f"{len(names)} class_names for num_classes={config['num_classes']}: give a name for each class, and "
                "their number as num_classes"
            )
        config["class_names"] = list(names)
    ids = config["category_ids"]
    if ids is not None:
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise ValueError(f"category_ids={reprlib.repr(ids)}: give a list of whole numbers")
        if not all(is_number(x, 0, 2**63 - 1, Integral) for x in ids) or len(set(ids)) != len(ids):
            raise ValueError(f"category_ids={reprlib.repr(ids)}: give whole numbers from 0 on, each once")
        if len(ids) != config["num_classes"]:
            raise ValueError(f"{len(ids)} category_ids for num_classes={config['num_classes']}")
        config["category_ids"] = [int(x) for x in ids]
    if config["thresholds"] is not None:
        config["thresholds"] = check_thresholds(config["thresholds"], config["class_names"], "thresholds")


def check_ranges(thresholds: Thresholds) -> None:
    """Raise `ValueError` if a number is out of range; a tensor of scores is not looked at."""
    for name in PROBABILITIES:
        if not isinstance(value := getattr(thresholds, name), Tensor):
            check_number(name, value, 0, 1)
    for name in ("topk", "max_detections"):
        check_number(name, getattr(thresholds, name), *RANGES[name][:2], whole=True)


def check_thresholds(value: Any, class_names: Sequence[str] | None, argument: str) -> dict[str, float]:
    """Check a score for each of some classes, by name, and return the scores as a dict that JSON knows.

    Raises:
        ValueError: the model has no class of a name, or a score is not in 0..1; the message names the argument.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{argument}={reprlib.repr(value)}: give a score for each class name, as a dict")
    if class_names is None:
        raise ValueError(f"{argument}={reprlib.repr(value)}: this model's config has no class_names to look them up in")
    for name, score in value.items():
        if name not in class_names:
            raise ValueError(f"{argument}: no class {name!r}; the model's classes are {', '.join(class_names)}")
        if not is_number(score, 0, 1):
            raise ValueError(f"{argument}[{name!r}]={reprlib.repr(score)}: give a score from 0 to 1")
    return {name: float(score) for name, score in value.items()}


def check_radius(center_radius: float | None) -> None:
    """Raise `ValueError` unless a centre's radius is a number above 0, or None."""
    if center_radius is not None and not is_number(center_radius, 1e-6, 1e6):
        raise ValueError(f"center_radius={reprlib.repr(center_radius)}: give a number above 0, or None")


class ExtraLevels(LastLevelP6P7):
    """P6 and P7 are computed as torchvision does; right in bfloat16 on a CPU for images up to 128 pixels wide, too.

    oneDNN makes mistakes in a 3x3 convolution with stride 2 of maps that are 1 or 2 wide in bfloat16: with AMX it does
    not write the whole result, with AVX-512 and AMX not the whole gradient of the weight (torch 2.11 and 2.14.1). Such
    a map is computed with zeros on its right, up to a width of 3.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = convolve_narrow(self.p6, p[-1])
        p7 = convolve_narrow(self.p7, F.relu(p6))
        return [*p, p6, p7], [*names, "p6", "p7"]


def convolve_narrow(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 3x3 convolution with stride 2 and padding 1, whose result for a map of width 1 or 2 has width 1."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] < 3:
        return conv(F.pad(x, (0, 3 - x.shape[-1])))[..., :1]
    return conv(x)


class FCOSHead(nn.Module):
    """The head has two towers of convolutions, which all levels share (arXiv 1904.01355, figure 2)."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_convs: int,
        strides: Sequence[int],
        distance: str,
        centerness_on: str,
        prior: float,
    ):
        super().__init__()
        self.strides, self.distance, self.centerness_on = strides, distance, centerness_on
        self.grad_checkpointing = False
        self.cls_tower = Tower(channels, num_convs)
        self.box_tower = Tower(channels, num_convs)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(strides)))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.get_parameter("bias"))
        nn.init.constant_(self.cls_logits.get_parameter("bias"), prior_bias(prior))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        recompute = self.grad_checkpointing and self.training
        cls_maps, box_maps = (x.forward_levels(features, recompute) for x in (self.cls_tower, self.box_tower))
        cls, raw, ctr = self.outputs(cls_maps, box_maps)
        reg = []
        for x, stride, scale in zip(raw, self.strides, self.scales.unbind(), strict=True):
            x = scale * x.to(torch.promote_types(x.dtype, torch.float32))  # pixels need more than bf16's 8 bits
            reg.append(F.relu(x) * stride if self.distance == "relu" else x.exp())
        return cls, reg, ctr

    def outputs(
        self, cls_maps: Sequence[Tensor], box_maps: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Apply the last convolutions to the towers' maps: class logits, raw distances and centerness logits."""
        centered = box_maps if self.centerness_on == "box" else cls_maps
        cls, raw = [self.cls_logits(x) for x in cls_maps], [self.box_distances(x) for x in box_maps]
        return cls, raw, [self.centerness(x) for x in centered]


def prior_bias(prior: float) -> float:
    """Return the logit of the probability `prior`."""
    return -math.log((1 - prior) / prior)


def shared_classes(before: Sequence[str] | None, now: Sequence[str] | None) -> list[tuple[int, int]]:
    """List the label of each class that was there before by its name, and the label that it had then."""
    labels = {name: i for i, name in enumerate(before or ())}
    return [(i, labels[name]) for i, name in enumerate(now or ()) if name in labels]


class Tower(nn.Sequential):
    """A tower is a sequence of convolution, group norm and ReLU."""

    def __init__(self, channels: int, num_convs: int):
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(32, channels), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # nn.Sequential does the same, but torch 2.11 does not compile modules that have no code outside of torch.nn.
        for layer in self:
            x = layer(x)
        return x

    def forward_levels(self, maps: Sequence[Tensor], recompute: bool) -> Sequence[Tensor]:
        """Run on the maps [B,C,h,w] of all levels; `recompute` keeps only them for the backward pass."""
        return [checkpoint(self, x, use_reentrant=False) if recompute else self(x) for x in maps]


class Predictions(NamedTuple):
    """FCOS predicts these numbers at the P locations of all levels: P3 first, each level row by row."""

    logits: Tensor  # [B,P,K] class logits
    distances: Tensor  # [B,P,4] left, top, right, bottom, in pixels of the network input
    centerness: Tensor  # [B,P] logits
    points: Tensor  # [P,2] x, y in pixels of the network input
    strides: Tensor  # [P] stride of the point's level

    def __repr__(self) -> str:
        return shown_shapes(self)


def shown_shapes(value: NamedTuple) -> str:
    """Write a tuple of tensors in one line, with their types and shapes instead of their numbers."""
    parts = [
        f"{name}={str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x!r}"
        for name, x in value._asdict().items()
    ]
    return f"{type(value).__name__}({', '.join(parts)})"


def check_predictions(preds: Predictions) -> None:
    """Raise `ValueError` unless `preds` are predictions whose tensors have the documented shapes."""
    if not isinstance(preds, Predictions):
        raise ValueError(f"preds must be the Predictions that a detector returns, got {type(preds).__name__}")
    check_tensor("preds.logits", preds.logits, ("B", "P", "K"))
    check_tensor("preds.distances", preds.distances, (*preds.logits.shape[:2], 4))
    check_tensor("preds.centerness", preds.centerness, (*preds.logits.shape[:2],))
    check_tensor("preds.points", preds.points, (preds.logits.shape[1], 2))
    check_tensor("preds.strides", preds.strides, (preds.logits.shape[1],), "")


def level_sizes(height: int, width: int, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Compute the (h, w) of each pyramid map from the network input's height and width, both multiples of 32."""
    return [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in strides]


def is_pair(value: Any) -> bool:
    """Tell whether `value` is a list or tuple of two."""
    return isinstance(value, list | tuple) and len(value) == 2


def make_points(
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    device: torch.device | str,
    input_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the locations of the cells of all pyramid maps.

    The cell (ix, iy) of a map is at x = `ix * stride + stride // 2`, likewise y (arXiv 1904.01355, section 3.1;
    `points="center"`). With `input_size` it is at x = `ix * (W // w)`, likewise y, as in torchvision
    (`points="corner"`): at the cell's corner, and `W // w` is not the stride where the stride does not divide W.

    Args:
        sizes: (h, w) of each map.
        strides: stride of each map in pixels.
        input_size: (H, W) of the network input, padding included, or None.

    Returns:
        points: float32 [P,2] (x, y) in pixels of the network input.
        strides: float32 [P], stride of each point's map.
    """
    points, point_strides = [], []
    for (h, w), stride in zip(sizes, strides, strict=True):
        x = torch.arange(w, device=device, dtype=torch.float32)
        y = torch.arange(h, device=device, dtype=torch.float32)
        if input_size is None:
            x, y = x * stride + stride // 2, y * stride + stride // 2
        else:
            x, y = x * (input_size[1] // w), y * (input_size[0] // h)
        points.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).reshape(-1, 2))
        point_strides.append(torch.full((h * w,), float(stride), device=device))
    return torch.cat(points), torch.cat(point_strides)
