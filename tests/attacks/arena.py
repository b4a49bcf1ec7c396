# SPDX-License-Identifier: Apache-2.0
"""Run attacks one by one in a child process; measure outcome, time and memory of each.

An attack is held if the code reads the file, or refuses it with one error for the user, within the limits of time and
memory, and starts no program. Crashes and hangs end the child process only; a new one continues with the next attack.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

from datasets.images import UnreadableImage
from utils.errors import UserError
from utils.processes import process_state
from utils.text import SENTENCE, printable

SECONDS = 20.0  # of processor time per attack
PAUSE = 60.0  # seconds after which a child that reports nothing and does not wait for a processor is killed
MEMORY = 2 << 30  # bytes above normal
_SPACE = 8 << 30  # bytes of address space above normal: an attack that takes more gets a MemoryError
_PROGRAMS = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'subprocess.Popen', 'pty.spawn')  # audit events
_CODE = ('os', 'posix', 'subprocess', 'sys', 'shutil', 'socket')  # modules that no pickle may ask for

Attacks = Callable[[], Iterator[tuple[str, Callable[[], object]]]]


@dataclasses.dataclass
class Result:
    """Numbers of one kind of attack.

    Attributes:
        refused: attacks that ended with an error for the user.
        read: attacks whose file was read.
        failures: (name of the attack, what happened) of the others.
        seconds: longest processor time of an attack.
        memory: largest memory of an attack above that before it, in bytes.
        slowest, largest: the attacks with these values.
    """

    kind: str
    refused: int = 0
    read: int = 0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    slowest: str = ''
    largest: str = ''

    @property
    def tries(self) -> int:
        return self.refused + self.read + len(self.failures)

    def add(self, name: str, outcome: str, seconds: float, memory: int) -> None:
        if seconds > self.seconds:
            self.seconds, self.slowest = seconds, name
        if memory > self.memory:
            self.memory, self.largest = memory, name
        if outcome in ('read', 'refused'):
            if seconds > SECONDS or memory > MEMORY:
                outcome = f'{seconds:.1f} s, {memory >> 20} MB'
            else:
                setattr(self, outcome, getattr(self, outcome) + 1)
                return
        self.failures.append((name, outcome))

    def row(self) -> str:
        """Line of the table: kind, tries, held, refused, worst time, worst memory."""
        held = self.refused + self.read
        return (
            f'| {self.kind} | {self.tries} | {held} | {self.refused} | {self.seconds:.2f} | {self.memory / 2**20:.0f} |'
        )


HEADER = '| kind | tries | held | of them refused | worst time, s | worst memory, MB |\n|---|---|---|---|---|---|'


def run(kind: str, attacks: Attacks) -> Result:
    """Run all attacks of a kind.

    Args:
        attacks: yields (name, function), the same ones in each call.
    """
    result, begin = Result(kind), 0
    while begin is not None:
        begin = _round(result, attacks, begin)
    return result


def _round(result: Result, attacks: Attacks, begin: int) -> int | None:
    """Run attacks from number `begin` in one child; return where the next child continues, or None at the end."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            _serve(attacks, begin, writer)
            status = 0
        except Exception:
            os.write(writer, json.dumps({'broken': traceback.format_exc()[-2000:]}).encode() + b'\n')
        finally:
            os._exit(status)
    os.close(writer)
    current, name, started, work = begin - 1, '', time.monotonic(), 0.0
    with os.fdopen(reader, 'rb', buffering=0) as stream:
        pending = b''
        while True:
            data = stream.read(65536) if select.select([stream], [], [], 1.0)[0] else None
            if data is None and not _hangs(child, time.monotonic() - started, work):
                continue
            if not data:
                break
            *lines, pending = (pending + data).split(b'\n')
            for message in map(json.loads, lines):
                if 'broken' in message:
                    raise RuntimeError(message['broken'])
                if 'outcome' in message:
                    result.add(message['name'], message['outcome'], message['seconds'], message['memory'])
                    name = ''
                else:
                    current, name = message['number'], message['name']
                started, work = time.monotonic(), _work_of(child)
    if data is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return None
    if not name or current < begin:
        raise RuntimeError(f'the attacks of {result.kind} cannot be made: status {status} after number {current}')
    why = 'no answer' if data is None else f'the process ended with status {status}'
    result.add(name, why, time.monotonic() - started if data is None else 0.0, 0)
    return current + 1


def _hangs(child: int, waited: float, work: float) -> bool:
    """Return True if the child has used too much processor time since `work`, or sleeps for too long."""
    return _work_of(child) - work > 2 * SECONDS or (waited > PAUSE and process_state(child) != 'R')


def _work_of(process: int) -> float:
    """Processor time of a process, in seconds (proc_pid_stat(5))."""
    with open(f'/proc/{process}/stat') as file:
        user, system = file.read().rpartition(')')[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')


def _serve(attacks: Attacks, begin: int, writer: int) -> None:
    """Run the attacks and report each; in the child."""
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    started: list[str] = []
    sys.addaudithook(lambda event, args: _watch(event, args, started))
    with tempfile.TemporaryFile() as output:
        for handle in (1, 2):
            os.dup2(output.fileno(), handle)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False), errors='backslashreplace', write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, 'w', closefd=False), errors='backslashreplace', write_through=True)
        for number, (name, attack) in enumerate(attacks()):
            if number < begin:
                continue
            os.write(writer, json.dumps({'number': number, 'name': name}).encode() + b'\n')
            output.truncate(0)
            started.clear()
            before = _reset_peak()
            clock = _cpu_time()
            outcome = _outcome(attack)
            seconds, memory = _cpu_time() - clock, _status('VmHWM') - before
            output.seek(0)
            text = output.read(1 << 20).decode(errors='replace')
            if outcome in ('read', 'refused') and ('Traceback' in text or 'FatalError' in text):
                outcome = f'printed: {text[-1000:]}'
            if started:
                outcome = f'started {started}'
            message = {'name': name, 'outcome': outcome, 'seconds': seconds, 'memory': memory}
            os.write(writer, json.dumps(message).encode() + b'\n')


def _outcome(attack: Callable[[], object]) -> str:
    try:
        attack()
        return 'read'
    except (UserError, UnreadableImage) as error:
        text = printable(error)
        return 'refused' if 0 < len(text) <= SENTENCE and '\n' not in text else f'no sentence: {text[:300]}'
    except SystemExit as error:
        return 'refused' if error.code in (0, 1, 2) else f'exit status {error.code}'
    except BaseException:
        return traceback.format_exc()[-1500:]


def _cpu_time() -> float:
    """Processor time of this process and its children: other processes of the machine do not change it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _watch(event: str, args: tuple, started: list[str]) -> None:
    if event in _PROGRAMS or (event == 'pickle.find_class' and str(args[0]).partition('.')[0] in _CODE):
        started.append(f'{event} {args!r:.200}')


def _reset_peak() -> int:
    """Reset the peak of the resident memory; return the resident memory in bytes (proc_pid_clear_refs(5))."""
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')
    return _status('VmRSS')


def _status(field: str) -> int:
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) << 10


def _address_space() -> int:
    with open('/proc/self/statm') as file:
        return int(file.read().split()[0]) * resource.getpagesize()
