# SPDX-License-Identifier: Apache-2.0
"""Task interface: everything in training, evaluation and prediction that depends on the learning objective.

A task defines its data set and transform, its loss, its evaluator and its predictions. The training loop, the data
loader, checkpoints and tools only call the methods below. To add a task, register a subclass of `Task` under a value of
TRAIN.TASK, in a module of this package or in your own folder:

>>> @register_task('mine')
... class MyTask(Task): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from models.engines import LAYERS, EngineModel, check_engine
from tasks.model_schedules import ModelSchedule, build_model_schedules
from tasks.pictures import Shown, rgb
from utils.device import upload
from utils.errors import UserError
from utils.registry import Registry
from utils.sizes import image_shape

TASKS = Registry('task (TRAIN.TASK)')
register_task = TASKS.register

NOTHING: Mapping = MappingProxyType({})


class Group(Protocol):
    """The process group of a run, see `engine.distributed.Context`."""

    rank: int
    world_size: int
    is_main: bool

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a tensor in place and return it."""

    def gather(self, text: str) -> list[str]:
        """The texts of all processes by rank, on every process."""


class Interrupted(Exception):
    """Raised when an evaluation stops early, on request."""


class Losses(NamedTuple):
    """Result of `Task.loss` for a micro-batch; all tensors are 0-D float32 and stay on the device.

    Attributes:
        total: mean loss over the images, to backpropagate.
        parts: unweighted parts of the loss, means over the images; keys: see `Task.parts`.
        counts: sums over the images; keys: see `Task.counts`.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = NOTHING
    counts: Mapping[str, Tensor] = NOTHING


@dataclass(frozen=True)
class PredictionOptions:
    """Options of `tools/predict.py` and of evaluations that save predictions.

    Attributes:
        topk: number of classes per image, at most all classes of the model.
        class_names: one name per class.
        pictures: False: `Prediction.pictures` is empty.
    """

    topk: int = 5
    class_names: Sequence[str] | None = None
    pictures: bool = True


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        row: JSON object.
        cells: values of `Task.prediction_columns`.
        text: printed after the name of the image.
        pictures: suffix of the file name -> image to write.
    """

    row: Mapping[str, Any]
    cells: tuple = ()
    text: str = ''
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


class Evaluator:
    """Accumulate the metrics of an evaluation, exactly on any number of processes.

    Every process calls `reset`, `process` for each of its batches, `reduce` (a collective operation), and `result`.

    Attributes:
        titles: name of each metric -> title in the log.
        best: (name, direction) of the metric that selects the best weights; direction 'max' or 'min'.
    """

    titles: Mapping[str, str]
    best: tuple[str, str]

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        """Clear the accumulated state. Raises `Interrupted` on every process if `should_stop` is true on one."""
        raise NotImplementedError

    def process(self, batch: Batch, outputs: Any) -> None:
        """Add a batch of at least one image; `outputs` is the result of `Task.infer`."""
        raise NotImplementedError

    def reduce(self, group: Group) -> None:
        """All-reduce the state, so that `result` is equal on every process."""
        raise NotImplementedError

    def result(self) -> dict[str, float]:
        """Return the metrics by name."""
        raise NotImplementedError

    def details(self) -> list[str]:
        """Return additional log lines, such as a table of classes."""
        return []

    def progress(self) -> dict[str, float]:
        """Return intermediate metrics of this process for the log; empty if they are expensive."""
        return {}

    def pictures(self, model: nn.Layer) -> dict[str, Image.Image]:
        """Return pictures by name. The main process calls this method after `result`."""
        return {}

    def files(self) -> dict[str, str]:
        """Texts by file name, of which the run's folder keeps those of the last evaluation. As `pictures`."""
        return {}

    def class_results(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the results of each class by name, for classes.csv; empty: there are none. As `pictures`.

        Args:
            rows: rows of predictions.csv, one per image that could be read, in the order of the data set.
        """
        return []


class MeanEvaluator(Evaluator):
    """Means over the images, accumulated in float64 on the device.

    Args:
        titles, best: see `Evaluator`.
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
        """See the argument `sums`."""
        raise NotImplementedError

    def reset(self, model: nn.Layer, group: Group, should_stop: Callable[[], bool]) -> None:
        self._total = paddle.zeros([len(self.titles)], 'float64')
        self._images = 0

    def process(self, batch: Batch, outputs: Any) -> None:
        self._total += self.sums(batch, outputs)
        self._images += len(batch)

    def reduce(self, group: Group) -> None:
        totals = paddle.concat([self._total, upload(np.array([self._images], 'float64'))])
        *sums, images = group.sum(totals).tolist()
        self._total, self._images = upload(np.array(sums, 'float64')), int(images)

    def result(self) -> dict[str, float]:
        return {name: value / max(self._images, 1) for name, value in zip(self.titles, self._total.tolist())}

    progress = result


class Task:
    """Base class of tasks. Order of calls:

        task = build_task(config)                   checks the configuration
        task.dataset(split)                         sets config.MODEL.NUM_CLASSES from the data
        model = build_model(config)
        task.attach(model, log, training)           checks the model, loads a teacher
        task.loss(...), task.infer(...)             in each step

    Args:
        config: resolved configuration; not frozen until the data sets are built.

    Attributes:
        views: number of augmented views per training image.
        data_kind: required class of the data sets.
        parts: name of each part of the loss -> title in the log.
        counts: name of each count -> title in the log; the log shows counts divided by the number of images.
        schedules: schedules of model parameters such as the keep rate, see tasks/model_schedules.py.
        target_columns: columns of predictions.csv for the targets of an image, see `targets`.
        infers_by_call: `infer` only calls the model, on images of `image_shape`, so an exported program can replace the model.
    """

    views: int = 1
    data_kind: type = datasets.Dataset
    parts: Mapping[str, str] = NOTHING
    counts: Mapping[str, str] = NOTHING
    target_columns: tuple[str, ...] = ()
    infers_by_call: bool = False

    def __init__(self, config):
        self.config = config
        if config.SAVE_PREDICTIONS and not self.has_predictions():
            raise UserError(
                f'TRAIN.TASK {config.TRAIN.TASK} has no predictions: remove -save_predictions (SAVE_PREDICTIONS).'
            )
        if config.DATA.VIEWS not in (None, self.views):
            raise UserError(
                f'TRAIN.TASK {config.TRAIN.TASK} trains on {self.views} view(s) of each image: remove DATA.VIEWS or set '
                f'it to {self.views}.'
            )
        self.schedules: list[ModelSchedule] = build_model_schedules(config)

    # ------------------------------------------------------------------------------------------------ data
    def dataset(self, split: str) -> datasets.Dataset:
        """Build the data set of `split` ('train' or 'val'). The first call sets MODEL.NUM_CLASSES if it is None.

        A task without classes returns `datasets.Images`, and does not set MODEL.NUM_CLASSES.

        Raises:
            UserError: missing or malformed data, or more classes than the model has.
        """
        dataset = datasets.build_dataset(self.config, split)
        if not isinstance(dataset, self.data_kind):
            raise UserError(
                f'DATA.DATASET {self.config.DATA.DATASET} does not have the targets of TRAIN.TASK {self.config.TRAIN.TASK}: '
                'change one of the two (docs/data.md lists data sets).'
            )
        self.config.MODEL.NUM_CLASSES = datasets.resolve_num_classes(self.config, dataset)
        return dataset

    def describe_data(self, data: Mapping[str, datasets.Images]) -> list[str]:
        """Return notes on the data sets for the log at the start of a run, such as empty classes."""
        notes = [note for dataset in data.values() for note in dataset.notes]
        if isinstance(data.get('train'), datasets.Dataset):
            notes.append(datasets.describe_empty(data['train'], self.config.MODEL.NUM_CLASSES))
        return list(filter(None, notes))

    def transform(self, training: bool):
        """Build the transform of a sample, see `datasets.transforms.Transform`."""
        return build_transform(self.config, training)

    # ------------------------------------------------------------------------------------------------ model
    def attach(self, model: nn.Layer, log: Callable[[str], None], training: bool) -> None:
        """Check that the model fits the task; for training, load teachers and add adapters.

        Args:
            model: with its weights loaded.
            log: called with each message.
            training: False: evaluation only.

        Raises:
            UserError: the model or the configuration does not fit the task.
        """

    def update_schedules(self, model: nn.Layer, t: float) -> dict[str, float]:
        """Apply all schedules at epoch `t` (fractional) to the model, and return their values for the log."""
        values = {}
        for schedule in self.schedules:
            values[schedule.name] = schedule.value(t)
            schedule.set(model, values[schedule.name])
        return values

    def is_final(self, t: float) -> bool:
        """Return whether all schedules have their final values at epoch `t`; only then are best weights selected."""
        return all(schedule.is_final(t) for schedule in self.schedules)

    # ------------------------------------------------------------------------------------------------ training
    def loss(self, model: nn.Layer, batch: Batch, rng: np.random.Generator) -> Losses:
        """Compute the loss of a micro-batch.

        Args:
            model: may be wrapped by DataParallel.
            batch: tensors on the device; images [B, C, H, W] float32, normalized; of several views [B, views, C, H, W].
            rng: random generator for all random numbers of the step.
        """
        raise NotImplementedError

    def training_pictures(
        self, batch: Batch, rng: np.random.Generator, dataset: datasets.Images, count: int
    ) -> list[Shown]:
        """Return pictures of the first images of a training batch, as `loss` gets them, with their targets.

        Args:
            batch, rng: see `loss`.
            dataset: data set of the batch.
            count: number of images.
        """
        shown = [Shown(pictures, '') for pictures in self.pictures_of(batch.images[:count])]
        labels = batch.targets.get('label')
        if labels is None:
            return shown
        return [Shown(*one[:1], class_name(dataset, label)) for one, label in zip(shown, labels[:count].tolist())]

    def pictures_of(self, images: Tensor) -> list[list[np.ndarray]]:
        """Return the views of each image, [H, W, 3] uint8, of normalized images [B, ..., C, H, W]."""
        data = self.config.DATA
        views = images.unbind(1) if images.ndim > 4 else [images]
        return [list(row) for row in zip(*(rgb(view, data.IMAGENET_MEAN, data.IMAGENET_STD) for view in views))]

    def image_shape(self) -> list[int]:
        """Return [C, H, W] of the training images."""
        return image_shape(self.config)

    def example(self, batch_size: int) -> Batch:
        """Return a random training batch on the device, for benchmarks and tests."""
        shape = [batch_size, *[self.views] * (self.views > 1), *self.image_shape()]
        classes = max(self.config.MODEL.NUM_CLASSES or 1, 1)
        return Batch(paddle.randn(shape), {'label': paddle.randint(classes, shape=[batch_size])}, np.arange(batch_size))

    # ------------------------------------------------------------------------------------------------ evaluation
    def infer(self, model: nn.Layer, batch: Batch) -> Any:
        """Run the model in evaluation mode; the outputs go to `Evaluator.process` and `predictions`."""
        return model(batch.images)

    def check_engine(self) -> None:
        """Raise UserError if the inference engine ENGINE cannot compute `infer`, AMP is set, or it lacks ENGINE_PRECISION."""
        engine = self.config.ENGINE
        check_engine(engine, self.config.ENGINE_PRECISION)
        if engine == LAYERS:
            return
        if self.config.AMP:
            raise UserError(f'-amp (AMP) needs -engine {LAYERS}; -engine {engine} has ENGINE_PRECISION.')
        if not self.infers_by_call:
            raise UserError(
                f'-engine {engine} (ENGINE) runs classifiers; TRAIN.TASK {self.config.TRAIN.TASK} needs ENGINE {LAYERS}.'
            )

    def on_engine(self, model: nn.Layer) -> nn.Layer:
        """Return a model for `infer` whose forward pass is computed by the inference engine ENGINE, see `check_engine`."""
        self.check_engine()
        if self.config.ENGINE == LAYERS:
            return model
        return EngineModel(model, self.config.ENGINE, self.image_shape(), self.config.ENGINE_PRECISION)

    def evaluator(self) -> Evaluator:
        """Return a new evaluator of the validation set."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ predictions
    def targets(self, batch: Batch) -> list[tuple]:
        """Return the values of `target_columns` for each image of a batch on the device."""
        return [()] * len(batch)

    @classmethod
    def has_predictions(cls) -> bool:
        """Return False if `prediction_columns` raises an error."""
        return cls.prediction_columns is not Task.prediction_columns

    def prediction_columns(self, options: PredictionOptions) -> tuple[str, ...]:
        """Return the column names of `Prediction.cells`.

        Raises:
            UserError: the task has no predictions.
        """
        raise UserError(
            f'TRAIN.TASK {self.config.TRAIN.TASK} has no predictions: fine-tune a classifier from these weights first, '
            'with -pretrained.'
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the preprocessing of an exported program for `tools/export.py`; fields: docs/predict_export.md."""
        resize, crop = build_transform(self.config, training=False).steps
        return {
            'resize_short': None if isinstance(resize, Squash) else resize.size,
            'interpolation': resize.resample.name.lower(),
            'image_size': crop.size,
            'crop_pct': self.config.DATA.CROP_PCT if resize.size != crop.size else 1.0,
        }

    def program_inputs(self, batch_size: int) -> dict[str, np.ndarray]:
        """Examples of what an exported program takes beside the images, by name, in the order of the model's arguments."""
        return {}

    def exports(self, model: nn.Layer) -> Iterator[None]:
        """Yield before each export that is compared with the model on random images; the last one is what users get.

        A model that may return nothing for such images is compared under other settings first.
        """
        yield

    def program_difference(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
        """Return the largest difference between the outputs of a program and of its model, relative to the largest value."""
        scales = (max(np.abs(output).max(), np.finfo('float32').tiny) for output in expected)
        return float(np.max([np.abs(one - other).max() / scale for one, other, scale in zip(found, expected, scales)]))

    def predictions(self, outputs: Any, options: PredictionOptions) -> list[Prediction]:
        """Return one prediction per image from the result of `infer`."""
        raise NotImplementedError


def class_name(dataset: datasets.Images, label: int) -> str:
    """Return the name of a class, or its number if the data set has no names."""
    names = getattr(dataset, 'class_names', None)
    return names[label] if names is not None and label < len(names) else str(label)


def build_task(config) -> Task:
    """Build the task of TRAIN.TASK.

    Raises:
        UserError: an unknown name, or a configuration that does not fit the task.
    """
    return TASKS[config.TRAIN.TASK](config)
