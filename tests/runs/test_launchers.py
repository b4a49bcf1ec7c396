# SPDX-License-Identifier: Apache-2.0
"""What users type, in a copy of the repository, and what they see when it is wrong."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from config import get_arguments, get_config, update_config
from engine.run import run_config
from tests.conftest import ROOT
from tests.runs.conftest import environment, finish, metrics, run, start
from utils.environment import _LAUNCHER
from utils.errors import UserError


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """The files of the repository, without its history, environment and outputs."""
    target = tmp_path_factory.mktemp('clone') / 'leanvit'
    hidden = shutil.ignore_patterns('.git', '.venv', 'output', '__pycache__', 'tests', '.*_cache', '.hypothesis')
    shutil.copytree(ROOT, target, ignore=hidden)
    return target


def shell(clone, script, *flags, status=0, **variables):
    process = subprocess.Popen(
        ['sh', script, *flags], cwd=clone, env=environment(PYTHON=sys.executable, **variables),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    code, out, err = finish(process)
    assert code == status, out[-2000:] + err[-2000:]
    return out, err


def test_the_two_scripts_on_a_machine_without_gpu(clone, tmp_path):
    """Nothing set: digits in two processes; then the same accuracy from the evaluation script."""
    cache = {'LEANVIT_CACHE': str(tmp_path / 'cache')}
    _, err = shell(clone, 'run_eval_multi.sh', status=2)
    assert 'nothing was trained yet' in err
    out, _ = shell(clone, 'run_train_multi.sh', '-batch_size=64', '-opts', 'TRAIN.NUM_EPOCHS', '2', **cache)
    assert 'ImageNet: CFG=./configs/gmlp_s16_224.yaml DATA_PATH=/dataset/imagenet sh' in out
    accuracy = re.search(r'Finished: best Validation Acc@1: (\d\.\d{4})', out).group(1)
    assert float(accuracy) > 0.15  # two epochs: more than chance; the full recipe is the README's affair
    latest = clone / 'output' / 'latest'
    assert '----- world_size = 2' in (latest / 'log_0.txt').read_text()
    for name in (
        'config.yaml',
        'log.txt',
        'log_1.txt',
        'log_all.txt',
        'metrics.jsonl',
        'last.pdparams',
        'best.pdparams',
        'vdl',
    ):
        assert (latest / name).exists(), name
    name = os.readlink(latest)
    latest.unlink()
    latest.write_text(f'{name}\n')  # as on a file system without links
    out, _ = shell(clone, 'run_eval_multi.sh', **cache)
    assert re.search(r'Validation Acc@1: (\d\.\d{4})', out).group(1) == accuracy


def test_log_lines_and_metrics_rows(recipe, tmp_path):
    """Log parsers of PaddleViT's users match these lines."""
    _, err = run('main_single_gpu.py', f'-cfg={recipe}', '-tag=log', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    assert err == ''
    folder = tmp_path / 'out' / 'log'
    text = (folder / 'log.txt').read_text()
    for pattern in (
        r'MASTER_LOG ----- Total # of train batch \(single gpu\): 10\n',
        r'Base lr is scaled to: \S+, warmup start lr is scaled to: \S+, end lr is scaled to: \S+\n',
        r'----- Start training from epoch 1\.\n',
        r'Train epoch 1\. LR=\d\.\d{6}e-\d\d\n',
        r'Epoch\[001/001\], Step\[0009/0010\], Lr: \d\.\d{6}, Loss: \d\.\d{4} \(\d\.\d{4}\), Avg Acc: \d\.\d{4}',
        r'----- Epoch\[001/001\], Lr: \d\.\d{6}, time: \d+\.\d\d, Train Loss: \d\.\d{4}, Train Acc: \d\.\d{4}\n',
        r'----- Validation after Epoch: 1\n',
        r'----- Epoch\[001/001\], Validation Loss: \d\.\d{4}, Validation Acc@1: \d\.\d{4}, Validation Acc@5: \d\.\d{4}, time: ',
        r'----- Save model: \S+epoch_0001\.pdparams\n',
    ):
        assert re.search(pattern, text), pattern
    assert re.search(r'Step\[0000/0002\], Avg Loss: ', (folder / 'log_0.txt').read_text())
    kinds = {row['kind']: row for row in metrics(folder)}
    assert set(kinds) == {'train', 'val', 'val_ema'}
    assert {'epoch', 'step', 'lr', 'loss', 'acc1', 'images_per_second'} <= set(kinds['train'])
    assert {'epoch', 'step', 'loss', 'acc1', 'acc5', 'images'} <= set(kinds['val'])


def test_any_home_terminal_and_name(recipe, tmp_path):
    """No home to write to, an ASCII terminal, names that it cannot show: VisualDL's file is there, and no warning."""
    output = tmp_path / 'dat\udce9 数'
    shell = {'HOME': '/dev/null', 'LANG': 'C', 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'}
    flags = (f'-cfg={recipe}', f'-output={output}', '-tag=run', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    out, err = run('main_single_gpu.py', *flags, **shell, LEANVIT_CACHE=str(tmp_path / 'cache'))
    assert rf'weights in {tmp_path}/dat\udce9 \u6570/run/best.pdparams' in out
    assert not re.search('traceback|warning: |home|matplotlib', err.replace('WARNING: OMP', ''), re.IGNORECASE), err
    assert 'dat\\udce9 数' in (output / 'run' / 'log.txt').read_text(encoding='utf-8')
    assert str(output) == get_config(str(output / 'run' / 'config.yaml')).SAVE
    from visualdl import LogReader

    (log,) = (output / 'run' / 'vdl').iterdir()
    tags = LogReader(file_path=str(log)).get_tags()['scalar']
    assert {'train/loss', 'train/lr', 'val/acc1', 'val_ema/acc1'} <= set(tags)


def test_a_written_configuration_runs_again(recipe, tmp_path):
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=one', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    again = tmp_path / 'out' / 'one' / 'config.yaml'
    run('main_single_gpu.py', f'-cfg={again}', '-tag=two')
    rows = [
        [{k: r[k] for k in ('kind', 'loss', 'acc1')} for r in metrics(tmp_path / 'out' / tag)] for tag in ('one', 'two')
    ]
    assert rows[0] == rows[1]


def test_help_lists_every_flag():
    out, _ = run('main_multi_gpu.py', '-h')
    flags = 'cfg dataset data_path output tag batch_size batch_size_eval image_size num_classes accum_iter num_workers'
    for flag in (flags + ' pretrained resume last_epoch ngpus eval amp throughput opts').split():
        assert f' -{flag}' in out, flag


def test_amp_says_what_it_does_on_a_cpu(recipe):
    out, _ = run('main_single_gpu.py', f'-cfg={recipe}', '-amp', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    assert 'AMP on the CPU: training with ' in out


def test_throughput_beside_variables_of_another_job(recipe):
    left_over = {
        'PADDLE_TRAINERS_NUM': '2', 'PADDLE_TRAINER_ID': '0', 'PADDLE_CURRENT_ENDPOINT': '127.0.0.1:6170',
        'PADDLE_TRAINER_ENDPOINTS': '127.0.0.1:6170,127.0.0.1:6171', 'FLAGS_selected_gpus': '3',
    }  # fmt: skip
    out, err = run('main_single_gpu.py', f'-cfg={recipe}', '-throughput', '-num_classes=3', **left_over)
    assert (
        err
        == f'note: {", ".join(name for name in _LAUNCHER if name in left_over)} are left over from another job and ignored.\n'
    )
    assert re.search(r'throughput: \d+\.\d images/s at batch 8', out)


@pytest.mark.parametrize('script', ['main_single_gpu.py', 'main_multi_gpu.py'])
def test_a_mistake_is_one_sentence_and_status_2(script, tmp_path):
    for flags, words in (
        (['-cfg=nowhere.yaml'], "cannot read the configuration 'nowhere.yaml'"),
        (['-opts', 'TRAIN.EPOCHS', '3'], "unknown key 'TRAIN.EPOCHS'. Did you mean 'TRAIN."),
        (['-batch_size=many'], "invalid whole number value: 'many'"),
        (['-dataset=folder', f'-data_path={tmp_path}/none'], 'none'),
    ):
        code, _, err = finish(start(script, f'-output={tmp_path}', *flags))
        assert code == 2
        assert words in err and 'Traceback' not in err, err
        assert len([line for line in err.splitlines() if 'error: ' in line]) == 1


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['-eval'], '-eval needs weights: give -pretrained'),
        (['-pretrained=gone'], 'gone.pdparams'),
        (['-resume=gone'], "-resume: there is neither 'gone'"),
        (['-last_epoch=3'], '-last_epoch (TRAIN.LAST_EPOCH) is 3, but nothing is resumed'),
        (['-num_classes=2'], 'MODEL.NUM_CLASSES is 2, but'),
        (['-image_size=18'], '18'),
        (['-opts', 'MODEL.TYPE', 'gmpl'], "unknown MODEL.TYPE 'gmpl'. Did you mean 'gmlp'"),
        (['-dataset=foldr'], "unknown data set 'foldr'. Did you mean 'folder'"),
        (['-opts', 'TRAIN.OPTIMIZER.NAME', 'adam'], "'adam'"),
        (['-opts', 'TRAIN.LR_SCHEDULER.NAME', 'cosine'], "'cosine'"),
        (['-output=/proc/none'], "cannot write the run folder '/proc/none"),
        (['-opts', 'MODEL.MIXER.PATCH_SIZE', '5'], 'patch'),
    ],
)
def test_mistakes_end_before_the_first_step(recipe, flags, words):
    config = update_config(get_config(), get_arguments([f'-cfg={recipe}', *flags]))
    with pytest.raises(UserError) as caught:
        run_config(config)
    assert words in str(caught.value), caught.value
    assert '\n' not in str(caught.value)


def test_an_unreadable_image_names_itself(recipe, images, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(images, data)
    broken = data / 'train' / 'class1' / '3.png'
    broken.write_bytes(b'not a picture')
    (data / 'train' / 'class1' / 'phone.heic').touch()
    flags = (f'-cfg={recipe}', f'-data_path={data}', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    _, err = run('main_multi_gpu.py', *flags, NPROC='2', status=2)
    assert err.count(str(broken)) == 1 and 'Traceback' not in err
    run('main_multi_gpu.py', *flags, 'DATA.BAD_IMAGE', 'skip', 'TAG', 'skip', NPROC='2')
    row = metrics(tmp_path / 'out' / 'skip')[0]
    assert row['skipped'] >= 1
    log = (tmp_path / 'out' / 'skip' / 'log.txt').read_text()
    assert log.count(f"----- left out below '{data}/train', not images by their extensions: 1 .heic (1 in all).") == 1


def test_a_lost_worker_ends_the_run(recipe, tmp_path):
    import psutil

    from tests.runs.conftest import wait_for

    process = start('main_single_gpu.py', f'-cfg={recipe}', '-tag=lost', '-opts', 'TRAIN.NUM_EPOCHS', '500')
    wait_for(tmp_path / 'out' / 'lost' / 'log.txt', 'Epoch[001/', process)
    for child in psutil.Process(process.pid).children():
        child.kill()
    code, _, err = finish(process, timeout=60)
    assert code == 2
    assert 'error: a data-loading worker died' in err and 'Traceback' not in err


def test_an_existing_tag_is_continued(recipe, tmp_path):
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=again', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    out, _ = run('main_single_gpu.py', f'-cfg={recipe}', '-tag=again', '-opts', 'TRAIN.NUM_EPOCHS', '2')
    assert "The run 'again' exists and is continued." in out
    assert [row['epoch'] for row in metrics(tmp_path / 'out' / 'again') if row['kind'] == 'train'] == [1, 2]


def test_nothing_is_written_where_a_run_may_not(recipe, tmp_path):
    """A full or read-only disk ends the run and leaves the last good file."""
    folder = tmp_path / 'out' / 'full'
    run('main_single_gpu.py', f'-cfg={recipe}', '-tag=full', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    before = (folder / 'last.pdparams').read_bytes()
    limited = (
        f'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); '
        f'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.path.insert(0, {ROOT!r}); '
        f"sys.argv = ['main_single_gpu.py', '-cfg={recipe}', '-tag=full', '-opts', 'TRAIN.NUM_EPOCHS', '2']; "
        f"runpy.run_path({os.path.join(ROOT, 'main_single_gpu.py')!r}, run_name='__main__')"
    )
    tuned = dict.fromkeys(('FLAGS_paddle_num_threads', 'OMP_NUM_THREADS'), '1')
    malloc = dict.fromkeys(('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_'), '1048576')
    process = subprocess.run(
        [sys.executable, '-c', limited], env=environment(**tuned, **malloc), capture_output=True, text=True, timeout=120
    )
    assert process.returncode != 0
    assert 'error: ' in process.stderr and 'Traceback' not in process.stderr, process.stderr[-2000:]
    assert (folder / 'last.pdparams').read_bytes() == before
    assert not list(folder.glob('.*.tmp'))
