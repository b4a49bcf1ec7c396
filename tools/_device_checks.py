# SPDX-License-Identifier: Apache-2.0
"""The checks of tools/check_device.py. Each is a function of the context and an empty folder that yields findings."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import re
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
from tools._device_goldens import GOLDENS
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
CHOOSING = FAMILIES[2:4]  # rounding may change their choice of tokens
TIMED = {True: ('deit_small_patch16_224', 'deit_base_patch16_224', 'gmlp_s16_224', *FAMILIES[2:5]), False: FAMILIES[:1]}
BATCHES = {True: (256, 128), False: (8, 4)}  # evaluation, training
SHRINK = (1, 2, 4)  # divisors of the batches, where the memory of the GPU is too small
ROUNDS, WARMUP = 5, 2

OUTPUTS = FLOAT32, HALF = 1e-4, 3e-2  # largest difference of logits / largest logit
GRADIENTS = 1e-3, 1e-1  # largest difference of gradients / largest gradient, in float32 and half precision
STEPS, LOSSES = 5, 1e-3  # largest relative difference of the losses of the first steps
RESUMED = {True: 1e-4, False: 0.0}  # on a GPU, some sums of gradients have no fixed order
_REPRODUCIBLE = {'FLAGS_cudnn_deterministic': '1'}  # else the gradients of convolutions have none
OVERFLOWING, SAFE = 2.0**40, 2.0**8  # loss scales: float16 overflows, and does not
DIGITS = 'gmlp_digits'
HANGS = 100  # seconds until a process counts as hung; on a busy machine one takes several times its ten seconds
# Seconds after which a check is left, between two findings; together five minutes.
LIMITS = {
    'goldens': 20, 'models': 50, 'training': 40, 'overflow': 15, 'resume': 40, 'processes': 50, 'waits': 25, 'speed': 60,
}  # fmt: skip


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
def check_goldens(context: Context, folder: str) -> Iterator[Finding]:
    """Compare outputs with those of the original PyTorch programs, in float32 and in the half-precision types of the GPU."""
    for golden in GOLDENS:
        model, images, expected = golden.load()
        yield _at_most(
            f'{golden.name}: original program, float32', _difference(_logits(model, images), expected), FLOAT32
        )
        for dtype in half_types() if golden.half and context.on_gpu else []:
            with paddle.amp.auto_cast(dtype=dtype):
                found = _logits(model, images)
            yield _at_most(f'{golden.name}: original program, {dtype}', _difference(found, expected), HALF)


def check_models(context: Context, folder: str) -> Iterator[Finding]:
    """Compare logits and gradients with those of the CPU, in float32 and in the half-precision types of the GPU."""
    if not context.on_gpu:
        return
    for name in FAMILIES:
        config = get_config(config_file(name))
        shape = [2, *image_shape(config)]
        images = np.random.default_rng(0).standard_normal(shape, 'float32')
        with _on('cpu'):
            model = _randomized(build_model(config))
            state, expected = _arrays(model), (_logits(model, images), _gradients(model, images))
        model = build_model(config)
        model.set_state_dict({key: paddle.to_tensor(value) for key, value in state.items()})
        for dtype in ('float32', *half_types()):
            with contextlib.nullcontext() if dtype == 'float32' else paddle.amp.auto_cast(dtype=dtype):
                found = _logits(model, images), _gradients(model, images)
            for what, one, other, bounds in zip(('logits', 'gradients'), found, expected, (OUTPUTS, GRADIENTS)):
                title, difference = f'{name}: {what}, {dtype}', _difference(one, other)
                if dtype != 'float32' and name in CHOOSING:
                    yield Finding(title, f'{difference:.2g}')
                else:
                    yield _at_most(title, difference, bounds[dtype != 'float32'])


def check_training(context: Context, folder: str) -> Iterator[Finding]:
    """Compare the losses of the first training steps with those of the CPU."""
    with _on('cpu'):
        expected = _losses(_digits(), Context(0, 1, False))
    if context.on_gpu:
        found = _losses(_digits(), context)
        yield _at_most(f'losses of {STEPS} steps, float32', _difference(found, expected), LOSSES)
        for dtype in half_types():
            for level in ('O1', 'O2'):
                found = _losses(_digits('AMP', True, 'AMP_DTYPE', dtype, 'AMP_LEVEL', level), context)
                yield _at_most(f'losses of {STEPS} steps, {dtype} {level}', _difference(found, expected), HALF)
    yield Finding(
        'loss falls on one batch', f'{expected[0]:.3f} to {expected[-1]:.3f}', '', bool(expected[-1] < expected[0])
    )


def check_overflow(context: Context, folder: str) -> Iterator[Finding]:
    """Start with a loss scale at which float16 overflows, and train until it has fallen far enough."""
    if not (context.on_gpu and 'float16' in half_types()):
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
    """Sum vectors over two processes, then train in two: gradients, sums and accuracies pass through all-reduces."""
    if context.on_gpu and paddle.device.cuda.device_count() < 2:
        yield Finding('two processes', 'left out', 'needs two GPUs')
        return
    result = json.loads(_start('tools/_all_reduce.py', HANGS).splitlines()[-1])
    exact = result['exact'] and result['sum'] == [0.0, 3.0, 6.0]
    yield Finding('all-reduce of two processes', 'exact' if exact else str(result['sum']), 'exact', exact)
    yield Finding(f'all-reduce of {result["megabytes"]:.0f} MB', f'{result["gigabytes_per_second"]:.2f} GB/s')
    _run('main_multi_gpu.py', folder, '-ngpus=2', '-tag=two', '-opts', 'TRAIN.NUM_EPOCHS', '4', 'DATA.BATCH_SIZE', '16')
    best = read_file(os.path.join(folder, 'two', LAST))['progress']['best']
    yield Finding('accuracy of two processes after 4 epochs', f'{best:.3f}', 'at least 0.5', bool(best >= 0.5))


def check_waits(context: Context, folder: str) -> Iterator[Finding]:
    """Count the operations of a training step with which the host waits for a GPU."""
    if not context.on_gpu:
        return
    for dtype, bound in (('float32', 0), *((dtype, int(dtype == 'float16')) for dtype in half_types())):
        amp = [] if dtype == 'float32' else ['AMP', True, 'AMP_DTYPE', dtype]
        short = ['TRAIN.NUM_EPOCHS', 1, 'TRAIN.WARMUP_EPOCHS', 0, 'DATA.BATCH_SIZE', 128, 'REPORT_FREQ', 10**6]
        config = _digits(*amp, *short)
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
    """Train on the digits as a user would."""
    _start(script, HANGS, f'-cfg=configs/{DIGITS}.yaml', f'-output={folder}', *flags)


def _start(script: str, limit: float, *flags: str) -> str:
    """Run a script for up to `limit` seconds and return its output. Raises RuntimeError with the output of a failure."""
    process = subprocess.Popen(
        [sys.executable, script, *flags], cwd=_ROOT, env={**os.environ, **_REPRODUCIBLE}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # its processes end with it
        output, _ = process.communicate()
        raise RuntimeError(f'{script} did not end within {limit:g} s: {_end_of(output)}') from None
    if process.returncode:
        raise RuntimeError(f'{script} failed: {_end_of(output)}')
    return output


def _end_of(output: str) -> str:
    return ' / '.join(output.splitlines()[-3:])


# ---------------------------------------------------------------------------------------------------- speed
def check_speed(context: Context, folder: str) -> Iterator[Finding]:
    """Measure images per second and memory, in mixed precision on a GPU."""
    evaluation, training = BATCHES[context.on_gpu]
    types = half_types() if context.on_gpu else []
    amp = ['AMP', True, 'AMP_DTYPE', types[0]] if types else []
    for name in TIMED[context.on_gpu]:
        case = BenchmarkCase(name, get_config(config_file(name), amp))
        for divisor in SHRINK:
            sizes = evaluation // divisor, training // divisor
            try:
                findings = _speed(case, *sizes, context, types[0] if types else 'float32')
            except Exception as error:
                if not (
                    isinstance(error, MemoryError) or re.search('out of memory|not enough memory', str(error), re.I)
                ):
                    raise
                findings = [Finding(f'{name}: batches of {sizes[0]} and {sizes[1]}', 'out of memory')]
            yield from findings
            _free(context)
            if len(findings) > 1:
                break


def _speed(case: BenchmarkCase, evaluation: int, training: int, context: Context, how: str) -> list[Finding]:
    """Measure a model at the batch sizes of evaluation and training; `how`: its precision."""
    calls = [*case.calls([evaluation], context), case.training_call(training, context)]
    passes, steps = (statistics.median(times) for times in time_interleaved(calls, context, ROUNDS, WARMUP))
    del calls
    _free(context)  # the memory is measured in a process of its own
    memory = peak_memory(case, training, training=True)
    return [
        Finding(f'{case.name}: evaluation at batch {evaluation}, {how}', f'{evaluation / passes:.1f} images/s'),
        Finding(f'{case.name}: training step at batch {training}, {how}', f'{training / steps:.1f} images/s'),
        Finding(f'{case.name}: memory of the training step', f'{memory / 1e6:.0f} MB' if memory else 'unknown'),
    ]


def _free(context: Context) -> None:
    """Return the unused memory of this process to the GPU."""
    gc.collect()
    if context.on_gpu:
        paddle.device.cuda.empty_cache()


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


def half_types() -> list[str]:
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
    step, updater, _ = _step(config, context)
    if updater.scaler.is_enable():
        updater.scaler.set_init_loss_scaling(SAFE)  # a skipped step would look like a wrong number
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


def _gradients(model: nn.Layer, images: np.ndarray) -> np.ndarray:
    """Return the gradients of a fixed function of the logits as one vector, in evaluation mode: without random numbers."""
    model.eval()
    logits = model(paddle.to_tensor(images)).astype('float32')
    factors = np.sin(np.arange(logits.size, dtype='float32')).reshape(logits.shape)
    (logits * paddle.to_tensor(factors)).sum().backward()
    gradients = [p.grad.astype('float32').numpy().reshape(-1) for p in model.parameters() if p.grad is not None]
    model.clear_gradients(set_to_zero=False)
    return np.concatenate(gradients)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


CHECKS = {
    'goldens': check_goldens,
    'models': check_models,
    'training': check_training,
    'overflow': check_overflow,
    'resume': check_resume,
    'processes': check_processes,
    'waits': check_waits,
    'speed': check_speed,
}
