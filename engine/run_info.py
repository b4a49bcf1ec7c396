# SPDX-License-Identifier: Apache-2.0
"""run.json: the commands of a run, its environment, and the source of each value of its configuration."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys

import paddle

from config import SCHEMA
from engine.distributed import Context
from utils.environment import processor_name
from utils.files import atomic_write, json_text, read_regular

RUN_INFO = 'run.json'
_PACKAGES = ('numpy', 'pillow', 'opencv-python-headless')
_MAX_BYTES, _MAX_COMMANDS = 1 << 20, 100


def write_run_info(folder: str, config, saved, context: Context) -> None:
    """Write run.json. Commands of earlier parts of the run, and the sources that it had for config.yaml, are kept.

    Args:
        config: the configuration of the command.
        saved: the configuration that config.yaml holds.
    """
    path = os.path.join(folder, RUN_INFO)
    earlier = _read(path)
    commands = [*earlier.get('commands', []), ' '.join(sys.argv)]
    info = {
        'commands': commands[-_MAX_COMMANDS:],
        'environment': environment(context),
        'sources': sources(config, saved, folder, earlier.get('sources', {})),
    }
    with atomic_write(path, 'w') as file:
        file.write(json_text(info, indent=1) + '\n')


def environment(context: Context) -> dict[str, str]:
    """Return versions and hardware by name."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        'device': paddle.device.cuda.get_device_name() if context.on_gpu else 'CPU',
        'processes': str(context.world_size),
        'processor': processor_name(),
        'system': platform.platform(),
        'python': platform.python_version(),
        'paddle': paddle.__version__,
        **({'cuda': paddle.version.cuda(), 'cudnn': paddle.version.cudnn()} if context.on_gpu else {}),
        **versions,
    }


def sources(config, saved, folder: str, earlier: dict[str, str]) -> dict[str, str]:
    """Return the sources of all saved values but defaults, see `Schema.where`.

    A resumed run reads its own config.yaml, whose values have the sources in `earlier`.
    """
    own = os.path.realpath(os.path.join(folder, 'config.yaml'))
    kept = (name for name in SCHEMA.keys if SCHEMA.get(saved, name) == SCHEMA.get(config, name))
    found = {name: SCHEMA.where(config, name) for name in kept}
    result = {}
    for name, source in found.items():
        if os.path.realpath(source.rpartition(':')[0]) == own:
            source = earlier.get(name, '')
        if source:
            result[name] = source
    return result


def _read(path: str) -> dict:
    """Return the content of a run.json; {} if there is none, or a damaged one."""
    try:
        info = json.loads(read_regular(path, _MAX_BYTES))
        valid = isinstance(info['commands'], list) and isinstance(info['sources'], dict)
        return info if valid else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
