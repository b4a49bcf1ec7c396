# SPDX-License-Identifier: Apache-2.0
"""The configuration tree, its files, its command line, and what a user can get wrong there."""

import glob
import os
import re
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import get_arguments, get_config, update_config
from tests.conftest import ROOT
from utils.errors import UserError
from utils.schema import leaves


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write_file


def command_line(*argv):
    return update_config(get_config(), get_arguments(list(argv)))


def test_precedence_defaults_base_yaml_flags_opts(write):
    write('base/grand.yaml', 'TRAIN: {NUM_EPOCHS: 1, WEIGHT_DECAY: 0.5, WARMUP_EPOCHS: 7, GRAD_CLIP: 3}')
    write('base/parent.yaml', 'BASE: [grand.yaml]\nTRAIN: {NUM_EPOCHS: 2}\nDATA: {BATCH_SIZE: 5}')
    path = write('model.yaml', "BASE: ['base/parent.yaml']\nTRAIN: {WEIGHT_DECAY: 0.25}")
    result = command_line('-cfg', path, '-batch_size', '9', '-opts', 'TRAIN.GRAD_CLIP', '1.5', 'DATA.BATCH_SIZE', '11')
    assert result.TRAIN.WARMUP_EPOCHS == 7.0  # grandparent
    assert result.TRAIN.NUM_EPOCHS == 2  # parent over grandparent
    assert result.TRAIN.WEIGHT_DECAY == 0.25  # the file over its bases
    assert result.DATA.BATCH_SIZE_EVAL == 9  # flag over file
    assert (result.TRAIN.GRAD_CLIP, result.DATA.BATCH_SIZE) == (1.5, 11)  # -opts over all
    assert result.TRAIN.END_LR == 1e-5  # default


@pytest.mark.parametrize(
    'argv',
    [
        ['-cfg', '{path}', '-batch_size', '8', '-dataset', 'cifar10', '-eval'],
        ['-cfg={path}', '-batch_size=8', '-dataset=cifar10', '-eval'],
        ["-cfg='{path}'", "-batch_size='8'", '-dataset="cifar10"', '-eval'],
    ],
)
def test_flags_with_space_equals_and_stray_quotes(write, argv):
    path = write('m.yaml', 'MODEL: {NAME: m}')
    result = command_line(*(word.format(path=path) for word in argv))
    assert (result.MODEL.NAME, result.DATA.BATCH_SIZE, result.DATA.BATCH_SIZE_EVAL) == ('m', 8, 8)
    assert (result.DATA.DATASET, result.EVAL) == ('cifar10', True)


def test_every_paddlevit_flag_sets_its_key():
    result = command_line(
        *[
            '-data_path=/d',
            '-output=/o',
            '-tag=t',
            '-batch_size=3',
            '-batch_size_eval=4',
            '-image_size=96',
            '-accum_iter=2',
            '-num_workers=0',
        ],
        *['-pretrained=w.pdparams', '-resume=r', '-last_epoch=5', '-amp', '-throughput', '-num_classes=7'],
    )
    assert (result.DATA.DATA_PATH, result.SAVE, result.TAG) == ('/d', '/o', 't')
    assert (result.DATA.BATCH_SIZE, result.DATA.BATCH_SIZE_EVAL, result.DATA.IMAGE_SIZE) == (3, 4, 96)
    assert (result.TRAIN.ACCUM_ITER, result.DATA.NUM_WORKERS, result.TRAIN.LAST_EPOCH) == (2, 0, 5)
    assert (result.MODEL.PRETRAINED, result.MODEL.RESUME, result.MODEL.NUM_CLASSES) == ('w.pdparams', 'r', 7)
    assert result.AMP and result.THROUGHPUT and not result.EVAL


def test_zero_on_the_command_line_counts():
    assert command_line('-num_workers', '0').DATA.NUM_WORKERS == 0
    with pytest.raises(UserError, match=r'DATA\.BATCH_SIZE is 0.*at least 1'):
        command_line('-batch_size', '0')


def test_paddlevit_values(write):
    path = write(
        'old.yaml',
        """
        BASE: ['']
        MODEL:
          TYPE: GatedMLP
          DROP_PATH: 0
          MIXER: {HIDDEN_SIZE: 256, NUM_LAYERS: 30, MLP_RATIO: 6}
        TRAIN:
          BASE_LR: 5e-4
          END_LR: 0
          LINEAR_SCALED_LR: None
          MODEL_EMA_FORCE_CPU: true
          CUTMIX_MINMAX: [0.2, 0.8]
          OPTIMIZER: {BETAS: [0.9, 0.95]}
        """,
    )
    result = get_config(path)
    assert (result.MODEL.MIXER.EMBED_DIM, result.MODEL.MIXER.DEPTH, result.MODEL.MIXER.MLP_RATIO) == (256, 30, 6.0)
    assert (result.MODEL.DROPPATH, result.TRAIN.BASE_LR, result.TRAIN.END_LR) == (0.0, 5e-4, 0.0)
    assert isinstance(result.TRAIN.END_LR, float) and result.TRAIN.LINEAR_SCALED_LR is None
    assert (result.TRAIN.CUTMIX_MINMAX, result.TRAIN.OPTIMIZER.BETAS) == ((0.2, 0.8), (0.9, 0.95))


def test_an_empty_file_changes_nothing(write):
    assert get_config(write('empty.yaml', '# nothing\n')) == get_config()


def test_result_is_a_frozen_copy():
    result = get_config()
    with pytest.raises(AttributeError):
        result.SAVE = 'x'
    assert get_config().SAVE == './output'


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('TRAIN:\n  BASELR: 1', [':2', "'TRAIN.BASELR'", "'TRAIN.BASE_LR'"]),
        ('DATA: {BATCHSIZE: 1}', ["'DATA.BATCHSIZE'", "'DATA.BATCH_SIZE'"]),
        ('TRAIN: 3', ["'TRAIN'"]),
        ('TRAIN:\n  NUM_EPOCHS: many', [':2', 'TRAIN.NUM_EPOCHS', 'whole number', "'many'"]),
        ('TRAIN: {NUM_EPOCHS: 1.5}', ['TRAIN.NUM_EPOCHS', 'whole number']),
        ('AMP: maybe', ['AMP', 'True or False']),
        ('TRAIN: {NUM_EPOCHS: null}', ['TRAIN.NUM_EPOCHS', 'None']),
        ('TRAIN: {NONFINITE: ignore}', ['TRAIN.NONFINITE', 'error, skip']),
        ('TRAIN: {CROP_SCALE: [0.5, 0.1]}', ['TRAIN.CROP_SCALE', '0 < low <= high']),
        ('MODEL: {DROPPATH: 2}', ['MODEL.DROPPATH', 'between 0 and 1']),
        ('SEED: 1\nSEED: 2', [':2', "'SEED'", 'twice']),
        ('SAVE: !!python/object/apply:os.getcwd []', ["'SAVE'"]),
        ('- 1\n- 2', ["'KEY: value'"]),
        ('TRAIN: [', ['not a YAML file']),
    ],
)
def test_mistakes_in_a_file_name_the_place(write, text, words):
    path = write('bad.yaml', text)
    with pytest.raises(UserError) as caught:
        get_config(path)
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message


def test_missing_files_and_cycles(write, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration '.*none\.yaml': No such file"):
        get_config(str(tmp_path / 'none.yaml'))
    child = write('child.yaml', 'BASE: [gone.yaml]')
    with pytest.raises(UserError, match=r'gone\.yaml.*BASE of .*child\.yaml'):
        get_config(child)
    a = write('a.yaml', 'BASE: [b.yaml]')
    write('b.yaml', 'BASE: [a.yaml]')
    with pytest.raises(UserError, match='leads back'):
        get_config(a)


def test_opts_need_pairs_and_known_keys():
    with pytest.raises(UserError, match="'AMP' has no partner"):
        get_config(opts=['SAVE', 'x', 'AMP'])
    with pytest.raises(UserError, match="unknown key 'SAVES'. Did you mean 'SAVE'"):
        get_config(opts=['SAVES', 'x'])


@given(st.floats(1e-8, 1e3), st.integers(1, 10**6), st.booleans())
def test_values_survive_the_command_line(lr, epochs, amp):
    result = get_config(opts=['TRAIN.BASE_LR', repr(lr), 'TRAIN.NUM_EPOCHS', str(epochs), 'AMP', str(amp).lower()])
    assert (lr, epochs, amp) == (result.TRAIN.BASE_LR, result.TRAIN.NUM_EPOCHS, result.AMP)


def test_values_are_never_code():
    result = get_config(opts=['TAG', "__import__('os').getcwd()"])
    assert result.TAG == "__import__('os').getcwd()"


def test_a_dumped_configuration_loads_to_the_same_tree(write):
    tree = get_config(opts=['TRAIN.CUTMIX_MINMAX', '(0.2, 0.8)', 'TRAIN.GRAD_CLIP', 1.0, 'MODEL.NUM_CLASSES', 5])
    assert get_config(write('dump.yaml', tree.dump())) == tree


def test_every_key_is_explained_and_has_a_reader():
    """A key that nothing reads is a lie to whoever sets it."""
    with open(os.path.join(ROOT, 'config.py'), encoding='utf-8') as file:
        source = file.read()
    code = ''
    for folder in ('models', 'datasets', 'engine', 'tools', '.'):
        for path in glob.glob(os.path.join(ROOT, folder, '*.py')):
            if os.path.basename(path) != 'config.py':
                with open(path, encoding='utf-8') as file:
                    code += file.read()
    unread = [key for key, _ in leaves(get_config()) if not re.search(rf'\b{key.split(".")[-1]}\b', code)]
    assert unread in ([], ['BASE'])
    bare = [line for line in source.splitlines() if re.match(r'_C\.\S+ = (?!CN\(\))', line) and '  # ' not in line]
    assert bare == []


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'configs', '*.yaml'))), ids=os.path.basename)
def test_every_recipe_loads(path):
    get_config(path)
