# SPDX-License-Identifier: Apache-2.0
"""The estimate of time and memory at the start of a training: one log line, from numbers that the host has."""

import re
from types import SimpleNamespace

import pytest

from engine.estimate import describe_estimate, peak_memory
from engine.length import RunLength
from tests.engine import curves
from tests.engine.gpu import gpu  # noqa: F401
from tests.engine.test_curves import GMLP
from tests.engine.test_waits import trainer_of, waits  # noqa: F401
from tests.tasks.helpers import build_trainer
from utils.text import duration

ESTIMATE = (
    r'----- Estimate: (.+) per epoch of (\d+) steps, (.+) for the remaining (\d+) steps .*peak memory ([\d.]+) GiB'
)


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0.004, '0.004 s'), (3.2, '3 s'), (59.7, '1 min 00 s'), (185, '3 min 05 s'), (3599.9, '1 h 00 min'), (25920, '7 h 12 min'),
        (86400 * 2 + 3 * 3600, '2 d 03 h'),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers_of_an_estimate():
    length = RunLength(steps_per_epoch=1251, num_steps=1251 * 300, validate_every=1251)
    assert describe_estimate(length, 21, 2.5, 3 * 2**30) == (
        'Estimate: 8 min 20 s per epoch of 1251 steps, 1 d 17 h for the remaining 375279 steps of the run, without '
        'validations; peak memory 3.00 GiB'
    )
    assert describe_estimate(length, 375300, 2.5, None).endswith(
        '0 s for the remaining 0 steps of the run, without validations'
    )


def test_a_run_is_estimated_once_from_its_second_report(images, tmp_path, monkeypatch):
    """25 images/s: 5 steps of 16 images, of which two are taken at the second report."""
    options = {'DATA.DATA_PATH': images, 'TRAIN.NUM_EPOCHS': 2, 'REPORT_FREQ': 2}
    trainer = build_trainer(curves._config({**curves.COMMON, **GMLP, **options}), str(tmp_path))
    now = [0.0]
    monkeypatch.setattr('engine.report.time', SimpleNamespace(time=lambda: now[0]))
    step = trainer._step

    def timed(*args):
        now[0] += 16 / 25
        return step(*args)

    monkeypatch.setattr(trainer, '_step', timed)
    trainer.fit()
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    (place,) = (number for number, line in enumerate(lines) if 'Estimate' in line)
    assert sum('Images/s' in line for line in lines[:place]) == 2
    epoch, steps, rest, left, memory = re.search(ESTIMATE, lines[place]).groups()
    assert (epoch, steps, rest, left) == ('3 s', '5', '5 s', '8') and float(memory) > 0.1


def test_the_estimate_waits_for_no_device(waits, images, tmp_path):  # noqa: F811
    """Each report reads the same tensors, whether an estimate follows or not."""
    run = trainer_of(GMLP, images, str(tmp_path), REPORT_FREQ=2, **{'TRAIN.NUM_EPOCHS': 2})
    report, counts = run.reporter.step, []

    def counted(*args, **options):
        begin = len(waits)
        report(*args, **options)
        counts.append(waits[begin:])

    run.reporter.step = counted
    run.fit()
    assert len(counts) > 4 and counts[1] == counts[0] == counts[2] == counts[3]


def test_memory_of_a_gpu_is_that_of_its_allocator(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr('paddle.device.cuda.max_memory_allocated', lambda: 5)
    assert peak_memory(on_gpu=True) == 5 and peak_memory(on_gpu=False) > 2**20
