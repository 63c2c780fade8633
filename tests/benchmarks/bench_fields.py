"""Fields of 256 digits fitted together against one after the other (`zoo.train`), in milliseconds per field and step.

    python tests/benchmarks/bench_fields.py

Processor time on one thread; both sides in turn, the least of three. Both have the same points, and end at the same fields.
"""

import dataclasses
import time

import torch

from pdiff_lib import zoo
from pdiff_lib.base.recipe import Base, Data
from pdiff_lib.tasks.fields import Fields
from pdiff_lib.zoos import population

FIELDS, FEW, POINTS, EPOCHS = 256, 8, 512, 2
CASES = [("field-16-16", 32), ("field-32-32", 32), ("field-32-32", 64), ("field-32-32", 256), ("siren-32-32", 64)]  # network, points per step


def compare(task, name, batch):
    """Milliseconds per field and step: one by one, together; and how far the two end from each other, relative."""
    base = Base(network=name, pretrained=False, base_epochs=EPOCHS, base_batch=batch, base_optimizer="adam", base_lr=1e-3)
    settings, steps, least = dataclasses.asdict(base), EPOCHS * (POINTS // batch), [float("inf")] * 2
    del settings["seed"]
    seeds, members = [population.member_seed(0, i) for i in range(FIELDS)], range(FIELDS)

    def alone():
        nets = population.initial(task, base, members[:FEW])
        start = time.process_time()
        for i, net in enumerate(nets):
            zoo.train(net, task.of_members([i]), seed=seeds[i], device="cpu", progress=False, **settings)
        return time.process_time() - start, nets

    def together():
        nets = population.initial(task, base, members)
        start = time.process_time()
        population.train(nets, task.of_members(members), seeds, device="cpu", progress=False, **settings)
        return time.process_time() - start, nets

    for _ in range(3):
        for side, (run, count) in enumerate(((alone, FEW), (together, FIELDS))):
            seconds, nets = run()
            least[side] = min(least[side], 1e3 * seconds / count / steps)
            if not side:
                plain = torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])
    ours = torch.cat([p.detach().flatten() for net in nets[:FEW] for p in net.parameters()])
    return *least, float((ours - plain).norm() / plain.norm())


def main():
    torch.set_num_threads(1)
    task = Fields(Data(task="fields", dataset="digits", image_size=8, field_points=POINTS, field_test_points=100))
    print(f"torch {torch.__version__}, 1 thread, {FIELDS} fields together, {FEW} one by one")
    print(f"{'field':14}{'points':>8}{'one by one':>12}{'together':>10}{'ratio':>9}{'apart':>10}")
    for name, batch in CASES:
        plain, ours, apart = compare(task, name, batch)
        print(f"{name:14}{batch:>8}{plain:>12.3f}{ours:>10.4f}{plain / ours:>8.1f}x{apart:>10.1e}", flush=True)


if __name__ == "__main__":
    main()
