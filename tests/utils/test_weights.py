# SPDX-License-Identifier: Apache-2.0
"""Weight files of every format: content, refusals, errors; unwrapping, writing and finding."""

from __future__ import annotations

import collections
import errno
import io
import json
import os
import pickle
import zipfile

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from utils import weights
from utils.errors import UserError
from utils.weights import file_format, find_state_dict, read_file, resolve_weights_path, state_dicts, write_pdparams

W, B = np.arange(6, dtype='float32').reshape(2, 3), np.array([0.5, -1.5, 2.5], 'float32')


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


# ---------------------------------------------------------------------------------------------------- Paddle's files
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
    content = read_file(write(tmp_path / 'loop.pdparams', pickle.dumps(loop, 4)))
    assert content['model'] is content
    with pytest.raises(UserError, match='holds no weights'):
        find_state_dict(content)
    doubled = b'\x80\x02}X\x01\x00\x00\x00w)' + b'2\x86' * 100 + b's.'
    assert isinstance(read_file(write(tmp_path / 'doubled.pdparams', doubled))['w'], tuple)


# ---------------------------------------------------------------------------------------------------- other formats
def safetensors_file(header, data: bytes = b'', length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def entry(begin: int, end: int, shape=(1,), dtype='F32') -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def test_safetensors(tmp_path):
    arrays = {
        'w': W,
        'h': W.astype('float16'),
        'i': np.array([[1, -2]]),
        'b': np.array([True, False]),
        's': np.array(2.5),
    }
    path = str(tmp_path / 'model.safetensors')
    save_file(arrays, path, metadata={'format': 'np'})
    content = read_file(path)
    assert {k: (v.dtype, v.shape, v.tolist()) for k, v in content.items()} == {
        k: (v.dtype, v.shape, v.tolist()) for k, v in arrays.items()
    }
    os.rename(path, str(tmp_path / 'model.bin'))
    assert np.array_equal(read_file(str(tmp_path / 'model.bin'))['w'], W)


def test_safetensors_bfloat16_becomes_float32(tmp_path):
    data = safetensors_file({'w': entry(0, 4, (2,), 'BF16')}, b'\x80\x3f\x00\xc0')
    content = read_file(write(tmp_path / 'model.safetensors', data))
    assert content['w'].dtype == np.float32
    assert content['w'].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    'data',
    [
        safetensors_file(b'{}', length=2**63),
        safetensors_file(b'{}', length=2**64 - 1),
        safetensors_file(b'{"a":'),
        safetensors_file(b'[]'),
        safetensors_file({'a': entry(0, 4), 'b': entry(2, 6)}, bytes(6)),
        safetensors_file({'a': entry(0, 4), 'b': entry(8, 12)}, bytes(12)),
        safetensors_file({'a': entry(0, 4)}, bytes(8)),
        safetensors_file({'a': entry(0, 8, (2,))}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (2,))}, bytes(4)),
        safetensors_file({'a': entry(4, 0)}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (2**40, 2**40))}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (4,), 'F8_E4M3')}, bytes(4)),
        safetensors_file({'a': entry(0, 4, (1,), 'OBJECT')}, bytes(4)),
        b'\x01',
    ],
)
def test_safetensors_that_lie(tmp_path, data):
    with pytest.raises(UserError, match=r"model\.safetensors' is (damaged|refused)"):
        read_file(write(tmp_path / 'model.safetensors', data))


def test_npz(tmp_path):
    path = str(tmp_path / 'model.npz')
    for save in (np.savez, np.savez_compressed):
        save(path, w=W, **{'blocks.0.bias': B})
        content = read_file(path)
        assert np.array_equal(content['w'], W)
        assert np.array_equal(content['blocks.0.bias'], B)


def test_npz_holds_no_objects(tmp_path):
    path = str(tmp_path / 'model.npz')
    np.savez(path, w=np.array([{'a': 1}], dtype=object))
    with pytest.raises(UserError, match=r"model\.npz' is damaged.*[Oo]bject arrays"):
        read_file(path)


def test_npz_bombs(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('w.npy', bytes(weights.FREE_COMPRESSION * 2))
    with pytest.raises(UserError, match='is refused: it is compressed'):
        read_file(write(tmp_path / 'bomb.npz', buffer.getvalue()))


# ---------------------------------------------------------------------------------------------------- formats, errors
def test_the_content_decides_the_format(tmp_path):
    fixtures = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'fixtures', 'weights')
    np.savez(str(tmp_path / 'a.npz'), w=W)
    files = {
        os.path.join(fixtures, 'checkpoint.pth'): weights.TORCH,
        os.path.join(fixtures, 'checkpoint_protocol4.pt'): weights.TORCH,
        os.path.join(fixtures, 'checkpoint_legacy.pth.tar'): weights.OLD_TORCH,
        str(tmp_path / 'a.npz'): weights.NPZ,
        write(tmp_path / 'b', pickle.dumps({'w': W}, 4)): weights.PADDLE,
        write(tmp_path / 'c', safetensors_file({'w': entry(0, 4)}, bytes(4))): weights.SAFETENSORS,
    }
    for path, expected in files.items():
        assert file_format(path) == expected
        misnamed = tmp_path / 'misnamed.pth'
        with open(path, 'rb') as file:
            misnamed.write_bytes(file.read())
        assert file_format(str(misnamed)) == expected
        assert read_file(str(misnamed))


@pytest.mark.parametrize('suffix', ['pdparams', 'pth', 'safetensors', 'npz', 'txt'])
@pytest.mark.parametrize(
    'data', [b'', b'x', b'PK\x03\x04', b'\x80\x04', b'garbage ' * 100, b'<html>not found</html>', bytes(100)]
)
def test_what_is_no_weight_file_is_named_in_one_sentence(tmp_path, suffix, data):
    path = write(tmp_path / f'weights.{suffix}', data)
    for function in (read_file, file_format) if data == b'' else (read_file,):
        with pytest.raises(
            UserError, match=rf"weights\.{suffix}' is damaged, cut short, or not a weight file: ."
        ) as info:
            function(path)
        assert '\n' not in str(info.value)
        assert len(str(info.value)) < 250 + len(path)


def test_what_a_file_says_cannot_move_the_cursor(tmp_path):
    hostile = 'os\x1b[2J\n' + 'x' * 1000
    for data in (b'\x80\x04' + pickle.dumps(hostile, 4)[2:-1] * 2 + b'\x93.', pickle.dumps({hostile: W, 1: 2}, 4)):
        with pytest.raises(UserError) as info:
            find_state_dict(read_file(write(tmp_path / 'x.pdparams', data)))
        assert str(info.value).isprintable()
        assert len(str(info.value)) < 300 + len(str(tmp_path))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"cannot read '.*/missing\.pdparams': No such file"):
        read_file(str(tmp_path / 'missing.pdparams'))
    with pytest.raises(UserError, match=f"cannot read '{tmp_path}': Is a directory"):
        read_file(str(tmp_path))


def test_code_is_refused_by_name_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "marker"}',)

    for protocol in range(6):
        path = write(tmp_path / 'x.pdparams', pickle.dumps({'model': {'w': W}, 'x': Payload()}, protocol))
        with pytest.raises(UserError, match=rf"x\.pdparams' is refused: it names '{os.name}\.system'"):
            read_file(path)
    assert not (tmp_path / 'marker').exists()


@given(st.floats(0, 1), st.sampled_from(['pdparams', 'safetensors', 'npz']))
@settings(deadline=None, max_examples=100)
def test_cut_short(tmp_path_factory, share, suffix):
    path = tmp_path_factory.getbasetemp() / f'cut.{suffix}'
    if suffix == 'pdparams':
        write_pdparams({'w': W, 'n': {'b': B, 'epoch': 3}}, str(path))
    elif suffix == 'npz':
        np.savez(str(path), w=W, b=B)
    else:
        save_file({'w': W, 'b': B}, str(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * (len(data) - 1))])
    with pytest.raises(UserError, match=rf"cut\.{suffix}' is damaged"):
        read_file(str(path))


# ---------------------------------------------------------------------------------------------------- unwrapping
STATE = {'w': W, 'b': B}


@pytest.mark.parametrize(
    'content, where',
    [
        (STATE, ''),
        (collections.OrderedDict(STATE), ''),
        ({'state_dict': STATE, 'epoch': 1, 'arch': 'vit'}, 'state_dict'),
        ({'model': STATE, 'optimizer': {'state': {0: {'exp_avg': W}}}, 'args': None}, 'model'),
        ({'net': STATE}, 'net'),
        ({'state_dict': {'model': STATE, 'epoch': 1}}, 'state_dict.model'),
        ({'model_ema': STATE}, 'model_ema'),
        ({'state_dict_ema': STATE, 'epoch': 3}, 'state_dict_ema'),
        ({'module.w': W, 'module.b': B}, ''),
        ({'model': {'module.w': W, 'module.b': B}}, 'model'),
        ({'_layers.w': W, '_layers.b': B}, ''),
        ({'module._layers.w': W, 'module._layers.b': B}, ''),
        ({'model': STATE, 'model_ema': None}, 'model'),
        ({'model': STATE, 'model_ema': {}}, 'model'),
        ({'_orig_mod.w': W, '_orig_mod.b': B}, ''),
        ({'module._orig_mod.w': W, 'module._orig_mod.b': B}, ''),
        ({'module.module.w': W, 'module.module.b': B}, ''),
        ({'backbone.w': W, 'backbone.b': B}, ''),
        ({'encoder.model.w': W, 'encoder.model.b': B}, ''),
        ({'n_averaged': np.array(3), 'module.w': W, 'module.b': B}, ''),
        ({'model_state_dict': STATE, 'epoch': 1}, 'model_state_dict'),
        ({'model_ema': {'module': STATE, 'decay': 0.9}}, 'model_ema.module'),
    ],
)
def test_wrapped_weights(content, where):
    assert list(state_dicts(content)) == [where]
    for prefer_ema in (False, True):
        found = find_state_dict(content, prefer_ema)
        assert {k: v.tolist() for k, v in found.items()} == {'w': W.tolist(), 'b': B.tolist()}


def test_averaged_weights():
    for key in ('model_ema', 'state_dict_ema'):
        content = {'model': STATE, key: {'module.w': W + 1, 'module.b': B + 1}}
        assert np.array_equal(find_state_dict(content)['w'], W)
        assert np.array_equal(find_state_dict(content, prefer_ema=True)['w'], W + 1)


def test_a_prefix_of_some_names_only_stays():
    state = {'module.w': W, 'head.b': B}
    assert set(find_state_dict(state)) == set(state)
    assert set(find_state_dict({'blocks.0._orig_mod.w': W, 'b': B})) == {'blocks.0.w', 'b'}  # a compiled part
    twice = {'_orig_mod.w': W, 'w': B}
    assert set(find_state_dict(twice)) == set(twice)


def test_ambiguous_and_missing_weights():
    with pytest.raises(UserError, match=r"f\.pth holds several sets.*'state_dict' \(2 arrays\), 'net' \(1 arrays\)"):
        find_state_dict({'state_dict': STATE, 'net': {'w': W}}, source='f.pth')
    with pytest.raises(UserError, match=r"holds no weights.*'epoch' \(int\), 'teacher' \(dict\)"):
        find_state_dict({'epoch': 3, 'teacher': STATE})
    with pytest.raises(UserError, match='holds no weights.*but one ndarray'):
        find_state_dict(W)
    with pytest.raises(UserError, match='holds no weights.*but nothing'):
        find_state_dict({})
    with pytest.raises(UserError, match='holds no weights'):
        find_state_dict({'w': W, 'epoch': 3})


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


# ---------------------------------------------------------------------------------------------------- finding
def test_paths(tmp_path):
    for name in ('gmlp.pdparams', 'gmlp.v2', 'run/last.pdparams', 'best_run/best.pdparams', 'best_run/last.pdparams'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'x')
    expected = {
        'gmlp.pdparams': 'gmlp.pdparams',
        'gmlp': 'gmlp.pdparams',
        'gmlp.v2': 'gmlp.v2',
        'run': 'run/last.pdparams',
        'run/': 'run/last.pdparams',
        'best_run': 'best_run/best.pdparams',
        'run/last': 'run/last.pdparams',
    }
    for given_path, found in expected.items():
        assert resolve_weights_path(f'{tmp_path}/{given_path}') == f'{tmp_path}/{found}'


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'w.pdparams').write_bytes(b'x')
    assert resolve_weights_path('~/w') == str(tmp_path / 'w.pdparams')


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / 'gmlp_s16_224.pdparams').write_bytes(b'x')
    (tmp_path / 'other.txt').write_bytes(b'x')
    with pytest.raises(
        UserError, match=r"neither '.*/gmlp_s16' nor '.*/gmlp_s16\.pdparams'; .* holds gmlp_s16_224\.pdparams"
    ):
        resolve_weights_path(str(tmp_path / 'gmlp_s16'))
    with pytest.raises(UserError, match=r"is no '.*/gmlp\.pdparams'; '.*' holds gmlp_s16_224\.pdparams"):
        resolve_weights_path(str(tmp_path / 'gmlp.pdparams'))
    with pytest.raises(
        UserError, match=r"neither '.*/best\.pdparams' nor '.*/last\.pdparams'; '.*' holds gmlp_s16_224"
    ):
        resolve_weights_path(str(tmp_path))
    with pytest.raises(UserError, match=r"the folder '.*/nowhere' does not exist"):
        resolve_weights_path(str(tmp_path / 'nowhere' / 'w'))
    with pytest.raises(UserError, match=r'holds gmlp_s16_224\.pdparams'):
        resolve_weights_path(str(tmp_path / 'GMLP_S16_224.PDPARAMS'))
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'model.safetensors').write_bytes(b'x')
    with pytest.raises(UserError, match=r'holds model\.safetensors'):
        resolve_weights_path(str(tmp_path / 'hub'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=r'holds no \.pdparams file'):
        resolve_weights_path(str(tmp_path / 'empty'))
