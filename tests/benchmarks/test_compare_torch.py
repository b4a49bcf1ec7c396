# SPDX-License-Identifier: Apache-2.0
"""The comparison with PyTorch: messages, order of the turns, statistics, tables and refusals; its models where PyTorch is."""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading

import numpy as np
import paddle
import pytest

from benchmarks import compare_torch, leanvit_side, processes
from benchmarks.cases import DENSE, INFERENCE, MODELS, REDUCED, TRAINING, Case, alternating, cases, groups
from benchmarks.compare_torch import Comparison, parse, turns
from benchmarks.leanvit_side import LeanViT
from benchmarks.processes import Stopped, Worker, serve
from benchmarks.table import fastest, quartiles, ratio, tables
from models import build_model
from models.weights.convert import port_state_dict
from tests.conftest import assert_close
from tests.models.helpers import small_config
from utils.errors import UserError

CASE = Case(DENSE, INFERENCE, 'fp32', 2, 'leanvit', 'paddle')


def record(case: Case, *seconds: float, **more) -> dict:
    return {**case.fields(), 'seconds': list(seconds), **more}


# ---------------------------------------------------------------------------------------------------- cases
def test_frameworks_alternate_and_evit_brings_its_dense_model():
    assert list(groups([REDUCED])) == [[DENSE, REDUCED]] and sum(groups(MODELS), []) == list(MODELS)
    runners = [(case.side, case.runner) for case in cases(['gmlp_s16_224'], INFERENCE, 'bf16', 1, False)]
    assert runners == [('leanvit', 'dygraph'), ('torch', 'eager'), ('leanvit', 'paddle'), ('torch', 'compile'), ('leanvit', 'openvino')]  # fmt: skip
    runners = [case.runner for case in cases(['gmlp_s16_224'], TRAINING, 'fp32', 16, False)]
    assert runners == ['dygraph', 'eager']
    assert alternating('ab', 'xyz') == list('xaybz')


def test_turns(monkeypatch):
    """Every second round is in reverse; warm-up rounds are not timed; the limit ends the rounds after the first."""
    assert ''.join(case for case, _ in turns('ab', 3, 60, lambda: None)) == 'abbaabba'
    assert [timed for _, timed in turns('ab', 1, 60, lambda: None)] == [False, False, True, True]
    clock = iter([0.0, 100.0, 200.0])
    monkeypatch.setattr(compare_torch.time, 'monotonic', lambda: next(clock))
    assert len(list(turns('ab', 5, 60, lambda: None))) == 4


# ---------------------------------------------------------------------------------------------------- messages
class Fake:
    """A framework whose passes are counted."""

    def __init__(self):
        self.passes = 0

    def versions(self) -> dict:
        return {'fake': '1.0'}

    def prepare(self, case: Case):
        if case.runner == 'openvino':
            raise UserError('openvino is not installed.')
        if case.runner == 'onnxruntime':
            raise RuntimeError('no kernel\nfor this')

        def call():
            self.passes += 1

        return call, {'parameters': 3}

    def exchange(self, model: str, path: str):
        return 1e-6


class Link(Worker):
    """A `Worker` whose process is a thread."""

    def __init__(self, side):
        self._connection, other = multiprocessing.Pipe()
        threading.Thread(target=serve, args=(other, side), daemon=True).start()

    def __exit__(self, *error):
        self._connection.close()


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(processes, 'TURN', 1e-4)
    monkeypatch.setattr(processes, 'die_with_parent', lambda: None)
    monkeypatch.setattr(compare_torch, 'PAUSE', 0)


def test_requests_and_answers(at_once):
    side = Fake()
    with Link(side) as worker:
        assert worker.ask(5, 'versions') == {'fake': '1.0'}
        assert worker.ask(5, 'prepare', case=CASE.fields()) == {'parameters': 3} and side.passes == 1
        seconds, used = worker.ask(5, 'turn', case=CASE.fields())
        assert 0 < seconds < 1 and 0 <= used < 1 and side.passes > 1
        for runner, text in (('openvino', 'openvino is not installed.'), ('onnxruntime', 'RuntimeError: no kernel')):
            with pytest.raises(UserError, match=text):
                worker.ask(5, 'prepare', case={**CASE.fields(), 'runner': runner})
        worker.ask(5, 'forget')
        with pytest.raises(UserError, match='KeyError'):
            worker.ask(5, 'turn', case=CASE.fields())


PROCESS = """
import os, sys, time
from multiprocessing.connection import Connection
from benchmarks.processes import serve

class Side:
    def versions(self):
        return dict(os.environ)
    def exchange(self, model, path):
        if model == 'slow':
            time.sleep(60)
        print('out of memory', flush=True)
        os._exit(9)

print('noise', flush=True)
serve(Connection(int(sys.argv[-1])), Side())
"""


def test_processes_that_end_or_take_too_long():
    command = [sys.executable, '-c', PROCESS]
    with Worker(command, {'PYTHONPATH': processes.ROOT, 'ADDED': 'x'}) as worker:
        assert worker.ask(30, 'versions')['ADDED'] == 'x'
        with pytest.raises(Stopped, match='the process ended: out of memory'):
            worker.ask(30, 'exchange', model='m', path='')
    with Worker(command, {'PYTHONPATH': processes.ROOT}) as worker:
        worker.ask(30, 'versions')
        with pytest.raises(Stopped, match=r'no result within 0 s \(-limit\)'):
            worker.ask(0.1, 'exchange', model='slow', path='')
        process = worker._process
        with worker:
            pass
    assert process.poll() is not None


# ---------------------------------------------------------------------------------------------------- comparison
class Deadly(Fake):
    """A framework that does not survive one of its runners."""

    deaths = 0

    def prepare(self, case: Case):
        if case.runner == 'compile':
            Deadly.deaths += 1
            raise EOFError
        return super().prepare(case)


class DeadlyLink(Link):
    """Ends with the first EOFError."""

    def ask(self, limit, do, **arguments):
        try:
            return super().ask(limit, do, **arguments)
        except UserError as error:
            if 'EOFError' in str(error):
                raise Stopped('the process ended: killed') from None
            raise


@pytest.mark.parametrize('load', [0.1, 50.0])
def test_a_whole_comparison(at_once, tmp_path, monkeypatch, capsys, load):
    """Cases that fail or end their process are named; all others are measured with it once more."""
    monkeypatch.setattr(compare_torch.os, 'getloadavg', lambda: (load, 0, 0))
    started, Deadly.deaths = [], 0

    def start(side: str) -> Link:
        started.append(side)
        return DeadlyLink(Deadly() if side == 'torch' else Fake())

    args = parse([REDUCED, '-rounds=2', '-only=inference', '-precision=fp32', '-batch', '4'])
    result = Comparison(args, start, str(tmp_path)).run()
    records = {(row['model'], row['runner']): row for row in result['records']}
    assert len(records) == 12 and result['differences'] == {DENSE: 1e-6, REDUCED: 1e-6}
    assert started == ['torch', 'leanvit', 'torch', 'torch'] and Deadly.deaths == 2
    assert records[DENSE, 'compile']['error'] == 'the process ended: killed'
    assert records[DENSE, 'openvino']['error'] == 'openvino is not installed.'
    for name in (DENSE, REDUCED):
        for runner in ('dygraph', 'paddle', 'eager'):
            assert len(records[name, runner]['seconds']) == len(records[name, runner]['processor_seconds']) == 2
            assert records[name, runner]['parameters'] == 3
    assert json.loads(json.dumps(result))['environment']['rounds'] == 2 and result['environment']['load'] == load
    assert ('other processes use the processor (load average 50.0)' in capsys.readouterr().err) == (load == 50)
    assert 'leanvit onnxruntime: RuntimeError: no kernel' in tables(result)[-1]


def test_models_that_differ_are_not_compared(at_once, tmp_path):
    class Other(Fake):
        def exchange(self, model, path):
            return 0.1

    args = parse(['gmlp_s16_224', '-rounds=1'])
    with pytest.raises(UserError, match='gmlp_s16_224: with the same weights, logits differ by 1.0e-01'):
        Comparison(args, lambda side: Link(Other()), str(tmp_path)).run()


def test_mistakes(tmp_path):
    wrapper = tmp_path / 'python'
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    wrapper.chmod(0o755)
    for argv, text in [
        (['gmlp_ti16_224'], "there is no PyTorch model for 'gmlp_ti16_224': choose from gmlp_s16_224"),
        (['-rounds=0'], '-rounds is 0'),
        (['-batch', '4', '0'], '-batch is 0'),
        (['-json=/proc/x/out.json'], "cannot write '/proc/x/out.json'"),
        (['-torch_python=/nowhere/python'], "-torch_python: cannot start '/nowhere/python' .No such file"),
        ([f'-torch_python={wrapper}'], f"imported by {wrapper} .No module named 'torch'.: pip install -r benchmarks/"),
    ]:
        with pytest.raises(UserError, match=text):
            compare_torch.main(argv)


# ---------------------------------------------------------------------------------------------------- tables
def test_statistics():
    assert quartiles([4, 1, 2, 3, 5]) == (2, 3, 4)
    ours, theirs = record(CASE, 1.0, 2.0, 4.0), record(CASE, 2.0, 2.0, 2.0)
    assert ratio(ours, theirs) == (0.75, 1, 1.5) and ratio(ours, None) is None
    assert ratio(record(Case(DENSE, INFERENCE, 'fp32', 4, 'leanvit', 'paddle'), 1.0), theirs)[1] == 4
    assert (
        fastest({('leanvit', 'a'): ours, ('leanvit', 'b'): theirs, ('torch', 'c'): record(CASE, 0.1)}, 'leanvit')
        is ours
    )


def test_tables():
    """The best engine, ratios round by round, EViT relative to the dense model, mixed precision that was not active."""
    rows = []
    for model, factor in ((DENSE, 1.0), (REDUCED, 0.5)):
        ours, openvino, eager = (
            Case(model, INFERENCE, 'bf16', 16, *which)
            for which in (('leanvit', 'paddle'), ('leanvit', 'openvino'), ('torch', 'eager'))
        )
        rows += [record(ours, 2.0 * factor), record(openvino, 1.0 * factor), record(eager, 2.0)]
        rows.append(record(Case(model, INFERENCE, 'bf16', 16, 'torch', 'compile'), error='too slow'))
    steps = Case(DENSE, TRAINING, 'bf16', 16, 'leanvit', 'dygraph'), Case(DENSE, TRAINING, 'bf16', 16, 'torch', 'eager')
    rows += [record(steps[0], 4.0, 4.0, mixed_precision=False), record(steps[1], 2.0, 3.0)]
    head, *found, failed = tables({'environment': {'date': '2026-11-26', 'torch': '2.0'}, 'records': rows})
    assert head == 'date 2026-11-26, torch 2.0'
    inference, reduction, training = (table.splitlines()[2:] for table in found)
    assert inference[0] == f'| {DENSE} | bf16 | 16 | – | 8.0 | – | **16.0** | 8.0 | – | 2.00 (2.00–2.00) | – |'
    assert reduction == ['| bf16 | 16 | 2.00 (2.00–2.00) | 1.00 (1.00–1.00) |']
    assert training == [f'| {DENSE} | bf16 | 16 | 4.0 (in fp32) | 6.4 | – | 0.62 (0.56–0.69) | – |']
    assert failed.splitlines()[1] == f'- {DENSE} inference bf16 16 torch compile: too slow'


# ---------------------------------------------------------------------------------------------------- sides
SMALL = {'MODEL.TRANS.EMBED_DIM': 16, 'MODEL.TRANS.DEPTH': 1, 'MODEL.TRANS.NUM_HEADS': 2, 'DATA.IMAGE_SIZE': 32}


@pytest.mark.parametrize(
    ('kind', 'runner', 'facts'),
    [
        (INFERENCE, 'dygraph', {}),
        (INFERENCE, 'paddle', {}),
        (INFERENCE, 'openvino', {}),
        (TRAINING, 'dygraph', {'mixed_precision': False}),
    ],
)
def test_passes_of_this_suite(kind, runner, facts, tmp_path, monkeypatch):
    real = leanvit_side.configuration
    monkeypatch.setattr(leanvit_side, 'configuration', lambda model, options: real(model, {**options, **SMALL}))
    call, found = LeanViT(str(tmp_path)).prepare(Case(DENSE, kind, 'fp32', 2, 'leanvit', runner))
    call()
    call()
    assert found == facts


def small_torch_model(name: str):
    """(PyTorch model, configuration of this suite) of small size."""
    models = pytest.importorskip('benchmarks.torch_models', exc_type=ImportError)
    if name == 'evit':
        options = {'MODEL.TRANS.DEPTH': 4, 'MODEL.EVIT.DROP_LOC': (1, 2), 'MODEL.TRANS.NUM_HEADS': 2}
        config = small_config(REDUCED, *(item for pair in options.items() for item in pair))
        size, patch, dim = config.DATA.IMAGE_SIZE, config.MODEL.TRANS.PATCH_SIZE, config.MODEL.TRANS.EMBED_DIM
        shape = {'img_size': size, 'patch_size': patch, 'embed_dim': dim, 'depth': 4, 'num_heads': 2}
        return models.EViT(0.5, (1, 2), **shape, num_classes=config.MODEL.NUM_CLASSES), config
    config = small_config('ms_mlp_tiny_patch4_shift5_224')
    msmlp = config.MODEL.MSMLP
    shape = (msmlp.EMBED_DIM, msmlp.DEPTHS, msmlp.SHIFT_DIST, msmlp.MIX_SIZE)
    return models.MSMLP(*shape, num_classes=config.MODEL.NUM_CLASSES), config


@pytest.mark.parametrize('name', ['evit', 'ms_mlp'])
def test_references_in_pytorch(name, tmp_path, monkeypatch):
    """Plain references equal the models of this suite: number of parameters, logits with the same weights, a step."""
    pytest.importorskip('torch')
    pytest.importorskip('timm')
    from benchmarks import torch_models, torch_side

    theirs, config = small_torch_model(name)
    monkeypatch.setitem(torch_models.BUILDERS, 'small', lambda: theirs)
    monkeypatch.setattr(torch_side, 'SIZE', config.DATA.IMAGE_SIZE)
    monkeypatch.setattr(torch_side, 'CLASSES', config.MODEL.NUM_CLASSES)
    side, path = torch_side.PyTorch(1), tmp_path / 'exchange.npz'
    assert side.versions()['torch_threads'] == '1'
    side.exchange('small', str(path))
    arrays = dict(np.load(path))
    images, logits = arrays.pop('images'), arrays.pop('logits')
    model = build_model(config)
    model.set_state_dict(port_state_dict(model, arrays))
    model.eval()
    assert_close(model(paddle.to_tensor(images)).numpy(), logits, 1e-5)
    for kind, precision in ((INFERENCE, 'bf16'), (TRAINING, 'fp32')):
        call, facts = side.prepare(Case('small', kind, precision, 2, 'torch', 'eager'))
        call()
        assert facts == {'parameters': sum(parameter.size for parameter in model.parameters())}
