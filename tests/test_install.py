# SPDX-License-Identifier: Apache-2.0
"""Installing: which build of Paddle a machine gets, builds that are refused, and the steps of the Dockerfile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools._cuda import choose
from utils import environment
from utils.errors import UserError

DOCKERFILE = os.path.join(ROOT, 'docker', 'Dockerfile')
FILES = ('Makefile', 'requirements.txt', 'requirements-gpu.txt', 'requirements-common.txt', 'run_train_multi.sh')
INDEX = 'https://www.paddlepaddle.org.cn/packages/stable'
# An interpreter that makes environments of itself and writes down its other arguments.
PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    tools/_cuda.py) echo "$DRIVER" ;;
    *) echo "$*" >> calls ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with the repository's files for installing, and a function that runs a shell command there."""
    for name in FILES:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    program = tmp_path / 'bin' / 'python3'
    program.parent.mkdir()
    program.write_text(PYTHON)
    program.chmod(0o755)

    def run(command: str, driver: str = '', status: int = 0) -> tuple[list[str], str]:
        """Return the calls of Python and the error output."""
        variables = {'PATH': f'{program.parent}:{os.environ["PATH"]}', 'DRIVER': driver, 'HOME': str(tmp_path)}
        done = subprocess.run(
            ['sh', '-ec', command], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        calls = tmp_path / 'calls'
        found = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return found, done.stderr

    return run


def gpu_install(cuda: str) -> str:
    version = re.search(r'^paddlepaddle-gpu==.*$', read('requirements-gpu.txt'), re.MULTILINE).group()
    return (
        f'-m pip install -q --disable-pip-version-check --extra-index-url {INDEX}/cu{cuda}/ {version} '
        '-r requirements-common.txt'
    )


CPU_INSTALL = '-m pip install -q --disable-pip-version-check -r requirements.txt'


def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding='utf-8') as file:
        return file.read()


@pytest.mark.parametrize(
    ('driver', 'install'), [('', CPU_INSTALL), ('126', gpu_install('126')), ('118', gpu_install('118'))]
)
def test_make_train_installs_the_build_of_the_machine_and_trains(machine, driver, install):
    (first, second), _ = machine('make train', driver)
    assert first == install and second.endswith('-cfg=./configs/gmlp_digits.yaml')
    assert [call.split()[0].endswith('main_multi_gpu.py') for call in machine('make train', driver)[0]] == [True]


def test_make_gpu_takes_the_cuda_version_that_is_given(machine):
    machine('make install')
    uninstall, install = machine('make gpu CUDA=118', driver='130')[0]
    assert uninstall == '-m pip uninstall -q -y paddlepaddle paddlepaddle-gpu' and install == gpu_install('118')
    assert len(machine('make train', driver='130')[0]) == 1  # installed already
    assert 'make gpu CUDA=126' in machine('make gpu', status=2)[1]


def test_requirements_agree():
    """`pip install -r requirements-gpu.txt` works as typed: the file names the index; both builds have one version."""
    gpu, cpu = read('requirements-gpu.txt'), read('requirements.txt')
    assert re.search(rf'^--extra-index-url {re.escape(INDEX)}/cu\d+/$', gpu, re.MULTILINE)
    assert re.search(r'paddlepaddle-gpu==(\S+)', gpu)[1] == re.search(r'paddlepaddle==(\S+)', cpu)[1]
    assert not re.search(r'^-r|paddle', read('requirements-test.txt').partition('\n')[2], re.MULTILINE)


@pytest.mark.parametrize(
    ('driver', 'index'),
    [('12.6', '126'), ('12.8', '126'), ('12.9', '129'), ('13.2', '130'), ('11.8', '118'), ('11.4', ''), (None, '')],
)
def test_the_driver_decides_the_index(driver, index):
    line = f'| NVIDIA-SMI 560.35.03    Driver Version: 560.35.03    CUDA Version: {driver}     |'
    assert choose(line if driver else '') == index


@pytest.mark.parametrize(
    ('driver', 'capabilities', 'index'),
    [
        ('13.0', '7.0\n7.0\n', '126'),  # V100
        ('11.8', '6.1\n', '118'),
        ('13.0', '9.0\n7.0\n', '126'),
        ('13.0', '7.5\n', '130'),
        ('12.8', '8.0\n', '126'),
        ('12.8', '12.0\n', '129'),  # Blackwell
        ('13.0', 'no field\n', '130'),  # an old nvidia-smi
    ],
)
def test_the_gpus_decide_the_index_too(driver, capabilities, index):
    assert choose(f'| CUDA Version: {driver}     |', capabilities) == index


def test_a_machine_without_a_driver_prints_nothing(tmp_path):
    command = [sys.executable, os.path.join(ROOT, 'tools', '_cuda.py')]
    assert (
        subprocess.run(command, env={'PATH': str(tmp_path)}, capture_output=True, text=True, timeout=60).stdout == '\n'
    )
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\necho "CUDA Version: 12.6"\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    assert subprocess.run(command, env={'PATH': str(tmp_path)}, capture_output=True, text=True).stdout == '126\n'


# ---------------------------------------------------------------------------------------------------- refused builds
@pytest.mark.parametrize(
    ('builds', 'sentence'),
    [
        ({'paddlepaddle': '2.6.2'}, 'this is Paddle 2.6.2, but LeanViT needs'),
        (
            {'paddlepaddle': '3.3.1', 'paddlepaddle-gpu': '3.3.1'},
            r'paddlepaddle 3\.3\.1 and paddlepaddle-gpu 3\.3\.1 are installed together .*: pip uninstall -y',
        ),
    ],
)
def test_a_build_that_cannot_work_is_one_sentence(tmp_path, builds, sentence):
    """Before the import, which fails in an old build."""
    (tmp_path / 'paddle.py').write_text('raise ImportError("numpy.core.multiarray failed to import")\n')
    for name, version in builds.items():
        info = tmp_path / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    done = subprocess.run(
        [sys.executable, 'main_single_gpu.py', '-dataset=digits'],
        cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert re.match(f'error: {sentence}', done.stderr), done.stderr


def test_pypis_gpu_build_is_refused(monkeypatch):
    monkeypatch.setattr(environment, '_installed_builds', lambda: {'paddlepaddle-gpu': '2.6.2'})
    with pytest.raises(
        UserError, match='this is Paddle 2.6.2, but LeanViT needs 3.3 or newer: pip install -r .*-gpu.txt'
    ):
        environment.import_paddle()


# ---------------------------------------------------------------------------------------------------- Docker
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = re.sub(r'^#.*\n', '', read('docker/Dockerfile'), flags=re.MULTILINE).replace('\\\n', ' ')
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_clean():
    """`make lint` checks it with hadolint, too."""
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= {'ARG', 'FROM', 'RUN', 'USER', 'WORKDIR', 'COPY', 'CMD'}
    assert names.count('FROM') == names.count('CMD') == names.count('USER') == 1 and names[-1] == 'CMD'
    after = found[names.index('USER') :]
    assert after[0][1] not in ('root', '0') and not any('apt-get' in text for _, text in after)
    assert f'--chown={after[0][1]}' in next(text for name, text in after if name == 'COPY')
    assert f'--uid {after[0][1]} ' in next(text for name, text in found if 'useradd' in text)
    packages = next(text for name, text in found if 'apt-get' in text)
    for part in ('apt-get update', '--no-install-recommends', ' -y ', 'rm -rf /var/lib/apt/lists/*'):
        assert part in packages
    assert not re.search(r'latest|sudo|curl|wget', ' '.join(text for _, text in found))
    default = dict(text.partition('=')[::2] for name, text in found if name == 'ARG')
    assert re.match(rf'nvidia/cuda:{default["CUDA"][:2]}\.{default["CUDA"][2]}\.\d', default['BASE'])


@pytest.mark.slow
def test_the_command_of_the_image_trains(tmp_path):
    """In a copy of the files that the image gets, with the packages of this environment, as a user whose home is empty."""
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folder, environment = tmp_path / 'leanvit', tmp_path / 'leanvit' / '.venv'
    for name in listed.split('\0')[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), folder / name)
    environment.mkdir()
    for name in ('bin', 'lib', 'pyvenv.cfg'):
        (environment / name).symlink_to(os.path.join(sys.prefix, name))
    (environment / '.installed').touch()
    command = re.findall(r'"([^"]+)"', instructions()[-1][1])
    variables = {'HOME': str(tmp_path), 'PATH': os.environ['PATH']}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r'Validation Acc@1: ([\d.]+)', done.stdout)[-1]) > 0.9


@pytest.mark.parametrize(('cuda', 'install'), [('', CPU_INSTALL), ('126', gpu_install('126'))], ids=['CPU', 'GPU'])
def test_the_steps_of_the_image(machine, cuda, install):
    """What the image runs as its user, in a folder with the files; `CUDA` is the build argument."""
    found = instructions()
    steps = [text for name, text in found[[name for name, _ in found].index('USER') :] if name == 'RUN']
    assert [machine(step.replace('${CUDA}', cuda))[0] for step in steps] == [[install]]
    command = ' '.join(re.findall(r'"([^"]+)"', found[-1][1]))
    (call,) = machine(command)[0]
    assert call.endswith('-cfg=./configs/gmlp_digits.yaml')
