# SPDX-License-Identifier: Apache-2.0
"""Recognize files that are given as a weight file by mistake, and suggest what to do."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from typing import IO

from utils.text import printable

MAX_JSON = 8 << 20  # bytes; the index of a sharded checkpoint takes a megabyte, and parsing takes sixty times the size
_SHOWN = 60  # characters of a name in a message
_EXPORTED = 'give the .pdparams file that it was exported from'
_UNPACK = 'unpack it and give the weight file inside'
_TENSORFLOW = 'TensorFlow weights are not read, give weights of PyTorch or Paddle'
_SAVE_WEIGHTS = 'save the state dict of the model instead'

# First bytes, kind of file, what to do.
_MAGIC: Sequence[tuple[bytes, str, str]] = (
    (
        b'version https://git-lfs.github.com/',
        'a git-lfs pointer and not the file itself',
        'fetch it with `git lfs pull`, or download it',
    ),
    (b'/annex/objects/', 'a git-annex pointer and not the file itself', 'fetch it with `git annex get`'),
    (b'\x89HDF\r\n\x1a\n', 'an HDF5 file (Keras)', _TENSORFLOW),
    (b'model_checkpoint_path:', 'the index of TensorFlow checkpoints', _TENSORFLOW),
    (b'GGUF', 'a GGUF file', 'give the original weights (.safetensors or .pth)'),
    (b'\x93NUMPY', 'a single numpy array (.npy)', 'store all arrays by name with numpy.savez'),
    (b'\x1f\x8b', 'a gzip archive', _UNPACK),
    (b'BZh', 'a bzip2 archive', _UNPACK),
    (b'\xfd7zXZ', 'an xz archive', _UNPACK),
    (b'7z\xbc\xaf\x27\x1c', 'a 7z archive', _UNPACK),
    (b'Rar!', 'a RAR archive', _UNPACK),
    (b'\x28\xb5\x2f\xfd', 'a zstd archive', _UNPACK),
    (b'\x89PNG', 'a picture', 'give a weight file'),
    (b'\xff\xd8\xff', 'a picture', 'give a weight file'),
    (b'%PDF', 'a PDF document', 'give a weight file'),
)
# Formats without fixed first bytes.
_SUFFIXES: Sequence[tuple[str, str, str]] = (
    ('.pdiparams', 'weights of an exported program, which have no names', _EXPORTED),
    ('.pdmodel', 'an exported program', _EXPORTED),
    ('.onnx', 'an ONNX model', 'give the weights that it was exported from'),
    ('.tflite', 'a TensorFlow Lite model', _TENSORFLOW),
    ('.pb', 'a TensorFlow graph', _TENSORFLOW),
    ('.h5', 'an HDF5 file (Keras)', _TENSORFLOW),
)
_PROTOBUF = re.compile(rb'\x08[\x01-\x20]\x12')  # ONNX: IR version, then the producer's name
_SAVED_MODEL = re.compile(rb'\x08\x01\x12[\x80-\xff]')  # TensorFlow: version 1, then a graph of 128 bytes or more
_SHARD = re.compile(r'\.data-\d{5}-of-\d{5}$')
_TABLE_END = b'\x57\xfb\x80\x8b\x24\x75\x47\xdb'  # of the index of a TensorFlow checkpoint


def foreign_kind(file: IO[bytes], path: str) -> tuple[str, str] | None:
    """Return the kind of a file that is no weight file, and what to do; None if it may be a weight file."""
    file.seek(0)
    head = file.read(512)
    if not head:
        return 'empty', 'copy or download it again'
    for magic, kind, remedy in _MAGIC:
        if head.startswith(magic):
            return kind, remedy
    if head[257:262] == b'ustar':
        return 'a tar archive', _UNPACK
    if head.startswith(b'PK'):
        return _zip_kind(file)
    text = head.removeprefix(b'\xef\xbb\xbf').lstrip().lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head', b'<body', b'<script')):
        return 'a web page and not the file itself', 'download the file again, with its direct link'
    if text.startswith((b'{', b'[')):
        return _json_kind(file, path)
    return _binary_kind(file, head, path)


def _zip_kind(file: IO[bytes]) -> tuple[str, str] | None:
    if not zipfile.is_zipfile(file):
        return None  # the reader reports the damage
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith('/')]
    if any('/code/' in f'/{name}' and name.endswith('.py') for name in names):
        return 'a TorchScript program', _SAVE_WEIGHTS
    if any(name.endswith('model.weights.h5') for name in names):
        return 'a Keras model', _TENSORFLOW
    if any(re.fullmatch(r'([^/]+/)?data\.pkl', name) for name in names) or all(n.endswith('.npy') for n in names):
        return None if names else ('an empty zip archive', 'copy or download it again')
    return f'a zip archive of other files ({_listed(names)})', _UNPACK


def _json_kind(file: IO[bytes], path: str) -> tuple[str, str] | None:
    """Return the kind of a JSON file, and what to do; None if it is no valid JSON."""
    if os.path.getsize(path) > MAX_JSON:
        return None
    file.seek(0)
    try:
        content = json.loads(file.read().decode('utf-8-sig'))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return 'a JSON document', 'give a weight file'
    if isinstance(content.get('weight_map'), dict):
        shards = sorted({str(name) for name in content['weight_map'].values()})
        return (
            f'the index of weights in {len(shards)} files ({_listed(shards)})',
            'join the files to one, for example with `save_pretrained(folder, max_shard_size="100GB")`',
        )
    if 'base_code' in content and 'program' in content:
        return 'an exported program', _EXPORTED
    error = content.get('error') or content.get('message')
    if isinstance(error, str):
        return f"the answer of a server ('{printable(error, _SHOWN)}') and not the file itself", 'download it again'
    return 'a JSON document', 'give a weight file'


def _binary_kind(file: IO[bytes], head: bytes, path: str) -> tuple[str, str] | None:
    lower = str(path).lower()
    for suffix, kind, remedy in _SUFFIXES:
        if lower.endswith(suffix):
            return kind, remedy
    file.seek(max(os.path.getsize(path) - len(_TABLE_END), 0))
    if file.read() == _TABLE_END or _SHARD.search(lower):
        return 'a part of a TensorFlow checkpoint', _TENSORFLOW
    if _SAVED_MODEL.match(head) or head[4:8] == b'TFL3':
        return 'a TensorFlow model', _TENSORFLOW
    if _PROTOBUF.match(head):
        return 'an ONNX model', 'give the weights that it was exported from'
    if head[:16] == bytes(16) and head[20:21] == b'\x08':  # a dense tensor: version, no levels, version, description
        return _SUFFIXES[0][1:]
    return None


def _listed(names: Sequence[str]) -> str:
    return ', '.join(printable(name, _SHOWN) for name in names[:3])
