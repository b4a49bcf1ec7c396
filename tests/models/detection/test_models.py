# SPDX-License-Identifier: Apache-2.0
"""Region proposals, heads and the whole Mask R-CNN against detectron2's ViTDet."""

import numpy as np
import paddle
import pytest
from paddle import to_tensor

import utils.device
from config import get_config
from engine.learning_rate import lr_schedule
from engine.optim import parameter_groups
from models import build_model, create_model
from models.detection import Targets, nms, postprocess
from models.detection.boxes import BoxCoder
from models.detection.heads import MASK_SIDE, Sample, box_losses, mask_loss
from models.detection.mask_rcnn import ENCODER
from models.detection.masks import mask_targets
from models.detection.rpn import RPN
from models.exported import Predictor, save_program
from models.profile import profile
from models.registry import config_file
from tests.conftest import assert_close, golden
from tests.engine.gpu import gpu  # noqa: F401
from tests.models.detection.helpers import padded, polygons, tiny_detector
from tests.models.helpers import linear_weights, port
from utils.errors import UserError


# ---------------------------------------------------------------------------------------------------- proposals
@pytest.fixture(scope='module')
def rpn():
    g = golden('vitdet-rpn')
    facts = g.meta
    candidates, proposals = (
        [facts[f'{when}_nms_topk'][split] for split in ('train', 'test')] for when in ('pre', 'post')
    )
    model = RPN(
        8, facts['strides'], [size for (size,) in facts['anchor_sizes']], candidates=candidates, proposals=proposals,
        threshold=facts['nms_thresh'], samples=facts['batch_size_per_image'],
    )  # fmt: skip
    port(model.rpn_head, g.group('sd'))
    maps = [to_tensor(g[f'in/feat{level}']) for level in range(5)]
    return g, model, (model.anchors(maps), *model.rpn_head(maps))


def test_region_proposal_head_and_losses(rpn):
    g, model, (anchors, logits, deltas) = rpn
    for level in range(5):
        assert_close(logits[level], g[f'out/objectness{level}'])
        assert_close(deltas[level], g[f'out/deltas{level}'])
    anchors, logits, deltas = paddle.concat(anchors), paddle.concat(logits, 1), paddle.concat(deltas, 1)
    losses = model.losses(anchors, logits, deltas, to_tensor(g['in/labels']), to_tensor(g['in/matched_gt']))
    for name, loss in losses.items():
        assert_close(loss, g[f'out/{name}'])
    sum(losses.values()).backward()
    for name, parameter in model.rpn_head.named_parameters():
        assert_close(parameter.grad, g[f'out/grad/{name}'])


@pytest.mark.parametrize('split', ['train', 'test'])
def test_proposals(rpn, split):
    g, model, outputs = rpn
    model.train() if split == 'train' else model.eval()
    proposals = model.select(*outputs, to_tensor(g.meta['image_sizes_hw']))
    assert proposals.valid.all().item() and proposals.boxes.stop_gradient
    for image in range(2):
        assert_close(proposals.boxes[image], g[f'out/{split}_boxes{image}'])
        assert_close(proposals.logits[image], g[f'out/{split}_logits{image}'])


def test_proposals_that_are_not_finite_or_empty_are_left_out(rpn):
    _, model, (anchors, logits, deltas) = rpn
    model.eval()
    logits, deltas = ([x.detach() for x in parts] for parts in (logits, deltas))
    logits[0] = paddle.full_like(logits[0], float('nan'))
    deltas[1] = paddle.full_like(deltas[1], float('inf'))
    proposals = model.select(anchors, logits, deltas, to_tensor([[64, 48], [0, 0]]))
    counts = proposals.valid.astype('int32').sum(1).tolist()
    assert 0 < counts[0] <= 51 and counts[1] == 0  # 36 + 12 + 3 anchors of the coarse levels
    assert not proposals.boxes[1].any().item() and proposals.boxes.isfinite().all().item()


# ---------------------------------------------------------------------------------------------------- losses of the heads
def test_losses_of_the_heads():
    g = golden('vitdet-headloss')
    parts = {
        name: np.concatenate([g[f'in/{name}{image}'] for image in range(2)])
        for name in ('proposal_boxes', 'gt_classes', 'gt_boxes')
    }
    boxes, classes, targets = (to_tensor(part) for part in parts.values())
    sample = Sample(boxes, paddle.zeros_like(classes), classes, targets, paddle.zeros_like(classes))
    logits, deltas = (to_tensor(g[f'in/{name}'], stop_gradient=False) for name in ('scores', 'deltas'))
    losses = box_losses(logits, deltas, sample, BoxCoder(g.meta['box_weights']))
    for name, loss in losses.items():
        assert_close(loss, g[f'out/{name}'], 1e-5)
    sum(losses.values()).backward()
    assert_close(logits.grad, g['out/grad_scores'], 1e-5)
    assert_close(deltas.grad, g['out/grad_deltas'], 1e-5)
    wanted = []
    for image in range(2):
        foreground = g[f'in/gt_classes{image}'] < g.meta['num_classes']
        instances = polygons(g.group('in'), f'mask{image}_poly', int(foreground.sum()))
        wanted.append(mask_targets(instances, g[f'in/proposal_boxes{image}'][foreground], 2 * MASK_SIDE))
        np.testing.assert_array_equal(wanted[-1], g[f'out/mask_target{image}'])
    masks, labels = to_tensor(g['in/mask_logits'], stop_gradient=False), parts['gt_classes']
    chosen = paddle.take_along_axis(masks, to_tensor(labels[labels < g.meta['num_classes']]).reshape([-1, 1, 1, 1]), 1)
    loss = mask_loss(chosen.squeeze(1), to_tensor(np.concatenate(wanted)))
    assert_close(loss, g['out/loss_mask'], 1e-5)
    loss.backward()
    assert_close(masks.grad.sum([0, 2, 3]), g['out/mask_grad_sum_per_class'])
    assert mask_loss(paddle.zeros([0, 28, 28]), paddle.zeros([0, 28, 28])).item() == g['out/loss_mask_empty']


# ---------------------------------------------------------------------------------------------------- whole detector
@paddle.no_grad()
def test_detector():
    g = golden('vitdet-detector')
    model, (x, sizes) = tiny_detector(g), padded([g['in/img0'], g['in/img1']], 96)
    model.eval()
    assert_close(x[:, :, ::7, ::5], g['out/net_input'])
    maps = model.forward_features(x)
    assert_close(maps[0][:, :, ::3, ::3], g['out/p2_sub'])
    for level in range(3, 7):
        assert_close(maps[level - 2], g[f'out/p{level}'])
    proposals = model.proposal_generator(maps, sizes)
    owners = to_tensor(np.repeat([0, 1], proposals.boxes.shape[1]))
    logits, deltas = model.roi_heads.predict_boxes(maps, proposals.boxes.reshape([-1, 4]), owners)
    assert_close(logits, g['out/cls_logits'])
    assert_close(deltas, g['out/box_deltas'])
    for image, found in enumerate(model.detect(x, sizes)):
        assert_close(proposals.boxes[image], g[f'out/proposals{image}'])
        assert_close(proposals.logits[image], g[f'out/proposal_logits{image}'])
        assert_close(found.boxes, g[f'out/raw_boxes{image}'])
        assert_close(found.scores, g[f'out/scores{image}'])
        assert_close(found.masks, g[f'out/raw_mask_probs{image}'])
        np.testing.assert_array_equal(found.classes, g[f'out/classes{image}'])
        final = postprocess(found, sizes[image].tolist(), g.meta['output_hw'][image])
        assert_close(final.boxes, g[f'out/boxes{image}'])
        assert (final.masks != g[f'out/masks{image}']).mean() < 1e-5


@pytest.fixture(scope='module')
def training():
    """The weights and images of `vitdet-detector`, and a third image without objects."""
    g, train = golden('vitdet-detector'), golden('vitdet-detector-train')
    images = [g['in/img0'], g['in/img1'], train['in/img2']]
    boxes, classes = ([train[f'in/gt_{part}{i}'] for i in range(3)] for part in ('boxes', 'classes'))
    masks = [
        polygons(
            {name[:-1]: array for name, array in train.group('in').items() if name[-1] == str(i)},
            'gt_poly',
            len(boxes[i]),
        )
        for i in range(3)
    ]
    return train, tiny_detector(g), padded(images, 96), Targets(boxes, classes, masks)


def test_training(training):
    g, model, (x, sizes), targets = training
    model.train()
    losses = model(x, sizes, targets=targets)
    for name, loss in losses.items():
        assert_close(loss, g[f'out/{name}'])
    total = sum(losses.values())
    assert_close(total, g['out/total_loss'])
    total.backward()
    parameters, linear = dict(model.named_parameters()), linear_weights(model)
    for name, expected in g.group('out/grad').items():
        assert_close(parameters[name].grad, expected.T if name in linear else expected)
    norms = g.meta['grad_norms']
    assert set(norms) == set(parameters)
    for name, norm in norms.items():
        assert np.linalg.norm(parameters[name].grad) == pytest.approx(norm, rel=1e-4)
    model.clear_gradients()


def test_sampling_depends_on_the_generator_and_the_image_alone(training):
    _, model, (x, sizes), targets = training
    model.train()
    rpn, heads = model.proposal_generator, model.roi_heads
    exhaustive = rpn.samples, heads.samples
    rpn.samples, heads.samples = 16, 24
    try:
        runs = [model(x, sizes, targets=targets, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    finally:
        rpn.samples, heads.samples = exhaustive
    first, again, other = ({name: loss.item() for name, loss in run.items()} for run in runs)
    assert first == again != other


@pytest.mark.parametrize('rounds', [16, 1])
def test_a_gpu_suppresses_without_waiting(training, gpu, monkeypatch, rounds):  # noqa: F811
    """The losses are those of the CPU. With too few rounds the proposals are selected again, by Paddle's operator."""
    _, model, (x, sizes), targets = training
    model.train()
    monkeypatch.setattr(nms, 'ROUNDS', rounds)
    selected, select = [], model.proposal_generator.select
    monkeypatch.setattr(
        model.proposal_generator,
        'select',
        lambda *args, **options: (selected.append(options), select(*args, **options))[1],
    )
    found = {name: loss.item() for name, loss in model(x, sizes, targets=targets).items()}
    assert selected == ([{'waits': False}] if rounds > 1 else [{'waits': False}, {}])
    monkeypatch.setattr(utils.device, 'on_gpu', lambda: False)
    assert found == {name: loss.item() for name, loss in model(x, sizes, targets=targets).items()}
    assert selected[-1] == {'waits': True}


def test_images_without_objects_give_every_parameter_a_gradient(training):
    _, model, (x, sizes), _ = training
    model.train()
    nothing = Targets([np.zeros([0, 4])] * 3, [np.zeros([0])] * 3, [[]] * 3)
    losses = model(x, sizes, targets=nothing)
    assert [losses[name].item() for name in ('loss_rpn_loc', 'loss_box_reg', 'loss_mask')] == [0, 0, 0]
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not model.roi_heads.mask_head.predictor.weight.grad.any().item()
    model.clear_gradients()


# ---------------------------------------------------------------------------------------------------- the published model
def test_names_shapes_and_parameter_groups(zero_weights):
    g = golden('vitdet-schedule')
    facts = g.meta
    model = create_model('mask_rcnn_vitdet_tiny_640')
    linear = linear_weights(model)
    shapes = {n: list(v.shape)[::-1] if n in linear else list(v.shape) for n, v in model.state_dict().items()}
    assert shapes == facts['state_dict_shapes'] and len(shapes) == 245
    assert sum(p.size for p in model.parameters()) == facts['n_params'] == 27_652_512
    names = {p.name: name for name, p in model.named_parameters()}
    decayed, rest = parameter_groups(model, facts['groups'][0]['weight_decay'])
    if not decayed['weight_decay']:
        decayed, rest = rest, decayed
    for group, expected in zip((decayed, rest), facts['groups']):
        assert group['weight_decay'] == expected['weight_decay'] and group['learning_rate'] == 1.0
        assert len(group['params']) == expected['n_tensors']
        assert sum(p.size for p in group['params']) == expected['n_params']
    assert {names[p.name] for p in rest['params']} == set(facts['no_decay'])
    g = golden('vitdet-functions')
    rate, scales = g.meta['lr_decay_rate'], {}
    for group in parameter_groups(model, 0.05, rate):
        scales.update({names[p.name]: group['learning_rate'] for p in group['params']})
    assert_close([scales[name] for name in g.meta['lr_factor_names']], g['out/lr_factor'], 1e-6)


@pytest.mark.parametrize('size', ['tiny', 'small'])
def test_the_recipes_follow_the_published_schedule(size):
    g = golden('vitdet-schedule')
    config = get_config(config_file(f'mask_rcnn_vitdet_{size}_640'))
    train, facts = config.TRAIN, g.meta
    assert (facts['max_iter'], facts['groups'][0]['weight_decay']) == (train.NUM_ITERS, train.WEIGHT_DECAY)
    assert config.DATA.BATCH_SIZE * 8 == train.LINEAR_SCALED_LR == 64 and train.LAYER_DECAY == 1.0
    lr, steps = lr_schedule(config, 64, 1832), g['in/iter'].tolist()
    rates = [lr(step // 1832 + 1, step % 1832 / 1832) for step in steps]
    np.testing.assert_allclose(np.array(rates) / facts['groups'][0]['lr'], g['out/multiplier'], 1e-6)


def test_initialization():
    """Distributions of the specification, by group."""
    paddle.seed(0)
    model = build_model(get_config(opts=[*SMALL, 'MODEL.DET.CHANNELS', 64, 'MODEL.DET.BOX_FEATURES', 256, *MIXERS]))
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    normal = {
        'backbone.net.pos_embed': 0.02, 'backbone.net.blocks.0.attn.qkv.weight': 0.02,
        'proposal_generator.rpn_head.conv.conv1.weight': 0.01, 'proposal_generator.rpn_head.anchor_deltas.weight': 0.01,
        'roi_heads.box_head.conv1.weight': (2 / (64 * 9)) ** 0.5, 'roi_heads.mask_head.mask_fcn1.weight': (2 / (64 * 9)) ** 0.5,
        'roi_heads.mask_head.deconv.weight': (2 / (64 * 4)) ** 0.5, 'roi_heads.box_predictor.cls_score.weight': 0.01,
        'roi_heads.box_predictor.bbox_pred.weight': 0.001, 'roi_heads.mask_head.predictor.weight': 0.001,
    }  # fmt: skip
    uniform = {
        'roi_heads.box_head.fc1.weight': (3 / (64 * 49)) ** 0.5, 'backbone.simfp_4.1.weight': (64 * 9) ** -0.5,
        'backbone.simfp_2.4.weight': 6**-0.5, 'backbone.simfp_3.0.weight': (12 * 4) ** -0.5,
        'backbone.net.patch_embed.proj.weight': (3 * 64) ** -0.5,
    }  # fmt: skip
    for name, std in normal.items():
        assert state[name].std() == pytest.approx(std, rel=0.15), name
    for name, bound in uniform.items():
        assert 0.9 * bound < np.abs(state[name]).max() <= bound, name
    zeros = [name for name in state if name.endswith('bias') and 'simfp_2.' not in name and 'simfp_3.0' not in name]
    zeros = [name for name in zeros if 'patch_embed' not in name] + [name for name in state if 'rel_pos' in name]
    assert len(zeros) > 40 and not any(state[name].any() for name in zeros)


def test_costs(zero_weights):
    """Parameters and GMACs of the specification: of 1000 regions and 100 masks."""
    model = create_model('mask_rcnn_vitdet_tiny_640')
    model.eval()
    parts = {
        ENCODER: 5_540_864, 'backbone.simfp': 2_664_880, 'proposal_generator.': 1_184_015,
        'roi_heads.box_head.': 15_207_424, 'roi_heads.box_predictor.': 411_025, 'roi_heads.mask_head.': 2_644_304,
    }  # fmt: skip
    for prefix, params in parts.items():
        assert sum(p.size for name, p in model.named_parameters() if name.startswith(prefix)) == params
    cost = profile(model, [1, 3, 640, 640])
    assert cost.macs / 1e9 == pytest.approx(14.09 + 20.98 + 40.36 + 128.9 + 52.99, abs=0.1)
    assert profile(model.backbone, [1, 3, 640, 640]).macs / 1e9 == pytest.approx(14.09 + 20.98, abs=0.02)


# ---------------------------------------------------------------------------------------------------- contract
SMALL = [
    *['MODEL.TYPE', 'mask_rcnn', 'DATA.IMAGE_SIZE', 64, 'MODEL.NUM_CLASSES', 5, 'MODEL.TRANS.PATCH_SIZE', 8],
    *['MODEL.TRANS.EMBED_DIM', 24, 'MODEL.TRANS.NUM_HEADS', 3, 'MODEL.TRANS.DEPTH', 4, 'MODEL.DROPPATH', 0.0],
    *['MODEL.DET.POSITION_SIZE', 32, 'MODEL.DET.CHANNELS', 8, 'MODEL.DET.BOX_CONVS', 1, 'MODEL.DET.BOX_FEATURES', 16],
    *['MODEL.DET.MASK_CONVS', 1, 'MODEL.DET.ANCHOR_SIZES', (8, 16, 24, 32, 64), 'MODEL.DET.CANONICAL_SIZE', 56.0],
    *['MODEL.DET.MAX_DETECTIONS', 12, 'MODEL.DET.RPN_PROPOSALS', (60, 40)],
]
MIXERS = ['MODEL.TRANS.MIXER', ['windowed', 'decomposed'] * 2, 'MODEL.WINDOWED.SIZE', 3]
VITDET = [*SMALL, *MIXERS]
REMOVED = [*SMALL, 'MODEL.LAMBDA.PRUNE_LAYERS', [0, 2], 'MODEL.LAMBDA.REMOVED', True]


def objects(count: int = 2) -> Targets:
    """A square object of class i in image i; the first by its bitmap."""
    boxes = [np.array([[8, 8 + i, 40, 40]], 'float32') for i in range(count)]
    masks: list = [[[np.array([8, 8 + i, 40, 8 + i, 40, 40, 8, 40], 'float64')]] for i in range(count)]
    masks[0] = [np.pad(np.ones([32, 32], 'uint8'), 8)]
    return Targets(boxes, [np.array([i]) for i in range(count)], masks)


@pytest.mark.parametrize('opts', [VITDET, REMOVED, [*VITDET, 'MODEL.WINDOWED.REL_POS', False]])
def test_contract(opts):
    model = build_model(get_config(opts=opts))
    x = paddle.randn([2, 3, 64, 64])
    losses = model(x, targets=objects(), rng=np.random.default_rng(0))
    assert list(losses) == ['loss_rpn_cls', 'loss_rpn_loc', 'loss_cls', 'loss_box_reg', 'loss_mask']
    assert all(loss.ndim == 0 and loss.item() > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    state = model.state_dict()
    assert {model.layer_id(name) for name in state} == set(range(6)) and model.num_layers == 5
    assert model.no_weight_decay() <= set(state) and model.weight_rules.count_classes(state) == 5
    model.reset_classifier(7)
    after = model.state_dict()
    assert {n for n, v in after.items() if list(v.shape) != list(state[n].shape)} == set(
        filter(model.weight_rules.is_head, state)
    )
    assert model.weight_rules.count_classes(after) == model.num_classes == 7
    model.eval()
    found = model(paddle.randn([3, 3, 64, 96]), to_tensor([[64, 96], [10, 20], [33, 64]]))
    assert [part.shape for part in found] == [[3, 12, 4], [3, 12], [3, 12], [3, 12, 28, 28], [3]]


def check_recompute(opts) -> None:
    results = []
    for enable in (False, True):
        paddle.seed(0)
        model = build_model(get_config(opts=opts))
        model.set_grad_checkpointing(enable)
        losses = model(paddle.ones([2, 3, 64, 64]), targets=objects(), rng=np.random.default_rng(0))
        sum(losses.values()).backward()
        results.append([p.grad.numpy() for p in model.parameters()])
    for plain, recomputed in zip(*results):
        np.testing.assert_array_equal(plain, recomputed)


def test_gradient_checkpointing():
    check_recompute(VITDET)


@pytest.mark.parametrize(
    ('opts', 'some'),
    [([*VITDET, 'MODEL.DET.MIN_SCORE', 0.15], True), (REMOVED, True), ([*VITDET, 'MODEL.DET.MIN_SCORE', 1.0], False)],
)
def test_export(opts, some, tmp_path):
    """A program for any batch size, of boxes, scores, classes, masks and counts, also where nothing is detected."""
    model = build_model(get_config(opts=opts))
    for layer in (model.roi_heads.box_predictor.cls_score, model.proposal_generator.rpn_head.anchor_deltas):
        layer.weight.set_value(paddle.randn(layer.weight.shape))
    sizes = np.array([[64, 64], [40, 64], [64, 30]])
    save_program(model, [3, 64, 64], str(tmp_path / 'model'), {'sizes': sizes[:1]})
    program = Predictor(str(tmp_path / 'model'))
    for batch in (1, 3):
        x = paddle.randn([batch, 3, 64, 64])
        with paddle.no_grad():
            expected = model(x, to_tensor(sizes[:batch]))
        assert (expected.counts.min().item() > 0) == some
        for name, part, found in zip(expected._fields, expected, program(x.numpy(), sizes=sizes[:batch])):
            np.testing.assert_allclose(found, part, 1e-4, 1e-4, err_msg=name)


def test_mistakes():
    for opts, message in (
        ([*SMALL, 'MODEL.TOME.R', 2], 'MODEL.TOME.R is 2, but has no effect for MODEL.TYPE mask_rcnn'),
        (
            [*SMALL, 'MODEL.EVIT.KEEP_RATE', 0.5],
            'MODEL.EVIT.KEEP_RATE is 0.5, but has no effect for MODEL.TYPE mask_rcnn',
        ),
        ([*SMALL, 'MODEL.LAMBDA.PRUNE_LAYERS', [0]], 'set MODEL.LAMBDA.REMOVED to True'),
        ([*SMALL, 'MODEL.NUM_CLASSES', 0], 'a detector needs classes: set MODEL.NUM_CLASSES'),
        ([*SMALL, 'DATA.IMAGE_SIZE', 60], 'DATA.IMAGE_SIZE is 60, but must be a multiple of the patch size 8'),
        ([*SMALL, 'MODEL.DET.POSITION_SIZE', 60], 'MODEL.DET.POSITION_SIZE is 60, but must be a multiple of'),
        ([*SMALL, 'MODEL.DET.ANCHOR_SIZES', (8, 16)], 'MODEL.DET.ANCHOR_SIZES'),
        ([*SMALL, 'MODEL.TRANS.MIXER', ['windowed'] * 3], 'names 3 mixers, but must name one, or one for each of 4'),
        ([*SMALL, 'MODEL.TRANS.MIXER', ['relative']], 'MODEL.TRANS.REL_POS'),
    ):
        with pytest.raises(UserError, match=message):
            build_model(get_config(opts=opts))
    with pytest.raises(UserError, match='a detector needs classes'):
        build_model(get_config(opts=SMALL)).reset_classifier(0)
