# SPDX-License-Identifier: Apache-2.0
"""The check of a device: on this CPU, with the branches of a GPU forced, and on a GPU where there is one."""

from __future__ import annotations

import json
import subprocess
import sys

import paddle
import pytest

from tasks import build_task
from tests.conftest import ROOT
from tests.engine.gpu import gpu  # noqa: F401
from tests.runs.conftest import environment
from tests.tasks.helpers import ALONE
from tools import _device_checks as checks
from tools import _device_goldens, check_device
from tools._device_checks import Finding
from tools._device_goldens import GOLDENS
from utils.environment import is_gpu_build
from utils.errors import UserError


def test_table_and_file(tmp_path, capsys):
    path = tmp_path / 'device.json'
    assert check_device.main(['-only', 'goldens', 'models', 'training', '-json', str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(path.read_text())
    assert found['machine']['paddle'] == paddle.__version__
    *goldens, finding = found['findings']  # a CPU is not compared with itself
    assert [row['name'] for row in goldens] == [f'{g.name}: original program, float32' for g in GOLDENS]
    assert lines[-1] == f'| {finding["name"]} | {finding["value"]} | – | yes |'


def test_limits_cover_all_checks_in_five_minutes():
    assert checks.LIMITS.keys() == checks.CHECKS.keys() and sum(checks.LIMITS.values()) <= 300


def test_a_check_ends_at_its_limit_and_an_error_is_a_finding(monkeypatch, capsys):
    def slow(context, folder):
        yield Finding('first', '1')
        clock[0] += 100
        yield Finding('second', '2')
        yield Finding('third', '3')

    def broken(context, folder):
        yield Finding('before', '1')
        raise RuntimeError('CUDA error 700')

    clock = [0.0]
    monkeypatch.setattr(check_device.time, 'monotonic', lambda: clock[0])
    monkeypatch.setitem(check_device.CHECKS, 'models', slow)
    monkeypatch.setitem(check_device.CHECKS, 'waits', broken)
    assert check_device.main(['-only', 'models', 'waits']) == 1
    out = capsys.readouterr().out
    assert '| second | 2 | – | yes |\n| models: rest of the check | left out | after 50 s | yes |\n| before' in out
    assert out.endswith('| waits | RuntimeError: CUDA error 700 | no error | NO |\n')


def test_a_reference_file_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(_device_goldens, 'FOLDER', '/nowhere')
    with pytest.raises(UserError, match="'/nowhere/gmlp-fwd_a.npz' is missing: run the check in a clone"):
        check_device.main(['-only', 'goldens'])


def test_processes_that_hang_or_fail_are_ended():
    with pytest.raises(RuntimeError, match='-c did not end within 0.2 s'):
        checks._start('-c', 0.2, 'import time; time.sleep(60)')
    with pytest.raises(RuntimeError, match='-c failed: .*ZeroDivisionError'):
        checks._start('-c', 30, '1 / 0')


@pytest.mark.skipif(is_gpu_build(), reason='starts processes without GPUs')
def test_two_processes_reduce_exactly(tmp_path, monkeypatch):
    """A script of its own under the launcher; the training of two processes is a test of the launchers."""
    monkeypatch.setattr(checks, 'HANGS', 240)
    findings = checks.check_processes(ALONE, str(tmp_path))
    exact, speed = next(findings), next(findings)
    assert exact.ok and exact.value == 'exact' and speed.value.endswith(' GB/s')


def test_a_check_that_fails_is_seen(monkeypatch, capsys):
    findings = [checks._at_most('logits', 0.5, 0.1), checks._at_most('nan', float('nan'), 1), Finding('speed', '3')]
    monkeypatch.setitem(check_device.CHECKS, 'models', lambda context, folder: findings)
    assert check_device.main(['-only', 'models']) == 1
    out = capsys.readouterr().out
    assert 'logits: 0.5 (at most 0.1) FAILED' in out
    for row in ('| logits | 0.5 | at most 0.1 | NO |', '| nan | nan | at most 1 | NO |', '| speed | 3 | – | yes |'):
        assert row in out


@pytest.mark.parametrize(
    ('name', 'count'),
    [('goldens', 17), ('models', 6), ('training', 6), ('overflow', 1), ('waits', 3)],
    ids=lambda value: str(value),
)
def test_checks_of_a_gpu(gpu, monkeypatch, tmp_path, name, count):  # noqa: F811
    """Here the GPU is the CPU, so that all numbers agree."""
    monkeypatch.setattr(checks, 'FAMILIES', ('gmlp_digits',))
    monkeypatch.setattr(checks, 'OVERFLOWING', 2.0**127)
    monkeypatch.setattr(checks, 'is_gpu_build', lambda: True)
    monkeypatch.setattr(checks, '_digits', lambda *options, digits=checks._digits: digits(*without_half(options)))
    if name == 'overflow':
        monkeypatch.setattr(checks, 'build_task', large_losses)
    found = list(checks.CHECKS[name](gpu, str(tmp_path)))
    assert len(found) == count and all(finding.ok for finding in found), found


def test_wrong_gradients_are_seen(gpu, monkeypatch):  # noqa: F811
    """Such as those of an attention kernel whose forward pass is right."""
    gradients = checks._gradients
    monkeypatch.setattr(checks, 'FAMILIES', ('deit_tiny_patch16_224',))
    monkeypatch.setattr(checks, 'half_types', list)
    monkeypatch.setattr(
        checks, '_gradients', lambda model, images, seen=[1]: gradients(model, images) * seen.pop() if seen else -1
    )
    found = {finding.name: finding.ok for finding in checks.check_models(gpu, '')}
    assert found == {f'deit_tiny_patch16_224: {what}, float32': what == 'logits' for what in ('logits', 'gradients')}


def test_losses_in_float16_skip_no_step(gpu, monkeypatch):  # noqa: F811
    """At the start scale of 65536, gradients may overflow at first."""
    scales, step = [], checks._step
    monkeypatch.setattr(checks, '_step', lambda *args: (scales.append(step(*args)), scales[-1])[1])
    checks._losses(checks._digits('AMP', True), gpu)
    assert scales[0][1].scaler.state_dict()['scale'].item() == checks.SAFE


def test_batches_shrink_to_the_memory(gpu, monkeypatch):  # noqa: F811
    """As on a card of 11 GB. Other errors end the check."""

    def measured(case, evaluation, training, context, how):
        asked.append((evaluation, training))
        if training > 32:
            raise errors[len(asked) % 2]
        return [Finding(case.name, how)] * 3

    asked, errors = [], [MemoryError('ResourceExhaustedError'), UserError('there is not enough memory for one batch')]
    monkeypatch.setattr(checks, '_speed', measured)
    monkeypatch.setattr(checks, 'half_types', lambda: ['float16'])
    monkeypatch.setattr(checks, 'TIMED', {True: ('deit_base_patch16_224',)})
    monkeypatch.setattr(paddle.device.cuda, 'empty_cache', lambda: None)
    found = [(finding.name, finding.value) for finding in checks.check_speed(gpu, '')]
    assert asked == [(256, 128), (128, 64), (64, 32)]
    assert found == [
        ('deit_base_patch16_224: batches of 256 and 128', 'out of memory'),
        ('deit_base_patch16_224: batches of 128 and 64', 'out of memory'),
        *[('deit_base_patch16_224', 'float16')] * 3,
    ]
    errors[:] = [RuntimeError('an illegal memory access was encountered')] * 2
    with pytest.raises(RuntimeError, match='illegal memory access'):
        list(checks.check_speed(gpu, ''))


def without_half(options) -> list:
    """Options with O1 instead of O2: a CPU cannot compute with weights in half precision."""
    return ['O1' if option == 'O2' else option for option in options]


def large_losses(config):
    """A task whose float32 gradients overflow at a loss scale of 2^127."""
    task = build_task(config)
    loss = task.loss

    def scaled(*args):
        losses = loss(*args)
        return losses._replace(total=losses.total * 1e4)

    task.loss = scaled
    return task


@pytest.mark.gpu
def test_this_gpu():
    command = [sys.executable, 'tools/check_device.py', '-only', 'goldens', 'models', 'training', 'overflow', 'waits']
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
