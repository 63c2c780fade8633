"""Neural Network Diffusion (p-diff, arXiv 2402.13144): generate neural-network parameters, and check what they are.

The rooms, in the order in which data passes through them:

    recipe -> data -> networks -> subset -> zoo -> pdiff / baselines (fit, sample) -> evaluate -> similarity -> plots

`experiment.Experiment` walks that line once and keeps every stage (`runs`); the notebooks are its face.
"""

__version__ = "0.1.0"
