"""Originals, however they came to be: one training's checkpoints or many trainings; what the modules hold is handed on."""

from pdiff_lib.tasks.classification import Feed as Feed
from pdiff_lib.tasks.order import steps_per_epoch as steps_per_epoch
from pdiff_lib.zoos.checkpoints import of as of
from pdiff_lib.zoos.trajectory import (
    TrainingPath as TrainingPath,
    collect as collect,
    train as train,
    training_path as training_path,
)
from pdiff_lib.zoos.zoo import Zoo as Zoo, load as load
