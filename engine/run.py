# SPDX-License-Identifier: Apache-2.0
"""Train or evaluate the model of a configuration; both launchers call `run_config` in each process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import paddle

import datasets
from engine import distributed
from engine.checkpoint import checkpoint_files, read_checkpoint
from engine.checkpoint_schema import validate_checkpoint
from engine.evaluate import describe_metrics, evaluate
from engine.report import write_files
from engine.run_folder import RunFolder, lock_folder, open_folder
from engine.throughput import measure, report
from engine.train import Trainer
from models import build_model
from models.engines import LAYERS
from models.weights.classes import stored_classes
from models.weights.load import Weights, load_pretrained, read_weights
from tasks import Task, build_evaluator, build_task
from utils.errors import UserError
from utils.runlog import MetricsFile, RunLog


def run_config(config) -> None:
    """Train, evaluate (EVAL) or measure (THROUGHPUT) the model of `config` in this process."""
    context = distributed.start(config.PEER_TIMEOUT)
    if config.DATA.BATCH_SIZE_EVAL is None:
        config.DATA.BATCH_SIZE_EVAL = config.DATA.BATCH_SIZE
    if config.ENGINE != LAYERS and not (config.EVAL or config.THROUGHPUT):
        raise UserError(f'-engine {config.ENGINE} (ENGINE) needs -eval or -throughput; training runs the layers.')
    if config.THROUGHPUT:
        result = measure(config, context)
        if context.is_main:
            report(result)
        return
    if config.EVAL and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        raise UserError('-eval needs weights: give -pretrained=FILE.pdparams, or -resume=RUN.')
    if config.MODEL.RESUME:
        checkpoint_files(config.MODEL.RESUME)  # an error of the data would hide a wrong name
    with lock_folder(config, context) as folder:
        _run_in(folder, config, context)


def _run_in(folder: RunFolder, config, context) -> None:
    task = build_task(config)
    if config.TRAIN.LAST_EPOCH and not config.EVAL and _resumed(config, folder) is None:
        raise UserError(
            f'-last_epoch (TRAIN.LAST_EPOCH) is {config.TRAIN.LAST_EPOCH}, but nothing is resumed: name the weights of that '
            'epoch with -resume=FILE, or leave it out.'
        )
    unset = config.MODEL.NUM_CLASSES is None
    splits = ['val'] if config.EVAL else ['train', 'val']  # `train` first: its classes decide those of `val`
    data = {split: task.dataset(split) for split in splits}
    paddle.seed(config.SEED)  # the same initial weights on every rank
    model = build_model(config)
    weights, notes = _weights_to_evaluate(config) if config.EVAL else (None, [])
    if weights is not None:
        _match_classes(config, model, weights, data['val'], unset)
    config.freeze()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(RunLog(None, context.rank)))
        log.local(f'----- world_size = {context.world_size}, local_rank = {context.rank}\n{config}')
        for note in task.describe_data(data):
            log.master(f'----- {note}')
        loaders = {
            split: stack.enter_context(build_loader(config, task, dataset, split, context))
            for split, dataset in data.items()
        }
        if config.EVAL:
            for note in notes:
                log.master(note)
            _evaluate(config, task, model, weights, loaders['val'], context, log, folder)
        else:
            _train(config, task, model, loaders, context, log, folder)


def build_loader(config, task: Task, dataset, split: str, context: distributed.Context) -> datasets.Loader:
    """Build the loader of one split for this rank."""
    training = split == 'train'
    transform = task.transform(training)
    return datasets.build_dataloader(config, dataset, training, context.rank, context.world_size, transform)


def _weights_to_evaluate(config) -> tuple[Weights, list[str]]:
    """Read the weights that MODEL.RESUME, else MODEL.PRETRAINED names. Return them and the notes to log."""
    notes: list[str] = []
    if not config.MODEL.RESUME:
        return read_weights(config.MODEL.PRETRAINED), notes
    path, state = read_checkpoint(config.MODEL.RESUME, notes.append)
    checkpoint = validate_checkpoint(state, path)
    return Weights(path, checkpoint.weights, checkpoint.metadata), notes


def _match_classes(config, model, weights: Weights, data: datasets.Images, unset: bool) -> None:
    """Set the model's number of classes to that of the weights, if MODEL.NUM_CLASSES is unset and the data have fewer.

    Labels of list files are indices of the classifier's outputs. Data sets with class names number the classes they
    contain, so with fewer classes the same index means another class: an error.
    """
    classes = stored_classes(model, weights.arrays) if isinstance(data, datasets.Dataset) else None
    if not classes or not model.num_classes or classes <= model.num_classes:
        return
    if data.class_names is not None:
        raise UserError(
            f'{weights.source} has a classifier of {classes} classes, but {data.source} has {data.num_classes} classes, '
            'whose indices may differ from those of the weights: give the images in a list file (DATA.DATASET list) with '
            'the labels of the training.'
        )
    if unset:
        model.reset_classifier(classes)
        config.MODEL.NUM_CLASSES = classes


def _evaluate(config, task: Task, model, weights: Weights, loader, context, log, folder: RunFolder) -> None:
    load_pretrained(model, weights, log=log.master, replace_head=False)
    task.attach(model, log.master, training=False)
    model = task.on_engine(model)
    evaluator = build_evaluator(task, loader.dataset)
    open_folder(folder, config, context, log)
    result = evaluate(config, model, loader, context, log, task, evaluator)
    log.master(f'----- Validation: {describe_metrics(evaluator, result, "Validation")}, time: {result["seconds"]:.2f}')
    for line in evaluator.details():
        log.master(line)
    if context.is_main:
        metrics = MetricsFile(os.path.join(folder.path, 'metrics.jsonl'))
        metrics.append({'kind': 'eval', 'epoch': 0, 'step': 0, **result})
        write_files(folder.path, evaluator.files())
    if result['skipped']:
        log.master(f'{result["skipped"]} images could not be read and are not counted.')


def _resumed(config, folder: RunFolder) -> str | None:
    """Return the checkpoint or run to resume: MODEL.RESUME, or an existing run named TAG."""
    resume = config.MODEL.RESUME
    if resume:
        return folder.path if os.path.isdir(resume) else resume
    return folder.path if config.TAG and folder.has_checkpoint else None


def _train(config, task: Task, model, loaders, context, log, folder: RunFolder) -> None:
    resume = _resumed(config, folder)
    if resume and not config.MODEL.RESUME:
        log.master(f"----- The run '{config.TAG}' exists and is continued.")
    task.attach(model, log.master, training=True)  # may add parameters to the model
    if config.MODEL.PRETRAINED and not resume:
        start_from_weights(config, model, log.master)
    trainer = Trainer(config, model, task, loaders['train'], loaders['val'], context, log, folder.path)
    if resume:
        path, state = read_checkpoint(resume, log.master)
        trainer.snapshot.load_state_dict(state, path)
    open_folder(folder, config, context, log, keep_config=trainer.finished)
    trainer.fit()


def start_from_weights(config, model, log: Callable[[str], None]) -> None:
    """Load the initial weights of a training run, MODEL.PRETRAINED."""
    load_pretrained(model, config.MODEL.PRETRAINED, log=log)
    if config.MODEL.FRESH_HEAD:
        model.reset_classifier(model.num_classes)
        log('----- Pretrained: the classifier is re-initialized (MODEL.FRESH_HEAD)')
