# SPDX-License-Identifier: Apache-2.0
"""Weights of PaddleViT's DeiT, ViT and MAE folders: a network with those names and ours give the same logits."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from models import build_model, create_model
from models.mae import MaskedAutoencoder
from models.vision_transformer import VisionTransformer
from models.weights.convert import port_with_report
from models.weights.load import load_frozen, load_pretrained, load_state, read_weights
from models.weights.paddlevit import from_paddlevit
from tests.conftest import assert_close
from utils.errors import UserError

SIZES = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 3}
PATCHES, WIDTH, CLASSES = 16, 24, 5


def quiet(line: str) -> None:
    pass


class Attention(nn.Layer):
    """Attention under PaddleViT's names: `qkv` or `query`, `key`, `value`, then `out`."""

    def __init__(self, width: int, split: bool):
        super().__init__()
        self.split = split
        if split:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        parts = [self.query(x), self.key(x), self.value(x)] if self.split else paddle.split(self.qkv(x), 3, axis=-1)
        q, k, v = (part.reshape([part.shape[0], -1, 3, part.shape[-1] // 3]).transpose([0, 2, 1, 3]) for part in parts)
        weights = nn.functional.softmax(q @ k.transpose([0, 1, 3, 2]) / (q.shape[-1] ** 0.5), axis=-1)
        return self.out((weights @ v).transpose([0, 2, 1, 3]).flatten(2))


class TransformerLayer(nn.Layer):
    def __init__(self, width: int, split: bool = False):
        super().__init__()
        self.attn_norm, self.mlp_norm = (nn.LayerNorm(width, epsilon=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width, split), nn.Layer()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.mlp_norm(x))))


class PaddleViT(nn.Layer):
    """A network of PaddleViT's folders.

    Args:
        kind: 'new' ViT or DeiT; 'distilled' DeiT; 'old' ViT with tokens in the patch embedding; 'mae', a fine-tuned MAE.
        probed: batch normalization before the classifier, as in MAE's linear probe.
        pooled: average pooling before the norm, as in MAE's fine-tuning.
    """

    def __init__(self, kind: str = 'new', pooled: bool = False, split: bool = False, probed: bool = False):
        super().__init__()
        self.kind, self.pooled = kind, pooled
        self.patch_embedding, self.encoder = nn.Layer(), nn.Layer()
        self.patch_embedding.patch_embedding = nn.Conv2D(3, WIDTH, 8, 8)
        tokens = self.tokens
        prefix = 2 if kind == 'distilled' else 1
        tokens.cls_token = self.create_parameter([1, 1, WIDTH])
        if kind == 'distilled':
            tokens.dist_token = self.create_parameter([1, 1, WIDTH])
            self.classifier_dist = nn.Linear(WIDTH, CLASSES)
        self.table = {'old': 'position_embeddings', 'mae': 'encoder_position_embedding'}.get(kind, 'position_embedding')
        setattr(tokens, self.table, self.create_parameter([1, prefix + PATCHES, WIDTH]))
        self.encoder.layers = nn.LayerList(TransformerLayer(WIDTH, split) for _ in range(2))
        norm = nn.LayerNorm(WIDTH, epsilon=1e-6)
        (self if kind == 'mae' else self.encoder).encoder_norm = norm
        self.classifier = nn.Linear(WIDTH, CLASSES)
        if probed:
            norm = nn.BatchNorm1D(WIDTH, weight_attr=False, bias_attr=False, epsilon=1e-6)
            norm._mean.set_value(paddle.randn([WIDTH]))
            norm._variance.set_value(paddle.rand([WIDTH]) + 0.1)
            self.classifier = nn.Sequential(norm, self.classifier)

    @property
    def tokens(self):
        return self.patch_embedding if self.kind == 'old' else self

    def forward(self, x):
        x = self.patch_embedding.patch_embedding(x).flatten(2).transpose([0, 2, 1])
        names = ['cls_token', 'dist_token'] if self.kind == 'distilled' else ['cls_token']
        prefix = [getattr(self.tokens, name).expand([x.shape[0], -1, -1]) for name in names]
        x = paddle.concat([*prefix, x], axis=1) + getattr(self.tokens, self.table)
        for layer in self.encoder.layers:
            x = layer(x)
        norm = self.encoder_norm if self.kind == 'mae' else self.encoder.encoder_norm
        if self.pooled:
            return self.classifier(norm(x[:, 1:].mean(1)))
        x = norm(x)
        if self.kind == 'distilled':
            return (self.classifier(x[:, 0]) + self.classifier_dist(x[:, 1])) / 2
        return self.classifier(x[:, 0])


def saved(network: nn.Layer, path) -> str:
    """Write a file as PaddleViT does, with random weights."""
    paddle.seed(3)
    for parameter in network.parameters():
        if not parameter.stop_gradient:  # not the statistics of batch normalization
            parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    paddle.save(network.state_dict(), str(path))
    return str(path)


CASES = {
    'new': ({}, {}),
    'split qkv': ({'split': True}, {}),
    'old': ({'kind': 'old'}, {}),
    'distilled': ({'kind': 'distilled'}, {'distilled': True}),
    'fine-tuned MAE, pooled': ({'kind': 'mae', 'pooled': True}, {'global_pool': True}),
    'fine-tuned MAE, class token': ({'kind': 'mae'}, {}),
    'probed MAE': ({'kind': 'mae', 'probed': True}, {'variants': ['head_norm']}),
    'probed MAE, pooled': (
        {'kind': 'mae', 'pooled': True, 'probed': True},
        {'global_pool': True, 'variants': ['head_norm']},
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_logits(case, tmp_path):
    theirs, ours = CASES[case]
    network = PaddleViT(**theirs)
    path = saved(network, tmp_path / 'published.pdparams')
    network.eval()
    model = VisionTransformer(num_classes=CLASSES, **SIZES, **ours)
    load_pretrained(model, path, log=quiet, replace_head=False)
    model.eval()
    x = paddle.randn([2, 3, 32, 32])
    assert_close(model(x), network(x).numpy(), 1e-5)


def test_teachers_and_the_converter_take_them_too(tmp_path):
    network = PaddleViT()
    path = saved(network, tmp_path / 'published.pdparams')
    x = paddle.randn([2, 3, 32, 32])
    teacher = VisionTransformer(num_classes=7, **SIZES)  # the number of classes becomes that of the file
    load_frozen(teacher, path, log=quiet)
    assert_close(teacher(x), network(x).numpy(), 1e-5)
    model = VisionTransformer(num_classes=CLASSES, **SIZES)
    state, report = port_with_report(model, read_weights(path).arrays, own_names=True)
    model.set_state_dict(state)
    model.eval()
    assert_close(model(x), network(x).numpy(), 1e-5)
    assert 'blocks.1.mlp.fc2.bias' in report.used


def test_another_number_of_classes_replaces_the_classifier(tmp_path):
    path = saved(PaddleViT(), tmp_path / 'published.pdparams')
    lines: list[str] = []
    load_pretrained(VisionTransformer(num_classes=3, **SIZES), path, log=lines.append)
    assert any(
        '5 classes and the model of 3' in line or '5 classes and the model a classifier of 3' in line for line in lines
    )
    with pytest.raises(UserError, match='classifier of 5 classes.*NUM_CLASSES to 5'):
        load_pretrained(VisionTransformer(num_classes=3, **SIZES), path, log=quiet, replace_head=False)


def test_unknown_parts_are_refused(tmp_path):
    network = PaddleViT()
    network.adapter = nn.Linear(2, 2)
    with pytest.raises(UserError, match='adapter.weight'):
        load_pretrained(VisionTransformer(num_classes=5, **SIZES), saved(network, tmp_path / 'w.pdparams'), log=quiet)
    with pytest.raises(UserError, match=r'MODEL\.TRANS\.DISTILLED to True'):
        path = saved(PaddleViT('distilled'), tmp_path / 'd.pdparams')
        load_pretrained(VisionTransformer(num_classes=5, **SIZES), path, log=quiet, replace_head=False)


def mae_state(model: MaskedAutoencoder) -> dict[str, np.ndarray]:
    """Return the weights of an autoencoder under the names of PaddleViT's MAE folder."""
    changes = [
        ('decoder_blocks.', 'decoder.layers.'), ('blocks.', 'encoder.layers.'), ('.norm1.', '.attn_norm.'),
        ('.norm2.', '.mlp_norm.'), ('.attn.proj.', '.attn.out.'), ('patch_embed.proj.', 'patch_embedding.patch_embedding.'),
        ('decoder_norm.', 'decoder.norm.'), ('decoder_embed.', 'linear_projection.'),
        ('decoder_pos_embed', 'decoder_position_embedding'),
    ]  # fmt: skip
    result = {}
    for name, value in model.state_dict().items():
        theirs = {'pos_embed': 'encoder_position_embedding', 'norm.weight': 'encoder.norm.weight'}.get(name, name)
        theirs = 'encoder.norm.bias' if name == 'norm.bias' else theirs
        for ours, other in changes:
            if ours in theirs:
                theirs = theirs.replace(ours, other, 1)
                if 'layers' not in theirs:
                    break
        result[theirs] = value.numpy()
    return result


def test_masked_autoencoder(tmp_path):
    sizes = {'decoder_embed_dim': 16, 'decoder_depth': 1, 'decoder_num_heads': 2}
    source, model = (MaskedAutoencoder(**sizes, **SIZES) for _ in range(2))
    state = mae_state(source)
    assert {'decoder.layers.0.attn.out.weight', 'encoder.layers.1.mlp_norm.bias', 'encoder.norm.bias'} <= state.keys()
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / 'mae.pdparams'))
    load_pretrained(model, str(tmp_path / 'mae.pdparams'), log=quiet, replace_head=False)
    x, noise = paddle.randn([2, 3, 32, 32]), paddle.rand([2, PATCHES])
    assert_close(model(x, noise).pred, source(x, noise).pred.numpy(), 1e-6)
    classifier = VisionTransformer(num_classes=5, global_pool=True, **SIZES)
    load_pretrained(classifier, str(tmp_path / 'mae.pdparams'), log=quiet)
    assert_close(classifier.blocks[1].attn.proj.weight, source.blocks[1].attn.proj.weight.numpy(), 0)


def test_other_weights_are_unchanged():
    model = create_model('deit_tiny_patch16_224', num_classes=3, opts=['MODEL.TRANS.DEPTH', 1])
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert from_paddlevit(state).keys() == state.keys()


FILES = {
    'deit_tiny_distilled_patch16_224': 'MODEL: {TYPE: deit, NAME: deit_tiny_distilled_patch16_224, %s}',
    'vit_base_patch16_224': 'MODEL: {TYPE: ViT, NAME: vit_base_patch16_224, %s}',
}


@pytest.mark.parametrize('name', FILES)
def test_evaluation_of_a_published_pair(name, tmp_path):
    """YAML file and weights of PaddleViT together, through `build_model` and `-pretrained`'s reader."""
    from config import get_config

    (tmp_path / f'{name}.yaml').write_text(
        'DATA: {IMAGE_SIZE: 32}\n'
        + FILES[name] % 'PATCH_SIZE: 8, EMBED_DIM: 24, DEPTH: 2, NUM_HEADS: 3, NUM_CLASSES: 5'
    )
    network = PaddleViT('distilled' if 'distilled' in name else 'new')
    path = saved(network, tmp_path / f'{name}.pdparams')
    model = build_model(get_config(str(tmp_path / f'{name}.yaml')))
    load_pretrained(model, path, log=quiet, replace_head=False)
    model.eval()
    x = paddle.randn([2, 3, 32, 32])
    assert_close(model(x), network(x).numpy(), 1e-5)


def test_checkpoints_to_resume(tmp_path):
    """A training checkpoint: weights and EMA are found under the names of this suite."""
    from engine.checkpoint_schema import validate_checkpoint

    network = PaddleViT()
    saved(network, tmp_path / 'flat.pdparams')
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    average = {name: value * 2 for name, value in state.items()}
    content = {'model': state, 'model_ema': average, 'optimizer': {}, 'epoch': 3, 'lr_scheduler': {'last_epoch': 3}}
    checkpoint = validate_checkpoint(content, 'Epoch-3-Loss-1.pdparams')
    model = VisionTransformer(num_classes=CLASSES, **SIZES)
    load_state(model, checkpoint.weights, checkpoint.source, quiet, replace_head=False)
    found = checkpoint.match_average(model).state
    assert (checkpoint.epoch, checkpoint.complete) == (3, True)
    assert_close(found['blocks.0.attn.proj.weight'], 2 * state['encoder.layers.0.attn.out.weight'], 1e-6)
    assert_close(model.norm.weight, state['encoder.encoder_norm.weight'], 1e-6)
