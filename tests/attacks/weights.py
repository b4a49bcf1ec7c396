# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged weight files through every door that takes weights."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import paddle

from config import get_config
from engine.checkpoint import read_checkpoint
from models import build_model, create_model
from models.weights.load import load_frozen, load_pretrained
from tests.attacks.mutations import mutants
from tests.engine.test_train import make_trainer
from tests.utils.formats.helpers import archive, entry, ops, safetensors_file, tensor, torch_file
from tests.utils.formats.test_limits import DOUBLED, checksummed, shared_paths
from tests.utils.formats.test_limits import FILES as LIMITS
from tools import export, extract_features, port_weights, predict
from utils.formats import read_file, write_pdparams

P, GET0, PUT0 = b'\x80\x02', b'h\xf0', b'q\xf0'
PAYLOADS = (  # code in each way that a pickle can ask for it
    b'cos\nsystem\n' + ops('touch HIT') + b'\x85R', b'cposix\nsystem\n' + ops('touch HIT') + b'\x85R',
    b'(' + ops('touch HIT') + b'ios\nsystem\n', b'(cos\nsystem\n' + ops('touch HIT') + b'o',
    b'cbuiltins\neval\n' + ops('open("HIT","w")') + b'\x85R', b'c__builtin__\nexec\n' + ops('open("HIT","w")') + b'\x85R',
    ops('os') + ops('system') + b'\x93' + ops('touch HIT') + b'\x85R', b'csubprocess\nPopen\n' + ops('touch') + b'\x85R',
    b'cbuiltins\ngetattr\n' + ops('x') + ops('y') + b'\x86R', b'cnumpy\nload\n' + ops('x') + b'\x85R',
    b'cnumpy.testing._private.utils\nrunstring\n' + ops('x') + b'}\x86R', b'ctorch\nload\n' + ops('x') + b'\x85R',
    b'cpaddle\nload\n' + ops('x') + b'\x85R', b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00', b'\x97', b'\x98',
    b'cargparse\nNamespace\n)}\x92', b'ctypes\nFunctionType\n)R', b'cbuiltins\nint.__new__\n)R', b'Pcode\n',
    b'ccodecs\nlookup\n' + ops('zip') + b'\x85R', b'c_codecs\nencode\n' + ops(('x', 'zip')) + b'R', b'c.\n.\n)R', b'c\n\n)R',
)  # fmt: skip


def legacy_file(state: dict[str, np.ndarray]) -> bytes:
    """torch.save before PyTorch 1.6."""
    result = b''.join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}))
    result += P + b'}'
    for number, (name, array) in enumerate(state.items()):
        strides = tuple(step // 4 for step in np.empty(array.shape, 'f4').strides)
        view = tensor(0, array.shape, strides, array.size, str(number)).replace(b'tQ', b'NtQ')
        result += ops(name) + view + b's'
    result += b'.' + pickle.dumps([str(number) for number in range(len(state))], 2)
    for array in state.values():
        result += struct.pack('<Q', array.size) + array.astype('<f4').tobytes()
    return result


def npz_file(state: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **state)
    return buffer.getvalue()


def safetensors_of(state: dict[str, np.ndarray]) -> bytes:
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, array in state.items():
        raw = array.astype('<f4').tobytes()
        header[name] = entry(len(data), len(data) + len(raw), array.shape)
        data += raw
    return safetensors_file(header, data)


def own_file(content: dict, folder: str) -> bytes:
    path = os.path.join(folder, 'seed.pdparams')
    write_pdparams(content, path)
    with open(path, 'rb') as file:
        return file.read()


def seeds(state: dict[str, np.ndarray], folder: str) -> dict[str, bytes]:
    """A state dict in each format, by the name of the file."""
    own = own_file({**state, 'Facts@@': {'MODEL.TRANS.NUM_HEADS': 2}}, folder)
    plain = {**state, 'StructuredToParameterName@@': dict.fromkeys(state, 'linear_0.w_0')}
    nested = {'model': state, 'epoch': 1, 'optimizer': {'LR_Scheduler': {'last_epoch': 1}}}
    return {
        'own.pdparams': own,
        'paddle.pdparams': pickle.dumps(plain, 4),
        'protocol0.pdparams': pickle.dumps(state, 0),
        'protocol2.pdparams': pickle.dumps(nested, 2),
        'torch.pth': torch_file(state, 'model'),
        'legacy.pth': legacy_file(state),
        'd2.pkl': pickle.dumps({'model': state, '__author__': 'x', 'matching_heuristics': True}, 4),
        'w.safetensors': safetensors_of(state),
        'w.npz': npz_file(state),
        'z.npz': npz_file(state, compressed=True),
    }


# ---------------------------------------------------------------------------------------------------- made by hand
LONG = ops('x' * (1 << 20)) + PUT0 + b'0'


def crafted() -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of files that ask for code, time or memory."""
    for number, payload in enumerate(PAYLOADS):
        yield f'code {number}.pdparams', P + payload + b'.'
        yield f'code {number} in a dict.pkl', P + b'}' + ops('w') + payload + b's.'
        yield f'code {number}.pth', archive(payload)
        yield f'code {number} old.pth', legacy_file({})[:-8] + P + payload + b'.'
    facts = ops('Facts@@') + b'}' + ops('MODEL.TRANS.NUM_HEADS')
    weights = b'}' + ops('w') + pickle.dumps(np.zeros(2, 'f4'), 2)[2:-1] + b's'
    for name, value in {
        'doubled list': DOUBLED, 'long text': LONG + b'](' + GET0 * 100_000 + b'e' + PUT0 + b'0',
    }.items():  # fmt: skip
        yield f'dtype of a {name}.pdparams', P + value + b'cnumpy\ndtype\n' + GET0 + b'\x85R.'
        yield f'kind of a {name}.pdparams', P + value + b'cnumpy.core.multiarray\n_reconstruct\n' + GET0 + b'\x85R.'
        yield f'fact of a {name}.pdparams', P + value + weights + facts + GET0 + b'ss.'
        yield f'key of a {name}.pdparams', P + value + b'}' + GET0 + b'Ns.'
        yield f'stride of a {name}.pth', archive(value + tensor().replace(ops((1,)), GET0))
        yield f'storage of a {name}.pth', archive(value + tensor().replace(ops('0'), GET0))
        yield f'slices of a {name}.pdparams', (
            P + value + b'}' + ops('UnpackBigParamInfor@@') + b'}' + ops('w') + b'}' + ops('slices') + GET0
            + b's' + ops('OriginShape') + ops((1,)) + b'sss.'
        )  # fmt: skip
    yield 'many paths.pdparams', checksummed(shared_paths(18, 1000))
    yield 'many paths, deep.pdparams', checksummed(shared_paths(19, 4))
    for number, text in enumerate(
        (b'{"file": ' * 100_000, b'{"file": 1, "arrays": 5}', b'{"file": ' + b'9' * 9000 + b'}')
    ):
        yield f'checksums {number}.pdparams', checksummed(pickle.dumps({'w': np.zeros(2, 'f4')}, 4), text)
    names = json.dumps({'file': 1, 'arrays': {str(n) * 3: n for n in range(200_000)}}).encode()
    yield 'many names.pdparams', checksummed(pickle.dumps({}, 4), names)
    yield 'sets.pdparams', P + b'\x8f' * 1_048_000 + b'.'
    yield 'marks.pdparams', P + b'(' * 1_048_000 + b'.'
    yield 'deep objects.pdparams', P + b'(' * 400_000 + b'N' + b'iargparse\nNamespace\n' * 400_000 + b'.'
    yield 'deep states.pdparams', P + b'cargparse\nNamespace\n)R' * 200_000 + b'b' * 199_999 + b'.'
    yield 'digits.pdparams', b'I' + b'9' * 1_000_000 + b'\n.'
    yield 'long digits.pdparams', b'L' + b'9' * 4000 + b'L\n.'
    yield 'escapes.pdparams', b"S'" + b'\\x41' * 1_000_000 + b"'\n."
    yield 'overlapping zip.npz', overlapping()
    yield 'lzma.npz', lzma_npz()
    yield 'zeros.npz', npz_file({'w': np.zeros(30 << 20, 'u1')}, compressed=True)
    yield 'big names.safetensors', safetensors_file({'x' * 900_000: entry(0, 4)}, bytes(4))
    yield 'many.safetensors', safetensors_file({f'{n}': entry(0, 0, (0,)) for n in range(60_000)})
    yield 'dims.safetensors', safetensors_file({'w': entry(0, 0, [0] * 100_000)})
    yield 'header.safetensors', safetensors_file(b'{"w":' * 100_000)
    yield 'deep shards.json', b'{"weight_map": {"a": ' + b'[' * 900 + b']' * 900 + b'}}'
    yield 'prefixes.pth', torch_file({'module.' * 5000 + 'w': np.zeros(2, 'f4')})
    yield 'escape names.pth', torch_file({'\x1b[2J\x1b]0;x\x07': np.zeros(2, 'f4'), '\u202e': np.zeros(1, 'f4')})
    yield 'heads.pth', torch_file({'head.weight': np.zeros((50_000_000, 0), 'f4')})
    yield 'one storage.pth', archive(b'}' + b''.join(ops(str(n)) + tensor(size=(4, 4096, 1024), stride=(0, 0, 0)) + b's' for n in range(2000)))  # fmt: skip


def overlapping() -> bytes:
    """Members that share their data: each is unpacked again."""
    data = npz_file({'w': np.zeros(4 << 20, 'u1')}, compressed=True)
    start = data.index(b'PK\1\2')
    record = data[start : data.index(b'PK\5\6')]
    records = b''.join(record.replace(b'w.npy', b'%05d' % n) for n in range(5000))
    return data[:start] + records + struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 5000, 5000, len(records), start, 0)


def lzma_npz() -> bytes:
    """A dictionary of 4 GB for a few bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_LZMA) as file:
        file.writestr('w.npy', npz_file({'w': np.zeros(9)})[40:])
    return buffer.getvalue().replace(struct.pack('<I', 1 << 23), b'\xff\xff\xff\xff', 1)


def limits() -> Iterator[tuple[str, bytes]]:
    for name, data in LIMITS.items():
        suffix = 'safetensors' if b'{' in data[:12] else 'pdparams'
        yield f'{name if isinstance(name, str) else name[0]}.{suffix}', data


# ---------------------------------------------------------------------------------------------------- doors
def doors(lab: SimpleNamespace) -> dict[str, Callable[[str], object]]:
    """What reads a weight file, by name; each is called with a path."""
    flags = [f'-cfg={lab.cfg}']
    more = ['-opts', 'DATA.NUM_WORKERS', '0']
    out = os.path.join(lab.folder, 'out')
    config = get_config(lab.cfg, ['MODEL.NUM_CLASSES', 7])
    model = build_model(config)
    state = paddle.get_rng_state()
    trainer = make_trainer(os.path.join(lab.folder, 'run'), lab.images, TRAIN__MODEL_EMA=True)

    def resume(path: str) -> None:
        trainer.snapshot.load_state_dict(*reversed(read_checkpoint(path, print)))

    def port(path: str) -> None:
        port_weights.main([*flags, f'-source={path}', f'-output={out}.pdparams', '-opts', 'MODEL.NUM_CLASSES', '7'])

    paddle.set_rng_state(state)
    return {
        'read_file': read_file,
        '-pretrained': lambda path: load_pretrained(model, path),
        '-resume': resume,
        'port_weights': port,
        'create_model': lambda path: create_model('vit_digits', pretrained=path),
        'teacher': lambda path: load_frozen(build_model(config), path),
        'predict': lambda path: predict.main([*flags, f'-pretrained={path}', lab.image, *more]),
        'export': lambda path: export.main([*flags, f'-pretrained={path}', f'-output={out}', *more]),
        'extract_features': lambda path: extract_features.main(
            [*flags, f'-pretrained={path}', f'-output={out}.npz', lab.image, *more]
        ),
    }


def attacks(
    lab: SimpleNamespace, door: str, tries: int, made: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, attack) of a door: files made by hand if `made`, and `tries` damaged ones."""
    take = doors(lab)[door]

    def written(name: str, data: bytes) -> Callable[[], object]:
        def attack() -> None:
            path = os.path.join(lab.folder, 'attack' + os.path.splitext(name)[1])
            with open(path, 'wb') as file:
                file.write(data)
            take(path)

        return attack

    for name, data in itertools.chain(crafted(), limits() if door == 'read_file' else ()) if made else ():
        yield name, written(name, data)
    formats = seeds(lab.state, lab.folder)
    if door == '-resume':
        formats = {f'p{protocol}.pdparams': pickle.dumps(lab.checkpoint, protocol) for protocol in (0, 2, 4)}
        formats['own.pdparams'] = own_file(lab.checkpoint, lab.folder)
    for index, (name, data) in enumerate(formats.items()):
        for number, damaged in enumerate(mutants(data, tries // len(formats), seed=index)):
            yield f'{number} of {name}', written(name, damaged)
