# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a trained or evaluated model: what both launchers call in each process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import paddle

import datasets
from engine import distributed
from engine.checkpoint import read_checkpoint
from engine.evaluate import evaluate
from engine.objectives import TASKS
from engine.run_folder import RunFolder, claim, open_folder
from engine.throughput import measure, report
from engine.train import Trainer
from models import build_model
from models.pretrained import load_pretrained, load_state
from utils.errors import UserError
from utils.runlog import MetricsFile, RunLog
from utils.weights import FACTS


def run_config(config) -> None:
    """Trains, evaluates (EVAL) or measures (THROUGHPUT) what `config` describes, in this process."""
    context = distributed.start()
    if config.DATA.BATCH_SIZE_EVAL is None:
        config.DATA.BATCH_SIZE_EVAL = config.DATA.BATCH_SIZE
    if config.THROUGHPUT:
        result = measure(config, context)
        if context.is_main:
            report(result)
        return
    if config.EVAL and not (config.MODEL.PRETRAINED or config.MODEL.RESUME):
        raise UserError('-eval needs weights: give -pretrained=FILE.pdparams, or -resume=RUN.')
    with claim(config, context) as folder:
        _run_in(folder, config, context)


def _run_in(folder: RunFolder, config, context) -> None:
    if config.TRAIN.LAST_EPOCH and not config.EVAL and _resumed(config, folder) is None:
        raise UserError(
            f'-last_epoch (TRAIN.LAST_EPOCH) is {config.TRAIN.LAST_EPOCH}, but nothing is resumed: name the weights of that '
            'epoch with -resume=FILE, or leave it out.'
        )
    splits = {}
    for split in ['val'] if config.EVAL else ['train', 'val']:  # classes of training are what validation must fit
        splits[split] = datasets.build_dataset(config, split)
        config.MODEL.NUM_CLASSES = datasets.resolve_num_classes(config, splits[split])
    paddle.seed(config.SEED)  # the same initial weights on every process
    model = build_model(config)
    config.freeze()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(RunLog(None, context.rank)))
        log.local(f'----- world_size = {context.world_size}, local_rank = {context.rank}\n{config}')
        _log_notes(config, splits, log)
        loaders = {
            split: stack.enter_context(
                datasets.build_dataloader(config, data, split == 'train', context.rank, context.world_size)
            )
            for split, data in splits.items()
        }
        if config.EVAL:
            _evaluate(config, model, loaders['val'], context, log, folder)
        else:
            _train(config, model, loaders, context, log, folder)


def _log_notes(config, splits: dict[str, datasets.Dataset], log: RunLog) -> None:
    """What a user should know about the data before an epoch is over."""
    notes = [note for data in splits.values() for note in data.notes]
    if 'train' in splits:
        notes.append(datasets.describe_empty(splits['train'], config.MODEL.NUM_CLASSES))
    for note in filter(None, notes):
        log.master(f'----- {note}')


def _evaluate(config, model, loader, context, log, folder: RunFolder) -> None:
    if config.MODEL.RESUME:
        path, state = read_checkpoint(config.MODEL.RESUME, log.master)
        weights = {**state.get('model', state), FACTS: state.get(FACTS, {})}
        load_state(model, weights, f"'{path}'", log.master, replace_head=False)
    else:
        load_pretrained(model, config.MODEL.PRETRAINED, log=log.master, replace_head=False)
    measure = TASKS[config.TRAIN.TASK](config, model, log.master, training=False).measure
    open_folder(folder, config, context, log)
    result = evaluate(config, model, loader, context, log, measure=measure)
    log.master(f'----- Validation: {measure.text(result, "Validation")}, time: {result["seconds"]:.2f}')
    if context.is_main:
        metrics = MetricsFile(os.path.join(folder.path, 'metrics.jsonl'))
        metrics.append({'kind': 'eval', 'epoch': 0, 'step': 0, **result})
    if result['skipped']:
        log.master(f'{result["skipped"]} images could not be read and are not counted.')


def _resumed(config, folder: RunFolder) -> str | None:
    """The checkpoint or run that training continues from: MODEL.RESUME, or the run that has the name TAG already."""
    resume = config.MODEL.RESUME
    if resume:
        return folder.path if os.path.isdir(resume) else resume
    return folder.path if config.TAG and folder.has_checkpoint else None


def _train(config, model, loaders, context, log, folder: RunFolder) -> None:
    resume = _resumed(config, folder)
    if resume and not config.MODEL.RESUME:
        log.master(f"----- The run '{config.TAG}' exists and is continued.")
    if config.MODEL.PRETRAINED and not resume:
        start_from_weights(config, model, log.master)
    task = TASKS[config.TRAIN.TASK](config, model, log.master, training=True)
    trainer = Trainer(config, model, task, loaders['train'], loaders['val'], context, log, folder.path)
    if resume:
        path, state = read_checkpoint(resume, log.master)
        trainer.load_state_dict(state, path)
    open_folder(folder, config, context, log)
    trainer.fit()


def start_from_weights(config, model, log: Callable[[str], None]) -> None:
    """Loads what a training starts from, MODEL.PRETRAINED."""
    load_pretrained(model, config.MODEL.PRETRAINED, log=log)
    if config.MODEL.FRESH_HEAD:
        model.reset_classifier(model.num_classes)
        log('----- Pretrained: the classifier starts anew (MODEL.FRESH_HEAD)')
