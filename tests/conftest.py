# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: reference vectors, and Paddle's environment as the launchers set it."""

import json
import os
import signal

os.environ.setdefault('FLAGS_use_stride_kernel', '0')
os.environ.setdefault('FLAGS_paddle_num_threads', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('GLOG_minloglevel', '2')
os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from utils.environment import is_gpu_build

# Commands that tests start take their signals, also where the tests themselves run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in each run, on machines of any speed.
settings.register_profile('suite', derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('suite')

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def pytest_configure() -> None:
    """Compute on the CPU with the GPU build, too: references and bits are those of CPUs."""
    if is_gpu_build():
        import paddle

        paddle.set_device('cpu')


def pytest_collection_modifyitems(items) -> None:
    """Skip tests marked `gpu` where Paddle sees no GPU."""
    marked = [item for item in items if item.get_closest_marker('gpu')]
    if marked and not _sees_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason='no GPU that Paddle can use'))


def _sees_gpu() -> bool:
    import paddle

    return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


class Golden(dict):
    """A reference file: `g['in/x']`; `g.group('sd')` is a dict without the prefix; `g.meta` the description."""

    @property
    def meta(self) -> dict:
        return json.loads(str(self['meta']))

    def group(self, prefix: str) -> dict:
        return {k[len(prefix) + 1 :]: v for k, v in self.items() if k.startswith(prefix + '/')}


def golden(name: str) -> Golden:
    """Reference inputs, weights and outputs computed by the original PyTorch code."""
    with np.load(os.path.join(HERE, 'goldens', f'{name}.npz'), allow_pickle=False) as file:
        return Golden({key: file[key] for key in file.files})


def assert_close(actual, expected, tolerance: float = 1e-4) -> None:
    """Largest difference relative to the scale of the expected values."""
    actual, expected = np.asarray(actual, 'float64'), np.asarray(expected, 'float64')
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = max(float(np.abs(expected).max()), 1e-12)
    worst = float(np.abs(actual - expected).max()) / scale
    assert worst <= tolerance, f'relative difference {worst:.3g} > {tolerance:.3g}'


def make_images(root: str) -> str:
    """Three classes of textured squares under `root`: 75 training images, 13 validation images."""
    rng = np.random.default_rng(0)
    for split, per_class in (('train', (25, 25, 25)), ('val', (5, 4, 4))):
        for label, count in enumerate(per_class):
            folder = os.path.join(root, split, f'class{label}')
            os.makedirs(folder)
            for number in range(count):
                pixels = rng.integers(0, 120, (20, 24, 3)) + 60 * label
                Image.fromarray(pixels.astype('uint8')).save(os.path.join(folder, f'{number}.png'))
    return root


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> str:
    """An image folder; see `make_images`."""
    return make_images(str(tmp_path_factory.mktemp('images')))
