# SPDX-License-Identifier: Apache-2.0
"""The configuration tree, its files, its command line, and what a user can get wrong there."""

import glob
import math
import os
import re
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import SCHEMA, describe, get_arguments, get_config, update_config
from tests.conftest import ROOT
from tests.readers import Readers
from utils.errors import UserError
from utils.schema import Interval, leaves


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


def test_lists_of_texts():
    """On a command line names need no quotes."""
    for value in ('[a.json,b.json]', "['a.json', 'b.json']", '[a.json, b.json]', ['a.json', 'b.json']):
        opts = ['TRAIN.TASK', 'detection', 'DATA.ANNOTATION_FILES', value]
        assert get_config(opts=opts).DATA.ANNOTATION_FILES == ('a.json', 'b.json')
    assert get_config(opts=['MODEL.TYPE', 'vit', 'MODEL.TRANS.MIXER', 'attention']).MODEL.TRANS.MIXER == ('attention',)
    with pytest.raises(UserError, match='DATA.ANNOTATION_FILES is .*, but must be a list of 2'):
        get_config(opts=['TRAIN.TASK', 'detection', 'DATA.ANNOTATION_FILES', 'a.json'])


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


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('TRAIN:', "'TRAIN' has no keys, but must be a section with keys such as TRAIN.TASK; add some or remove it."),
        ('TRAIN: [1]', "'TRAIN' is [1], but must be a section with keys such as TRAIN.TASK; add some or remove it."),
        ('MODEL: {TOME: 8}', "'MODEL.TOME' is 8, but must be a section with keys such as MODEL.TOME.R; add"),
        ('SEED: {A: 1}', "SEED is {'A': 1}, but must be a whole number"),
        ('SEED: {}', 'SEED is {}, but must be a whole number'),
        ('TRIAN: {BASE_LR: 1}', "unknown key 'TRIAN'. Did you mean 'TRAIN'?"),
        ('? [a, b]\n: 3', "expected 'KEY: value', but the key is a list or a section."),
        ('train: {BASE_LR: 1}', "unknown key 'train'. Did you mean 'TRAIN'?"),
        ('1: 5', "unknown key '1'. config.py lists all keys."),
        ('A: &a {B: *a}', 'or an alias (*name) contains itself'),
        ('BASE: ["a\\0b"]', 'cannot exist: its name holds a zero byte.'),
        ('DATA: {CROP_PCT: 0.0001}', 'DATA.CROP_PCT is 0.0001, but must be a number between 0.01 and 1.'),
        ('SEED: &a [*a]', 'or an alias (*name) contains itself'),
        ('TAG: 2020-13-45', "cannot read the value of 'TAG': it is not valid YAML."),
        ('SEED: 0x' + 5000 * 'F', 'a number of 5002 digits; give at most 100'),
        ('MODEL: {MIXER: {EMBED_DIM: 8, HIDDEN_SIZE: 8}}', "the key 'MODEL.MIXER.EMBED_DIM' is given twice; keep one."),
        ('BASE: {A: 1}', "BASE is {'A': 1}, but must be a list of texts."),
        ('TRAIN: {CROP_SCALE: [a, b]}', "is ['a', 'b'], but must be (low, high) with 0 < low <= high <= 1."),
        ('TRAIN: {CUTMIX_MINMAX: [0.5, 0.5]}', 'but must be (low, high) with 0 <= low < high <= 1, or None.'),
        (
            'TRAIN: {OPTIMIZER: {BETAS: [0.9]}}',
            'is (0.9,), but must be a list of 2 numbers, each between 0 and 1 (excluded).',
        ),
        (
            'MODEL: {EVIT: {DROP_LOC: [x]}}',
            "is ['x'], but must be a list of whole numbers, each of at least 0 and at most 999.",
        ),
        ('MODEL: {TRANS: {REL_POS: [all]}}', "is ('all',), but must be a list of texts, each one of: block, shared."),
        ('MODEL: {MSMLP: {MIX_SIZE: [3, 5]}}', 'is [3, 5], but must be a list of lists of whole numbers, each of'),
        ('TRAIN: {GRAD_CLIP: -1}', 'TRAIN.GRAD_CLIP is -1.0, but must be a number between 0 and 1000000, or None.'),
        (
            'DATA: {IMAGENET_STD: [58.4, 57.1, 57.4]}',
            'each between 0.001 and 1; images are scaled to [0, 1], so divide',
        ),
        ('DATA: {IMAGENET_MEAN: [0.5]}', 'DATA.IMAGENET_MEAN is [0.5], but must have 3 numbers (DATA.IMAGE_CHANNELS).'),
        ('TRAIN: {CROP_SCALE: 1, NUM_EPOCHS: 1}', 'TRAIN.CROP_SCALE is 1, but must be (low, high)'),
    ],
)
def test_odd_values_end_in_one_sentence(write, text, message):
    with pytest.raises(UserError) as caught:
        get_config(write('odd.yaml', text))
    assert message in str(caught.value) and 'odd.yaml' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_empty_values_that_are_harmless(write):
    for text in (
        '',
        '# nothing',
        '---',
        'TRAIN: {}',
        'BASE: []',
        "BASE: ['']",
        'TRAIN: {GRAD_CLIP: 0}',
        'TRAIN: {GRAD_CLIP: none}',
    ):
        assert not get_config(write('fine.yaml', text)).TRAIN.GRAD_CLIP


def test_deep_nesting(write):
    with pytest.raises(UserError, match='nested too deeply'):
        get_config(write('deep.yaml', 600 * '['))


# ---------------------------------------------------------------------------------------------------- bounds
def scalar(kind):
    return scalar(kind[0]) if isinstance(kind, list) else kind


NUMERIC = {name: key for name, key in SCHEMA.keys.items() if scalar(key.kind) in (int, float)}


def test_every_number_has_bounds():
    assert [name for name, key in NUMERIC.items() if not key.allowed] == []
    assert all(key.accepts(key.coerce(key.default)) for key in SCHEMA.keys.values())


def outside(key):
    """Numbers that a key with bounds does not take, those that are none or belong to the other kind included."""
    low, high = key.allowed.low, key.allowed.high
    numbers = [st.sampled_from([float('nan'), float('inf'), -float('inf'), 10**400, -(10**400)])]
    numbers += [st.integers(max_value=math.ceil(low) - 1), st.integers(min_value=math.floor(high) + 1)]
    if scalar(key.kind) is float:
        numbers += [st.floats(max_value=low, exclude_max=True), st.floats(min_value=high, exclude_min=True)]
        numbers += [st.just(low)] * key.allowed.low_open + [st.just(high)] * key.allowed.high_open
    else:
        numbers += [st.just(low + 0.5)]
    return st.one_of(numbers)


def with_number(value, number):
    """`value`, or where it is a list its last element, replaced by `number`."""
    return [*value[:-1], with_number(value[-1], number)] if isinstance(value, (list, tuple)) else number


@given(st.data())
def test_numbers_outside_their_bounds_are_refused(data):
    name = data.draw(st.sampled_from([name for name, key in NUMERIC.items() if isinstance(key.allowed, Interval)]))
    key = SCHEMA.keys[name]
    value = with_number(key.default or ([1] if isinstance(key.kind, list) else 1), data.draw(outside(key)))
    for given_as in (value, repr(value)) if '0' * 400 not in repr(value) else (value,):
        with pytest.raises(UserError, match=rf'^-opts: {name} is .*, but must be .*\.$'):
            get_config(opts=[name, given_as])


@given(st.sampled_from(sorted(NUMERIC)))
def test_defaults_are_within_their_bounds(name):
    value = SCHEMA.get(get_config(opts=[name, repr(SCHEMA.keys[name].default)]), name)
    assert value == SCHEMA.keys[name].default


# ---------------------------------------------------------------------------------------------------- owners
@pytest.mark.parametrize(
    ('opts', 'message'),
    [
        (
            'MODEL.TOME.R 8',
            'MODEL.TOME.R is 8, but has no effect for MODEL.TYPE gmlp, only for vit, deit, evit; remove',
        ),
        ('MODEL.HEAD_DROPOUT 0.1', 'MODEL.HEAD_DROPOUT is 0.1, but has no effect for MODEL.TYPE gmlp, only for vit'),
        (
            'MODEL.TYPE DeiT MODEL.MIXER.DEPTH 3',
            'MODEL.MIXER.DEPTH is 3, but has no effect for MODEL.TYPE DeiT, only for',
        ),
        (
            'MODEL.MAE.MASK_RATIO 0.5 MODEL.TYPE vit',
            'no effect for MODEL.TYPE vit, only for mae; remove it or change MODEL.TYPE.',
        ),
        (
            'MODEL.TYPE mae TRAIN.TASK mae TRAIN.SMOOTHING 0.2',
            'no effect for TRAIN.TASK mae, only for supervised, linear_probe; remove',
        ),
        (
            'MODEL.TYPE mocov3 TRAIN.TASK mocov3 TRAIN.SMOOTHING 0',
            'no effect for TRAIN.TASK mocov3, only for supervised, linear_probe; rem',
        ),
        ('MODEL.TYPE mocov3 MODEL.DROPPATH 0.3', 'MODEL.DROPPATH is 0.3, but has no effect for MODEL.TYPE mocov3'),
    ],
)
def test_keys_without_effect(write, opts, message):
    with pytest.raises(UserError, match=re.escape(message)):
        get_config(opts=opts.split())
    names = [*zip(opts.split()[::2], opts.split()[1::2])]
    with pytest.raises(UserError, match=rf'foreign\.yaml:\d: .*{re.escape(message)}'):
        get_config(write('foreign.yaml', ''.join(f'{name}: {value}\n' for name, value in names)))


def test_values_that_change_nothing_may_be_given(write):
    get_config(opts=['MODEL.TOME.R', 0, 'MODEL.TRANS.DEPTH', 12, 'MODEL.EVIT.DROP_LOC', [3, 6, 9]])
    get_config(opts=['MODEL.TYPE', 'GatedMLP', 'MODEL.MIXER.DEPTH', 3])
    get_config(opts=['MODEL.TYPE', 'mine', 'MODEL.MIXER.DEPTH', 3])  # an architecture of the user's own


def test_inherited_values_of_another_model_are_dropped(write):
    write('common.yaml', 'MODEL: {TRANS: {DEPTH: 3}, MIXER: {DEPTH: 4}}')  # names no model
    path = write('child.yaml', 'BASE: [common.yaml]\nMODEL: {TYPE: vit, TRANS: {NUM_HEADS: 6}}')
    result = get_config(path)
    assert (result.MODEL.TRANS.DEPTH, result.MODEL.TRANS.NUM_HEADS, result.MODEL.MIXER.DEPTH) == (3, 6, 12)
    other = get_config(path, ['MODEL.TYPE', 'gmlp'])
    assert (other.MODEL.TRANS.DEPTH, other.MODEL.TRANS.NUM_HEADS) == (12, 12)
    write('vit.yaml', 'MODEL: {TYPE: vit}')
    path = write('both.yaml', 'BASE: [vit.yaml, common.yaml]')
    with pytest.raises(
        UserError, match=r'common\.yaml:1: MODEL\.MIXER\.DEPTH is 4, but has no effect for MODEL.TYPE vit'
    ):
        get_config(path)


def test_the_record_of_a_run_may_hold_values_without_effect(write):
    """As those do that were written before such values were dropped; its other values count."""
    tree = get_config(config_file_named('gmlp_digits')).clone()
    tree.defrost()
    tree.MODEL.TYPE, tree.MODEL.TRANS.DEPTH, tree.TRAIN.NUM_EPOCHS = 'vit', 6, 3
    record = write('config.yaml', tree.dump())
    assert get_config(record).MODEL.MIXER.DEPTH == 12
    assert (get_config(record).MODEL.TRANS.DEPTH, get_config(record).TRAIN.NUM_EPOCHS) == (6, 3)
    with pytest.raises(UserError, match='-opts: MODEL.MIXER.DEPTH is 3, but has no effect'):
        get_config(record, ['MODEL.MIXER.DEPTH', 3])


def config_file_named(name):
    return os.path.join(ROOT, 'configs', f'{name}.yaml')


def test_one_text_is_a_list_of_one(write):
    assert get_config(write('vit.yaml', 'MODEL: {TYPE: vit, TRANS: {MIXER: relative}}')).MODEL.TRANS.MIXER == (
        'relative',
    )


# ---------------------------------------------------------------------------------------------------- printing
def program(*argv):
    command = [sys.executable, '-m', 'config', *argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


def test_the_program_says_where_each_value_comes_from(write):
    base = write('base.yaml', 'TRAIN: {NUM_EPOCHS: 7}\nSEED: 3')
    path = write('child.yaml', 'BASE: base.yaml\n\nSEED: 4')
    argv = ['-cfg', path, '-batch_size=9', '-opts', 'TAG', 'a b', 'TRAIN.GRAD_CLIP', '2']
    status, out, err = program(*argv)
    assert (status, err) == (0, '')
    rows = {line.split()[0]: re.split('  +', line) for line in out.splitlines()}
    assert list(rows) == list(SCHEMA.keys)
    assert rows['TRAIN.NUM_EPOCHS'][1:] == ['7', f'{base}:1']
    assert rows['SEED'][1:] == ['4', f'{path}:3']
    assert rows['DATA.BATCH_SIZE_EVAL'][1:] == ['9', '-batch_size']
    assert rows['TAG'][1:] == ['a b', '-opts']
    assert rows['DATA.DATA_PATH'][1:] == ['/dataset/imagenet/', 'default']
    starts = {
        (line.index(rows[name][1], len(name)), line.rindex(rows[name][2])) for name, line in zip(rows, out.splitlines())
    }
    assert len(starts) == 1, 'columns are aligned'
    assert out.splitlines() == describe(command_line(*argv))


def test_the_program_ends_as_all_do():
    status, out, err = program('-opts', 'SEED', '-1')
    assert (status, out) == (2, '') and re.fullmatch(r'error: -opts: SEED is -1, but must be .*\.\n', err)
    reader = subprocess.run(
        f'{sys.executable} -m config | head -n 1', shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert len(reader.stdout.splitlines()) == 1 and reader.stderr == ''


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
    with pytest.raises(UserError, match="'AMP' is not part of a pair"):
        get_config(opts=['SAVE', 'x', 'AMP'])
    with pytest.raises(UserError, match="unknown key 'SAVES'. Did you mean 'SAVE'"):
        get_config(opts=['SAVES', 'x'])
    with pytest.raises(UserError, match='BASE has an effect in YAML files only'):
        get_config(opts=['BASE', 'x.yaml'])


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


def test_every_key_is_one_explained_line():
    with open(os.path.join(ROOT, 'config.py'), encoding='utf-8') as file:
        names = re.findall(r'^_C\.(\S+) = (?:Size)?Key\(.+\)  # \S.+$', file.read(), re.MULTILINE)
    assert names == list(SCHEMA.keys) == [name for name, _ in leaves(get_config())]


def sources(*left_out):
    """Path -> text of the code, but for config.py."""
    texts = {}
    for folder in ('models', 'datasets', 'tasks', 'analysis', 'deploy', 'engine', 'tools', '.'):
        for path in glob.glob(os.path.join(ROOT, folder, '**' if folder != '.' else '', '*.py'), recursive=True):
            if os.path.relpath(path, ROOT) not in ('config.py', *left_out):
                with open(path, encoding='utf-8') as file:
                    texts[path] = file.read()
    return texts


def test_every_key_has_a_reader():
    """A key without one has no effect; BASE is read by the mechanism."""
    assert set(SCHEMA.keys) - Readers(sources(), SCHEMA.keys).read() == {'BASE'}


def test_equal_names_in_other_sections_are_no_readers():
    few = {path: text for path, text in sources('models/gmlp.py').items() if '/models/' in path}
    read = Readers(few, SCHEMA.keys).read()
    assert {'MODEL.TRANS.EMBED_DIM', 'MODEL.MSMLP.EMBED_DIM', 'MODEL.TRANS.DEPTH'} <= read
    assert not any(name.startswith('MODEL.MIXER.') for name in read)


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'configs', '*.yaml'))), ids=os.path.basename)
def test_every_recipe_loads(path):
    get_config(path)
