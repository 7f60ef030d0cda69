"""Programs that try to get out, to do harm or to live on, and solutions that try to pass without solving.

`ESCAPES`: each prints ESCAPED if it got what it wanted. The words SECRET_PATH, OUTSIDE, PARENT, PORT and ABSTRACT are
replaced with a file of the parent's, a writable folder of the parent's, its process id, a TCP port on which it listens,
and the name of its abstract Unix socket. Every program is bounded in itself (loops end, sizes are limited), so that a
missing protection makes a test fail and not a machine.

`FORGERIES`: solutions that define no right `add`, whatever the kind of test.
"""

from __future__ import annotations

_TRY = """
import os, sys
def attempt(action, good=lambda value: True):
    try:
        value = action()
    except BaseException as error:
        print("refused", type(error).__name__)
    else:
        print("ESCAPED" if good(value) else "nothing", repr(value)[:80])
"""

_CTYPES = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
"""

ESCAPES: dict[str, str] = {
    "reads a file of the parent": _TRY
    + """
attempt(lambda: open('SECRET_PATH').read())
""",
    "reads the password file": _TRY
    + """
attempt(lambda: open('/etc/passwd').read())
attempt(lambda: open('/etc/shadow').read())
""",
    "climbs out by dots": _TRY
    + """
attempt(lambda: open('../' * 20 + 'SECRET_PATH'.lstrip('/')).read())
""",
    "reports its own end": _TRY
    + """
for number in range(3, 4096):
    try:
        os.write(number, b"started 1\\nend exit 0\\n")
    except OSError:
        continue
    print("ESCAPED", number)
""",
    "follows its own symlink": _TRY
    + """
os.symlink('SECRET_PATH', 'link')
attempt(lambda: open('link').read())
""",
    "makes a hard link": _TRY
    + """
attempt(lambda: (os.link('SECRET_PATH', 'hard'), open('hard').read()))
""",
    "reads the parent's environment": _TRY
    + """
attempt(lambda: open('/proc/PARENT/environ', 'rb').read())
attempt(lambda: open('/proc/1/environ', 'rb').read())
""",
    "goes through /proc/1/root": _TRY
    + """
attempt(lambda: os.listdir('/proc/1/root/'))
""",
    "goes through the parent's /proc/cwd": _TRY
    + """
attempt(lambda: os.listdir('/proc/PARENT/cwd/'))
""",
    "reads the parent's memory": _TRY
    + """
attempt(lambda: open('/proc/PARENT/mem', 'rb'))
""",
    "reads the guard's arguments": _TRY
    + """
attempt(lambda: open(f'/proc/{os.getppid()}/cmdline').read())
""",
    "lists processes": _TRY
    + """
attempt(lambda: os.listdir('/proc'))
""",
    "finds secrets in its environment": _TRY
    + """
attempt(lambda: [name for name in os.environ if 'SECRET' in name], bool)
""",
    "looks for open descriptors": _TRY
    + """
for fd in range(3, 256):
    try:
        os.fstat(fd)
    except OSError:
        continue
    print('ESCAPED', fd)
""",
    "opens by handle": _TRY
    + _CTYPES
    + """
handle = ctypes.create_string_buffer(128)
handle[0] = 64
mount = ctypes.c_int()
if libc.name_to_handle_at(-100, b'/', handle, ctypes.byref(mount), 0) == 0:
    print('ESCAPED')
""",
    "reads kernel logs and devices": _TRY
    + """
attempt(lambda: open('/dev/kmsg', 'rb'))
attempt(lambda: open('/dev/mem', 'rb'))
attempt(lambda: os.listdir('/sys/kernel'))
""",
    "makes a device": _TRY
    + """
attempt(lambda: (os.mknod('disk', 0o60600, os.makedev(254, 0)), open('disk', 'rb').read(1)))
""",
    "reads the home folder": _TRY
    + """
attempt(lambda: os.listdir('/root'))
attempt(lambda: os.listdir('/home'))
""",
    "writes outside": _TRY
    + """
attempt(lambda: open('OUTSIDE/written', 'w').write('x'))
""",
    "writes into the standard library": _TRY
    + """
attempt(lambda: open(os.__file__, 'a'))
attempt(lambda: os.rename(os.__file__, os.__file__ + 'x'))
""",
    "changes a mode outside": _TRY
    + """
attempt(lambda: os.chmod('SECRET_PATH', 0o777))
attempt(lambda: os.unlink('SECRET_PATH'))
""",
    "remounts": _TRY
    + _CTYPES
    + """
attempt(lambda: libc.mount(None, b'/', None, 32 | 4096, None), lambda v: v == 0)
attempt(lambda: libc.umount2(b'/box', 2), lambda v: v == 0)
""",
    "changes its root": _TRY
    + """
attempt(lambda: os.chroot('.'))
""",
    "fills the disk": _TRY
    + """
total = 0
try:
    for number in range(60):
        with open(f'f{number}', 'wb') as f:
            f.write(bytes(4 << 20))
        total += 4
except OSError:
    pass
print('ESCAPED' if total > 40 else total)
""",
    "writes one huge file": _TRY
    + """
try:
    with open('big', 'wb') as f:
        for _ in range(30):
            f.write(bytes(4 << 20))
    print('ESCAPED')
except OSError as error:
    print(error)
""",
    "makes many files": _TRY
    + """
try:
    for n in range(40000):
        os.close(os.open(f'n{n}', os.O_CREAT))
    print('ESCAPED')
except OSError as error:
    print(error)
""",
    "deletes its own folder": """
import os, shutil
shutil.rmtree(os.getcwd(), ignore_errors=True)
print('done')
""",
    "locks its own folder": """
import os
os.makedirs('a/b')
os.chmod('a/b', 0)
os.chmod('a', 0)
os.chmod('.', 0)
""",
    "nests folders deeply": """
import os
for _ in range(1500):
    os.mkdir('d')
    os.chdir('d')
""",
    "connects to the parent": _TRY
    + """
import socket

attempt(lambda: socket.create_connection(('127.0.0.1', PORT), 1))
""",
    "asks a name server": _TRY
    + """
import socket

attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)))
""",
    "listens": _TRY
    + """
import socket

attempt(lambda: socket.create_server(('0.0.0.0', 0)))
""",
    "opens a raw socket": _TRY
    + """
import socket

attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
""",
    "uses an abstract Unix socket": _TRY
    + r"""
import socket

attempt(lambda: socket.socket(socket.AF_UNIX).connect('\0ABSTRACT'))
""",
    "opens a socket by ctypes": _TRY
    + _CTYPES
    + """
print('ESCAPED' if libc.socket(2, 1, 0) >= 0 else '')
""",
    "forks without end": _TRY
    + """
import time
made = 0
try:
    for _ in range(400):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    pass
print('ESCAPED' if made > 100 else made)
""",
    "forks from every child": """
import os
try:
    for _ in range(12):
        os.fork()
except OSError:
    pass
while True:
    pass
""",
    "starts many threads": _TRY
    + """
import threading, time
made = 0
try:
    for _ in range(400):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print('ESCAPED' if made > 100 else made)
sys.stdout.flush()
os._exit(0)
""",
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (0, 1, 2):
            os.close(fd)
        time.sleep(600)
    os._exit(0)
print('left')
""",
    "ignores every signal and goes on": """
import signal, time, os
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1)
""",
    "stops itself": """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "signals the parent": _TRY
    + """
attempt(lambda: os.kill(PARENT, 0))
attempt(lambda: os.kill(PARENT, 10))
""",
    "signals everybody": """
import os, signal
signal.signal(15, signal.SIG_IGN)
os.kill(-1, 15)
print('sent')
""",
    "kills everybody": """
import os
os.kill(-1, 9)
print('sent')
""",
    "kills its parent": """
import os
try:
    os.kill(os.getppid(), 9)
except OSError:
    pass
print('sent')
""",
    "kills its process group": """
import os
os.killpg(0, 9)
""",
    "traces the parent": _TRY
    + _CTYPES
    + """
for pid in (PARENT, os.getppid()):
    print('ESCAPED' if libc.ptrace(16, pid, 0, 0) == 0 else '')
""",
    "reads memory across processes": _TRY
    + _CTYPES
    + """
buffer = ctypes.create_string_buffer(8)
class Vector(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
v = Vector(ctypes.addressof(buffer), 8)
read = libc.process_vm_readv(os.getppid(), ctypes.byref(v), 1, ctypes.byref(v), 1, 0)
print('ESCAPED' if read > 0 else '')
""",
    "runs a shell": _TRY
    + """
import subprocess

attempt(lambda: subprocess.run(['/bin/sh', '-c', 'id'], check=True))
""",
    "becomes root": _TRY
    + """
attempt(lambda: os.setuid(0))
attempt(lambda: os.setgroups([0]))
""",
    "enters a new user namespace": _TRY
    + _CTYPES
    + """
print('ESCAPED' if libc.unshare(0x10000000) == 0 else '')
""",
    "clones into a new user namespace": _TRY
    + _CTYPES
    + """
if os.uname().machine == 'x86_64':
    pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    print('ESCAPED' if pid > 0 else '')
""",
    "raises its limits": _TRY
    + """
import resource

attempt(lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)))
attempt(lambda: resource.setrlimit(resource.RLIMIT_CPU, (1 << 40, 1 << 40)))
attempt(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1 << 40, 1 << 40)))
attempt(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40)))
""",
    "takes all memory": """
blocks = []
for _ in range(3000):
    blocks.append(bytearray(1 << 20))
print('ESCAPED')
""",
    "takes memory in many processes": """
import os, time
for _ in range(10):
    if os.fork() == 0:
        block = bytearray(b'x') * (30 << 20)
        time.sleep(30)
        os._exit(0)
time.sleep(30)
print('ESCAPED')
""",
    "hides memory in a memfd": _TRY
    + """
attempt(lambda: os.memfd_create('x'))
""",
    "computes for ever": """
while True:
    pass
""",
    "computes for ever in C": """
print(pow(3, 1 << 40) > 0)
""",
    "burns time in short-lived children": """
import os
while True:
    if os.fork() == 0:
        for _ in range(10 ** 5):
            pass
        os._exit(0)
    os.wait()
""",
    "sleeps": """
import time
time.sleep(1000)
""",
    "waits for input": """
import sys
print(sys.stdin.read() == '')
open('fifo' if __import__('os').mkfifo('fifo') is None else '')
""",
    "prints without end": """
while True:
    print('x' * 65536)
""",
    "prints errors without end": """
import sys
while True:
    sys.stderr.write('x' * 65536)
""",
    "closes its output and sleeps": """
import os, time
for fd in (0, 1, 2):
    os.close(fd)
time.sleep(1000)
""",
    "opens many files": _TRY
    + """
found = []
try:
    for _ in range(2000):
        found.append(open('/dev/null'))
    print('ESCAPED')
except OSError:
    pass
""",
    "recurses for ever": """
import sys
sys.setrecursionlimit(10 ** 9)
def f():
    return f()
f()
""",
    "crashes the interpreter": """
import ctypes
ctypes.string_at(0)
""",
    "parses deep JSON": """
import json
json.loads('[' * 10 ** 6)
""",
    "nests brackets deeply": """
eval('(' * 10 ** 5)
""",
    "holds NUL bytes": "print(1)\0",
    "holds lone surrogates": "print('\ud800')",
    "prints bytes that are no text": """
import sys
sys.stdout.buffer.write(bytes(range(256)))
""",
    "reads its own maps and memory": _TRY
    + """
attempt(lambda: open('/proc/self/maps').read())
attempt(lambda: open('/proc/self/mem', 'rb'))
attempt(lambda: os.listdir('/proc/self/fd'))
attempt(lambda: os.readlink('/proc/self/exe'))
attempt(lambda: open('/dev/fd/3').read())
""",
    "takes a descriptor from another process": _TRY
    + _CTYPES
    + """
for pid in (PARENT, os.getppid(), 1):
    handle = libc.syscall(434, pid, 0)
    for fd in range(3, 16):
        if handle >= 0 and libc.syscall(438, handle, fd, 0) >= 0:
            print('ESCAPED', pid, fd)
""",
    "opens its parent for signals": _TRY
    + """
import signal
attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(PARENT), 10))
""",
    "uses io_uring and bpf": _TRY
    + _CTYPES
    + """
params = ctypes.create_string_buffer(256)
print('ESCAPED' if libc.syscall(425, 2, params) >= 0 else '')
print('ESCAPED' if libc.syscall(321, 0, params, 64) >= 0 else '')
print('ESCAPED' if libc.syscall(298, params, 0, -1, -1, 0) >= 0 else '')
""",
    "finds its terminal or the parent's session": _TRY
    + """
import fcntl, termios
attempt(lambda: open('/dev/tty', 'w').write('x'))
attempt(lambda: fcntl.ioctl(0, termios.TIOCSTI, b'x'))
""",
    "swaps a folder for a link while it is deleted": """
import os
if os.fork() == 0:
    while True:
        for target in ('SECRET_PATH', 'OUTSIDE', '/'):
            try:
                os.symlink(target, 'swap')
                os.unlink('swap')
                os.mkdir('swap')
                os.rmdir('swap')
            except OSError:
                pass
print('left')
""",
    "shares memory with others": _TRY
    + _CTYPES
    + """
import mmap
attempt(lambda: os.open('/dev/shm/tandem', os.O_RDWR))
for key in range(1, 64):
    print('ESCAPED' if libc.shmget(key, 0, 0) >= 0 else '', end='')
""",
    "replaces its own program": """
import os
open('main.py', 'w').write('print(1)')
os.remove('main.py')
""",
}

FORGERIES: dict[str, str] = {
    "is empty": "",
    "is no Python": """
def add(:
""",
    "exits with success": """
import os
os._exit(0)
""",
    "exits by SystemExit": """
raise SystemExit(0)
""",
    "exits inside the call": """
import os
def add(*a):
    os._exit(0)
""",
    "raises SystemExit inside the call": """
def add(*a):
    raise SystemExit(0)
""",
    "prints markers": """
print('all tests passed')
print('OK')
print('1 1 1')
""",
    "prints markers inside the call": r"""
def add(*a):
    print("print('all tests passed')\nprint('OK')\nprint('1 1 1')\n")
""",
    "returns what is equal to everything": """
class E:
    def __eq__(self, o):
        return True
    def __ne__(self, o):
        return False
    def __hash__(self):
        return 5
def add(*a):
    return E()
""",
    "returns an int that is equal to everything": """
class E(int):
    def __eq__(self, o):
        return True
    __hash__ = int.__hash__
def add(*a):
    return E(77)
""",
    "returns what subtracts to nothing": """
class E:
    def __sub__(self, o):
        return 0
    __rsub__ = __sub__
    def __abs__(self):
        return 0
    def __lt__(self, o):
        return True
    __gt__ = __le__ = __ge__ = __lt__
def add(*a):
    return E()
""",
    "contains everything": """
class E:
    def __contains__(self, o):
        return True
    def __iter__(self):
        return iter(())
    def __len__(self):
        return 0
def add(*a):
    return E()
""",
    "says yes to every method": """
class E:
    def __getattr__(self, n):
        return lambda *a: True
def add(*a):
    return E()
""",
    "replaces builtins": """
import builtins
builtins.AssertionError = Exception
builtins.isinstance = lambda *a: True
builtins.all = builtins.any = lambda *a: True
builtins.abs = lambda x: 0
abs = all = len = lambda *a: 0
def add(*a):
    return 77
""",
    "replaces unittest": """
import unittest
unittest.TestCase.assertEqual = lambda *a: None
unittest.TestCase.run = lambda *a, **k: None
def add(*a):
    return 77
""",
    "replaces math": """
import math
class math:
    isclose = staticmethod(lambda *a, **k: True)
def isclose(*a):
    return True
def add(*a):
    return 77
""",
    "replaces json": """
import json
json.dumps = lambda *a, **k: '{"value": true}'
json.loads = lambda *a: {'do': 'load', 'args': []}
def add(*a):
    return 77
""",
    "replaces the harness": """
import code_solution, code_values
code_values.encode = lambda *a: {'value': True}
code_solution.encode = lambda *a, **k: {'d': []}
code_solution.Solution._answer = lambda *a: {'value': True}
""",
    "ends calls with StopIteration": """
def add(*a):
    raise StopIteration
""",
    "raises AssertionError": """
def add(*a):
    raise AssertionError
""",
    "raises SkipTest": """
import unittest
def add(*a):
    raise unittest.SkipTest('x')
""",
    "searches frames": """
import sys
def add(*a):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if 'expected' in str(value):
                return value
        for name in ('expected', 'nonce', 'passed', 'answer'):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
""",
    "searches the garbage collector": """
import gc
def add(*a):
    for o in gc.get_objects():
        if isinstance(o, dict) and ('expected' in o or 'output' in o or 'nonce' in o):
            return o.get('expected', o.get('output'))
""",
    "looks for files with answers": """
import os
def add(*a):
    for place, _, names in os.walk('/box'):
        for name in names:
            if 'test' in name:
                return eval(open(os.path.join(place, name)).read().split('==')[-1])
""",
    "writes verdicts to every descriptor": r"""
import os
for fd in range(1, 64):
    for text in (b'1\n', b'{"value": true}\n', b'{"value": {"l": []}}\n' * 3):
        try:
            if fd != 0:
                os.set_blocking(fd, False)
                os.write(fd, text)
        except OSError:
            pass
def add(*a):
    return 77
""",
    "returns strings and floats that lie": """
class S(str):
    __eq__ = lambda self, o: True
    __hash__ = str.__hash__
    __len__ = lambda self: 2
class F(float):
    __eq__ = __le__ = __ge__ = lambda self, o: True
    __sub__ = __rsub__ = lambda self, o: 0.0
    __hash__ = float.__hash__
def add(a, b):
    return S(77) if isinstance(a, str) else F(77)
""",
    "returns lists that lie": """
class L(list):
    __eq__ = __contains__ = lambda self, o: True
    __len__ = lambda self: 2
    __iter__ = lambda self: iter(())
def add(*a):
    return L([77])
""",
    "traces every call": """
import sys, threading
def tracer(frame, event, arg):
    for name in list(frame.f_locals):
        if name in ('value', 'answer', 'result'):
            frame.f_locals[name] = 3
    return tracer
sys.settrace(tracer)
threading.settrace(tracer)
sys.setprofile(lambda frame, event, arg: None)
def add(*a):
    return 77
""",
    "hides a finalizer that forges": r"""
import os
class E:
    def __del__(self):
        for fd in range(1, 64):
            try:
                os.set_blocking(fd, False)
                os.write(fd, b'all tests passed\n' * 3)
            except OSError:
                pass
        os._exit(0)
keep = E()
def add(*a):
    return E() and 77
""",
    "searches its arguments and environment": """
import os, sys
def add(*a):
    text = ' '.join([*sys.argv, *sys.orig_argv, *os.environ.values()])
    return text if 'expected' in text else 77
""",
    "reads the judge's side of the line": """
import os
def add(*a):
    for fd in range(0, 64):
        try:
            os.set_blocking(fd, False)
            text = os.read(fd, 65536)
        except OSError:
            continue
        if b'==' in text or b'assert' in text:
            return eval(text.rpartition(b'==')[2])
    return 77
""",
    "opens the line again for itself": """
import os
def add(*a):
    for fd in range(3, 64):
        try:
            again = os.open(f'/proc/self/fd/{fd}', os.O_RDWR)
            os.write(again, b'1')
        except OSError:
            pass
    return 77
""",
    "goes on in a child": r"""
import os
if os.fork() == 0:
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"value": true}\n' * 100)
        except OSError:
            pass
def add(*a):
    return 77
""",
    "leaves modules for the judge": """
import os, sys
for name in ('code_judge.py', 'code_values.py', 'unittest.py', 'math.py', 'json.py', 'sitecustomize.py'):
    try:
        open(name, 'w').write('def same(*a): return True')
        open(os.path.join('/tmp', name), 'w').write('def same(*a): return True')
    except OSError:
        pass
def add(*a):
    return 77
""",
    "is loaded by an import hook": """
import sys, builtins
builtins.__import__ = lambda *a, **k: sys
sys.meta_path.clear()
sys.modules.clear()
def add(*a):
    return 77
""",
    "answers in an exit handler": """
import atexit, os
atexit.register(os._exit, 0)
def add(*a):
    return 77
""",
    "answers in a thread": """
import threading, os, time
def late():
    time.sleep(0.05)
    print('all tests passed')
    os._exit(0)
threading.Thread(target=late).start()
def add(*a):
    time.sleep(0.2)
    return 77
""",
    "handles signals": """
import signal, os
for s in (6, 14, 15):
    signal.signal(s, lambda *a: os._exit(0))
os.kill(os.getpid(), 15)
def add(*a):
    return 77
""",
    "calls back": """
import sys
def add(*a):
    for name in ('solution', '__main__', 'code_solution'):
        module = sys.modules.get(name)
    class C:
        def __call__(self, *a):
            return C()
        def __len__(self):
            return 2 ** 62
    return C()
""",
    "sends references that do not exist": """
import json, code_solution
code_solution.Solution._answer = lambda self, m: {'value': {'o': 10 ** 9}}
""",
    "sends other tags": """
import code_solution
code_solution.Solution._answer = lambda self, m: {'value': {'k': 0}}
""",
    "sends callbacks": """
import code_solution
n = [0]
def answer(self, m):
    n[0] += 1
    return {'callback': 0, 'args': []} if n[0] < 1000 else {'value': True}
code_solution.Solution._answer = answer
""",
    "sends deep JSON": r"""
import code_solution
class L:
    pass
def send(self, m):
    self.writing.write('{"value": ' + '{"l": [' * 5000 + ']}' * 5000 + '}\n')
    self.writing.flush()
import code_values
code_values.Line.send = send
""",
    "sends a huge number": r"""
import code_values
def send(self, m):
    self.writing.write('{"value": ' + '9' * 10 ** 5 + '}\n')
    self.writing.flush()
code_values.Line.send = send
""",
    "sends what is no text": r"""
import os, code_values
def send(self, m):
    os.write(self.writing.fileno(), b'\xff\xfe\x00\n')
code_values.Line.send = send
""",
    "sends mutations": """
import code_solution
code_solution.Solution._answer = lambda self, m: {'value': None, 'args': [{'l': []}, {'l': []}, {'d': []}]}
""",
    "never answers": """
import time
def add(*a):
    time.sleep(100)
""",
    "takes memory": """
def add(*a):
    return bytearray(1 << 33)
""",
    "floods the line": """
import code_values
def send(self, m):
    while True:
        self.writing.write('x' * 65536)
code_values.Line.send = send
""",
    "floods stdout": """
def add(*a):
    while True:
        print('x' * 65536)
""",
}
