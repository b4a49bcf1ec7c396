# SPDX-License-Identifier: Apache-2.0
"""All combinations of the parts of the Vision Transformer: each trains, or is refused with a sentence.

The parts are those of the registries. A new one needs a line in `MIXERS`, `REDUCERS` or `TASK_OPTIONS`, and is then tried with
all the others.
"""

from __future__ import annotations

import itertools

import numpy as np
import paddle
import pytest

from config import SCHEMA, get_config
from models import build_model
from models.layers import mixers, tokens
from tasks import TASKS
from tests.tasks.helpers import attached, batch_of
from utils.errors import UserError
from utils.formats import write_pdparams

TINY = {
    'DATA.IMAGE_SIZE': 16, 'MODEL.TYPE': 'vit', 'MODEL.NUM_CLASSES': 3, 'MODEL.TRANS.PATCH_SIZE': 4,
    'MODEL.TRANS.EMBED_DIM': 16, 'MODEL.TRANS.DEPTH': 3, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.TRANS.MLP_RATIO': 2.0,
}  # fmt: skip
FADING = {'MODEL.LAMBDA.PRUNE_LAYERS': (0,), 'MODEL.LAMBDA.DECAY_EPOCHS': 2}
EVIT = {'MODEL.EVIT.KEEP_RATE': 0.5, 'MODEL.EVIT.DROP_LOC': (1, 2)}
MIXERS = {  # by registered mixer: its variants
    'attention': {
        'attention': {},
        'shared': {'MODEL.TRANS.REL_POS': ('shared',)},
        'removed': {**FADING, 'MODEL.LAMBDA.REMOVED': True, 'MODEL.TRANS.CONV_STEM': True},
        'fading': FADING,
    },
    'relative': {
        'block': {'MODEL.TRANS.REL_POS': ('block',)},
        'beit': {
            'MODEL.TRANS.REL_POS': ('block', 'shared'), 'MODEL.TRANS.KEY_BIAS': False, 'MODEL.TRANS.LAYER_SCALE': 0.1,
            'MODEL.TRANS.RESCALED_INIT': True, 'MODEL.TRANS.ABS_POS': False, 'MODEL.TRANS.HIDDEN_DROPOUT': False,
        },
    },
    'windowed': {'windowed': {'MODEL.TRANS.MIXER': ('windowed',), 'MODEL.WINDOWED.SIZE': 2}},
    'decomposed': {'decomposed': {'MODEL.TRANS.MIXER': ('decomposed',)}},
}  # fmt: skip
PATCHES_ONLY = ('windowed', 'decomposed')  # mixers of models without class token, which tests/models/detection tries
REDUCERS = {  # by registered reducer: its variants
    'evit': {'evit': EVIT, 'evit_fuse': {**EVIT, 'MODEL.EVIT.FUSE_TOKEN': True}},
    'tome': {'tome': {'MODEL.TOME.R': 2}},
}
TASK_OPTIONS = {  # by registered task: the smallest model that it trains
    'supervised': {},
    'linear_probe': {},
    'mae': {
        'MODEL.TYPE': 'mae', 'MODEL.MAE.DECODER_EMBED_DIM': 16, 'MODEL.MAE.DECODER_NUM_HEADS': 2, 'MODEL.MAE.DECODER_DEPTH': 1,
    },
    'mocov3': {'MODEL.TYPE': 'mocov3', 'MODEL.MOCO.DIM': 8, 'MODEL.MOCO.MLP_DIM': 16},
    'segmentation': {'MODEL.TYPE': 'segmenter', 'MODEL.SEGMENTER.DECODER': 'linear', 'TRAIN.RANDOM_ERASE_PROB': 0.0},
    'detection': {
        'MODEL.TYPE': 'mask_rcnn', 'MODEL.DET.POSITION_SIZE': 16, 'MODEL.DET.CHANNELS': 8, 'MODEL.DET.BOX_FEATURES': 8,
        'MODEL.DET.BOX_CONVS': 1, 'MODEL.DET.MASK_CONVS': 1, 'MODEL.DET.ANCHOR_SIZES': (2, 4, 8, 12, 16),
        'TRAIN.RANDOM_ERASE_PROB': 0.0,
    },
}  # fmt: skip
HEAD_SWITCHES = {'DISTILLED': 'distilled', 'GLOBAL_POOL': 'pool'}  # all combinations of these keys of MODEL.TRANS
HEAD_VALUES = {'REPRESENTATION_SIZE': ('hidden', 8), 'HEAD_NORM': ('batch_norm', True)}
OBJECTIVES = SCHEMA.keys['TRAIN.DISTILLATION_TYPE'].allowed
MIXER_VARIANTS = {name: options for kind in sorted(mixers.MIXERS) for name, options in MIXERS[kind].items()}


def reducer_variants() -> dict:
    """No reducer, each variant of one, and one variant of each of several."""
    choices = [[*REDUCERS[kind].items(), ('', {})] for kind in sorted(tokens.REDUCERS)]
    combinations = [dict(chosen) for chosen in itertools.product(*choices)]
    return {
        '_'.join(filter(None, chosen)) or 'all': {k: v for options in chosen.values() for k, v in options.items()}
        for chosen in combinations
    }


def head_variants() -> dict:
    """Each combination of the switches, and each other key alone."""
    found = {}
    for values in itertools.product((False, True), repeat=len(HEAD_SWITCHES)):
        chosen = [key for key, value in zip(HEAD_SWITCHES, values) if value]
        found['_'.join(HEAD_SWITCHES[key] for key in chosen) or 'token'] = {
            f'MODEL.TRANS.{key}': True for key in chosen
        }
    return found | {name: {f'MODEL.TRANS.{key}': size} for key, (name, size) in HEAD_VALUES.items()}


REDUCER_VARIANTS = reducer_variants()
HEADS = head_variants()
IMAGES = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype('float32')


def test_each_key_of_the_transformer_has_its_place():
    """A new key of MODEL.TRANS is a size, or belongs to a stem, a mixer or a head that the combinations try."""
    sizes = {'PATCH_SIZE', 'EMBED_DIM', 'DEPTH', 'NUM_HEADS', 'MLP_RATIO', 'QKV_BIAS', 'FROZEN_STAGES'}
    prefix = 'MODEL.TRANS.'
    tried = {key[len(prefix) :] for options in MIXER_VARIANTS.values() for key in options if key.startswith(prefix)}
    found = {key[len(prefix) :] for key in SCHEMA.keys if key.startswith(prefix)}
    assert found == sizes | tried | set(HEAD_SWITCHES) | set(HEAD_VALUES)


def conflict(mixer: str, reducer: str, head: str, objective: str) -> str | None:
    """Key that the refusal of a combination names; None: it is allowed."""
    if mixer in PATCHES_ONLY:
        return 'MODEL.TRANS.MIXER'
    if mixer in ('block', 'shared', 'beit') and (reducer != 'all' or head == 'distilled'):
        return 'MODEL.TRANS.REL_POS'
    if (objective != 'none') != head.startswith('distilled'):
        return 'TRAIN.DISTILLATION_TYPE'
    return None


def settings(*parts: dict, **more):
    options = {key: value for part in (TINY, *parts, more) for key, value in part.items()}
    return get_config(opts=[item for pair in options.items() for item in pair])


@pytest.fixture(scope='module')
def teacher(tmp_path_factory) -> dict:
    """Options that name a teacher."""
    folder = tmp_path_factory.mktemp('teacher')
    config = settings()
    (folder / 'teacher.yaml').write_text(config.dump())
    write_pdparams(build_model(config).state_dict(), str(folder / 'teacher.pdparams'))
    return {
        'TRAIN.TEACHER_CFG': str(folder / 'teacher.yaml'),
        'TRAIN.TEACHER_MODEL': str(folder / 'teacher.pdparams'),
    }


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('reducer', REDUCER_VARIANTS)
@pytest.mark.parametrize('mixer', MIXER_VARIANTS)
def test_it_trains_or_is_refused(mixer, reducer, head, teacher):
    parts = MIXER_VARIANTS[mixer], REDUCER_VARIANTS[reducer], HEADS[head]
    model = None
    for objective in OBJECTIVES:
        config = settings(*parts, teacher if objective != 'none' else {}, **{'TRAIN.DISTILLATION_TYPE': objective})
        key = conflict(mixer, reducer, head, objective)
        if key is None:
            model = model or build_model(config)
            take_step(model, attached(config, model))
        else:
            check_refusal(config, key, model)
    if model is not None:
        check_round_trip(model, settings(*parts))


def take_step(model, task) -> None:
    model.train()
    values = task.update_schedules(model, 1.0)
    assert values.get('attn_lambda', 0.5) == 0.5
    batch = batch_of(paddle.to_tensor(IMAGES), paddle.to_tensor([0, 1, 2, 0]))
    loss, _, counts = task.loss(model, batch, np.random.default_rng(0))
    loss.backward()
    assert np.isfinite(loss.item()) and 0 <= counts['acc1'].item() <= 4
    for name, parameter in model.named_parameters():
        assert parameter.stop_gradient or np.isfinite(parameter.grad.numpy()).all(), name
    model.clear_gradients()


def check_refusal(config, key: str, model=None) -> None:
    with pytest.raises(UserError) as caught:
        attached(config, model or build_model(config))
    message = str(caught.value)
    assert key in message and message.endswith('.') and '\n' not in message


def check_round_trip(model, config) -> None:
    """Another model with the state of this one computes the same, λ included."""
    other = build_model(config)
    missing, unexpected = other.set_state_dict({name: value.numpy() for name, value in model.state_dict().items()})
    assert not missing and not unexpected
    model.eval(), other.eval()
    x = paddle.to_tensor(IMAGES)
    np.testing.assert_array_equal(other(x), model(x))
    assert other(x).shape == [4, 3]


@pytest.mark.parametrize(('mixer', 'reducer'), list(itertools.product(('removed', 'fading'), ('evit', 'evit_tome'))))
def test_tokens_are_not_dropped_where_attention_is_removed(mixer, reducer):
    config = settings(MIXER_VARIANTS[mixer], REDUCER_VARIANTS[reducer], **{'MODEL.EVIT.DROP_LOC': (0,)})
    check_refusal(config, 'MODEL.LAMBDA')


@pytest.mark.parametrize('name', list(TASKS))
def test_every_task_trains_on_its_example(name):
    config = settings(TASK_OPTIONS[name], **{'TRAIN.TASK': name})
    model = build_model(config)
    task = attached(config, model)
    model.train()
    task.update_schedules(model, 1.0)
    losses = task.loss(model, task.example(4), np.random.default_rng(0))
    losses.total.backward()
    assert np.isfinite(losses.total.item())
    assert (losses.parts.keys(), losses.counts.keys()) == (task.parts.keys(), task.counts.keys())
    evaluator = task.evaluator()
    assert evaluator.best[0] in evaluator.titles and evaluator.best[1] in ('min', 'max')


@pytest.mark.parametrize('kind', [name for name in TASKS if TASK_OPTIONS[name].get('MODEL.TYPE') == name])
def test_pre_training_refuses_parts_of_classifiers(kind):
    """It has all tokens, plain blocks and the class token."""
    plain = {'MODEL.TYPE': kind, 'TRAIN.TASK': kind}
    build_model(settings(plain))
    for name, options in {**MIXER_VARIANTS, **REDUCER_VARIANTS, **HEADS}.items():
        if options:
            with pytest.raises(
                UserError, match=rf'MODEL.TYPE {kind} does not support MODEL\.|has no effect for MODEL.TYPE {kind},'
            ):
                build_model(settings(plain, options))
                pytest.fail(name)
