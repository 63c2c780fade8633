"""A training that is killed and started again, for tests of what trains through `training.loop`."""

import pytest

from pdiff_lib.base import runs, training


def killed_and_resumed(fit, monkeypatch, at: int):
    """What `fit()` gives when it has been killed before step `at`, and the steps that it then still made; a list that goes on
    growing with further fits."""
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)  # after every step

    def save_and_die(self, state, save=runs.Checkpoint.save):
        save(self, state)
        if int(state["step"]) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs.Checkpoint, "save", save_and_die)
        fit()
    steps, loop = [], training.loop
    monkeypatch.setattr(training, "loop", lambda loss_at, *args, **kwargs: loop(
        lambda i: (steps.append(i), loss_at(i))[1], *args, **kwargs))
    return fit(), steps
