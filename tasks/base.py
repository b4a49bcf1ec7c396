# SPDX-License-Identifier: Apache-2.0
"""The interface between the training loop and what is learnt.

A task owns everything that depends on what is learnt: its data set and transform, its loss, its evaluation, its predictions.
The loop, the loader, checkpoints and the tools call the methods below and know no task. A new task is a module in this
package, or in a user's own folder, that registers a subclass of `Task` under the value of TRAIN.TASK:

>>> @register_task('mine')
... class MyTask(Task): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

import datasets
from datasets.batch import Batch
from datasets.transforms import Squash, build_transform
from tasks.model_schedules import ModelSchedule, build_model_schedules
from utils.errors import UserError
from utils.registry import Registry

TASKS = Registry('task (TRAIN.TASK)')
register_task = TASKS.register

NOTHING: Mapping = MappingProxyType({})


class Group(Protocol):
    """The processes of a run, see `engine.distributed.Context`."""

    rank: int
    world_size: int
    is_main: bool

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a tensor in place and return it."""


class Interrupted(Exception):
    """An evaluation was asked to stop before its end."""


class Losses(NamedTuple):
    """Result of `Task.loss` for a micro-batch; all tensors are 0-D float32 and stay on the device.

    Attributes:
        total: mean loss over the images, which is differentiated.
        parts: unweighted parts of the loss by name, means over the images; the names are those of `Task.parts`.
        counts: sums over the images by name; the names are those of `Task.counts`.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = NOTHING
    counts: Mapping[str, Tensor] = NOTHING


@dataclass(frozen=True)
class PredictionOptions:
    """What a user asks of predictions.

    Attributes:
        topk: classes per image, where a task ranks them; all of them where the model has fewer.
        class_names: one name per class.
    """

    topk: int = 5
    class_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Prediction:
    """What `tools/predict.py` writes of one image.

    Attributes:
        row: JSON object.
        cells: values of `Task.prediction_columns`.
        text: to print behind the name of the image.
        pictures: to write beside the table, by the suffix of their name.
    """

    row: Mapping[str, Any]
    cells: tuple = ()
    text: str = ''
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


class Evaluator:
    """Accumulates the metrics of one evaluation, exactly on any number of processes.

    Each process calls `reset`, `process` for each of its batches, then all call `reduce` together, then `result`.

    Attributes:
        titles: name of each metric -> title in the log.
        best: (name, direction) of the metric that selects the best weights; direction 'max' or 'min'.
    """

    titles: Mapping[str, str]
    best: tuple[str, str]

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """Forget earlier batches. Raises `Interrupted`, on every process, where `should_stop` said so on one."""
        raise NotImplementedError

    def process(self, batch: Batch, outputs: Any) -> None:
        """Add a batch of at least one image; `outputs` is the result of `Task.infer`."""
        raise NotImplementedError

    def reduce(self, group: Group) -> None:
        """Combine the state of all processes; every process then has the same result."""
        raise NotImplementedError

    def result(self) -> dict[str, float]:
        """Metrics by name, of all images that were processed (and reduced)."""
        raise NotImplementedError

    def details(self) -> list[str]:
        """Lines for the log below the result, such as a table of classes."""
        return []

    def progress(self) -> dict[str, float]:
        """Metrics of this process so far, for its log; empty where they are expensive."""
        return {}

    def pictures(self, model: nn.Layer) -> dict[str, Image.Image]:
        """Pictures of an evaluation by name. The main process calls this after `result`."""
        return {}


class MeanEvaluator(Evaluator):
    """Means over the images, summed in float64 on the device.

    Args:
        titles: see `Evaluator`.
        best: see `Evaluator`.
        sums: (batch, outputs) -> sums over the images of the batch in the order of `titles`, [len(titles)] float64.
    """

    def __init__(
        self, titles: Mapping[str, str], best: tuple[str, str], sums: Callable[[Batch, Any], Tensor] | None = None
    ):
        self.titles = titles
        self.best = best
        if sums is not None:
            self.sums = sums

    def sums(self, batch: Batch, outputs: Any) -> Tensor:
        """See the argument of that name."""
        raise NotImplementedError

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        self._total = paddle.zeros([len(self.titles)], 'float64')
        self._images = 0

    def process(self, batch: Batch, outputs: Any) -> None:
        self._total += self.sums(batch, outputs)
        self._images += len(batch)

    def reduce(self, group: Group) -> None:
        totals = paddle.concat([self._total, paddle.to_tensor([self._images], 'float64')])
        *sums, images = group.sum(totals).tolist()
        self._total, self._images = paddle.to_tensor(sums, 'float64'), int(images)

    def result(self) -> dict[str, float]:
        return {name: value / max(self._images, 1) for name, value in zip(self.titles, self._total.tolist())}

    progress = result


class Task:
    """What is learnt. The life of a task:

        task = build_task(config)                   checks the configuration
        task.dataset(split)                         sets config.MODEL.NUM_CLASSES from the data
        model = build_model(config)
        task.attach(model, log, training)           checks the model, loads a teacher
        task.loss(...), task.infer(...)             in each step

    Args:
        config: the resolved tree; not frozen before the data sets are built.

    Attributes:
        views: augmented views of each training image.
        data_kind: class of the data sets that have the targets of the task.
        parts: name of each part of the loss -> title in the log.
        counts: name of each count -> title in the log; the log shows counts divided by the number of images.
        schedules: settings of the model that depend on the epoch, see tasks/model_schedules.py.
    """

    views: int = 1
    data_kind: type = datasets.Dataset
    parts: Mapping[str, str] = NOTHING
    counts: Mapping[str, str] = NOTHING

    def __init__(self, config):
        self.config = config
        if config.DATA.VIEWS not in (None, self.views):
            raise UserError(
                f'TRAIN.TASK {config.TRAIN.TASK} trains on {self.views} view(s) of each image: remove DATA.VIEWS or set '
                f'it to {self.views}.'
            )
        self.schedules: list[ModelSchedule] = build_model_schedules(config)

    # ------------------------------------------------------------------------------------------------ data
    def dataset(self, split: str) -> datasets.Dataset:
        """The data set of `split` ('train' or 'val'). The first one sets MODEL.NUM_CLASSES where it is None.

        A task without classes returns `datasets.Images`, and leaves MODEL.NUM_CLASSES to the configuration.

        Raises:
            UserError: missing or malformed data, or more classes than the model has.
        """
        dataset = datasets.build_dataset(self.config, split)
        if not isinstance(dataset, self.data_kind):
            raise UserError(
                f'DATA.DATASET {self.config.DATA.DATASET} does not have the targets of TRAIN.TASK {self.config.TRAIN.TASK}: '
                'choose another of the two (docs/data.md lists data sets).'
            )
        self.config.MODEL.NUM_CLASSES = datasets.resolve_num_classes(self.config, dataset)
        return dataset

    def describe_data(self, data: Mapping[str, datasets.Images]) -> list[str]:
        """Sentences on the data sets of the splits that a user should read before an epoch is over."""
        notes = [note for dataset in data.values() for note in dataset.notes]
        if isinstance(data.get('train'), datasets.Dataset):
            notes.append(datasets.describe_empty(data['train'], self.config.MODEL.NUM_CLASSES))
        return list(filter(None, notes))

    def transform(self, training: bool):
        """From a sample of the data set to the planes of a batch, see `datasets.transforms.Transform`."""
        return build_transform(self.config, training)

    # ------------------------------------------------------------------------------------------------ model
    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """Prepare for a model, whose weights are loaded: check that it fits; load teachers and add parts for training.

        Raises:
            UserError: the model or the configuration does not fit the task.
        """

    def update_schedules(self, model: nn.Layer, t: float) -> dict[str, float]:
        """Set what depends on the epoch `t` (fractional, from the start of training) in the model; return it for the log."""
        values = {}
        for schedule in self.schedules:
            values[schedule.name] = schedule.value(t)
            schedule.set(model, values[schedule.name])
        return values

    def is_final(self, t: float) -> bool:
        """Whether the model at epoch `t` equals the final one; earlier evaluations do not select the best weights."""
        return all(schedule.is_final(t) for schedule in self.schedules)

    # ------------------------------------------------------------------------------------------------ training
    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """Compute the loss of a micro-batch.

        Args:
            model: may be wrapped by DataParallel.
            batch: tensors on the device; images [B, C, H, W] float32, normalized; of several views [B, views, C, H, W].
            rng: source of all random draws.
        """
        raise NotImplementedError

    def image_shape(self) -> list[int]:
        """[C, H, W] of the images that a model is trained on."""
        data = self.config.DATA
        return [data.IMAGE_CHANNELS, data.IMAGE_SIZE, data.IMAGE_SIZE]

    def example(self, batch_size: int) -> Batch:
        """A random training batch on the device, for benchmarks and tests."""
        shape = [batch_size, *[self.views] * (self.views > 1), *self.image_shape()]
        classes = max(self.config.MODEL.NUM_CLASSES or 1, 1)
        return Batch(paddle.randn(shape), {'label': paddle.randint(classes, shape=[batch_size])}, np.arange(batch_size))

    # ------------------------------------------------------------------------------------------------ evaluation
    def infer(self, model: nn.Layer, batch: Batch) -> Any:
        """Outputs of the model in evaluation mode for `Evaluator.process` and `predictions`."""
        return model(batch.images)

    def evaluator(self) -> Evaluator:
        """A new evaluator of the validation set."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ predictions
    def prediction_columns(self, options: PredictionOptions) -> tuple[str, ...]:
        """Names of the cells of each prediction.

        Raises:
            UserError: the task predicts nothing.
        """
        raise UserError(
            f'TRAIN.TASK {self.config.TRAIN.TASK} predicts nothing about images: train a classifier from these weights '
            'first, by -pretrained.'
        )

    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes the input of an exported program, for `tools/export.py`; docs/predict_export.md has the fields."""
        resize, crop = build_transform(self.config, training=False).steps
        return {
            'resize_short': None if isinstance(resize, Squash) else resize.size,
            'interpolation': resize.resample.name.lower(),
            'image_size': crop.size,
            'crop_pct': self.config.DATA.CROP_PCT if resize.size > crop.size else 1.0,
        }

    def predictions(self, outputs: Any, options: PredictionOptions) -> list[Prediction]:
        """One prediction per image, from the result of `infer`."""
        raise NotImplementedError


def build_task(config) -> Task:
    """The task that TRAIN.TASK names.

    Raises:
        UserError: an unknown name, or a configuration that does not fit the task.
    """
    return TASKS[config.TRAIN.TASK](config)
