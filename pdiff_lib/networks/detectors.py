"""Networks that find objects in images: torchvision's detectors and segmenters, and the same on a small backbone. And a detector in two
parts: what it computes at every place, which can be captured, and how detections are made of that, which cannot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from jaxtyping import Float, UInt8
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from pdiff_lib.base import own
from pdiff_lib.networks import weights as files

WIDTHS, FEATURES = (32, 64, 128, 256), 64  # channels of the small backbone's four stages, of its pyramid
STRIDES = (4, 8, 16, 32)  # of these, in pixels
STAGES = ("layer1", "layer2", "layer3", "layer4")
DETECTIONS = 20  # per image, at most, of the small detectors
MINIS = ("fasterrcnn-mini", "fcos-mini"), ("fcn-mini",)
PUBLISHED = ("fasterrcnn_", "fcos_"), ("fcn_", "deeplabv3_", "lraspp_")  # how torchvision's names begin


class Backbone(nn.Module):
    """A ResNet of four basic blocks, 1.2 million numbers.

    Args:
        output_stride: of the last stage, in pixels; below 32, later stages are dilated.

    Attributes:
        body: timm's ResNet, without its classifier.
    """

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        self.body = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, output_stride=output_stride, stem_width=WIDTHS[0] // 2, stem_type="deep",
                           channels=WIDTHS, global_pool="")

    def stages(self, x: Float[Tensor, "B 3 H W"]) -> OrderedDict[str, Tensor]:
        b = self.body
        x = b.maxpool(b.act1(b.bn1(b.conv1(x))))
        found = OrderedDict()
        for name in STAGES:
            x = found[name] = getattr(b, name)(x)
        return found


class Pyramid(Backbone):
    """The small backbone with a feature pyramid; images -> `FEATURES` channels at every stride, by stage.

    Attributes:
        out_channels: `FEATURES`.
    """

    out_channels = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(WIDTHS), FEATURES)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> OrderedDict[str, Tensor]:
        return self.fpn(self.stages(x))


class Dilated(Backbone):
    """The small backbone as torchvision's segmenters take one: its last stage at stride 8, as FCN has it."""

    def __init__(self) -> None:
        super().__init__(output_stride=8)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        return {"out": self.stages(x)[STAGES[-1]]}


def _mini(name: str, classes: int, size: int) -> nn.Module:
    plain = {"min_size": size, "max_size": size, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    if name == "fcn-mini":
        return FCN(Dilated(), FCNHead(WIDTHS[-1], classes + 1))
    pyramid = Pyramid()
    if name == "fcos-mini":
        # An FCOS level is for objects of 4 to 8 times its anchors' side, the first and the last for all beyond: here of up to 16, 32, ... pixels.
        anchors = AnchorGenerator(tuple((stride // 2,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
        return FCOS(pyramid, classes + 1, anchor_generator=anchors, head=FCOSHead(FEATURES, 1, classes + 1, num_convs=2), score_thresh=0.05,
                    detections_per_img=DETECTIONS, topk_candidates=100, **plain)
    anchors = AnchorGenerator(tuple((4 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES))
    return FasterRCNN(pyramid, rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=500, rpn_pre_nms_top_n_test=200,
                      rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=50, rpn_batch_size_per_image=64, box_batch_size_per_image=64,
                      box_roi_pool=MultiScaleRoIAlign(list(STAGES), 5, 2),
                      box_head=TwoMLPHead(FEATURES * 25, 256),
                      box_predictor=FastRCNNPredictor(256, classes + 1),
                      box_detections_per_img=DETECTIONS, **plain)


def create(name: str, classes: Sequence[str], size: int, *, segment: bool = False, pretrained: bool = False, weights: str = "") -> nn.Module:
    """A detector or a segmenter, in train mode, on the CPU; initial weights from the global random state.

    Args:
        name: "fasterrcnn-mini", "fcos-mini" or "fcn-mini"; a name of torchvision's ("fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn",
            "fcn_resnet50"); or `package.module:function`, which is called with num_classes (the background among them) and image_size.
        classes: names of the classes.
        size: side of the images in pixels.
        segment: a segmenter is wanted.
        pretrained: torchvision's published weights (COCO), of which these classes are used, by their names.
        weights: a safetensors file to start from.

    Returns:
        The network, with plain attributes `input_shape` = (3, size, size) and `numbers`: which number of its own each class has.

    Raises:
        ValueError: another name, published weights that do not know a class, or weights that do not fit.
        RuntimeError: the published weights cannot be had.
    """
    minis, published = MINIS[segment], PUBLISHED[segment]
    numbers = list(range(1, len(classes) + 1))
    if own.is_name(name) and not pretrained:
        net = own.build(name, num_classes=len(classes) + 1, image_size=size)
    elif name in minis and not pretrained:
        net = _mini(name, len(classes), size)
    elif name.startswith(published) and name in torchvision.models.list_models():
        if pretrained:
            known = torchvision.models.get_model_weights(name)["DEFAULT"].meta["categories"]
            if odd := [c for c in classes if c not in known]:
                raise ValueError(f"pretrained {name} does not know class {odd[0]!r}: expected some of {', '.join(known[:6])}, ...")
            numbers = [known.index(c) for c in classes]
        try:
            net = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, weights_backbone=None,
                                               **({} if pretrained else {"num_classes": len(classes) + 1}))
        except OSError as error:
            raise RuntimeError(f"published weights of {name} cannot be had: {error}") from error
        if segment:
            net.aux_classifier = None  # of training alone
    else:
        kind = "segmenter" if segment else "detector"
        raise ValueError(f"network {name!r}{' with published weights' * pretrained}: expected a {kind}: "
                         f"{', '.join(minis)}{' (without published weights)' * pretrained}, torchvision's {', '.join(p + '...' for p in published)}, or "
                         "package.module:function")
    if weights:
        files.load(net, own.Path(weights), name, len(classes) + 1)
    net.input_shape, net.numbers = (3, size, size), tuple(numbers)
    return net


class Dense(nn.Module):
    """What a detector computes at every place of its images, in one tensor: of FCOS what its head gives, of others the pyramid."""

    def __init__(self, net: FCOS | GeneralizedRCNN):
        super().__init__()
        self.backbone = net.backbone
        if isinstance(net, FCOS):
            self.head = net.head

    def parts(self, x: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """By name, in the order of `forward`."""
        features = self.backbone(x)
        return self.head(list(features.values())) if hasattr(self, "head") else features

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        return torch.cat([part.flatten(1) for part in self.parts(x).values()], dim=1)


class _Proposals(nn.Module):
    def __init__(self, net: GeneralizedRCNN):
        super().__init__()
        self.rpn, self.roi_heads = net.rpn, net.roi_heads

    def forward(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return self.roi_heads(features, self.rpn(images, features)[0], images.image_sizes)[0]


class InParts:
    """A detector on images of one size: `finish(params, dense(images(x)))` equals what it says of them with `params` in place of its own.

    Args:
        net: torchvision's FCOS, or Faster R-CNN; in eval mode.
        size: side of the images in pixels.

    Attributes:
        dense: the part that a network's graph can be made of.
        most: detections per image.

    Raises:
        ValueError: another kind of detector.
    """

    def __init__(self, net: nn.Module, size: int):
        if not isinstance(net, (FCOS, FasterRCNN)):
            raise ValueError(f"{type(net).__name__} is no FCOS and no FasterRCNN: expected one of these, whose parts are known")
        self.net, self.size, self.dense = net, size, Dense(net)
        self.most = net.detections_per_img if isinstance(net, FCOS) else net.roi_heads.detections_per_img
        self.rest = None if isinstance(net, FCOS) else _Proposals(net)
        device = next(net.parameters()).device
        with torch.no_grad():
            x = self.images(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
            self.sides = net.transform(list(torch.zeros(1, 3, size, size, device=device)))[0].image_sizes
            self.levels = [f.shape[2:] for f in net.backbone(x).values()]
            self.shapes = {name: part.shape[1:] for name, part in self.dense.parts(x).items()}
        self.padded = x.shape[2:]

    def images(self, x: UInt8[Tensor, "B 3 s s"]) -> Float[Tensor, "B 3 H W"]:
        """As the detector's own first step makes them: scaled, resized and padded."""
        return self.net.transform(list(x.float() / 255))[0].tensors

    def finish(self, params: dict[str, Tensor], flat: Float[Tensor, "B F"]) -> Float[Tensor, "B most 6"]:
        """Detections of what `dense` gave, as in `table`; NaN of images for which that is not finite."""
        finite = torch.isfinite(flat).all(dim=1)
        images = ImageList(flat.new_empty(len(flat), 3, *self.padded), self.sides * len(flat))
        pieces = flat.where(finite[:, None], 0.0).split([s.numel() for s in self.shapes.values()], dim=1)
        parts = {name: piece.view(len(flat), *shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}
        if self.rest is not None:
            own = {n: v for n, v in params.items() if n.startswith(("rpn.", "roi_heads."))}
            found = torch.func.functional_call(self.rest, own, (images, OrderedDict(parts)))
        else:
            anchors = self.net.anchor_generator(images, [flat.new_empty(len(flat), 1, *level) for level in self.levels])
            counts = [h * w for h, w in self.levels]
            found = self.net.postprocess_detections({n: list(part.split(counts, dim=1)) for n, part in parts.items()},
                                                    [list(a.split(counts)) for a in anchors], images.image_sizes)
        found = self.net.transform.postprocess(found, images.image_sizes, [(self.size, self.size)] * len(flat))
        return table(found, self.most).where(finite.cpu()[:, None, None], torch.nan)


@torch.no_grad()
def table(found: list[dict[str, Any]], most: int) -> Float[Tensor, "B most 6"]:
    """Detections as numbers: left, top, right and lower edge in pixels, score, the network's number of the class; the best first, -1 in rows
    without one."""
    out = torch.full((len(found), most, 6), -1.0)
    for row, one in zip(out, found):
        best = one["scores"].argsort(descending=True, stable=True)[:most]
        row[:len(best)] = torch.cat([one["boxes"][best], one["scores"][best, None], one["labels"][best, None].float()], dim=1).cpu()
    return out
