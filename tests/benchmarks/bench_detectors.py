"""Detectors and segmenters with many vectors: what is frozen once per batch of images, or the whole network per vector.

    python tests/benchmarks/bench_detectors.py [network ...]

20 vectors x 16 images; both sides in this process with the same threads, alternately, the best of three in processor time (one run of large
networks), the capture included. The plain side runs 4 vectors, scaled. Random weights. `bound`: what the count of FLOPs allows, whole / rest, if the frozen
part were free and the making of detections (proposals, non-maximum suppression) cost nothing; FLOPs alone: small tensors cost more.
"""

import sys
import time
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

from pdiff_lib.base.recipe import Recipe
from pdiff_lib.networks import detectors, subset
from pdiff_lib.tasks import task

VECTORS, IMAGES, PLAIN, REPEATS = 20, 16, 4, 3
CASES = [  # network, what is generated, pixels
    ("fcos-mini", "head.*.conv.4.*", 64), ("fasterrcnn-mini", "last_norms:2", 64), ("fasterrcnn-mini", "roi_heads.box_predictor.*", 64),
    ("fcn-mini", "backbone.body.layer4.0.bn2.*", 64), ("fcn-mini", "classifier.1.*", 64),
    ("fcos_resnet50_fpn", "head.*.conv.10.*", 256), ("fasterrcnn_resnet50_fpn", "backbone.body.layer4.2.bn3.*", 256),
    ("fcn_resnet50", "backbone.layer4.2.bn3.*", 256), ("fcn_resnet50", "classifier.1.*", 256)]


def plain(judge, net, sub, theta):
    x = judge.x_test
    with torch.no_grad():
        if isinstance(judge, task.own.load(task.TASKS["segmentation"])):
            return torch.stack([torch.func.functional_call(net, sub.unflatten(v), (judge.prepared(x),))["out"].argmax(1) for v in theta])
        most = detectors.InParts(net, judge.scenes.size).most
        found = [detectors.table(torch.func.functional_call(net, sub.unflatten(v), (list(x.float() / 255),)), most) for v in theta]
        return torch.stack([judge._of_classes(net)(one) for one in found])


def seconds(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def flops(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def main(wanted):
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, processor time; {VECTORS} vectors x {IMAGES} images")
    print(f"{'network':25}{'generated':32}{'pixels':>7}{'plain s':>9}{'ours s':>8}{'ratio':>8}{'bound':>8}  agree")
    for name, choice, size in CASES:
        if wanted and name not in wanted:
            continue
        segment = name.startswith("fcn")
        recipe = Recipe.of(task="segmentation" if segment else "detection", dataset="scenes", image_size=size, train_images=2, test_images=IMAGES,
                           network=name, pretrained=False, crop_scale=1.0)
        judge = task.of(recipe.data)
        net = judge.network(recipe.base).eval()
        with torch.no_grad():  # or all places of an image have the same score, and which are kept is a matter of rounding
            for i, p in enumerate(net.parameters()):
                p.add_(0.5 * p.std(correction=0) * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        if hasattr(net, "transform"):
            net.transform.min_size, net.transform.max_size = (size,), size  # torchvision's own would enlarge it to 800
        sub = subset.select(net, choice)
        theta = sub.flatten(net) + 0.05 * torch.randn(VECTORS, sub.numel, generator=torch.Generator().manual_seed(0))
        device = torch.device("cpu")

        def ours():
            if segment:
                return judge.masks(net, sub, theta, judge.x_test, device)
            return judge.predictor(net, sub, device)(theta)

        both = [(seconds(lambda: plain(judge, net, sub, theta[:PLAIN])), seconds(ours)) for _ in range(REPEATS if name.endswith("mini") else 1)]
        theirs, own = (min(t for t, _ in side) for side in zip(*both))
        theirs *= VECTORS / PLAIN
        a, b = both[0][0][1], both[0][1][1][:PLAIN]
        if segment:
            agree = f"{(a == b).float().mean():.5f} of the pixels"
            predictor = judge._over(judge.x_test, net, sub, device, lambda scores, items: scores)
        else:
            agree = f"{float((a - b).abs().max()):.1e} apart"
            predictor = judge.predictor(net, sub, device)
        boundary, params = predictor._boundary(0), sub.unflatten(theta[0])
        whole = flops(lambda: plain(judge, net, sub, theta[:1]))
        rest = flops(lambda: predictor.finish(params, predictor.part.rest(params, boundary), predictor._items(0)))
        bound = VECTORS * whole / (whole + (VECTORS - 1) * rest)
        print(f"{name:25}{choice:32}{size:7}{theirs:9.2f}{own:8.2f}{theirs / own:7.1f}x{bound:7.1f}x  {agree}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
