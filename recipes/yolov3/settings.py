"""What a run is told, and the data that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from data import LabelledImages, Sample, ShapeImages, collate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader, Dataset

DEFAULTS = Path(__file__).with_name("shapes.yaml")
# Seeds of the drawn images, so that no test image is one of training.
TRAIN_SEED, TEST_SEED = 1, 2


def read_settings(arguments: Sequence[str]) -> DictConfig:
    """Merges the default settings, a file's and those of the command line.

    Args:
        arguments: files of settings and ``key=value``, the later over the earlier.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a key that there is not, or a value of the wrong form.
    """
    settings = OmegaConf.load(DEFAULTS)
    OmegaConf.set_struct(settings, True)
    for part in ("cnmix", "optimizer", "loss"):  # checked by what takes them
        OmegaConf.set_struct(settings[part], False)
    for argument in arguments:
        try:
            more = OmegaConf.from_dotlist([argument]) if "=" in argument else OmegaConf.load(argument)
            settings = OmegaConf.merge(settings, more)
        except OmegaConfBaseException as error:
            raise ValueError(f"{argument}: {str(error).splitlines()[0]}") from error
    for name in ("epochs", "batch_size", "evaluate_every"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {settings[name]!r}")
    return settings


def load_data(settings: DictConfig) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Returns the images of training and of the test; either has ``names``, those of the classes."""
    data, size = settings.data, settings.model.image_size
    if data.path is None:
        return (
            ShapeImages(data.train_images, size, TRAIN_SEED),
            ShapeImages(data.test_images, size, TEST_SEED),
        )
    if not data.names:
        raise ValueError("data.path needs data.names, the names of its classes in order, as data.names=[cat,dog]")
    return (
        LabelledImages(data.path, data.train, size, data.names, flip=True),
        LabelledImages(data.path, data.test, size, data.names),
    )


def batches(data: Dataset[Sample], settings: DictConfig, train: bool) -> DataLoader[Sample]:
    """Loads images, in a random order and without an incomplete batch for training."""
    return DataLoader(
        data,
        settings.batch_size,
        shuffle=train,
        drop_last=train and len(data) >= settings.batch_size,
        num_workers=settings.workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(settings.seed),
    )
