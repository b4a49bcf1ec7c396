# SPDX-License-Identifier: Apache-2.0
"""Published weights by name, from a local server: `-pretrained=auto`, `create_model(pretrained=True)`, tools/download.py."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest

from config import get_arguments, get_config, update_config
from models import create_model
from models.weights import published
from models.weights.load import load_pretrained, read_weights
from models.weights.published import fetch, file_url
from models.zoo import Published
from tests.conftest import ROOT
from tests.utils.test_transfer import server  # noqa: F401
from tools import download as tool
from utils.errors import UserError

NAME = 'deit_tiny_patch16_224'


@pytest.fixture(scope='module')
def file() -> bytes:
    """Weights of the model in PyTorch's layout, all of them small random numbers."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, value in create_model(NAME).state_dict().items():
        array = rng.standard_normal(value.shape).astype('float32') * 0.02
        linear = array.ndim == 2 and not name.startswith(('cls', 'pos'))
        arrays[name] = array.T if linear else array
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@pytest.fixture
def zoo(server, file, monkeypatch, tmp_path):  # noqa: F811
    """Serve `file` as the published weights of the model; yields the server and a function that changes the row."""
    monkeypatch.setattr('tests.utils.test_transfer.CONTENT', file)
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('LEANVIT_MIRROR', raising=False)
    digest = hashlib.sha256(file).hexdigest()

    def publish(url: str = f'{server.url}/ok/deit-{digest[:8]}.npz', **fields):
        monkeypatch.setitem(published.PUBLISHED, NAME, Published(NAME, url=url, **fields))

    publish()
    server.publish = publish
    return server


def files(tmp_path) -> list[str]:
    return sorted(os.listdir(tmp_path / 'cache' / 'weights' / NAME))


def test_it_is_downloaded_verified_and_converted_once(zoo, file, tmp_path):
    lines: list[str] = []
    path = fetch(NAME, lines.append)
    assert path == str(tmp_path / 'cache' / 'weights' / NAME / f'{NAME}.pdparams')
    assert [line.split()[1] for line in lines] == ['Downloading', 'Downloaded', 'Converted']
    assert len(files(tmp_path)) == 2
    model = create_model(NAME)
    load_pretrained(model, path, log=lines.append, replace_head=False)
    weight = np.load(io.BytesIO(file))['blocks.3.mlp.fc1.weight']
    np.testing.assert_array_equal(model.blocks[3].mlp.fc1.weight.numpy(), weight.T)
    fetch(NAME)
    assert len(zoo.requests) == 1


def test_the_names_that_users_type(zoo, tmp_path):
    flags = [f'-cfg={ROOT}/configs/{NAME}.yaml', '-pretrained=auto']
    config = update_config(get_config(), get_arguments(flags))
    assert f'auto:{NAME}' == config.MODEL.PRETRAINED
    state = read_weights(config.MODEL.PRETRAINED).arrays
    model = create_model(NAME, pretrained=True)
    np.testing.assert_array_equal(model.norm.weight.numpy(), state['norm.weight'])
    assert create_model(NAME, num_classes=4, pretrained=True).head.weight.shape == [192, 4]
    evit = create_model('deit_tiny_patch16_224', pretrained=f'auto:{NAME}', opts=['MODEL.EVIT.KEEP_RATE', 0.7])
    np.testing.assert_array_equal(evit.norm.weight.numpy(), state['norm.weight'])


def test_the_tool(zoo, capsys):
    assert tool.main([NAME, 'gmlp_ti16_224', 'nonsense']) == 2
    out = capsys.readouterr().out
    assert f'{NAME}.pdparams' in out
    assert 'no weights are published for gmlp_ti16_224' in out and "unknown model 'nonsense'" in out
    assert tool.main(['-list']) == 0
    assert f'{NAME} ' in capsys.readouterr().out


def test_a_wrong_hash_is_never_read(zoo, tmp_path):
    zoo.publish(f'{zoo.url}/ok/deit-00000000.npz')
    with pytest.raises(UserError, match='must be 00000000; it is not used'):
        fetch(NAME)
    assert files(tmp_path) == []
    zoo.publish(sha256='f' * 64)  # of the table, before that of the name
    with pytest.raises(UserError, match='must be ffff'):
        fetch(NAME)


def test_a_file_that_the_user_put_there(zoo, file, tmp_path, monkeypatch):
    folder = tmp_path / 'cache' / 'weights' / NAME
    os.makedirs(folder)
    zoo.publish('https://github.com/somebody/project')
    with pytest.raises(UserError, match=f"linked on https://github.com/somebody/project: .* put it into '{folder}'"):
        fetch(NAME)
    (folder / 'from_drive.npz').write_bytes(file)
    assert fetch(NAME).endswith(f'{NAME}.pdparams') and zoo.requests == []
    os.unlink(folder / f'{NAME}.pdparams')
    zoo.publish(sha256='f' * 64)
    with pytest.raises(UserError, match='from_drive.npz.*must be ffff'):
        fetch(NAME)


def test_a_mirror(zoo, monkeypatch):
    zoo.publish('https://dl.fbaipublicfiles.com/deit/deit.npz')
    monkeypatch.setenv('LEANVIT_MIRROR', f'{zoo.url}/ok/')
    assert fetch(NAME).endswith(f'{NAME}.pdparams')
    assert [kind for kind, _ in zoo.requests] == ['ok']


def test_two_processes_at_once(zoo, tmp_path):
    url = published.PUBLISHED[NAME].url
    code = (
        'import sys; from models.weights import published; from models.zoo import Published; '
        f'published.PUBLISHED["{NAME}"] = Published("{NAME}", url=sys.argv[1]); print(published.fetch("{NAME}"))'
    )
    command = [sys.executable, '-c', code, url]
    children = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all(f'{NAME}.pdparams' in output for output in outputs)
    assert len(zoo.requests) == 1


def test_a_cache_that_cannot_be_written(zoo, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('LEANVIT_CACHE', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='cannot write to the cache .*set LEANVIT_CACHE'):
        fetch(NAME)


@pytest.mark.parametrize(
    ('url', 'wanted'),
    [
        ('https://dl.fbaipublicfiles.com/deit/x-a1311bcf.pth', 'https://dl.fbaipublicfiles.com/deit/x-a1311bcf.pth'),
        (
            'https://github.com/o/r/releases/download/v1/x.pth.tar',
            'https://github.com/o/r/releases/download/v1/x.pth.tar',
        ),
        ('https://github.com/youweiliang/evit', ''),
        ('https://huggingface.co/timm/gmlp', 'https://hf.lan/timm/gmlp/resolve/main/model.safetensors'),
        ('https://huggingface.co/o/r/resolve/main/x.pth', 'https://hf.lan/o/r/resolve/main/x.pth'),
        (
            'https://drive.google.com/file/d/1A_b-C/view?usp=sharing',
            'https://drive.usercontent.google.com/download?id=1A_b-C&export=download&confirm=t',
        ),
        (
            'https://drive.google.com/open?id=1A',
            'https://drive.usercontent.google.com/download?id=1A&export=download&confirm=t',
        ),
        ('', ''),
    ],
)
def test_urls(url, wanted, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'https://hf.lan/')
    assert file_url(url) == wanted
