# SPDX-License-Identifier: Apache-2.0
"""Keys that a user adds to a tree; tests/test_config.py has the tests of the tree itself."""

import re

import pytest

from utils.errors import UserError
from utils.schema import Key, Owners, Schema, Section


def own_schema(reads=()) -> Schema:
    """Keys of the models a and b and of the task t, to which a user's model c and task u are added."""
    root = Section()
    root.MODEL, root.TRAIN = Section(), Section()
    root.MODEL.TYPE, root.TRAIN.TASK = Key('a'), Key('t')
    root.MODEL.A, root.MODEL.B, root.TRAIN.T = Section(models=['a']), Section(models=['b']), Section(tasks=['t'])
    root.MODEL.A.X, root.MODEL.B.X, root.TRAIN.T.X = Key(1), Key(1), Key(1)
    schema = Schema(root, {}, Owners(('a', 'b'), ('t',)))
    model, task = Section(models=['c']), Section(tasks=['u'])
    model.X, task.X = Key(1, '[1, 9]'), Key(1)
    schema.add('MODEL.C', model, reads)
    schema.add('TRAIN.U', task)
    return schema


def resolved(schema, **values):
    """The tree of -opts, of which '__' stands for a dot."""
    tree = schema.tree()
    for name, value in values.items():
        schema.set(tree, name.replace('__', '.'), value, '-opts')
    schema.end_layer(tree)
    schema.check(tree)
    schema.reset_unused(tree)
    return tree


def test_keys_that_are_added_have_defaults_bounds_and_owners():
    schema = own_schema(reads=['MODEL.B'])
    assert resolved(schema, MODEL__TYPE='c', MODEL__C__X='7', MODEL__B__X=2).MODEL.C.X == 7
    assert resolved(schema, TRAIN__TASK='u', TRAIN__U__X=2).MODEL.C.X == 1
    assert resolved(schema, MODEL__TYPE='d', MODEL__C__X=2, MODEL__A__X=2).MODEL.C.X == 2  # it has no keys of its own
    for values, message in (
        (
            {'MODEL__TYPE': 'c', 'MODEL__C__X': 0},
            'MODEL.C.X is 0, but must be a whole number of at least 1 and at most 9.',
        ),
        ({'MODEL__TYPE': 'c', 'MODEL__A__X': 2}, 'MODEL.A.X is 2, but has no effect for MODEL.TYPE c, only for a;'),
        ({'MODEL__C__X': 2}, 'MODEL.C.X is 2, but has no effect for MODEL.TYPE a, only for c;'),
        ({'TRAIN__TASK': 'u', 'TRAIN__T__X': 2}, 'TRAIN.T.X is 2, but has no effect for TRAIN.TASK u, only for t;'),
        ({'TRAIN__U__X': 2}, 'TRAIN.U.X is 2, but has no effect for TRAIN.TASK t, only for u;'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            resolved(schema, **values)


def test_keys_are_added_once_and_read_what_exists():
    with pytest.raises(ValueError, match=r'MODEL\.C cannot be added: MODEL\.D '):
        own_schema(reads=['MODEL.D'])
    schema, again = own_schema(), Section()
    again.X = Key(2)
    with pytest.raises(ValueError, match=r'MODEL\.C cannot be added: MODEL\.C\.X '):
        schema.add('MODEL.C', again)
    assert schema.keys['MODEL.C.X'].default == 1


def test_old_spellings_of_values():
    """Runs of version 0.1.0 have `EVAL_CROP: centre` in their config.yaml."""
    key = Key('center', ('center', 'squash'), aliases={'centre': 'center'})
    assert key.coerce('centre') == key.coerce('center') == 'center' and key.accepts(key.coerce('centre'))
    assert not key.accepts(key.coerce('middle')) and 'centre' not in key.expected()
