# SPDX-License-Identifier: Apache-2.0
"""A plan: every combination accounted for, figures that hold, a frontier nothing beats, files that build what they say."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from config import get_config
from engine.distributed import Context
from models import build_model
from models.layers import ToMeReducer
from models.profile import profile
from tests.runs.conftest import run
from tools import plan
from tools._pareto import pareto_frontier
from utils.environment import processor_name
from utils.errors import UserError
from utils.formats import write_pdparams

CONFIG = """
DATA: {{DATASET: folder, DATA_PATH: '{data}', IMAGE_SIZE: 32, CROP_PCT: 1.0, NUM_WORKERS: 0}}
MODEL:
  TYPE: vit
  NAME: tiny
  TRANS: {{PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 4, NUM_HEADS: 2}}
  EVIT: {{DROP_LOC: [1, 2]}}
SAVE: '{output}'
"""


@pytest.fixture(scope='module')
def tiny(tmp_path_factory, images) -> SimpleNamespace:
    """A Vision Transformer of four blocks (`cfg`), and random weights for three classes (`weights`)."""
    root = tmp_path_factory.mktemp('plan')
    cfg, weights = root / 'tiny.yaml', root / 'tiny.pdparams'
    cfg.write_text(CONFIG.format(data=images, output=root / 'out'))
    rng = np.random.default_rng(0)
    state = build_model(get_config(str(cfg), ['MODEL.NUM_CLASSES', 3])).state_dict()
    write_pdparams({n: rng.normal(0, 0.5, v.shape).astype('float32') for n, v in state.items()}, str(weights))
    return SimpleNamespace(root=root, cfg=str(cfg), weights=str(weights))


SWEEP = ('-remove=none;0;1', '-keep_rates=1,0.5', '-r=0,3')
LEFT_OUT = [((1,), 0.5, 0), ((1,), 0.5, 3)]  # EViT reduces in block 1


@pytest.fixture(scope='module')
def planned(tiny) -> SimpleNamespace:
    """A plan with accuracies (`folder`, `result`), and what it printed (`out`)."""
    folder = tiny.root / 'new' / 'plan'
    flags = (f'-cfg={tiny.cfg}', f'-output={folder}', '-rounds=2', '-batch_size=4')
    out, _ = run('tools/plan.py', *flags, *SWEEP, f'-pretrained={tiny.weights}')
    return SimpleNamespace(folder=folder, out=out, result=json.loads((folder / 'results.json').read_text()))


def key(row: dict) -> tuple:
    return tuple(row['remove']), row['keep_rate'], row['r']


def test_every_combination_is_measured_or_left_out_with_its_reason(planned):
    assert planned.result['environment']['device'] == processor_name()
    points, left_out = planned.result['points'], planned.result['left_out']
    assert [key(row) for row in left_out] == LEFT_OUT
    assert all('names block 1, whose attention MODEL.LAMBDA removes' in row['reason'] for row in left_out)
    assert len(re.findall('left out: removed 1, keep rate 0.5', planned.out)) == 2
    sweep = [(remove, rate, r) for remove in [(), (0,), (1,)] for rate in (1, 0.5) for r in (0, 3)]
    assert [key(row) for row in points] == [combination for combination in sweep if combination not in LEFT_OUT]
    for row in points:
        low, high = row['images_per_second_quartiles']
        assert 0 < low <= row['images_per_second'] <= high
        assert row['latency_ms'] > 0
        assert row['ratio'] == pytest.approx(row['images_per_second'] / points[0]['images_per_second'])
    with Image.open(planned.folder / 'pareto.png') as picture:
        assert picture.format == 'PNG' and picture.width > picture.height > 500


def test_the_frontiers_files_are_the_models_that_were_planned(planned, tiny, tmp_path):
    """Each file alone gives size, computation and accuracy of its point."""
    frontier = [row for row in planned.result['points'] if row['yaml']]
    pairs = [(row['acc1'], row['images_per_second']) for row in planned.result['points']]
    assert [planned.result['points'][i] for i in pareto_frontier(pairs)] == frontier
    assert sorted(path.name for path in planned.folder.glob('*.yaml')) == sorted(row['yaml'] for row in frontier)
    for row in frontier:
        config = get_config(str(planned.folder / row['yaml']))
        cost = profile(build_model(config), [1, 3, 32, 32])
        removal = config.MODEL.LAMBDA
        assert key(row) == (removal.PRUNE_LAYERS, config.MODEL.EVIT.KEEP_RATE, config.MODEL.TOME.R)
        assert bool(row['remove']) == removal.REMOVED
        profiled = build_model(get_config(str(planned.folder / row['yaml']), ['MODEL.NUM_CLASSES', 3]))
        assert row['params'] == sum(weight.size for weight in profiled.parameters())
        assert cost.macs - row['macs'] == (1000 - 3) * 16
    row = max(frontier, key=lambda row: (row['remove'], row['keep_rate'] < 1, row['r']))
    flags = (f'-cfg={planned.folder / row["yaml"]}', '-eval', f'-pretrained={tiny.weights}', '-batch_size=5')
    out, _ = run('main_single_gpu.py', *flags, f'-output={tmp_path}')
    assert f'Validation Acc@1: {row["acc1"]:.4f}' in out


def test_a_file_holds_what_changes_and_nothing_else(planned):
    text = (planned.folder / next(row['yaml'] for row in planned.result['points'] if row['yaml'])).read_text()
    assert 'BASE: ../../tiny.yaml' in text
    assert not re.search('DATA|NUM_CLASSES|PRETRAINED|DONE_LAYERS', text)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25))
def test_the_frontier_is_what_nothing_beats(points):
    frontier = pareto_frontier(points)

    def beats(p, q):
        return p != q and p[0] >= q[0] and p[1] >= q[1]

    assert frontier == sorted(set(frontier))
    for index, point in enumerate(points):
        assert (index in frontier) == (not any(beats(other, point) for other in points))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=25), st.randoms())
def test_the_frontier_depends_on_neither_order_nor_units(points, random):
    def chosen(points):
        return sorted({points[i] for i in pareto_frontier(points)})

    shuffled = random.sample(points, len(points))
    assert chosen(shuffled) == chosen(points)
    assert chosen([(2 * x + 1, y**3) for x, y in points]) == [(2 * x + 1, y**3) for x, y in chosen(points)]
    assert chosen([(y, x) for x, y in points]) == sorted((y, x) for x, y in chosen(points))


def candidates(tiny, *flags: str) -> tuple[list[plan.Candidate], object]:
    args = plan.parse([f'-cfg={tiny.cfg}', f'-output={tiny.root / "none"}', *flags])
    config, _ = plan.read_config(args)
    first, *others = plan.combinations(args, config)
    return plan.build_all(config, first, others)[0], args


def test_combinations_share_one_set_of_weights_and_none_of_the_results(tiny):
    found, _ = candidates(tiny, *SWEEP)
    assert {id(p) for c in found for p in c.model.parameters()} == {id(p) for p in found[0].model.parameters()}
    x = paddle.randn([2, 3, 32, 32])
    outputs = np.stack([c.model.forward_features(x)[:, 0].numpy() for c in found])
    alone = build_model(found[-1].config)
    alone.set_state_dict({n: v.clone() for n, v in found[-1].model.state_dict().items()})
    alone.eval()
    np.testing.assert_array_equal(alone.forward_features(x)[:, 0].numpy(), outputs[-1])
    distances = np.abs(outputs[:, np.newaxis] - outputs).max((2, 3)) + np.eye(len(found))
    assert distances.min() > 1e-4


def test_groups_of_programs_are_tied_by_the_given_model(tiny, monkeypatch):
    """The machine is twice as slow during the second group; the results do not show it."""
    found, args = candidates(tiny, '-r=0,1,2', '-backend=exported', '-rounds=3', '-batch_size=2')
    monkeypatch.setattr(plan, 'PROGRAMS_AT_ONCE', 1)
    groups = []

    def slow(calls, context, rounds, warmup):
        for call in calls:
            call()
        groups.append(len(calls))
        return [[len(groups) * (1 + index)] * rounds for index in range(len(calls))]

    monkeypatch.setattr(plan, 'time_interleaved', slow)
    seconds = plan.measure(found, args, Context(0, 1, False))
    assert groups == [4, 4]
    np.testing.assert_allclose(seconds, [[[1] * 3, [2] * 3], [[3] * 3, [4] * 3], [[3] * 3, [4] * 3]])


def test_the_given_models_own_values_are_the_default(tiny):
    opts = ('MODEL.LAMBDA.DONE_LAYERS', '[3]', 'MODEL.EVIT.KEEP_RATE', '0.5', 'MODEL.TOME.SCHEDULE', '[2,1]')
    found, _ = candidates(tiny, '-keep_rates=0.5,0.75', '-opts', *opts)
    assert [c.combination for c in found] == [plan.Combination((3,), rate, None) for rate in (0.5, 0.75)]
    assert found[1].config.MODEL.LAMBDA.REMOVED
    reducers = [reducer for block in found[1].model.blocks for reducer in block.reducers]
    assert [reducer.r for reducer in reducers if isinstance(reducer, ToMeReducer)] == [2, 1, 0]


def test_mistakes(tiny, tmp_path):
    earlier = tmp_path / 'earlier'
    earlier.mkdir()
    (earlier / 'results.json').write_text('{}')
    cfg, output = f'-cfg={tiny.cfg}', f'-output={tmp_path / "new"}'
    mistakes = [
        ([output], '-cfg is missing'),
        ([cfg, f'-output={earlier}'], 'holds an earlier plan'),
        ([cfg, output, '-keep_rates=1,0'], "-keep_rates has '0'"),
        ([cfg, output, '-keep_rates=1;0.5'], "-keep_rates has '1;0.5'"),
        ([cfg, output, '-r=8,half'], "-r has 'half'"),
        ([cfg, output, '-remove=0,2;'], "-remove has ''"),
        ([cfg, output, '-remove=9'], 'no combination can be built.*block 9, but there are blocks 0 to 3'),
        ([cfg, output, '-rounds=0'], '-rounds is 0'),
        ([cfg, output, '-data_path=/data'], '-pretrained is missing'),
        ([cfg, output, '-pretrained=/missing.pdparams'], '/missing.pdparams'),
        ([cfg, output, f'-pretrained={tiny.weights}', '-data_path=/missing'], '/missing'),
        ([cfg, output, '-opts', 'MODEL.TYPE', 'gmlp'], 'MODEL.TYPE is gmlp; only a Vision Transformer'),
    ]
    for argv, text in mistakes:
        with pytest.raises(UserError, match=text):
            plan.main(argv)
    assert not (tmp_path / 'new').exists()


def test_weights_that_fit_only_some_combinations(tiny, tmp_path):
    """Attention that is not in the file can stay away, but not come back."""
    state = build_model(get_config(tiny.cfg, ['MODEL.NUM_CLASSES', 3, 'MODEL.LAMBDA.PRUNE_LAYERS', (0,),
                                              'MODEL.LAMBDA.REMOVED', True])).state_dict()  # fmt: skip
    path = str(tmp_path / 'removed.pdparams')
    write_pdparams({name: value.numpy() for name, value in state.items()}, path)
    own = ['-opts', 'MODEL.LAMBDA.PRUNE_LAYERS', '[0]']
    args = plan.parse([f'-cfg={tiny.cfg}', f'-output={tmp_path}', f'-pretrained={path}', '-remove=none;0,3', *own])
    config, _ = plan.read_config(args)
    first, *others = plan.combinations(args, config)
    found, left_out = plan.build_all(config, first, others)
    assert [c.combination.remove for c in found] == [(0,), (0, 3)]
    ((combination, reason),) = left_out
    assert combination.remove == () and 'blocks.0.attn' in reason
