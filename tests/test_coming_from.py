# SPDX-License-Identifier: Apache-2.0
"""docs/coming_from.md: each flag of another code becomes the flags beside it, and the commands run on small data."""

from __future__ import annotations

import importlib
import os
import re
import shlex

import paddle
import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from models import build_model, create_model, list_models
from tests.conftest import ROOT
from tests.tasks.test_detection import TINY as DETECTOR
from tests.tasks.test_detection import squares  # noqa: F401, a fixture
from utils.errors import UserError
from utils.foreign_flags import translate
from utils.formats import write_pdparams

with open(os.path.join(ROOT, 'docs', 'coming_from.md'), encoding='utf-8') as _file:
    PAGE = _file.read()
ROWS = re.findall(r'^\| (.+?) \| (.+) \|$', PAGE, re.MULTILINE)
FLAGS = [
    (re.findall('`([^`]+)`', theirs), ours)
    for theirs, ours in ROWS
    if theirs.startswith(('`--', '`-d', '`-e', '`-f', '`ssl_train'))
]
TRANSLATED = [
    (theirs, re.findall('`([^`]+)`', ours)[0]) for examples, ours in FLAGS for theirs in examples if ours[0] == '`'
]
ANSWERED = [theirs for examples, ours in FLAGS for theirs in examples if ours.startswith('answered')]
IGNORED = [theirs for examples, ours in FLAGS for theirs in examples if ours.startswith('nothing')]
COMMANDS = re.findall(r'^python main_\w+\.py (-.+)$', PAGE, re.MULTILINE)
TOOLS = re.findall(r'^python tools/(\w+)\.py (-.+)$', PAGE, re.MULTILINE)
# Flags, scripts and pages of the papers' codes that have a row.
THEIRS = (
    '--base_keep_rate', '--fuse_token', '--use-lmdb', '--test_speed', '--visualize_mask', '--dist-eval', 'shrink_base.sh',
    'test.sh', 'benchmark.py', '--opts', '--zip', '--cache-mode', '--accumulation-steps', '--use-checkpoint', '--throughput',
    '--amp-opt-level', 'ssl_train -b', '-d 0-7', '-e 400', '-f projects', '--exp-options', 'DISTILL', 'TRANSFER', 'DETECTION',
    'MOCOV3', 'VISUAL',
)  # fmt: skip


def settings(line: str, *more: str) -> dict:
    words = line.split(' ') if '(' in line or '[' in line else shlex.split(line)
    config = update_config(get_config(), get_arguments([*more, *words]))
    return dict(config)


@pytest.mark.parametrize(('theirs', 'ours'), TRANSLATED)
def test_flags(theirs, ours, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    base = [] if '-cfg' in ours else ['-cfg=./configs/deit_small_patch16_224.yaml']
    assert settings(theirs, *base) == settings(ours, *base)
    if 'AUG.' not in theirs and '--opts' not in theirs:
        assert 'is read as' in capsys.readouterr().err


@pytest.mark.parametrize('theirs', THEIRS)
def test_the_page_has_a_row(theirs):
    assert any(theirs in row and ours for row, ours in ROWS)


def test_the_page_has_all_kinds_of_rows():
    assert len(COMMANDS) >= 8 and {tool for tool, _ in TOOLS} >= {'prune', 'visualize_tokens', 'compare_layers'}
    assert len(TRANSLATED) > 35 and len(ANSWERED) > 10 and len(IGNORED) == 2


@pytest.mark.parametrize('flag', ANSWERED)
def test_answers(flag):
    words = flag.removeprefix('ssl_train ').split()
    with pytest.raises(UserError, match='is not a flag of LeanViT: '):
        translate(words)


@pytest.mark.parametrize('flag', IGNORED)
def test_flags_without_effect(flag, capsys):
    assert translate(flag.split()) == []
    assert 'is ignored: ' in capsys.readouterr().err


def test_our_own_command_line_stays():
    words = ['-cfg=a.yaml', '-batch_size', '8', '-num_workers', '-1', '-eval', '-opts', '--eval', '-b']
    assert translate(words) == words
    assert translate(['-tag', 'e', '--unknown', '3']) == ['-tag', 'e', '--unknown', '3']


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('--resume', 'needs a value; to continue the last run, write -resume=output/latest'),
        ('--epochs --eval', '--epochs needs a value'),
        ('--opt novograd', "--opt is 'novograd', but LeanViT has an equal only for adamw"),
        ('--model swin_tiny', '--model swin_tiny: there is no such recipe'),
        ('-c a.yaml -o Global.epochs=3', '-o is not a flag'),
    ],
)
def test_mistakes(line, message):
    with pytest.raises(UserError, match=message):
        translate(line.split())


def test_workers_do_not_repeat_the_lines(monkeypatch, capsys):
    monkeypatch.setenv('PADDLE_TRAINER_ID', '1')
    assert translate(['--eval']) == ['-eval']
    assert capsys.readouterr().err == ''


# ---------------------------------------------------------------------------------------------------- commands
SMALL = {
    'DATA.IMAGE_SIZE': 16,
    'DATA.BATCH_SIZE': 4,
    'DATA.NUM_WORKERS': 0,
    'DATA.DATASET': 'folder',
    'DATA.CROP_PCT': 1.0,
}
TRANS = {'PATCH_SIZE': 4, 'EMBED_DIM': 24, 'NUM_HEADS': 3, 'DEPTH': 5}
RUN = {'TRAIN.NUM_EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0, 'VALIDATE_FREQ': 1, 'TRAIN.REPEATED_AUG': 0}


def small(config) -> dict:
    """Options of a small model and a short run for a recipe of the page."""
    opts, model = {**SMALL, **{f'MODEL.TRANS.{key}': value for key, value in TRANS.items()}, **RUN}, config.MODEL
    if model.TYPE == 'mask_rcnn':
        return {**DETECTOR, 'MODEL.NUM_CLASSES': 2}
    if config.TRAIN.TASK == 'supervised' and model.LAMBDA.PRUNE_LAYERS and not model.LAMBDA.REMOVED:
        opts.update({'MODEL.LAMBDA.DECAY_EPOCHS': 1, 'TRAIN.NUM_EPOCHS': 2})
    if model.TYPE == 'mocov3':
        opts.update({'MODEL.MOCO.DIM': 8, 'MODEL.MOCO.MLP_DIM': 16})
    if model.EVIT.KEEP_RATE < 1:
        opts['MODEL.EVIT.DROP_LOC'] = (1, 3)
    if model.NUM_CLASSES:
        opts['MODEL.NUM_CLASSES'] = 3
    if config.TRAIN.MAE_DISTILL.ATTN_IDX:
        opts['TRAIN.MAE_DISTILL.ATTN_IDX'] = (TRANS['DEPTH'],)
    return opts


def words_of(opts: dict) -> list[str]:
    return [text for key, value in opts.items() for text in (key, str(value))]


def write_weights(cfg: str, path) -> str:
    """Write initial weights of a recipe's small model with three classes, whose decaying attention has the weight 0."""
    config = get_config(cfg, words_of({**small(get_config(cfg)), 'MODEL.NUM_CLASSES': 3}))
    model = build_model(config)
    if config.MODEL.LAMBDA.PRUNE_LAYERS and not config.MODEL.LAMBDA.REMOVED:
        model.set_attn_lambda(0.0)
    write_pdparams({name: value.numpy() for name, value in model.state_dict().items()}, str(path))
    return str(path)


def write_teacher(folder) -> list[str]:
    """Write the encoder that a distillation of the page compares with. Return the flag and the key that name it."""
    cfg = 'configs/mae_base_patch16_224.yaml'
    config = get_config(cfg, words_of(small(get_config(cfg))))
    config.defrost()
    config.BASE = ['']
    (folder / 'teacher.yaml').write_text(config.dump())
    weights = write_weights(cfg, folder / 'teacher.pdparams')
    return [f'-teacher_model_path={weights}', '-opts', 'TRAIN.TEACHER_CFG', f'{folder}/teacher.yaml']


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_on_small_data(command, images, squares, tmp_path, monkeypatch):  # noqa: F811
    """Each command of the page, with a small model and three classes of images, or with small detection data."""
    monkeypatch.chdir(ROOT)
    flags = [word for word in command.split() if word.startswith(('-cfg', '-eval'))]
    config = update_config(get_config(), get_arguments(flags))
    weights = f'-pretrained={write_weights(flags[0][5:], tmp_path / "w.pdparams") if config.EVAL else "none"}'
    more = write_teacher(tmp_path) if '-teacher_model_path' in command else ['-opts']
    data = squares if config.MODEL.TYPE == 'mask_rcnn' else images
    line = [*flags, weights, f'-data_path={data}', f'-output={tmp_path}', '-tag=run', *more, *words_of(small(config))]
    run_config(update_config(get_config(), get_arguments(line)))
    assert (tmp_path / 'run' / 'metrics.jsonl').stat().st_size > 0


@pytest.mark.parametrize(('tool', 'flags'), TOOLS)
def test_tools_on_small_data(tool, flags, images, tmp_path, monkeypatch):
    """Each tool of the page, with weights of a small model."""
    monkeypatch.chdir(ROOT)
    cfg = re.search(r'-cfg=(\S+)', flags)[1]
    weights, target = write_weights(cfg, tmp_path / 'w.pdparams'), tmp_path / 'new'
    target.mkdir()
    line = re.sub(r'(-pretrained2?)=\S+', rf'\1={weights}', flags)
    line = line.replace('-output=', f'-output={target}/').replace('/dataset/imagenet', images)
    line = line.replace(' photos/', f' {images}/val')
    opts = words_of({**small(get_config(cfg)), 'MODEL.NUM_CLASSES': 3})
    of_second = ['-opts2', *opts] if tool == 'compare_layers' else []
    importlib.import_module(f'tools.{tool}').main([*line.split(), '-opts', *opts, *of_second])
    assert os.listdir(target)


def test_python_of_the_page():
    from models.pretrained import load_pretrained

    assert 'deit_small_patch16_224' in list_models('deit*') and callable(load_pretrained)
    model = create_model('deit_tiny_patch16_224', num_classes=10, opts=['MODEL.TRANS.DEPTH', 1, 'DATA.IMAGE_SIZE', 32])
    x = paddle.zeros([1, 3, 32, 32])
    assert model.forward_head(model.forward_features(x)).shape == [1, 10]
    assert len(model.forward_intermediates(x).blocks) == 1


def test_recipes_and_tools_of_the_page_exist():
    for name in re.findall(r'`((?:deit|evit|lambda|ms_mlp|mae|vit|mocov3)_[a-z]+_[\w]+)`', PAGE):
        assert name in list_models() or name.endswith('.sh'), name
    for tool in re.findall(r'tools/\w+\.py', PAGE):
        assert os.path.isfile(os.path.join(ROOT, tool)), tool
