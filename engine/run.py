# SPDX-License-Identifier: Apache-2.0
"""From a configuration to a trained or evaluated model: what both launchers call in each process."""

from __future__ import annotations

import glob
import itertools
import os
import time
from collections.abc import Callable

import paddle

import datasets
from engine import distributed
from engine.checkpoint import LAST, read_checkpoint
from engine.evaluate import evaluate
from engine.objectives import TASKS
from engine.throughput import measure, report
from engine.train import Trainer
from models import build_model
from models.pretrained import load_pretrained, load_state
from utils.errors import UserError
from utils.files import atomic_write
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
    splits = {}
    for split in ['val'] if config.EVAL else ['train', 'val']:  # classes of training are what validation must fit
        splits[split] = datasets.build_dataset(config, split)
        config.MODEL.NUM_CLASSES = datasets.resolve_num_classes(config, splits[split])
    paddle.seed(config.SEED)  # the same initial weights on every process
    model = build_model(config)
    config.freeze()
    folder = run_folder(config, context)
    log = RunLog(folder, context.rank)
    log.local(f'----- world_size = {context.world_size}, local_rank = {context.rank}\n{config}')
    _log_notes(config, splits, log)
    loaders = {
        split: datasets.build_dataloader(config, data, split == 'train', context.rank, context.world_size)
        for split, data in splits.items()
    }
    try:
        if config.EVAL:
            _evaluate(config, model, loaders['val'], context, log, folder)
        else:
            _train(config, model, loaders, context, log, folder)
    finally:
        for loader in loaders.values():
            loader.close()
        log.close()


def _log_notes(config, splits: dict[str, datasets.Dataset], log: RunLog) -> None:
    """What a user should know about the data before an epoch is over."""
    notes = [note for data in splits.values() for note in data.notes]
    if 'train' in splits:
        notes.append(datasets.describe_empty(splits['train'], config.MODEL.NUM_CLASSES))
    for note in filter(None, notes):
        log.master(f'----- {note}')


def _evaluate(config, model, loader, context, log, folder: str) -> None:
    if config.MODEL.RESUME:
        path, state = read_checkpoint(config.MODEL.RESUME, log.master)
        weights = {**state.get('model', state), FACTS: state.get(FACTS, {})}
        load_state(model, weights, f"'{path}'", log.master, replace_head=False)
    else:
        load_pretrained(model, config.MODEL.PRETRAINED, log=log.master, replace_head=False)
    measure = TASKS[config.TRAIN.TASK](config, model, log.master, training=False).measure
    result = evaluate(config, model, loader, context, log, measure=measure)
    log.master(f'----- Validation: {measure.text(result, "Validation")}, time: {result["seconds"]:.2f}')
    if context.is_main:
        MetricsFile(os.path.join(folder, 'metrics.jsonl')).append({'kind': 'eval', 'epoch': 0, 'step': 0, **result})
    if result['skipped']:
        log.master(f'{result["skipped"]} images could not be read and are not counted.')


def _train(config, model, loaders, context, log, folder: str) -> None:
    resume = config.MODEL.RESUME
    if not resume and config.TAG and os.path.exists(os.path.join(folder, LAST)):
        resume = folder
        log.master(f"----- The run '{config.TAG}' exists and is continued.")
    if config.MODEL.PRETRAINED and not resume:
        start_from_weights(config, model, log.master)
    task = TASKS[config.TRAIN.TASK](config, model, log.master, training=True)
    trainer = Trainer(config, model, task, loaders['train'], loaders['val'], context, log, folder)
    if resume:
        path, state = read_checkpoint(resume, log.master)
        trainer.load_state_dict(state, path)
    trainer.fit()


def start_from_weights(config, model, log: Callable[[str], None]) -> None:
    """Loads what a training starts from, MODEL.PRETRAINED."""
    load_pretrained(model, config.MODEL.PRETRAINED, log=log)
    if config.MODEL.FRESH_HEAD:
        model.reset_classifier(model.num_classes)
        log('----- Pretrained: the classifier starts anew (MODEL.FRESH_HEAD)')


def run_folder(config, context: distributed.Context) -> str:
    """Makes the run's folder, the same on every process, and writes the resolved configuration into it.

    `-resume=FOLDER` goes on in that folder, TAG names one, else it is train- or eval- and a time stamp.
    """
    resume = config.MODEL.RESUME
    if resume and os.path.isdir(resume) and not config.EVAL:
        folder = resume
    else:
        stamp = time.strftime(('eval' if config.EVAL else 'train') + '-%Y%m%d-%H%M%S')
        folder = context.broadcast_text(os.path.join(config.SAVE, config.TAG or _unused(config.SAVE, stamp)))
    if context.is_main:
        try:
            os.makedirs(folder, exist_ok=True)
            for stale in glob.glob(os.path.join(glob.escape(folder), '.*.tmp')):  # of a process killed while writing
                os.unlink(stale)
            _write_config(config, os.path.join(folder, 'config.yaml'))
            if not config.EVAL:
                _point_latest(folder)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder '{folder}': {error.strerror}; choose another with -output."
            ) from None
    context.barrier()
    return folder


def _unused(parent: str, name: str) -> str:
    """`name`, or with a number behind it where another run of the same second has it."""
    names = itertools.chain([name], (f'{name}-{number}' for number in itertools.count(2)))
    return next(name for name in names if not os.path.exists(os.path.join(parent, name)))


def _write_config(config, path: str) -> None:
    saved = config.clone()
    saved.defrost()
    saved.TAG, saved.EVAL, saved.MODEL.RESUME, saved.BASE = '', False, None, ['']
    with atomic_write(path, 'w') as file:
        file.write(saved.dump())


def _point_latest(folder: str) -> None:
    """SAVE/latest is the run that was trained last."""
    link = os.path.join(os.path.dirname(os.path.abspath(folder)), 'latest')
    if os.path.islink(link):
        os.unlink(link)
    if not os.path.exists(link):
        os.symlink(os.path.basename(os.path.abspath(folder)), link)
