# SPDX-License-Identifier: Apache-2.0
"""Every configuration: what its file says, what it builds, and that the result can be trained, changed and exported."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml

from config import SCHEMA, get_config
from models import build_model, create_model, list_models, register_model
from models.profile import profile
from models.registry import MODELS, config_file
from models.zoo import PUBLISHED
from tasks.mae_distillation import adapt_student
from tests.conftest import HERE, ROOT
from tests.models.helpers import images, small_config
from utils.errors import UserError

SNAPSHOT = os.path.join(HERE, 'goldens', 'state_dicts.json')
NAMES = list_models()
CLASSIFIERS = [name for name in NAMES if get_config(config_file(name)).TRAIN.TASK == 'supervised']
# One of each architecture and of each way through it.
KINDS = [
    'gmlp_s16_224',
    'gmlp_digits',
    'ms_mlp_tiny_patch4_shift5_224',
    'deit_tiny_patch16_224',
    'deit_tiny_distilled_patch16_224',
    'evit_small_patch16_224_k05_fuse',
    'evit_small_patch16_224_k05_drop',
    'lambda_small_024_finetune',
    'lambda_base_01346_tome_r24',
    'vit_tiny_patch16_224_mae_finetune_rpe',
]


def listing(model) -> dict:
    """Shapes by name; blocks of equal shapes share an entry: {'blocks.[0-11].norm1.weight': [384]}."""
    groups = {}
    for name, value in model.state_dict().items():
        before, block, after = re.fullmatch(r'(.*\bblocks\.|.*\bmixer_layers\.|)(\d*)(.*)', name).groups()
        groups.setdefault((before, after, tuple(value.shape)), []).append(block)
    result = {}
    for (before, after, shape), blocks in groups.items():
        result[before + (blocks[0] if len(blocks) == 1 else spans(blocks)) + after] = list(shape)
    return result


def spans(numbers: list) -> str:
    """['0', '2', '3', '4'] -> '[0,2-4]'."""
    text = ''
    for i, number in enumerate(numbers):
        follows = i > 0 and int(number) == int(numbers[i - 1]) + 1
        last = i + 1 == len(numbers) or int(numbers[i + 1]) > int(number) + 1
        text += (f'-{number}' if last else '') if follows else f',{number}'
    return f'[{text[1:]}]'


def listing_of_training(config, model) -> dict:
    """The listing of a model as it is trained: with the adapters of a distillation."""
    if config.TRAIN.TASK == 'mae':
        adapt_student(config, model)
    return listing(model)


def write_snapshot(names: list[str]) -> None:
    """Run by `python -m tests.models.test_registry [NAME...]` after a deliberate change of names or shapes."""
    with open(SNAPSHOT, encoding='utf-8') as file:
        old = json.load(file)
    new = {
        name: listing_of_training(get_config(config_file(name)), create_model(name)) if name in names else old[name]
        for name in NAMES
    }
    with open(SNAPSHOT, 'w', encoding='utf-8') as file:
        file.write('{\n' + ',\n'.join(f'{json.dumps(name)}: {json.dumps(new[name])}' for name in NAMES) + '\n}\n')


@pytest.mark.parametrize('name', NAMES)
def test_full_size(name, zero_weights):
    config = get_config(config_file(name))
    model = build_model(config)
    if not name.endswith('_digits'):
        cost = profile(model, [1, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE])
        with open(config_file(name), encoding='utf-8') as file:
            header = ''.join(line for line in file if line.startswith('#'))
        assert f'{cost.params:,} parameters' in header
        assert f'{cost.macs:,} MACs' in header
    with open(SNAPSHOT, encoding='utf-8') as file:
        expected = json.load(file).get(name)
    assert listing_of_training(config, model) == expected, 'if this was meant: python -m tests.models.test_registry'


@pytest.mark.parametrize('name', NAMES)
def test_file(name):
    path = config_file(name)
    with open(path, encoding='utf-8') as file:
        text = file.read()
    own, config = yaml.safe_load(text), get_config(path)
    assert config.MODEL.NAME == own['MODEL']['NAME'] == name
    # The data say how many classes there are; a recipe for one data set may say it as well.
    of_one_data_set = '_transfer_' in name or config.DATA.DATASET in ('ade20k', 'coco')
    assert (config.MODEL.NUM_CLASSES is None) == (not of_one_data_set)
    assert f'-cfg=./configs/{name}.yaml' in text


@pytest.mark.parametrize('name', NAMES)
def test_headers_state_hardware_and_accuracy(name):
    with open(config_file(name), encoding='utf-8') as file:
        header = ' '.join(line[1:].strip() for line in file if line.startswith('#'))
    hardware, accuracy = re.search(r' Hardware: (.+?) Accuracy: (.+)$', header).groups()
    assert re.search(r'\d+ GPUs with .*\d+ images each|one CPU', hardware)
    if name in PUBLISHED:
        stated = [str(value) for value in (PUBLISHED[name].acc1, PUBLISHED[name].acc5) if value is not None]
        assert stated and all(value in accuracy for value in stated)
    else:
        assert 'not published' in accuracy or (name.endswith('_digits') and '.md' in accuracy)


def test_the_table_of_published_weights_is_complete():
    assert list(PUBLISHED) == sorted(PUBLISHED) and set(PUBLISHED) <= set(NAMES)
    for row in PUBLISHED.values():
        assert row.acc1 > 50 and row.source and (row.acc5 is None or row.acc1 < row.acc5 < 100)
        assert not row.url or row.url.startswith('https://')
        assert re.fullmatch('([0-9a-f]{64})?', row.sha256)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_training_step(name):
    paddle.seed(0)
    config = small_config(name, 'MODEL.DROPPATH', 0.0)
    model = build_model(config)
    x = images(config)
    model.train()
    for _ in range(2):  # the classifier of gMLP starts at 0 and lets no gradient through in the first step
        outputs = model(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert [out.shape for out in outputs] == [[2, 5]] * (1 + config.MODEL.TRANS.DISTILLED)
        sum(F.cross_entropy(out, paddle.to_tensor([0, 3])) for out in outputs).backward()
        largest = {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in model.named_parameters()}
        with paddle.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.set_value(parameter - 0.01 * parameter.grad.sign())
        model.clear_gradients()
    assert [parameter_name for parameter_name, grad in largest.items() if not grad > 0] == []


@pytest.mark.parametrize('name', KINDS)
def test_contract(name):
    config = small_config(name)
    model = build_model(config)
    x = images(config)
    model.eval()
    np.testing.assert_array_equal(model(x), model.forward_head(model.forward_features(x)))
    state = model.state_dict()
    assert {model.layer_id(n) for n in state} == set(range(model.num_layers + 1))
    assert model.no_weight_decay() <= set(state) | {'dist_token'}

    body = {n: value.numpy() for n, value in state.items() if not n.startswith(model.weight_rules.head)}
    model.reset_classifier(7)
    assert model(x).shape == [2, 7]
    after = model.state_dict()
    assert {n for n in after if n.startswith(model.weight_rules.head)} == set(state) - set(body)
    for n, value in body.items():
        np.testing.assert_array_equal(after[n], value)
    model.reset_classifier(0)
    assert not any(n.startswith(model.weight_rules.head) for n in model.state_dict())
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    pooled = (pooled[0] + pooled[1]) / 2 if isinstance(pooled, tuple) else pooled
    np.testing.assert_array_equal(model(x), pooled)


@pytest.mark.parametrize('name', KINDS)
def test_export(name, tmp_path):
    paddle.seed(0)
    config = small_config(name)
    model = build_model(config)
    for parameter in model.parameters():  # away from the symmetric start of gMLP
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    model.eval()
    size, channels = config.DATA.IMAGE_SIZE, config.DATA.IMAGE_CHANNELS
    spec = paddle.static.InputSpec([None, channels, size, size], 'float32')
    static = paddle.jit.to_static(build_model(config), input_spec=[spec], full_graph=True)
    static.set_state_dict(model.state_dict())
    static.eval()
    paddle.jit.save(static, str(tmp_path / 'model'))
    loaded = paddle.jit.load(str(tmp_path / 'model'))
    for batch in (1, 3):
        x = images(config, batch)
        np.testing.assert_allclose(loaded(x), model(x), 1e-5, 1e-5)


@pytest.mark.parametrize('name', KINDS)
def test_no_type_is_taken_for_granted(name):
    config = small_config(name, 'MODEL.DROPPATH', 0.5)
    model = build_model(config).to(dtype='float64')
    model.train()
    outputs = model(images(config).astype('float64'))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert {out.dtype for out in outputs} == {paddle.float64}
    sum(out.sum() for out in outputs).backward()


def test_names():
    assert list_models('gmlp_?16_224') == ['gmlp_b16_224', 'gmlp_s16_224']
    assert len(list_models('evit_small_patch16_224_k0?_*e')) == 6
    assert list_models('nothing*') == []


def test_create_model():
    model = create_model(config_file('gmlp_digits'), num_classes=10, opts=['MODEL.MIXER.DEPTH', 1])
    assert model.num_classes == 10
    assert model.depth == 1
    assert create_model('gmlp_digits').num_classes == 1000
    with pytest.raises(UserError, match="unknown model 'gmlp_s16'.*Did you mean 'gmlp_s16_224'"):
        create_model('gmlp_s16')
    with pytest.raises(UserError, match='unknown MODEL.TYPE'):
        create_model('gmlp_digits', opts=['MODEL.TYPE', 'resnet'])


def test_the_callers_configuration_is_left_alone():
    config = small_config('gmlp_digits', 'MODEL.NUM_CLASSES', None)
    assert build_model(config).num_classes == 1000
    assert config.MODEL.NUM_CLASSES is None


@pytest.mark.parametrize('name', ['gmlp_digits', 'deit_tiny_patch16_224', 'ms_mlp_tiny_patch4_shift5_224'])
def test_a_builder_called_directly_builds_the_same(name):
    config = small_config(name, 'MODEL.NUM_CLASSES', None)
    models = []
    for build in (build_model, MODELS[config.MODEL.TYPE]):
        paddle.seed(1)
        models.append(build(config).state_dict())
    for (name, value), (other, same) in zip(*map(dict.items, models)):
        assert name == other
        np.testing.assert_array_equal(value, same)
    assert models[0]['head.bias'].shape == [1000]


def test_owners_of_keys_are_architectures_with_all_their_spellings():
    assert set(SCHEMA.known.models) == set(MODELS._aliases)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match='twice'):
        register_model('GMLP')(lambda config: None)


def test_table():
    run = lambda *arguments: subprocess.run(  # noqa: E731
        [sys.executable, '-m', 'models', *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = run('gmlp_digits')
    assert (result.returncode, result.stderr) == (0, '')
    assert re.fullmatch(r'gmlp_digits +[\d.]+ +[\d.]+ +16 +- +- +-', result.stdout.splitlines()[-1])
    result = run('resnet*')
    assert (result.returncode, result.stderr) == (
        2,
        "error: no model matches 'resnet*'; `python -m models` lists all.\n",
    )


if __name__ == '__main__':
    write_snapshot(sys.argv[1:] or NAMES)
