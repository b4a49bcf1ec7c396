# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete or absent, and independent of the names a process gave its parameters."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import paddle
import pytest
from paddle import nn

from engine.checkpoint import (
    epoch_files,
    from_automatic_names,
    optimizer_state,
    read_checkpoint,
    save_epoch,
    save_last,
    set_optimizer_state,
    to_arrays,
)
from tests.conftest import ROOT
from utils.errors import UserError
from utils.formats import read_file


def network(layers_before: int) -> nn.Layer:
    """A model whose automatic parameter names depend on what the process built before it."""
    for _ in range(layers_before):
        nn.Linear(3, 3)
        nn.LayerNorm(3)
    paddle.seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2))


def steps(model, optimizer, seeds):
    for seed in seeds:
        paddle.seed(seed)
        model(paddle.randn([4, 3])).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def adamw(model):
    return paddle.optimizer.AdamW(0.1, parameters=[{'params': model.parameters(), 'weight_decay': 0.1}])


def test_optimizer_state_goes_on_in_a_process_that_built_other_layers_first():
    model = network(0)
    optimizer = adamw(model)
    steps(model, optimizer, range(3))
    weights, state = to_arrays(model.state_dict()), to_arrays(optimizer_state(optimizer, model))
    steps(model, optimizer, range(3, 6))

    twin = network(5)
    twin.set_state_dict(weights)
    other = adamw(twin)
    set_optimizer_state(other, twin, state)
    steps(twin, other, range(3, 6))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), twin.state_dict()[name].numpy(), err_msg=name)


def test_optimizer_state_of_another_model_is_refused():
    model = network(0)
    optimizer = adamw(model)
    steps(model, optimizer, [0])
    state = to_arrays(optimizer_state(optimizer, model))
    other = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(UserError, match='parameters the model lacks: 2.bias'):
        set_optimizer_state(adamw(other), other, state)
    state['moment1']['0.weight'] = np.zeros((7, 7), 'float32')
    twin = network(0)
    with pytest.raises(UserError, match=r'moment1 of 0\.weight has shape \(7, 7\)'):
        set_optimizer_state(adamw(twin), twin, state)


def test_paddles_own_optimizer_files_are_translated_by_order():
    model = network(2)
    optimizer = adamw(model)
    steps(model, optimizer, range(2))
    theirs = {key: value.numpy() for key, value in optimizer.state_dict().items() if key != 'LR_Scheduler'}
    twin = network(4)
    translated = from_automatic_names(theirs, twin)
    ours = optimizer_state(optimizer, model)
    assert translated.keys() == ours.keys()
    for kind, entries in ours.items():
        assert translated[kind].keys() == entries.keys()
        for name, value in entries.items():
            np.testing.assert_array_equal(translated[kind][name], value.numpy())
    assert from_automatic_names(theirs, nn.Sequential(nn.Linear(3, 3))) is None
    assert from_automatic_names({'odd': np.zeros(1)}, twin) is None


def test_half_precision_is_stored_as_float32():
    array = to_arrays({'a': {'b': paddle.to_tensor([1.5]).astype('bfloat16')}})['a']['b']
    assert array.dtype == np.float32 and array[0] == 1.5


def test_periodic_checkpoints_are_pruned_and_keep_their_content(tmp_path):
    folder = str(tmp_path)
    for epoch in range(1, 6):
        save_last(folder, {'epoch': epoch, 'model': {'w': np.full(3, float(epoch))}})
        save_epoch(folder, epoch, keep=2)
    assert [os.path.basename(path) for path in epoch_files(folder)] == ['epoch_0004.pdparams', 'epoch_0005.pdparams']
    assert read_file(epoch_files(folder)[0])['epoch'] == 4


def test_a_damaged_last_falls_back_to_the_one_before(tmp_path):
    folder = str(tmp_path)
    save_last(folder, {'epoch': 1, 'model': {}})
    save_epoch(folder, 1, keep=0)
    with open(tmp_path / 'last.pdparams.new', 'wb') as file:
        file.write(b'\x80\x04 half')
    os.replace(tmp_path / 'last.pdparams.new', tmp_path / 'last.pdparams')
    said = []
    path, content = read_checkpoint(folder, said.append)
    assert (os.path.basename(path), content['epoch']) == ('epoch_0001.pdparams', 1)
    assert 'last.pdparams' in said[0]


def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(UserError, match='holds no last.pdparams'):
        read_checkpoint(str(tmp_path), print)
    with pytest.raises(UserError, match="there is neither '.*gone'"):
        read_checkpoint(str(tmp_path / 'gone'), print)


def test_old_pairs_of_weights_and_optimizer_are_read_together(tmp_path):
    model = network(0)
    optimizer = adamw(model)
    steps(model, optimizer, [0])
    base = str(tmp_path / 'GatedMLP-Epoch-3-Loss-0.5')
    paddle.save(model.state_dict(), base + '.pdparams')
    paddle.save(optimizer.state_dict(), base + '.pdopt')
    _, content = read_checkpoint(base, print)
    np.testing.assert_array_equal(content['model']['0.weight'], model[0].weight.numpy())
    assert from_automatic_names(content['optimizer'], model) is not None


def test_killed_while_saving_leaves_the_old_or_the_new_file(tmp_path):
    """SIGKILL at many moments of a loop that does nothing but save."""
    program = textwrap.dedent(
        f"""
        import itertools, sys
        sys.path.insert(0, {ROOT!r})
        import numpy as np
        from utils.formats import write_pdparams
        for number in itertools.count():
            write_pdparams({{'number': number, 'w': np.full(300000, number)}}, sys.argv[1])
        """
    )
    path = tmp_path / 'last.pdparams'
    seen = set()
    for moment in range(12):
        process = subprocess.Popen([sys.executable, '-c', program, str(path)])
        deadline = time.monotonic() + 30
        before = path.stat().st_mtime_ns if path.exists() else 0
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.0017 * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = read_file(str(path))
        assert (content['w'] == content['number']).all()
        seen.add(content['number'])
    assert seen
