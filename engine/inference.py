# SPDX-License-Identifier: Apache-2.0
"""A trained classifier put to use: loading it, and classifying image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from datasets import Dataset, build_dataloader
from datasets.batch import to_tensor
from datasets.dataset import FileStorage
from datasets.images import UnreadableImage
from datasets.transforms import build_transform
from models import build_model
from models.pretrained import load_pretrained
from models.state import count_classes
from utils.errors import UserError
from utils.weights import choose_state_dict, read_file, resolve_weights_path


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, or why there are none.

    Attributes:
        image: path of the file.
        classes: numbers of the classes, most likely first.
        probabilities: of these classes (softmax of the logits over all classes).
        error: why the image could not be read; the others are then empty.
    """

    image: str
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def load_classifier(config, log: Callable[[str], None] = print) -> paddle.nn.Layer:
    """Builds the model of a configuration with the weights MODEL.PRETRAINED, for evaluation.

    Where MODEL.NUM_CLASSES is None, the weights say how many classes there are.

    Raises:
        UserError: weights that are missing or do not fit.
    """
    model = build_model(config)
    path = resolve_weights_path(config.MODEL.PRETRAINED)
    if config.MODEL.NUM_CLASSES is None:
        _, arrays = choose_state_dict(read_file(path), prefer_ema=True, source=f"'{path}'")
        classes = count_classes(model, arrays)
        if classes:
            model.reset_classifier(classes)
    load_pretrained(model, path, log=log, replace_head=False)
    if not model.num_classes:
        raise UserError(
            f"'{path}' has no classifier (MODEL.TYPE {config.MODEL.TYPE}, {model.num_classes} classes): train one from it "
            'first, by -pretrained.'
        )
    model.eval()
    return model


def classify(config, model: paddle.nn.Layer, paths: Sequence[str], topk: int) -> Iterator[Prediction]:
    """Predictions of image files, in their order, through the loader and transform of the evaluation.

    Args:
        topk: classes per image; all of them where the model has fewer.
    """
    config = config.clone()
    config.defrost()
    config.DATA.BAD_IMAGE, config.DATA.CACHE = 'skip', 'no'
    dataset = Dataset(FileStorage('', paths), np.zeros(len(paths), 'int64'), source='the list of images')
    expected = 0  # the next image to report
    with build_dataloader(config, dataset, training=False) as loader:
        for number, batch in enumerate(loader.epoch(0)):
            classes, probabilities = [], []
            if len(batch.labels):
                images, _ = to_tensor(batch, config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
                probabilities, classes = _most_likely(model, images, topk)
            readable = dict(zip(batch.indices.tolist(), zip(classes, probabilities)))
            for index in range(expected, expected + loader.batch_size_at(number)):
                if index in readable:
                    yield Prediction(paths[index], *map(tuple, readable[index]))
                else:
                    yield Prediction(paths[index], error=_why_unreadable(config, dataset, index))
            expected += loader.batch_size_at(number)


def _most_likely(model: paddle.nn.Layer, images: paddle.Tensor, topk: int) -> tuple[list, list]:
    """Probabilities and numbers of the `topk` classes of each image, [B][topk]."""
    with paddle.no_grad():
        probabilities = F.softmax(model(images).astype('float32'), axis=-1)
    values, indices = paddle.topk(probabilities, min(topk, probabilities.shape[-1]), axis=-1)
    return values.tolist(), indices.tolist()


def _why_unreadable(config, dataset: Dataset, index: int) -> str:
    transform = build_transform(config, training=False)
    try:
        transform(dataset.picture(index, config.DATA.EXIF_ROTATE), np.random.default_rng(0))
    except UnreadableImage as error:
        return str(error)
    except MemoryError:
        return 'it needs more memory than there is'
    return 'it could not be read at first'  # a file that changes, or a storage that fails now and then
