# SPDX-License-Identifier: Apache-2.0
"""Configuration files that multiply, recur or are endless: one sentence, at once."""

from __future__ import annotations

import time

import numpy as np
import pytest

from config import get_config
from datasets.sample import Plane
from datasets.workers import BatchMemory
from utils.errors import UserError
from utils.schema import MAX_FILES
from utils.yaml_files import MAX_FILE, MAX_NODES

LAUGHS = 'SAVE: [&a0 [x, x], ' + ', '.join(f'&a{i} [*a{i - 1}, *a{i - 1}]' for i in range(1, 16)) + ']'
SECTIONS = 'MODEL:\n' + ''.join(
    f'  K{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n' if i else '  K0: &a0 {}\n' for i in range(16)
)
FILES = {
    'billion laughs': (LAUGHS, 'values, counting repetitions'),
    'billion laughs of sections': (SECTIONS, 'values, counting repetitions'),
    'a list within itself': ('SAVE: &a [*a]', 'contains itself'),
    'a section within itself': ('DATA: &a {DATA: *a}', 'contains itself'),
    'two within each other': ('SAVE: &a [&b [*a]]', 'contains itself'),
    'nested lists': ('SAVE: ' + '[' * 30 + ']' * 30, 'nested more than 20 deep'),
    'deeply nested lists': ('SAVE: ' + '[' * 50_000, 'nested too deeply'),
    'deeply nested sections': ('? ' * 20_000, 'nested too deeply'),
    'many values': ('SAVE: [' + '1,' * MAX_NODES + ']', 'values, counting repetitions'),
    'many keys': ('\n'.join(f'K{i}: 1' for i in range(MAX_NODES)), 'values, counting repetitions'),
    'a long file': ('SAVE: ' + 'x' * MAX_FILE, 'more than the 131072 that are read'),
    'a long integer': ('SEED: ' + '9' * 5000, 'a number of 5000 digits'),
    'a long hexadecimal integer': ('SEED: 0x' + 'f' * 50_000, 'a number of 50002 digits'),
    'a long sexagesimal integer': ('SEED: 1' + ':1' * 50_000, 'a number of 100001 digits'),
    'an integer of 65 bits': ('SEED: 18446744073709551616', 'SEED is 18446744073709551616, but must be'),
    'a version of many digits': ('%YAML ' + '9' * 10_000, 'not a YAML file'),
    'batch size': ('DATA: {BATCH_SIZE: 4611686018427387904}', 'BATCH_SIZE is 4611686018427387904'),
    'image size': ('DATA: {IMAGE_SIZE: 1099511627776}', 'IMAGE_SIZE is 1099511627776'),
    'workers': ('DATA: {NUM_WORKERS: 1000000}', 'NUM_WORKERS is 1000000'),
    'timeout': ('DATA: {TIMEOUT: .inf}', 'TIMEOUT is inf'),
    'no number': ('DATA: {TIMEOUT: .nan}', 'TIMEOUT is nan'),
    'code': ('SAVE: !!python/object/apply:os.system [true]', 'could not determine a constructor'),
    'escapes in a key': ('"\\e[2J": 1', r'unknown key .\\x1b\[2J'),
    'escapes in a value': ('DATA: {BATCH_SIZE: "\\e[2J\\a"}', r'BATCH_SIZE is .\\x1b\[2J\\x07'),
    'a long key': ('x' * 1000 + ': 1', 'unknown key'),
}  # fmt: skip


@pytest.mark.parametrize('name', FILES)
def test_one_sentence(tmp_path, name):
    text, words = FILES[name]
    (tmp_path / 'x.yaml').write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as info:
        get_config(str(tmp_path / 'x.yaml'))
    assert time.monotonic() - start < 20
    assert '\n' not in str(info.value) and '\x1b' not in str(info.value) and len(str(info.value)) < 4001


def test_aliases_are_read(tmp_path):
    (tmp_path / 'x.yaml').write_text('TRAIN: {BASE_LR: &lr 0.5, END_LR: *lr}')
    assert get_config(str(tmp_path / 'x.yaml')).TRAIN.END_LR == 0.5


def test_bases_that_multiply(tmp_path):
    """Each file names the next one twice."""
    for number in range(40):
        (tmp_path / f'{number}.yaml').write_text(f"BASE: ['{number + 1}.yaml', '{number + 1}.yaml']")
    (tmp_path / '40.yaml').write_text('SEED: 1')
    with pytest.raises(UserError, match=f'BASE leads to more than {MAX_FILES} files'):
        get_config(str(tmp_path / '0.yaml'))


@pytest.mark.parametrize(
    'text', ['-' * 100_000 + '1', '(' * 100_000, '1+' * 100_000 + '1', '[' * 9000, '-' * 9000 + '1']
)
def test_values_of_the_command_line(text):
    with pytest.raises(UserError, match=r'DATA\.BATCH_SIZE is '):
        get_config(opts=['DATA.BATCH_SIZE', text])


def test_a_batch_larger_than_the_address_space():
    with pytest.raises(UserError, match=r'a batch of 65536 images takes .* GB.*DATA\.BATCH_SIZE'):
        BatchMemory(65536, [Plane('image', (1 << 20, 1 << 20, 3), np.dtype('uint8').name)])
