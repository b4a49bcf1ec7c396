# SPDX-License-Identifier: Apache-2.0
"""Processes under the launcher that do what the arguments say, without Paddle: `ranks.py LIMIT ACTION_OF_RANK_0 ...`."""

import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from engine import supervise
from engine.launch import is_worker, launch
from utils.cli import run
from utils.errors import UserError

NOISE = "terminate called after throwing an instance of 'gloo::{}Exception'\n"


def wait():
    time.sleep(60)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
    wait()


def kill():
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def mistake():
    time.sleep(0.3)
    raise UserError("there is no 'x'.")


def abort(kind='Io', after=0.3):
    """As gloo: a message of C++, then SIGABRT."""
    time.sleep(after)
    os.write(2, NOISE.format(kind).encode())
    os.abort()


def time_out():
    abort('Timeout')


def abort_later():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    abort(after=0.6)


def lose():
    raise RuntimeError('gloo: Connection reset by peer')


def join():
    """Wait for ranks that do not join."""
    from engine import distributed

    distributed.JOIN_NOTICE = 5.0
    with distributed._join_timeout('process 0 of 2', 0.3):
        wait()


def note():
    os.write(2, b'a note of C++\n')


def leave():
    os._exit(7)


def ignore():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait()


def main():
    limit, *actions = sys.argv[1:]
    if not is_worker():
        supervise.AFTER_FAILURE = 1.0
        return launch(len(actions), float(limit))
    action = actions[int(os.environ['PADDLE_TRAINER_ID'])]
    print(action, flush=True)
    return globals()[action]()


if __name__ == '__main__':
    run(main)
