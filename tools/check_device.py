#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check this machine's device: numbers against the CPU, mixed precision, resuming, several processes, waits, speed.

    python tools/check_device.py -json device.json        or: make check-device

It takes about five minutes on a GPU, and prints a table to paste into an issue. On a CPU it runs what applies.
docs/benchmark.md explains the checks. The exit status is 1 if one fails.
"""

from __future__ import annotations

if __name__ == '__main__':
    import _bootstrap

    _bootstrap.start()
elif __name__ == '__mp_main__':  # the process that measures memory
    from utils.environment import import_paddle

    import_paddle()

import argparse
import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator

import paddle

from engine import distributed
from engine.distributed import Context
from tools._device_checks import CHECKS, LIMITS, Finding, half_types
from tools._output import add_output_file
from utils.cli import run
from utils.environment import processor_name
from utils.errors import UserError
from utils.files import atomic_write, json_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Check numbers, memory and speed of this device.')
    parser.add_argument('-only', choices=CHECKS, nargs='+', metavar='CHECK', help=f'of {", ".join(CHECKS)}')
    add_output_file(parser, flag='-json', dest='json', what='also write the results to this file')
    args = parser.parse_args(argv)
    with atomic_write(args.json, 'w') if args.json else contextlib.nullcontext() as file:
        context = distributed.start()
        machine = describe(context)
        findings = check(context, args.only or list(CHECKS))
        if file:
            file.write(json_text({'machine': machine, 'findings': [vars(finding) for finding in findings]}, indent=2))
    print('\n' + table(machine, findings))
    return 0 if all(finding.ok for finding in findings) else 1


def describe(context: Context) -> dict[str, str]:
    """Return the conditions of the check."""
    machine = {
        'paddle': paddle.__version__,
        'device': processor_name(),
        'threads': os.environ.get('OMP_NUM_THREADS', ''),
    }
    if context.on_gpu:
        major, minor = paddle.device.cuda.get_device_capability()
        machine.update(
            device=paddle.device.cuda.get_device_name(),
            gpus=str(paddle.device.cuda.device_count()),
            capability=f'{major}.{minor}',
            cuda=paddle.version.cuda(),
            amp=' and '.join(half_types()) or 'none',
            tf32='off' if os.environ.get('NVIDIA_TF32_OVERRIDE') == '0' else 'allowed',
        )
    return machine


def check(context: Context, names: list[str]) -> list[Finding]:
    """Run checks by name and print each finding as soon as it is there."""
    findings = []
    for name in names:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix='check-device-') as folder:
            for finding in limited(name, CHECKS[name](context, folder)):
                findings.append(finding)
                print(
                    f'{finding.name}: {finding.value} ({finding.bound or "measured"})'
                    + ('' if finding.ok else ' FAILED')
                )
        print(f'----- {name}: {time.monotonic() - started:.0f} s', flush=True)
    return findings


def limited(name: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Return the findings of a check up to its limit of time. An error of the device is a finding, too."""
    started = time.monotonic()
    try:
        for finding in findings:
            yield finding
            if time.monotonic() - started > LIMITS[name]:
                yield Finding(f'{name}: rest of the check', 'left out', f'after {LIMITS[name]} s')
                return
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        yield Finding(name, f'{type(error).__name__}: {" ".join(str(error).split())[:300]}', 'no error', False)


def table(machine: dict[str, str], findings: list[Finding]) -> str:
    """Return a Markdown table of all findings."""
    head = ', '.join(f'{name} {value}' for name, value in machine.items() if value)
    rows = [f'| {f.name} | {f.value} | {f.bound or "–"} | {"yes" if f.ok else "NO"} |' for f in findings]
    return '\n'.join([head, '', '| check | value | bound | passed |', '|---|---|---|---|', *rows])


if __name__ == '__main__':
    run(main)
