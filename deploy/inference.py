# SPDX-License-Identifier: Apache-2.0
"""Inference: load a trained model, and predict image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import paddle

from datasets import build_dataloader
from datasets.batch import on_device
from datasets.dataset import FileStorage, Images
from datasets.images import UnreadableImage
from models import build_model
from models.weights.classes import match_classes
from models.weights.load import load_pretrained, read_weights
from tasks import Prediction, PredictionOptions, Task, build_task
from utils.errors import UserError


class FilePrediction(NamedTuple):
    """Prediction of an image file, or an error.

    Attributes:
        image: path of the file.
        prediction: None if the file is unreadable.
        error: reason; None if the file is readable.
    """

    image: str
    prediction: Prediction | None
    error: str | None = None


def load_trained(config, log: Callable[[str], None] = print) -> tuple[Task, paddle.nn.Layer]:
    """Build task and model of a configuration, and load the weights MODEL.PRETRAINED for evaluation.

    If MODEL.NUM_CLASSES is None, it is set to the number of classes of the weights.

    Raises:
        UserError: missing weights, or weights that do not fit.
    """
    task, model = build_task(config), build_model(config)
    weights = read_weights(config.MODEL.PRETRAINED)
    if config.MODEL.NUM_CLASSES is None:
        match_classes(model, weights.arrays)
        config.MODEL.NUM_CLASSES = model.num_classes
    load_pretrained(model, weights, log=log, replace_head=False)
    task.attach(model, log, training=False)
    model.eval()
    return task, model


def load_classifier(config, log: Callable[[str], None] = print) -> paddle.nn.Layer:
    """Load a trained model with a classifier, without its task.

    Raises:
        UserError: see `load_trained`; or the model has no classifier.
    """
    model = build_model(config)
    weights = read_weights(config.MODEL.PRETRAINED)
    if config.MODEL.NUM_CLASSES is None:
        match_classes(model, weights.arrays)
    load_pretrained(model, weights, log=log, replace_head=False)
    if not model.num_classes:
        raise UserError(
            f'{weights.source} has no classifier (MODEL.TYPE {config.MODEL.TYPE}, {model.num_classes} classes): fine-tune a '
            'classifier from it first, with -pretrained.'
        )
    model.eval()
    return model


def predict_files(
    config, task: Task, model: paddle.nn.Layer, paths: Sequence[str], options: PredictionOptions
) -> Iterator[FilePrediction]:
    """Predict image files in order, with the data loader and the transform of the evaluation."""
    config = config.clone()
    config.defrost()
    config.DATA.BAD_IMAGE, config.DATA.CACHE = 'skip', 'no'
    files = Images(FileStorage('', paths), source='the list of images').with_channels(config.DATA.IMAGE_CHANNELS)
    transform = task.transform(training=False)
    expected = 0  # the next image to report
    with build_dataloader(config, files, training=False, transform=transform) as loader:
        batches = on_device(loader.epoch(0, borrow=True), config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
        for number, batch in enumerate(batches):
            predictions: list[Prediction] = []
            if len(batch):
                with paddle.no_grad():
                    predictions = task.predictions(task.infer(model, batch), options)
            readable = dict(zip(batch.indices.tolist(), predictions))
            for index in range(expected, expected + loader.batch_size_at(number)):
                error = None if index in readable else _why_unreadable(config, transform, files, index)
                yield FilePrediction(paths[index], readable.get(index), error)
            expected += loader.batch_size_at(number)


def _why_unreadable(config, transform, files: Images, index: int) -> str:
    try:
        transform(files.sample(index, config.DATA.EXIF_ROTATE), np.random.default_rng(0))
    except UnreadableImage as error:
        return str(error)
    except MemoryError:
        return 'there is not enough memory to read it'
    return 'the first attempt to read it failed'  # the file changed, or the storage failed temporarily
