"""The tests build torchvision's FCOS here, with weights that find much in any image, and its converted twin."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from vovnet_zoo import FCOS
from vovnet_zoo.convert import COCO_IDS, convert
from vovnet_zoo.detectors import archs, build_converted


def make_torchvision(num_classes: int = 91, *, trained: bool = True, **options) -> TorchvisionFCOS:
    """Build what `fcos_resnet50_fpn(weights=...)` builds, with drawn weights, in evaluation mode.

    `trained` draws them so that they act as after a training: norms that change their input, confident classes and
    boxes of all sizes, and classes of no object that are never found.
    """
    torch.manual_seed(0)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    fpn = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    net = TorchvisionFCOS(fpn, num_classes, **options)
    if trained:
        for module in net.modules():
            if isinstance(module, FrozenBatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
                nn.init.uniform_(module.weight, 0.2, 0.6)
                nn.init.uniform_(module.bias, -0.1, 0.1)
        classes, boxes = net.head.classification_head.cls_logits, net.head.regression_head
        nn.init.normal_(classes.weight, std=0.03)
        nn.init.constant_(classes.bias, -5.6)
        nn.init.normal_(boxes.bbox_reg.weight, std=0.03)
        nn.init.constant_(boxes.bbox_reg.bias, 2.0)
        nn.init.normal_(boxes.bbox_ctrness.weight, std=0.03)
        nothing = torch.ones(num_classes, dtype=torch.bool)
        nothing[slots(num_classes)] = False
        with torch.no_grad():
            classes.weight[nothing] = 0
            classes.bias[nothing] = -100
    return net.eval()


def slots(num_classes: int) -> list[int]:
    """List torchvision's class of each of our labels."""
    return COCO_IDS if num_classes == 91 else list(range(1, num_classes))


def twin(state_dict: dict[str, Tensor], **options) -> FCOS:
    """Convert the weights of torchvision's model; `options` are arguments of `FCOS`."""
    return build_converted(convert(state_dict, archs()), **options)
