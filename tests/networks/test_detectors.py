"""Detectors and segmenters: in parts they say what they say whole; what cannot be is refused."""

import pytest
import torch
from torch import nn

from pdiff_lib.networks import capture, detectors, subset

CLASSES = ("cat", "dog", "fox")


def detector(name, size=64):
    torch.manual_seed(0)
    net = detectors.create(name, CLASSES, size)
    images = [torch.rand(3, size, size) for _ in range(4)]
    for _ in range(2):  # running statistics of some images, so that something is found
        net(images, [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}] * 4)
    return net.eval(), (255 * torch.stack(images)).byte()


@pytest.mark.parametrize("name", ["fcos-mini", "fasterrcnn-mini"])
@pytest.mark.parametrize("size", [64, 72])  # 72 is padded to 96
def test_in_parts_and_captured_a_detector_finds_what_it_finds_whole(name, size):
    net, x = detector(name, size)
    names = ("last_norms:2", "backbone.body.layer4.*,head.*,rpn.*,roi_heads.*") if name == "fasterrcnn-mini" and size == 64 else ("last_norms:2",)
    for choice in names:
        sub = subset.select(net, choice.replace("head.*,", "") if name.startswith("faster") else choice)
        theta = sub.flatten(net) + 0.1 * torch.randn(sub.numel)
        parts = detectors.InParts(net, size)
        dense = [n for n, _ in parts.dense.named_parameters()]
        inside = tuple(n for n in sub.names if n in dense)
        part = capture.split(parts.dense, inside, parts.images(x)) if inside else capture.whole(parts.dense)
        params = sub.unflatten(theta)
        with torch.no_grad():
            flat = part.rest({n: params[n] for n in inside}, part.frozen(parts.images(x)))
            ours = parts.finish(params, flat)
            theirs = detectors.table(torch.func.functional_call(net, params, (list(x.float() / 255),)), parts.most)
            before = detectors.table(net(list(x.float() / 255)), parts.most)
        assert ours.shape == (4, detectors.DETECTIONS, 6) and (ours[..., 4] > 0).any()
        assert torch.allclose(ours, theirs, atol=1e-4) and not torch.allclose(before, theirs, atol=1e-2)


def test_the_head_alone_is_the_rest_where_only_its_norms_are_chosen():
    net, x = detector("fcos-mini")
    sub = subset.select(net, "head.*.conv.4.*")
    parts = detectors.InParts(net, 64)
    rest = capture.split(parts.dense, sub.names, parts.images(x)).rest
    convolutions = [n for n in rest.graph.nodes if "conv" in str(n.target)]
    assert len(convolutions) == 12  # cls_logits, bbox_reg and bbox_ctrness at four levels


def test_what_is_not_finite_becomes_no_detection():
    net, x = detector("fcos-mini")
    parts = detectors.InParts(net, 64)
    with torch.no_grad():
        flat = parts.dense(parts.images(x))
        flat[1, 5] = torch.inf
        found = parts.finish({}, flat)
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()


def test_a_table_has_the_best_first_and_ends_with_nothing():
    found = {"boxes": torch.tensor([[0.0, 0, 1, 1], [2, 2, 5, 6]]), "scores": torch.tensor([0.2, 0.7]), "labels": torch.tensor([1, 3])}
    table = detectors.table([found], 3)
    assert torch.allclose(table, torch.tensor([[[2, 2, 5, 6, 0.7, 3], [0, 0, 1, 1, 0.2, 1], [-1.0] * 6]]))
    assert detectors.table([found], 1).shape == (1, 1, 6)


def test_norms_come_in_the_order_in_which_they_are_called():
    net, _ = detector("fasterrcnn-mini")
    assert subset.select(net, "last_norms:1").names[0].startswith("backbone.body.layer4")
    assert net.input_shape == (3, 64, 64) and net.numbers == (1, 2, 3)


def test_torchvisions_own_networks_by_name():
    net = detectors.create("fasterrcnn_mobilenet_v3_large_320_fpn", CLASSES, 64)
    assert net.roi_heads.box_predictor.cls_score.out_features == 4
    segmenter = detectors.create("lraspp_mobilenet_v3_large", CLASSES, 64, segment=True).eval()
    assert segmenter(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 4, 64, 64)


@pytest.mark.parametrize("name, how", [("fcn-mini", {}), ("fcos-mini", {"segment": True}), ("fasterrcnn_resnet51_fpn", {}), ("resnet18", {}),
                                       ("fcos-mini", {"pretrained": True})])
def test_other_names_are_refused(name, how):
    with pytest.raises(ValueError, match=f"network {name!r}.*expected a (detector|segmenter)"):
        detectors.create(name, CLASSES, 64, **how)


def test_published_weights_must_know_the_classes():
    with pytest.raises(ValueError, match="pretrained fcos_resnet50_fpn does not know class 'unicorn'"):
        detectors.create("fcos_resnet50_fpn", ("cat", "unicorn"), 64, pretrained=True)


def test_a_detector_of_another_kind_has_no_known_parts():
    with pytest.raises(ValueError, match="Linear is no FCOS"):
        detectors.InParts(nn.Linear(1, 1), 64)
