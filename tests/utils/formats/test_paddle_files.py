# SPDX-License-Identifier: Apache-2.0
"""Files of Paddle: all that `paddle.save` writes is read, and what is written `paddle.load` takes."""

from __future__ import annotations

import errno
import os
import pickle

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.utils.formats.helpers import B, W, write
from utils.errors import UserError
from utils.formats import read_file, write_pdparams
from utils.weights import find_state_dict, resolve_weights_path


@pytest.fixture
def layer():
    layer = paddle.nn.Linear(2, 3)
    layer.set_state_dict({'weight': W, 'bias': B})
    return layer


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_flat_paddle_file(tmp_path, layer, protocol):
    path = str(tmp_path / 'flat.pdparams')
    paddle.save(layer.state_dict(), path, protocol=protocol)
    content = read_file(path)
    assert list(content) == ['weight', 'bias']
    assert np.array_equal(content['weight'], W)
    assert np.array_equal(content['bias'], B)


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_paddlevit_checkpoint(tmp_path, layer, protocol):
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=layer.parameters(), weight_decay=0.1)
    layer(paddle.ones([4, 2])).sum().backward()
    optimizer.step()
    checkpoint = {
        'model': layer.state_dict(),
        'model_ema': layer.state_dict(),
        'optimizer': optimizer.state_dict(),
        'lr_scheduler': schedule.state_dict(),
        'epoch': 7,
        'amp_grad_scaler': paddle.amp.GradScaler(enable=False).state_dict(),
        'half': paddle.to_tensor([1.0, -2.0]).astype('bfloat16'),
        'empty': paddle.zeros([0, 3]),
    }
    path = str(tmp_path / 'Epoch-7-Loss-0.5.pdparams')
    paddle.save(checkpoint, path, protocol=protocol)
    content = read_file(path)
    assert content['epoch'] == 7
    assert np.array_equal(content['model']['weight'], layer.weight.numpy())
    moments = {k: v for k, v in content['optimizer'].items() if 'moment1' in k}
    assert {v.shape for v in moments.values()} == {(2, 3), (3,)}
    assert content['lr_scheduler']['last_epoch'] == schedule.last_epoch
    assert content['half'].dtype == np.uint16  # Paddle's way to hold bfloat16
    assert content['empty'].shape == (0, 3)
    assert np.array_equal(find_state_dict(content)['bias'], layer.bias.numpy())


def test_old_pair_of_files(tmp_path, layer):
    optimizer = paddle.optimizer.AdamW(0.1, parameters=layer.parameters())
    layer(paddle.ones([4, 2])).sum().backward()
    optimizer.step()
    paddle.save(layer.state_dict(), str(tmp_path / 'MAE-Epoch-12-Loss-0.93.pdparams'))
    paddle.save(optimizer.state_dict(), str(tmp_path / 'MAE-Epoch-12-Loss-0.93.pdopt'))
    weights_path = resolve_weights_path(str(tmp_path / 'MAE-Epoch-12-Loss-0.93'))
    assert np.array_equal(read_file(weights_path)['weight'], layer.weight.numpy())
    moments = read_file(str(tmp_path / 'MAE-Epoch-12-Loss-0.93.pdopt'))
    expected = {k: v.numpy() for k, v in optimizer.state_dict().items() if isinstance(v, paddle.Tensor)}
    assert set(expected) <= set(moments)
    assert all(np.array_equal(moments[key], value) for key, value in expected.items())


def test_arrays_that_paddle_cut_into_slices(tmp_path):
    big = np.arange(24, dtype='float32').reshape(4, 6)
    state = {
        'small': B,
        'big@@.0': big.ravel()[:10],
        'big@@.1': big.ravel()[10:],
        'UnpackBigParamInfor@@': {'big': {'OriginShape': (4, 6), 'slices': ['big@@.0', 'big@@.1']}},
        'StructuredToParameterName@@': {'small': 'linear_0.b_0', 'big': 'linear_0.w_0'},
    }
    path = write(tmp_path / 'sliced.pdparams', pickle.dumps(state, 2))
    assert {k: v.numpy().tolist() for k, v in paddle.load(path).items()} == {'small': B.tolist(), 'big': big.tolist()}
    content = read_file(path)
    assert {k: v.tolist() for k, v in content.items()} == {'small': B.tolist(), 'big': big.tolist()}


def test_named_tuples_are_arrays_at_any_depth(tmp_path):
    state = {'a': [{'b': ('linear_0.w_0', W)}], 'pair': ('x', 1), 'deep': ((('n', B),),)}
    content = read_file(write(tmp_path / 'x.pdparams', pickle.dumps(state, 4)))
    assert np.array_equal(content['a'][0]['b'], W)
    assert content['pair'] == ('x', 1)
    assert np.array_equal(content['deep'][0][0], B)


def test_containers_within_themselves_and_doubled_a_hundred_times(tmp_path):
    loop: dict = {'w': W}
    loop['model'] = loop
    with pytest.raises(UserError, match='refused: it holds a container within itself'):
        read_file(write(tmp_path / 'loop.pdparams', pickle.dumps(loop, 4)))
    doubled = b'\x80\x02}X\x01\x00\x00\x00w)' + b'2\x86' * 100 + b's.'
    with pytest.raises(UserError, match='refused: its containers are nested too deeply, or repeated too often'):
        read_file(write(tmp_path / 'doubled.pdparams', doubled))


# ---------------------------------------------------------------------------------------------------- writing
arrays = st.sampled_from(['float32', 'float64', 'float16', 'int64', 'int32', 'uint8', 'bool']).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(st.dictionaries(st.text(min_size=1), arrays))
@settings(deadline=None, max_examples=60)
def test_written_arrays_come_back_bit_by_bit(tmp_path_factory, state):
    path = str(tmp_path_factory.getbasetemp() / 'round.pdparams')
    write_pdparams(state, path)
    loaded = paddle.load(path, return_numpy=True)
    for content in (read_file(path), loaded):
        assert list(content) == list(state)
        for name, array in state.items():
            assert content[name].dtype == array.dtype
            assert content[name].shape == array.shape
            assert content[name].tobytes() == array.tobytes()


def test_a_bare_paddle_load_takes_it(tmp_path, layer):
    path = str(tmp_path / 'w.pdparams')
    write_pdparams({'weight': np.asfortranarray(W), 'bias': B[::-1]}, path)
    fresh = paddle.nn.Linear(2, 3)
    assert fresh.set_state_dict(paddle.load(path)) == ([], [])
    assert np.array_equal(fresh.weight.numpy(), W)
    assert np.array_equal(fresh.bias.numpy(), B[::-1])
    write_pdparams(layer.state_dict(), path)  # tensors too
    assert np.array_equal(read_file(path)['weight'], W)


def test_nested_checkpoints(tmp_path):
    path = str(tmp_path / 'last.pdparams')
    state = {
        'model': {'w': W},
        'epoch': 3,
        'loss': np.float32(0.5),
        'names': ['a', ('b', 1)],
        'rng': {'state': 2**127, 'raw': b'\x00\xff'},
        'config': 'MODEL:\n',
        'best': None,
        'amp': False,
    }
    write_pdparams(state, path)
    content = read_file(path)
    assert np.array_equal(content.pop('model')['w'], W)
    state.pop('model')
    assert content == state


def test_what_could_not_be_read_is_not_written(tmp_path):
    path = str(tmp_path / 'last.pdparams')
    write_pdparams({'w': W}, path)
    for bad in (object(), np.array([object()]), {1, 2}, np.array(['a'])):
        with pytest.raises(TypeError, match=r'last\.pdparams: model: x'):
            write_pdparams({'model': {'x': bad}}, path)
    assert np.array_equal(read_file(path)['w'], W)
    assert os.listdir(tmp_path) == ['last.pdparams']


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / 'last.pdparams')
    write_pdparams({'w': W}, path)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r"cannot write '.*/last\.pdparams': No space left on device"):
        write_pdparams({'w': W + 1}, path)
    assert np.array_equal(read_file(path)['w'], W)
    assert os.listdir(tmp_path) == ['last.pdparams']
    with pytest.raises(UserError, match='cannot write'):
        write_pdparams({'w': W}, os.path.join(path, 'x.pdparams'))
