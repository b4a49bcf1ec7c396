# SPDX-License-Identifier: Apache-2.0
"""A trained model put to use: load it, and predict what its task says of image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import paddle

from datasets import build_dataloader
from datasets.batch import to_device
from datasets.dataset import FileStorage, Images
from datasets.images import UnreadableImage
from models import build_model
from models.weights.load import load_pretrained, match_classes, read_weights
from tasks import Prediction, PredictionOptions, Task, build_task
from utils.errors import UserError


class FilePrediction(NamedTuple):
    """The prediction of an image file, or why there is none.

    Attributes:
        image: path of the file.
        prediction: None where the file could not be read.
        error: why it could not be read.
    """

    image: str
    prediction: Prediction | None
    error: str | None = None


def load_trained(config, log: Callable[[str], None] = print) -> tuple[Task, paddle.nn.Layer]:
    """Build the model of a configuration with the weights MODEL.PRETRAINED, for evaluation, and its task.

    Where MODEL.NUM_CLASSES is None, the weights say how many classes there are; the configuration gets that number.

    Raises:
        UserError: weights that are missing or do not fit.
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
    """The model of `load_trained`, which must have a classifier.

    Raises:
        UserError: it has none.
    """
    model = build_model(config)
    weights = read_weights(config.MODEL.PRETRAINED)
    if config.MODEL.NUM_CLASSES is None:
        match_classes(model, weights.arrays)
    load_pretrained(model, weights, log=log, replace_head=False)
    if not model.num_classes:
        raise UserError(
            f'{weights.source} has no classifier (MODEL.TYPE {config.MODEL.TYPE}, {model.num_classes} classes): train one from it '
            'first, by -pretrained.'
        )
    model.eval()
    return model


def predict_files(
    config, task: Task, model: paddle.nn.Layer, paths: Sequence[str], options: PredictionOptions
) -> Iterator[FilePrediction]:
    """Predictions of image files, in their order, through the loader and the transform of the evaluation."""
    config = config.clone()
    config.defrost()
    config.DATA.BAD_IMAGE, config.DATA.CACHE = 'skip', 'no'
    files, transform = Images(FileStorage('', paths), source='the list of images'), task.transform(training=False)
    expected = 0  # the next image to report
    with build_dataloader(config, files, training=False, transform=transform) as loader:
        for number, batch in enumerate(loader.epoch(0)):
            predictions: list[Prediction] = []
            if len(batch):
                batch = to_device(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
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
        return 'it needs more memory than there is'
    return 'it could not be read at first'  # a file that changes, or a storage that fails now and then
