# SPDX-License-Identifier: Apache-2.0
"""Objectives against the original programs."""

import contextlib
import json
import os
import pickle

import numpy as np
import paddle
import pytest

from config import SCHEMA, get_config
from models import build_model
from models.exported import save_program
from tasks import TASKS
from tasks.classification import ClassificationTask, smoothed_cross_entropy, soft_cross_entropy
from tasks.distillation import build_teacher, distillation_loss
from tests.conftest import assert_close, golden
from tests.tasks.helpers import attached, batch_of
from utils.errors import UserError
from utils.formats import write_pdparams
from utils.schedules import keep_rate

STUDENT = {
    'MODEL.TYPE': 'deit', 'MODEL.NUM_CLASSES': 4, 'DATA.IMAGE_SIZE': 16, 'MODEL.TRANS.PATCH_SIZE': 8,
    'MODEL.TRANS.EMBED_DIM': 8, 'MODEL.TRANS.DEPTH': 2, 'MODEL.TRANS.NUM_HEADS': 2, 'MODEL.TRANS.DISTILLED': True,
    'MODEL.EVIT.DROP_LOC': (1,), 'TRAIN.DISTILLATION_TYPE': 'hard',
}  # fmt: skip


def configured(**changes):
    options = {**STUDENT, **{name.replace('__', '.'): value for name, value in changes.items()}}
    return get_config(opts=[item for pair in options.items() for item in pair])


def with_gradient(function, logits):
    logits = paddle.to_tensor(logits, stop_gradient=False)
    loss = function(logits)
    loss.backward()
    return loss.item(), logits.grad.numpy()


@pytest.mark.parametrize(
    ('name', 'loss'),
    [
        ('ls00', lambda x, g: smoothed_cross_entropy(x, paddle.to_tensor(g['in/label']), 0.0)),
        ('ls10', lambda x, g: smoothed_cross_entropy(x, paddle.to_tensor(g['in/label']), 0.1)),
        ('ls30', lambda x, g: smoothed_cross_entropy(x, paddle.to_tensor(g['in/label']), 0.3)),
        ('soft', lambda x, g: soft_cross_entropy(x, paddle.to_tensor(g['in/soft']))),
    ],
)
def test_losses_and_gradients_are_timms(name, loss):
    reference = golden('evit-loss')
    value, gradient = with_gradient(lambda x: loss(x, reference), reference['in/logits'])
    assert_close(value, reference[f'out/{name}'].item(), 1e-6)
    assert_close(gradient, reference[f'out/{name}_grad'], 1e-5)


@pytest.mark.parametrize('index', [1, 2, 3, 4])
def test_distillation_is_deits(index):
    reference = golden('evit-loss')
    settings = reference.meta['distill'][index]
    base = soft_cross_entropy(paddle.to_tensor(reference['in/logits']), paddle.to_tensor(reference['in/soft'])).item()
    value, gradient = with_gradient(
        lambda x: distillation_loss(x, paddle.to_tensor(reference['in/teacher']), settings['type'], settings['tau']),
        reference['in/logits_kd'],
    )
    total = (1 - settings['alpha']) * base + settings['alpha'] * value
    assert_close(total, reference[f'out/distill{index}'].item(), 1e-6)
    assert_close(settings['alpha'] * gradient, reference[f'out/distill{index}_grad_kd'], 1e-5)


@pytest.mark.parametrize('index', range(5))
def test_keep_rates_are_evits(index):
    reference = golden('evit-keeprate')
    settings = reference.meta['sched'][index]
    iterations = reference[f'in/iters{index}']
    for epoch, expected in enumerate(reference[f'out/sched{index}']):
        rates = [
            keep_rate(
                epoch + step / settings['iters_per_epoch'],
                base=settings['base_keep_rate'],
                start=settings['shrink_start_epoch'],
                length=settings['shrink_epochs'],
            )
            for step in iterations.tolist()
        ]
        assert_close(rates, expected, 1e-6)


def test_the_clock_sets_the_keep_rate_and_says_when_it_is_final():
    config = configured(MODEL__EVIT__KEEP_RATE=0.5, MODEL__EVIT__SHRINK_START_EPOCH=1, MODEL__EVIT__SHRINK_EPOCHS=2)
    task, model = ClassificationTask(config), build_model(config)
    assert task.update_schedules(model, 0.5) == {'keep_rate': 1.0} and not task.is_final(0.5)
    assert task.update_schedules(model, 2.0) == {'keep_rate': 0.75} and model.keep_rate == 0.75
    assert task.update_schedules(model, 3.0) == {'keep_rate': 0.5} and task.is_final(3.0)
    assert ClassificationTask(configured()).update_schedules(model, 0.0) == {}


def test_a_registered_teacher_teaches(tmp_path):
    teacher_cfg = tmp_path / 'teacher.yaml'
    teacher_cfg.write_text(configured(MODEL__TRANS__DISTILLED=False, TRAIN__DISTILLATION_TYPE='none').dump())
    teacher = build_model(get_config(str(teacher_cfg)))
    path = str(tmp_path / 'teacher.pdparams')
    write_pdparams(teacher.state_dict(), path)
    config = configured(
        TRAIN__TEACHER_CFG=str(teacher_cfg),
        TRAIN__TEACHER_MODEL=path,
        TRAIN__DISTILLATION_ALPHA=1.0,
        TRAIN__MIXUP_PROB=0,
    )
    student = build_model(config)
    answer = build_teacher(config, student, print)
    images = paddle.randn([3, 3, 16, 16])
    teacher.eval()
    np.testing.assert_array_equal(answer(images).numpy(), teacher(images).numpy())
    student.train()
    task = attached(config, student)
    losses = task.loss(student, batch_of(images, paddle.to_tensor([0, 1, 2])), np.random.default_rng(0))
    losses.total.backward()
    assert student.head_dist.weight.grad is not None
    assert not student.head.weight.grad.abs().sum().item()  # alpha 1: labels teach nothing
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not [name for name in student.state_dict() if 'teacher' in name]


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'TRAIN__DISTILLATION_TYPE': 'none'}, 'no teacher'),
        ({'MODEL__TRANS__DISTILLED': False}, 'no distillation classifier'),
        ({}, 'TRAIN.TEACHER_MODEL'),
        ({'TRAIN__TEACHER_MODEL': 'gone'}, "exported teacher 'gone'"),
        ({'TRAIN__TEACHER_MODEL': 'gone', 'TRAIN__TEACHER_CFG': 'deit_tiny_patch16_224'}, 'gone'),
    ],
)
def test_mistakes_about_teachers(changes, words):
    config = configured(**changes)
    with pytest.raises(UserError) as caught:
        build_teacher(config, build_model(config), print)
    assert words in str(caught.value)


def test_an_exported_teacher_teaches(tmp_path):
    teacher = build_model(configured(MODEL__TRANS__DISTILLED=False, TRAIN__DISTILLATION_TYPE='none'))
    teacher.eval()
    path = str(tmp_path / 'teacher')
    save_program(teacher, [3, 16, 16], path)
    config = configured(TRAIN__TEACHER_MODEL=path)
    answer = build_teacher(config, build_model(config), print)
    images = paddle.randn([5, 3, 16, 16])
    assert_close(answer(images).numpy(), teacher(images).numpy(), 1e-5)
    with pytest.raises(UserError, match='the teacher has 4 classes, but the student 7'):
        build_teacher(configured(TRAIN__TEACHER_MODEL=path, MODEL__NUM_CLASSES=7), build_model(config), print)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A teacher as tools/export.py writes it: program, weights and preprocessing under a dotted name."""
    teacher = build_model(configured(MODEL__TRANS__DISTILLED=False, TRAIN__DISTILLATION_TYPE='none'))
    teacher.eval()
    folder = tmp_path_factory.mktemp('exported')
    save_program(teacher, [3, 16, 16], str(folder / 'teacher.v2'))
    description = {'input': {'shape': [None, 3, 16, 16]}, 'image_size': 16, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    (folder / 'teacher.v2.preprocess.json').write_text(json.dumps(description))
    return folder, teacher, description


@pytest.mark.parametrize(
    'name', ['teacher.v2', 'teacher.v2.json', 'teacher.v2.pdiparams', 'teacher.v2.preprocess.json', '']
)
def test_an_exported_teacher_is_found_beside_its_preprocessing(exported, name):
    folder, teacher, _ = exported
    config = configured(TRAIN__TEACHER_MODEL=str(folder / name))
    images = paddle.randn([2, 3, 16, 16])
    assert_close(build_teacher(config, build_model(config), print)(images).numpy(), teacher(images).numpy(), 1e-5)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'image_size': 32}, 'takes images of 32 pixels, but the student of 16; export it with -image_size 16'),
        ({'image_size': [16, 28]}, 'images of 16x28 pixels, but the student of 16; .* or set DATA.IMAGE_SIZE to 16,28'),
        ({'image_size': [16]}, 'does not describe the images of the teacher'),
        ({'image_size': [16, 'x']}, 'does not describe the images of the teacher'),
        (
            {'input': {'shape': [None, 1, 16, 16]}, 'mean': [0], 'std': [1]},
            'images of 1 channels, but the student of 3',
        ),
        ({'std': [0, 1, 1]}, 'does not describe the images of the teacher'),
        ({'mean': None}, 'does not describe the images of the teacher'),
    ],
)
def test_an_exported_teacher_of_other_images_is_refused(exported, tmp_path, change, words):
    folder, _, description = exported
    for suffix in ('.json', '.pdiparams'):
        os.symlink(folder / f'teacher.v2{suffix}', tmp_path / f't{suffix}')
    (tmp_path / 't.preprocess.json').write_text(json.dumps({**description, **change}))
    config = configured(TRAIN__TEACHER_MODEL=str(tmp_path / 't'))
    with pytest.raises(UserError, match=words):
        build_teacher(config, build_model(config), print)


HOSTILE = {
    'a program that writes files': (
        lambda text: text.replace('"1.fetch"', '"1.save_combine"'),
        "operator '1.save_combine'",
    ),
    'a program that calls Python': (lambda text: text.replace('"1.fetch"', '"1.py_func"'), "operator '1.py_func'"),
    'a plugin': (lambda text: text.replace('"1.fetch"', '"7.fetch"'), "operator '7.fetch'"),
    'no operator': (lambda text: text.replace('"ops":[', '"ops":[1,'), "operator 'without a name'"),
    'another format': (lambda text: text.replace('"pir"', '"x"'), 'not in the JSON format of Paddle 3'),
    'no program': (lambda text: '[' * 100_000, 'not in the JSON format of Paddle 3'),
    'half a program': (lambda text: text[: len(text) // 2], 'not in the JSON format of Paddle 3'),
    'an unknown operator': (lambda text: text.replace('"1.fetch"', '"1.fetsch"'), "operator '1.fetsch'"),
    'an endless loop': (lambda text: text.replace('"1.fetch"', '"1.while"'), "operator '1.while'"),
    'a large program': (lambda text: ' ' * (65 << 20), 'more than the 67108864 that are read'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_exported_programs_are_checked(exported, tmp_path, name):
    folder, _, _ = exported
    change, words = HOSTILE[name]
    (tmp_path / 't.json').write_text(change((folder / 'teacher.v2.json').read_text()))
    os.symlink(folder / 'teacher.v2.pdiparams', tmp_path / 't.pdiparams')
    config = configured(TRAIN__TEACHER_MODEL=str(tmp_path / 't'))
    with pytest.raises(UserError, match=words) as info:
        build_teacher(config, build_model(config), print)
    assert '\n' not in str(info.value)


@pytest.mark.parametrize('change', [
    lambda data: data[:-1], lambda data: data + b'x', lambda data: b'', lambda data: data[:30], lambda data: b'\xff' * 100,
    lambda data: data[:20] + b'\x08\x05\x10' + b'\xff' * 8 + b'\x01' + data[24:], lambda data: data[:16] + b'\xff\xff\xff\x7f' + data[20:],
])  # fmt: skip
def test_exported_weights_are_checked(exported, tmp_path, change):
    folder, _, _ = exported
    os.symlink(folder / 'teacher.v2.json', tmp_path / 't.json')
    (tmp_path / 't.pdiparams').write_bytes(change((folder / 'teacher.v2.pdiparams').read_bytes()))
    config = configured(TRAIN__TEACHER_MODEL=str(tmp_path / 't'))
    with pytest.raises(UserError, match='cannot load the exported teacher'):
        build_teacher(config, build_model(config), print)


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('kind', ['legacy program', 'legacy mode', 'beside a program'])
def test_nothing_beside_a_program_is_unpickled(exported, tmp_path, kind):
    folder, _, _ = exported
    for suffix in ('.json', '.pdiparams') if kind != 'legacy program' else ('.pdiparams',):
        os.symlink(folder / f'teacher.v2{suffix}', tmp_path / f't{suffix}')
    if kind != 'beside a program':
        (tmp_path / 't.pdmodel').write_bytes(b'')
    for name in ('t.pdiparams.info', 't.json.info', 't.info', 'program.pdiparams.info'):
        (tmp_path / name).write_bytes(pickle.dumps(Runs(tmp_path / 'marker')))
    config = configured(TRAIN__TEACHER_MODEL=str(tmp_path / 't'))
    words = {
        'legacy program': 'is a program of Paddle 2',
        'legacy mode': 'FLAGS_enable_pir_api=0',
        'beside a program': '',
    }
    if kind == 'legacy mode':
        paddle.set_flags({'FLAGS_enable_pir_api': False})
    try:
        with pytest.raises(UserError, match=words[kind]) if words[kind] else contextlib.nullcontext():
            build_teacher(config, build_model(config), print)
    finally:
        paddle.set_flags({'FLAGS_enable_pir_api': True})
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('kind', ['exported', 'registered'])
def test_a_teacher_sees_images_in_its_own_normalization(exported, tmp_path, kind):
    folder, teacher, description = exported
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    changes = {}
    if kind == 'exported':
        for suffix in ('.json', '.pdiparams'):
            os.symlink(folder / f'teacher.v2{suffix}', tmp_path / f't{suffix}')
        (tmp_path / 't.preprocess.json').write_text(json.dumps({**description, 'mean': mean, 'std': std}))
        path = str(tmp_path / 't')
    else:
        settings = configured(MODEL__TRANS__DISTILLED=False, TRAIN__DISTILLATION_TYPE='none')
        settings.defrost()
        settings.DATA.IMAGENET_MEAN, settings.DATA.IMAGENET_STD = mean, std
        (tmp_path / 't.yaml').write_text(settings.dump())
        path = str(tmp_path / 't.pdparams')
        write_pdparams(teacher.state_dict(), path)
        changes['TRAIN__TEACHER_CFG'] = str(tmp_path / 't.yaml')
    config = configured(TRAIN__TEACHER_MODEL=path, **changes)
    answer = build_teacher(config, build_model(config), print)
    pixels = np.random.default_rng(0).random((2, 3, 16, 16)).astype('float32')

    def normalized(mean, std):
        return paddle.to_tensor((pixels - np.reshape(mean, [3, 1, 1])) / np.reshape(std, [3, 1, 1]), 'float32')

    data = config.DATA
    theirs = teacher(normalized(mean, std)).numpy()
    assert_close(answer(normalized(data.IMAGENET_MEAN, data.IMAGENET_STD)).numpy(), theirs, 1e-5)


def test_a_teacher_of_other_classes_is_refused_by_the_teachers_keys(tmp_path):
    settings = configured(MODEL__TRANS__DISTILLED=False, TRAIN__DISTILLATION_TYPE='none', MODEL__NUM_CLASSES=9)
    (tmp_path / 't.yaml').write_text(settings.dump())
    state = {name: value.numpy() for name, value in build_model(settings).state_dict().items()}
    write_pdparams(state, str(tmp_path / 't.pdparams'))
    config = configured(TRAIN__TEACHER_MODEL=str(tmp_path / 't'), TRAIN__TEACHER_CFG=str(tmp_path / 't.yaml'))
    with pytest.raises(UserError, match=r'has 9 classes, but the student 4.*TRAIN\.TEACHER_CFG'):
        build_teacher(config, build_model(config), print)
    write_pdparams({**state, 'Facts@@': {'MODEL.TRANS.NUM_HEADS': 77}}, str(tmp_path / 't.pdparams'))
    with pytest.raises(UserError, match=r'^teacher .*NUM_HEADS to 77.*belong to TRAIN\.TEACHER_CFG'):
        build_teacher(config, build_model(config), print)


def test_owners_of_keys_are_tasks():
    assert set(SCHEMA.known.tasks) == set(TASKS)
