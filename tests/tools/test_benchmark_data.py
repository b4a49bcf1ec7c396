# SPDX-License-Identifier: Apache-2.0
"""tools/benchmark_data.py on a few images: what it measures is the same pictures, and every combination is there."""

import json

import pytest
from PIL import Image

from tools import benchmark_data
from utils.errors import UserError


def test_tables(tmp_path, capsys):
    """The default makes pixels close to the reference's, and without FAST_RESIZE exactly those."""
    flags = ['-images', '9', '-rounds', '1', '-workers', '0', '2', '-image_size', '48', '-batch_size', '4']
    benchmark_data.main([*flags, '-json', str(tmp_path / 'out.json')])
    result = json.loads((tmp_path / 'out.json').read_text())
    rows = {(row['recipe'], row['pipeline']): row for row in result['one_core']}
    assert len(rows) == 8
    for recipe in benchmark_data.RECIPES:
        assert rows[recipe, 'reference']['ratio'] == 1
        assert 0 < rows[recipe, 'LeanViT']['difference'] < 8
        assert rows[recipe, 'LeanViT, exact']['difference'] == 0
        assert 0 < rows[recipe, 'LeanViT, -max_side 320']['difference'] < 12
    assert all(row['images_per_second'] > 0 for row in result['one_core'] + result['loader'])
    assert [(row['storage'], row['workers']) for row in result['loader']] == [
        (storage, workers) for storage in benchmark_data.STORAGES for workers in (0, 2)
    ]
    output = capsys.readouterr().out
    assert output.count('crop, flip, RandAugment') == 4
    assert all(f'\n{storage} ' in output for storage in benchmark_data.STORAGES)


def test_photographs(tmp_path):
    """500 x 375, 4:2:0, in two folders, each different."""
    benchmark_data.write_photographs(str(tmp_path), 3)
    files = sorted(tmp_path.glob('*/*.jpg'))
    assert len({file.read_bytes() for file in files}) == 3
    with Image.open(files[0]) as image:
        assert (image.size, image.mode, image.layer[0][1:3]) == ((500, 375), 'RGB', (2, 2))


@pytest.mark.parametrize('flags', [['-images', '0'], ['-rounds', '0'], ['-workers', '-1']])
def test_mistakes(flags):
    with pytest.raises(UserError, match=f'{flags[0]} is {flags[1]}'):
        benchmark_data.main(flags)
