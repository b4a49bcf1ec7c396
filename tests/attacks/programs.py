# SPDX-License-Identifier: Apache-2.0
"""Damaged exported programs, as teachers and for predictions."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import paddle

from config import get_config
from models import build_model
from models.exported import check_files, save_program
from tasks.distillation import _load_program
from tests.attacks.mutations import mutants
from utils.errors import UserError

_VALUES = (
    None,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    -(2**63),
    '',
    'x',
    [],
    {},
    [[]],
    1.5,
    True,
    '1.add',
    '1.while',
    '1.save_combine',
    '1.full',
)


def attacks(lab: SimpleNamespace, tries: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, attack): programs with other values, and damaged files of programs and weights."""
    prefix, other = os.path.join(lab.folder, 'program'), os.path.join(lab.folder, 'damaged')
    size = get_config(lab.cfg).DATA.IMAGE_SIZE
    save_program(build_model(get_config(lab.cfg, ['MODEL.NUM_CLASSES', 7])), [3, size, size], prefix)
    files = {}
    for suffix in ('.json', '.pdiparams'):
        with open(prefix + suffix, 'rb') as file:
            files[suffix] = file.read()

    def attack(changed: dict[str, bytes]) -> None:
        for suffix, data in {**files, **changed}.items():
            with open(other + suffix, 'wb') as file:
                file.write(data)
        try:  # as tasks/distillation.py does with a teacher
            check_files(other)
            teacher = _load_program(other)
            with paddle.no_grad():
                teacher(paddle.zeros([1, 3, size, size]))
        except Exception as error:
            raise UserError(str(error).strip().splitlines()[0] if str(error).strip() else 'no text') from None

    yield 'valid', lambda: attack({})
    base = json.loads(files['.json'])
    for number in range(tries // 2):
        data = json.dumps(changed(base, random.Random(number))).encode()
        yield f'value {number}', lambda data=data: attack({'.json': data})
    for suffix, data in files.items():
        for number, damaged in enumerate(mutants(data, tries // 4, seed=1)):
            yield f'{number} of {suffix}', lambda suffix=suffix, damaged=damaged: attack({suffix: damaged})


def changed(base: dict, rng: random.Random) -> dict:
    """A program with other values at one or two places."""
    result = copy.deepcopy(base)
    for _ in range(rng.choice((1, 1, 2))):
        owner, key = rng.choice(list(_places(result['program'])))
        if isinstance(owner, dict) and rng.random() < 0.2:
            del owner[key]
        elif isinstance(owner, list) and rng.random() < 0.2:
            owner.insert(key, copy.deepcopy(owner[key]))
        else:
            owner[key] = rng.choice(_VALUES)
    return result


def _places(value: object) -> Iterator[tuple]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)
