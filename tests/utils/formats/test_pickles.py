# SPDX-License-Identifier: Apache-2.0
"""The pickle reader gives what Python's would for data, and refuses all that is not data."""

import collections
import io
import os
import pickle
import struct
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.formats.helpers import ops
from utils.formats.pickles import PickleReader, RefusedError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(data: bytes):
    return PickleReader().load(io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------- data
SMALL = st.integers(-(2**59), 2**59)
keys = st.none() | st.booleans() | SMALL | st.floats(allow_nan=False) | st.text() | st.binary()
plain = st.recursive(
    keys | st.integers() | st.binary(max_size=300).map(bytearray) | st.text(min_size=256, max_size=300),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(keys, inner)
        | st.sets(keys)
        | st.frozensets(keys)
        | st.dictionaries(keys, inner).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


@given(plain, st.sampled_from(PROTOCOLS))
@settings(deadline=None, max_examples=150)
def test_plain_data_as_python_reads_it(value, protocol):
    result = read(pickle.dumps(value, protocol))
    assert result == value
    assert type(result) is (dict if isinstance(value, dict) else type(value))


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize(
    'code', ['?', 'i1', 'u1', '<i2', '>u2', '<i4', '>i8', 'u8', 'f2', '<f4', '>f4', 'f8', 'c8', 'c16']
)
def test_arrays_of_every_kind(code, protocol):
    values = np.arange(24).reshape(2, 3, 4).astype(code)
    arrays = [
        values,
        np.asfortranarray(values),
        values[:, ::2],
        values[0, 0, 0:1].reshape(()),
        values[:0],
        values[0, 1, 2],
    ]
    for expected, result in zip(arrays, read(pickle.dumps(arrays, protocol))):
        assert result.dtype.newbyteorder('=') == expected.dtype.newbyteorder('=')
        assert result.shape == expected.shape
        assert np.array_equal(result, expected)
    assert read(pickle.dumps(values, protocol)).flags.writeable


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_an_object_named_twice_is_one_object(protocol):
    array, shared = np.arange(3.0), [1]
    result = read(pickle.dumps([shared, shared, array, array], protocol))
    assert result[0] is result[1]
    assert result[2] is result[3]
    shared.append(shared)
    with pytest.raises(RefusedError, match='within itself'):
        read(pickle.dumps(shared, protocol))


def test_arguments_of_a_run_stay_data():
    result = read(pickle.dumps(types.SimpleNamespace(lr=0.1, names=['a']), 4))
    assert result.state == {'lr': 0.1, 'names': ['a']}
    assert not isinstance(result, types.SimpleNamespace)


def test_numpy_of_either_major_version():
    data = pickle.dumps({'w': np.arange(3), 's': np.float32(0.5)}, 2)
    for core in (b'numpy.core.', b'numpy._core.'):
        result = read(data.replace(b'numpy._core.', b'numpy.core.').replace(b'numpy.core.', core))
        assert result['w'].tolist() == [0, 1, 2]
        assert result['s'] == 0.5


def test_pickles_follow_each_other_in_a_stream():
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps({'a': 2}, 4) + b'rest')
    reader = PickleReader()
    assert reader.load(stream) == [1]
    assert reader.load(stream) == {'a': 2}
    assert stream.read() == b'rest'


# ---------------------------------------------------------------------------------------------------- attacks
class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State(Call):
    """Pickles as an object whose state is a call."""

    def __reduce__(self):
        return collections.OrderedDict, (), {'x': Call(*self.call)}


def payloads(marker: str) -> dict:
    command = f'touch {marker}'
    write = f"open({marker!r}, 'w').close()"
    shell = Call(os.system, command)
    return {
        'system': shell,
        'eval': Call(eval, write),
        'exec': Call(exec, write),
        'open': Call(open, marker, 'w'),
        'getattr': Call(getattr, os, 'system'),
        'import': Call(__import__, 'os'),
        'in a dict': {'model': {'w': np.ones(2)}, 'x': shell},
        'in a tuple': ('w', (shell,)),
        'as a key': {(1, 2): [shell]},
        'as state': State(os.system, command),
        'in an object array': np.array([shell, 1], dtype=object),
        'numpy load': Call(np.load, marker),
    }


@pytest.mark.parametrize('protocol', PROTOCOLS)
@pytest.mark.parametrize('name', list(payloads('')))
def test_nothing_is_run(tmp_path, name, protocol):
    marker = tmp_path / 'marker'
    value = payloads(str(marker))[name]
    if name == 'getattr':
        data = b'c__builtin__\ngetattr\n(cos\nsystem\n' + ops('x') + b'tR.'
    else:
        data = pickle.dumps(value, protocol)
    with pytest.raises(RefusedError):
        read(data)
    assert not marker.exists()


def test_the_refusal_names_the_function():
    with pytest.raises(RefusedError, match=r"'builtins\.eval'"):
        read(pickle.dumps(Call(eval, '1'), 4))
    with pytest.raises(RefusedError, match=rf"'{os.system.__module__}\.system'"):
        read(pickle.dumps(Call(os.system, 'true'), 2))


COMMAND = ops('true')
ARRAY = b'cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n' + ops((0,)) + ops('b') + b'tR'


def dtype(code: str) -> bytes:
    return b'cnumpy\ndtype\n' + ops((code, False, True)) + b'R'


REFUSED = {
    'protocol 0 instance': b'(' + COMMAND + b'ios\nsystem\n.',
    'protocol 1 object': b'(cos\nsystem\n' + COMMAND + b'o.',
    'new object': b'\x80\x02cos\nsystem\n' + ops(('true',)) + b'\x81.',
    'stack global': b'\x80\x04' + ops('os') + ops('system') + b'\x93.',
    'module with a blank': b'cos system\nx\n.',
    'extension registry': b'\x80\x02\x82\x01.',
    'buffer from outside': b'\x80\x05\x97.',
    'new object with keywords': b'\x80\x04ccollections\nOrderedDict\n)' + ops({'a': 1}) + b'\x92.',
    'codec': b'c_codecs\nencode\n' + ops(('a', 'zlib')) + b'R.',
    'object dtype': dtype('O8') + b'.',
    'structured dtype': dtype('f4,O') + b'.',
    'raw memory dtype': dtype('V8') + b'.',
    'array subclass': b'cnumpy._core.multiarray\n_reconstruct\n(cbuiltins\ndict\n' + ops((0,)) + ops('b') + b'tR.',
}
DAMAGED = {
    'state for a class': b'cnumpy\nndarray\n' + ops({'x': 1}) + b'b.',
    'state for a function': b'c_codecs\nencode\n' + ops((None, {'__defaults__': (1,)})) + b'b.',
    'state for a list': b']' + ops({'x': 1}) + b'b.',
    'call of text': ops('text') + b')R.',
    'call without a tuple': b'ccollections\nOrderedDict\n' + ops('text') + b'R.',
    'reference to the outside': b'Pkey\n.',
    'array with too few bytes': ARRAY + b'(I1\n' + ops((4,)) + dtype('f4') + b'I00\n' + ops(bytearray(b'x')) + b'tb.',
    'array of negative shape': ARRAY + b'(I1\n' + ops((-2, -2)) + dtype('b1') + b'I00\n' + ops('aaaa') + b'tb.',
    'array of 100 dimensions': ARRAY + b'(I1\n' + ops((1,) * 100) + dtype('b1') + b'I00\n' + ops('a') + b'tb.',
    'array without dtype': ARRAY + ops((1, (1,), 'f4', False, 'aaaa')) + b'b.',
    'items for a tuple': b')' + ops(1) + b'a.',
    'key without value': b'}(' + ops(1) + b'u.',
    'unhashable key': b'}' + b']' + ops(1) + b's.',
    'nothing at the end': b'.',
    'two things at the end': b'NN.',
    'mark at the end': b'(.',
    'unknown memo': b'h\x07.',
    'operands below the mark': b'N(R.',
    'bytes beyond the end': b'\x80\x04\x8e' + struct.pack('<Q', 1 << 60) + b'abc.',
    'text beyond the end': b'\x80\x04\x8d' + struct.pack('<Q', 1 << 40) + b'abc.',
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    with pytest.raises(RefusedError):
        read(REFUSED[name])


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged(name):
    with pytest.raises(Exception) as info:
        read(DAMAGED[name])
    assert not isinstance(info.value, (RefusedError, SystemError))


def test_a_filled_array_is_not_filled_again():
    content = b'(I1\n' + ops((1,)) + dtype('b1') + b'I00\n' + ops('a') + b't'
    assert read(ARRAY + content + b'b.').tolist() == [True]
    with pytest.raises(ValueError, match='without its content'):
        read(ARRAY + content + b'b' + content + b'b.')


def test_small_files_take_little_time_and_memory():
    start = time.monotonic()
    huge_memo_index = b'\x80\x04Nr\xff\xff\xff\xff.'
    assert read(huge_memo_index) is None
    deep_key = b'}' + b')' + b'\x85' * 300_000 + b'Ns.'
    doubling_key = b'}' + b')' + b'2\x86' * 100 + b'Ns.'
    for data in (deep_key, doubling_key):
        with pytest.raises(ValueError, match='key'):
            read(data)
    assert time.monotonic() - start < 20


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_damage_ends_in_an_exception_or_in_data(data):
    original = pickle.dumps({'model': {'w': np.arange(4.0), 'b': np.ones(2, 'f4')}, 'epoch': 3, 'l': [(1, 'x')]}, 4)
    damaged = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(damaged))
    except Exception as error:
        assert not isinstance(error, SystemError)
