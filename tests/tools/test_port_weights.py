# SPDX-License-Identifier: Apache-2.0
"""The converter as users run it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from config import get_config
from models import build_model
from models.weights.load import load_pretrained
from tests.conftest import ROOT, assert_close, golden
from tests.utils.formats.helpers import torch_file
from tools import port_weights
from utils import cli

YAML = """
DATA: {IMAGE_SIZE: 64}
MODEL:
  TYPE: gmlp
  NUM_CLASSES: 10
  MIXER: {PATCH_SIZE: 16, EMBED_DIM: 32, DEPTH: 3, MLP_RATIO: 6.0}
"""


@pytest.fixture
def cfg(tmp_path) -> str:
    path = tmp_path / 'gmlp_tiny.yaml'
    path.write_text(YAML)
    return str(path)


@pytest.fixture
def port(tmp_path, monkeypatch, capsys):
    """Runs the tool in this process, in `tmp_path`; returns its status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['port_weights.py', *args])
        with pytest.raises(SystemExit) as info:
            cli.run(port_weights.main)
        return (info.value.code, *capsys.readouterr())

    return run


def logits(cfg: str, weights: str, images: np.ndarray) -> np.ndarray:
    model = build_model(get_config(cfg))
    model.eval()
    assert model.set_state_dict(paddle.load(weights)) == ([], [])
    with paddle.no_grad():
        return model(paddle.to_tensor(images)).numpy()


@pytest.mark.parametrize('suffix', ['pth', 'pth.tar', 'safetensors', 'npz'])
def test_every_format_gives_the_published_logits(tmp_path, cfg, port, suffix):
    reference = golden('gmlp-fwd_a')
    arrays = reference.group('sd')
    source = tmp_path / f'source.{suffix}'
    if suffix == 'safetensors':
        save_file(arrays, str(source))
    elif suffix == 'npz':
        np.savez(str(source), **arrays)
    elif suffix == 'pth':
        source.write_bytes(torch_file(arrays))
    else:
        source.write_bytes(
            torch_file({f'module.{name}': array for name, array in arrays.items()}, wrapper='state_dict')
        )
    status, output, errors = port('-cfg', cfg, '-source', source.name, '-output', 'ported')
    assert (status, errors) == (0, '')
    assert '36 arrays used, 54,906 numbers' in output
    assert 'written: ported.pdparams' in output
    assert_close(logits(cfg, str(tmp_path / 'ported.pdparams'), reference['in/x']), reference['out/logits'])


def test_paddle_files_and_averaged_weights(tmp_path, cfg, port):
    model, other = build_model(get_config(cfg)), build_model(get_config(cfg))
    paddle.save(
        {'model': model.state_dict(), 'model_ema': other.state_dict(), 'epoch': 1}, str(tmp_path / 'run.pdparams')
    )
    for flags, expected in (([], model), (['-ema'], other)):
        status, output, _ = port(f'-cfg={cfg}', '-source=run.pdparams', '-output=flat.pdparams', *flags)
        assert status == 0
        assert f"PaddlePaddle file, 36 arrays under '{'model_ema' if flags else 'model'}'" in output
        loaded = paddle.load(str(tmp_path / 'flat.pdparams'), return_numpy=True)
        assert list(loaded) == list(expected.state_dict())
        assert all(np.array_equal(loaded[name], value.numpy()) for name, value in expected.state_dict().items())


def test_mistakes_are_one_sentence_and_leave_no_file(tmp_path, cfg, port):
    arrays = golden('gmlp-fwd_a').group('sd')
    np.savez(str(tmp_path / 'extra.npz'), **arrays, extra=np.ones((3, 4), 'float32'))
    np.savez(str(tmp_path / 'good.npz'), **arrays)
    (tmp_path / 'cut.pth').write_bytes(torch_file(arrays)[:1000])
    for args, text in (
        (
            ['extra.npz'],
            "error: 'extra.npz' does not fit GMLP: 1 in the file without a place in the model (extra [3, 4]).",
        ),
        (['none.pth'], "error: cannot read 'none.pth': No such file or directory."),
        (['cut.pth'], "error: 'cut.pth' is damaged, cut short, or not a weight file: "),
        (['good.npz', '-opts', 'MODEL.NUM_CLASSES', '3'], "error: 'good.npz' has 10 classes, but the model 3; "),
    ):
        status, _, errors = port('-cfg', cfg, '-output', 'out.pdparams', '-source', *args)
        assert status == 2
        assert errors.startswith(text)
        assert errors.count('\n') == 1
        assert not (tmp_path / 'out.pdparams').exists()


def test_the_command_from_any_folder(tmp_path, cfg):
    np.savez(str(tmp_path / 'good.npz'), **golden('gmlp-fwd_a').group('sd'))
    tool = [sys.executable, os.path.join(ROOT, 'tools', 'port_weights.py')]
    options = {'cwd': tmp_path, 'capture_output': True, 'text': True, 'timeout': 300}
    result = subprocess.run([*tool, '-cfg', cfg, '-source', 'good.npz', '-output', 'out.pdparams'], **options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'out.pdparams').exists()
    result = subprocess.run([*tool, '-cfg', cfg, '-source', 'none.pth', '-output', 'none.pdparams'], **options)
    assert result.returncode == 2
    assert "error: cannot read 'none.pth'" in result.stderr
    assert 'Traceback' not in result.stderr


SEGMENTATION = """
DATA: {{IMAGE_SIZE: 64}}
MODEL:
  TYPE: upernet
  NUM_CLASSES: {ncls}
  TRANS: {{EMBED_DIM: {E}, DEPTH: 4, NUM_HEADS: {heads}, REL_POS: [block], LAYER_SCALE: 1.0}}
  UPERNET: {{OUT_INDICES: [0, 1, 2, 3], CHANNELS: {ch}, AUX_CHANNELS: {auxch}}}
TRAIN: {{TASK: segmentation}}
"""


def test_a_segmentation_model(tmp_path, port):
    """A checkpoint of mmsegmentation 0.11, as MAE's and TinyMIM's codes write it."""
    reference = golden('segmentation-model')
    path = tmp_path / 'upernet.yaml'
    path.write_text(SEGMENTATION.format(**reference.meta['model']))
    (tmp_path / 'source.pth').write_bytes(torch_file(reference.group('sd'), wrapper='state_dict'))
    status, output, errors = port('-cfg', str(path), '-source', 'source.pth', '-output', 'ported')
    assert (status, errors) == (0, '')
    assert f'{len(reference.group("sd"))} arrays used' in output
    model = build_model(get_config(str(path)))
    load_pretrained(model, str(tmp_path / 'ported.pdparams'), replace_head=False)
    model.eval()
    assert_close(model(paddle.to_tensor(reference['in/image'])), reference['out/eval/logits_stride4'])
