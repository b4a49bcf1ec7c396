# SPDX-License-Identifier: Apache-2.0
"""The checks of tools/check_device.py. Each is a function of the context and an empty folder that yields findings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import paddle
from paddle import nn

from config import get_config
from datasets.batch import to_device
from datasets.loader import Batch
from engine.checkpoint import LAST
from engine.distributed import Context
from engine.precision import Precision
from engine.run import build_loader
from engine.throughput import BenchmarkCase, peak_memory, time_interleaved
from engine.train import Trainer
from engine.update import Updater
from engine.waits import count_waits
from models import build_model
from models.registry import config_file
from tasks import build_task
from utils.environment import is_gpu_build
from utils.formats import read_file
from utils.runlog import RunLog
from utils.sizes import image_shape, image_size

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# One model of each family, and those whose speed is measured on a GPU and on a CPU.
FAMILIES = (
    'deit_tiny_patch16_224', 'gmlp_ti16_224', 'evit_small_patch16_224_k07_fuse', 'lambda_small_024_tome_r22',
    'ms_mlp_tiny_patch4_shift5_224', 'vit_tiny_patch16_224_mae_finetune_rpe',
)  # fmt: skip
TIMED = {True: ('deit_small_patch16_224', 'deit_base_patch16_224', 'gmlp_s16_224', *FAMILIES[2:5]), False: FAMILIES[:1]}
BATCHES = {True: (256, 128), False: (8, 4)}  # evaluation, training
ROUNDS, WARMUP = 5, 2

FLOAT32, HALF = 1e-4, 3e-2  # largest difference of logits / largest logit
STEPS, LOSSES = 5, 1e-3  # largest relative difference of the losses of the first steps
RESUMED = {True: 1e-4, False: 0.0}  # on a GPU, sums of gradients have no fixed order
OVERFLOWING = 2.0**40  # loss scale
DIGITS = 'gmlp_digits'


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of a check; without a bound it is a measurement."""

    name: str
    value: str
    bound: str = ''
    ok: bool = True


def _at_most(name: str, value: float, bound: float) -> Finding:
    return Finding(name, f'{value:.2g}', f'at most {bound:g}', bool(value <= bound))  # NaN fails


# ---------------------------------------------------------------------------------------------------- numbers
def check_models(context: Context, folder: str) -> Iterator[Finding]:
    """Compare logits with those of the CPU, in float32 and in the half-precision types of the GPU."""
    if not context.on_gpu:
        return
    for name in FAMILIES:
        config = get_config(config_file(name))
        shape = [2, *image_shape(config)]
        images = np.random.default_rng(0).standard_normal(shape, 'float32')
        with _on('cpu'):
            model = _randomized(build_model(config))
            state, expected = _arrays(model), _logits(model, images)
        model = build_model(config)
        model.set_state_dict({key: paddle.to_tensor(value) for key, value in state.items()})
        yield _at_most(f'{name}: logits, float32', _difference(_logits(model, images), expected), FLOAT32)
        for dtype in _half_types():
            with paddle.amp.auto_cast(dtype=dtype):
                found = _logits(model, images)
            yield _at_most(f'{name}: logits, {dtype}', _difference(found, expected), HALF)


def check_training(context: Context, folder: str) -> Iterator[Finding]:
    """Compare the losses of the first training steps with those of the CPU."""
    with _on('cpu'):
        expected = _losses(_digits(), Context(0, 1, False))
    if context.on_gpu:
        found = _losses(_digits(), context)
        yield _at_most(f'losses of {STEPS} steps, float32', _difference(found, expected), LOSSES)
        for dtype in _half_types():
            for level in ('O1', 'O2'):
                found = _losses(_digits('AMP', True, 'AMP_DTYPE', dtype, 'AMP_LEVEL', level), context)
                yield _at_most(f'losses of {STEPS} steps, {dtype} {level}', _difference(found, expected), HALF)
    yield Finding(
        'loss falls on one batch', f'{expected[0]:.3f} to {expected[-1]:.3f}', '', bool(expected[-1] < expected[0])
    )


def check_overflow(context: Context, folder: str) -> Iterator[Finding]:
    """Start with a loss scale at which float16 overflows, and train until it has fallen far enough."""
    if not (context.on_gpu and 'float16' in _half_types()):
        return
    config, start = _digits('AMP', True), OVERFLOWING
    step, updater, model = _step(config, context)
    updater.scaler.set_init_loss_scaling(start)
    before, skipped = _arrays(model), 0
    while skipped < 40:
        step()
        if any(not np.array_equal(value, before[name]) for name, value in _arrays(model).items()):
            break
        skipped += 1
    finite = all(np.isfinite(value).all() for value in _arrays(model).values())
    scale = updater.scaler.state_dict()['scale'].item()
    ok = 0 < skipped < 40 and finite and scale == start * 0.5**skipped
    yield Finding(
        f'float16 steps skipped from loss scale {start:.2g}', str(skipped), 'the scale halves; weights stay finite', ok
    )


# ---------------------------------------------------------------------------------------------------- runs
def check_resume(context: Context, folder: str) -> Iterator[Finding]:
    """Train two epochs, and the second again from the checkpoint of the first."""
    _run('main_single_gpu.py', folder, '-tag=whole', '-opts', 'TRAIN.NUM_EPOCHS', '2', 'SAVE_FREQ', '1')
    first = os.path.join(folder, 'whole', 'epoch_0001.pdparams')
    _run('main_single_gpu.py', folder, '-tag=again', f'-resume={first}', '-opts', 'TRAIN.NUM_EPOCHS', '2')
    whole, again = (read_file(os.path.join(folder, tag, LAST))['model'] for tag in ('whole', 'again'))
    worst = max(_difference(again[name], value) for name, value in whole.items())
    yield _at_most('weights of a resumed run', worst, RESUMED[context.on_gpu])


def check_processes(context: Context, folder: str) -> Iterator[Finding]:
    """Train in two processes: gradients, sums and accuracies pass through all-reduces."""
    if context.on_gpu and paddle.device.cuda.device_count() < 2:
        return
    _run('main_multi_gpu.py', folder, '-ngpus=2', '-tag=two', '-opts', 'TRAIN.NUM_EPOCHS', '4', 'DATA.BATCH_SIZE', '16')
    best = read_file(os.path.join(folder, 'two', LAST))['progress']['best']
    yield Finding('accuracy of two processes after 4 epochs', f'{best:.3f}', 'at least 0.5', bool(best >= 0.5))


def check_waits(context: Context, folder: str) -> Iterator[Finding]:
    """Count the operations of a training step with which the host waits for a GPU."""
    if not context.on_gpu:
        return
    for dtype, bound in (('float32', 0), *((dtype, int(dtype == 'float16')) for dtype in _half_types())):
        amp = [] if dtype == 'float32' else ['AMP', True, 'AMP_DTYPE', dtype]
        config = _digits(*amp, 'TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0, 'REPORT_FREQ', 10**6)
        trainer, begins = _trainer(config, context, os.path.join(folder, dtype)), []
        step = trainer._step
        with count_waits() as found:
            trainer._step = lambda *args, begins=begins, found=found, step=step: (
                begins.append(len(found)),
                step(*args),
            )[1]
            trainer.fit()
        most = max(end - begin for begin, end in zip(begins[1:], begins[2:]))
        yield _at_most(f'waits of a step, {dtype}', most, bound)


def _trainer(config, context: Context, folder: str) -> Trainer:
    task = build_task(config)
    data = {split: task.dataset(split) for split in ('train', 'val')}
    model = build_model(config)
    task.attach(model, print, training=True)
    loaders = [build_loader(config, task, dataset, split, context) for split, dataset in data.items()]
    os.makedirs(folder)
    return Trainer(config, model, task, *loaders, context, RunLog(folder, 0), folder)


def _run(script: str, folder: str, *flags: str) -> None:
    """Train on the digits as a user would; raises CalledProcessError with the output of a failure."""
    command = [sys.executable, script, f'-cfg=configs/{DIGITS}.yaml', f'-output={folder}', *flags]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)


# ---------------------------------------------------------------------------------------------------- speed
def check_speed(context: Context, folder: str) -> Iterator[Finding]:
    """Measure images per second and memory, in mixed precision on a GPU."""
    evaluation, training = BATCHES[context.on_gpu]
    types = _half_types() if context.on_gpu else []
    amp = ['AMP', True, 'AMP_DTYPE', types[0]] if types else []
    for name in TIMED[context.on_gpu]:
        case = BenchmarkCase(name, get_config(config_file(name), amp))
        calls = [*case.calls([evaluation], context), case.training_call(training, context)]
        passes, steps = (statistics.median(times) for times in time_interleaved(calls, context, ROUNDS, WARMUP))
        del calls
        memory = peak_memory(case, training, training=True)
        how = types[0] if types else 'float32'
        yield Finding(f'{name}: evaluation at batch {evaluation}, {how}', f'{evaluation / passes:.1f} images/s')
        yield Finding(f'{name}: training step at batch {training}, {how}', f'{training / steps:.1f} images/s')
        yield Finding(f'{name}: memory of the training step', f'{memory / 1e6:.0f} MB' if memory else 'unknown')


# ---------------------------------------------------------------------------------------------------- parts
@contextlib.contextmanager
def _on(device: str) -> Iterator[None]:
    """Create tensors on another device."""
    before = paddle.device.get_device()
    paddle.set_device(device)
    try:
        yield
    finally:
        paddle.set_device(before)


def _half_types() -> list[str]:
    """Return the half-precision types of the GPU, bfloat16 first."""
    supported = {'bfloat16': paddle.amp.is_bfloat16_supported, 'float16': paddle.amp.is_float16_supported}
    return [dtype for dtype, test in supported.items() if is_gpu_build() and test()]


def _digits(*options):
    """Return the configuration of a small gMLP on the digits, with options, and without random augmentation."""
    config = get_config(config_file(DIGITS), ['TRAIN.MODEL_EMA', True, *options])
    config.defrost()
    config.MODEL.NUM_CLASSES, config.DATA.BATCH_SIZE_EVAL = 10, config.DATA.BATCH_SIZE
    return config


def _step(config, context: Context):
    """Return a function that takes a training step on a fixed batch and returns its loss, its updater and its model."""
    rng, data = np.random.default_rng(0), config.DATA
    model, task = _randomized(build_model(config)), build_task(config)
    task.attach(model, print, training=True)
    precision = Precision(config, context.on_gpu)
    updater = Updater(config, model, precision)
    pixels = rng.integers(0, 256, (32, *image_size(config), data.IMAGE_CHANNELS), dtype=np.uint8)
    batch = Batch(pixels, {'label': rng.integers(0, 10, 32)}, np.arange(32))

    def step() -> float:
        inputs = to_device(batch, data.IMAGENET_MEAN, data.IMAGENET_STD)
        with precision.autocast():
            loss = task.loss(model, inputs, np.random.default_rng(0)).total
        updater.backward(loss)
        updater.clip(context)
        updater.step(1e-3)
        updater.clear_gradients()
        return loss.item()

    return step, updater, model


def _losses(config, context: Context) -> np.ndarray:
    step, _, _ = _step(config, context)
    return np.array([step() for _ in range(STEPS)])


def _randomized(model: nn.Layer) -> nn.Layer:
    """Add the same small random numbers on every device, since classifiers start with zeros."""
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        shape = parameter.shape
        base = np.ones(shape) if len(shape) == 1 else np.zeros(shape)
        parameter.set_value((base + rng.normal(0, 0.05, shape)).astype('float32'))
    return model


def _arrays(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: value.astype('float32').numpy() for name, value in model.state_dict().items()}


@paddle.no_grad()
def _logits(model: nn.Layer, images: np.ndarray) -> np.ndarray:
    model.eval()
    return model(paddle.to_tensor(images)).astype('float32').numpy()


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


CHECKS = {
    'models': check_models,
    'training': check_training,
    'overflow': check_overflow,
    'resume': check_resume,
    'processes': check_processes,
    'waits': check_waits,
    'speed': check_speed,
}
