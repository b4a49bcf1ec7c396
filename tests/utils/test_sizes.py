# SPDX-License-Identifier: Apache-2.0
"""Image sizes: the side of a square, or (height, width), by every way to give one."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import get_config, update_config
from utils.errors import UserError
from utils.flags import get_arguments
from utils.sizes import image_shape, image_size, image_size_flag, size_argument, size_pair, size_text, size_value

SIDES = st.integers(1, 8192)


def given_size(value):
    return get_config(None, ['DATA.IMAGE_SIZE', value]).DATA.IMAGE_SIZE


@settings(deadline=None)
@given(SIDES, SIDES)
def test_the_forms_of_a_size_agree(height, width):
    size = size_value((height, width))
    assert isinstance(size, int) == (height == width)
    assert size_pair(size) == (height, width) == size_pair([height, width])
    assert image_size_flag(size_argument(size)) == image_size_flag(f"'[{height}, {width}]'") == size
    assert size_text(size) == (str(height) if height == width else f'{height}x{width}')


@pytest.mark.parametrize('text', ['', 'x', '1.5', '1,2,3', '1,', 'True', "1,'2'", '[[1,2]]'])
def test_values_that_are_no_size(text):
    with pytest.raises(ValueError):
        image_size_flag(text)


def test_a_pair_is_taken_from_files_options_and_flags(tmp_path):
    file = tmp_path / 'pair.yaml'
    file.write_text('DATA: {IMAGE_SIZE: [224, 160]}')
    configs = [
        get_config(str(file)),
        *(get_config(None, ['DATA.IMAGE_SIZE', value]) for value in ([224, 160], (224, 160), '[224,160]', '224,160')),
        *(update_config(get_config(), get_arguments([f'-image_size{text}'])) for text in ('=224,160', "='[224, 160]'")),
        update_config(get_config(), get_arguments(['-image_size', '224,160'])),
    ]
    for config in configs:
        assert config.DATA.IMAGE_SIZE == (224, 160) == image_size(config)
        assert image_shape(config) == [3, 224, 160]
    again = tmp_path / 'again.yaml'  # config.yaml of a run
    again.write_text(configs[0].dump())
    assert yaml.safe_load(again.read_text())['DATA']['IMAGE_SIZE'] == [224, 160]
    assert get_config(str(again)).DATA.IMAGE_SIZE == (224, 160)


def test_a_square_is_one_number():
    for value in (96, '96', [96, 96], '96,96', 96.0):
        size = given_size(value)
        assert size == 96 and type(size) is int
    assert type(update_config(get_config(), get_arguments(['-image_size=96,96'])).DATA.IMAGE_SIZE) is int
    assert image_size(get_config()) == (224, 224)


@pytest.mark.parametrize('value', [0, 8193, [224, 0], [224], [1, 2, 3], [224, 'x'], 'a,b', None, True, 1.5, [[1, 2]]])
def test_wrong_sizes_are_named(value):
    allowed = r'must be a whole number of at least 1 and at most 8192, or \(height, width\)\.$'
    with pytest.raises(UserError, match=rf'DATA\.IMAGE_SIZE is .*, but {allowed}'):
        given_size(value)


def test_a_wrong_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        get_arguments(['-image_size=224x160'])
    assert "invalid image size value: '224x160'" in capsys.readouterr().err
