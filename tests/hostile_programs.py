"""Programs for tests/test_sandbox.py: what each tries, by its name, and how it is to end."""

from pathlib import Path

from conftest import ROOT

HERE = Path(__file__).resolve()
# Each must raise OSError, ValueError, or AssertionError where it finds nothing; one sandbox runs all.
DENIED = {
    "opens a connection": "socket.create_connection(('1.1.1.1', 80), 2)",
    "asks for a name": "socket.getaddrinfo('example.org', 80)",
    "sends a datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    "reaches the host of a virtual machine": "socket.socket(40)",
    "opens a packet socket": "socket.socket(17)",
    "reads passwords": "open('/etc/shadow')",
    "reads accounts": "open('/etc/passwd')",
    "follows a symlink out": "os.symlink('/etc/passwd', '/tmp/x')\nopen('/tmp/x')",
    "follows a process's root out": "open('/proc/1/root/etc/passwd')",
    "follows a process's folder out": "open('/proc/1/cwd/../etc/passwd')",
    "leaves by the parent of the root": "open('/../../etc/passwd')",
    "lists the home": f"assert set(os.listdir({str(Path.home())!r})) - PYTHON",
    "lists the temporary files of others": f"assert set(os.listdir({str(HERE.parent)!r})) - PYTHON",
    "reads the tests": f"open({str(HERE)!r})",
    "reads the checkout": f"open({str(ROOT / 'README.md')!r})",
    "looks for services": "os.listdir('/run')",
    "looks for terminals": "os.listdir('/dev/pts')",
    "looks for devices": "open('/dev/zero')",
    "looks for hardware": "os.listdir('/sys')",
    "looks for other processes": "assert [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 9]",
    "reads its tests from the input": "os.read(0, 9)",
    "reads the environment of its caller": "assert 'SECRET_OF_TEST' in os.environ",
    "reads the environment of its supervisor": "open('/proc/1/environ').read()",
    "reads the memory of its supervisor": "open('/proc/1/mem', 'rb')",
    "looks for open files": "assert set(os.listdir('/proc/self/fd')) - {'0', '1', '2'}",
    "opens its supervisor's files": "open('/proc/1/fd/1', 'w')",
    "traces its supervisor": "call(libc.ptrace(16, 1, 0, 0))",
    "traces itself": "call(libc.ptrace(0, 0, 0, 0))",
    "limits its supervisor": "resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))",
    "slows its supervisor": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "raises its own limit": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "becomes root": "os.setuid(0 if os.getuid() else 1)",
    "takes a capability": "call(libc.prctl(47, 2, 1, 0, 0))",
    "mounts": "call(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
    "unmounts": "call(libc.umount2(b'/proc', 2))",
    "changes the root": "os.chroot('/tmp')",
    "nests a user namespace": "call(libc.unshare(0x10000000))",
    "clones a user namespace": "child(libc.syscall(56 if X86 else 220, 0x10000011, 0, 0, 0, 0))",
    "clones a user namespace in another way": "child(libc.syscall(435, (ctypes.c_uint64 * 8)(1 << 28, 0, 0, 0, 17), 64))",
    "makes its supervisor idle": "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
    "sets the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "sets the name of the machine": "socket.sethostname('x')",
    "reads the user's keys": "call(libc.syscall(250 if X86 else 219, 0, -4, 0))",
    "makes a key": "call(libc.syscall(248 if X86 else 217, b'user', b'x', b'x', 1, -2))",
    "asks for a key": "call(libc.syscall(249 if X86 else 218, b'user', b'x', 0, -2))",
    "opens a ring of system calls": "call(libc.syscall(425, 8, ctypes.create_string_buffer(120)))",
    "makes its supervisor idle in another way":
        "call(libc.syscall(314 if X86 else 274, 1, (ctypes.c_uint32 * 12)(48, 5), 0))",
    "counts events": "call(libc.syscall(298 if X86 else 241, EVENTS, 0, -1, -1, 0))",
    "handles page faults": "call(libc.syscall(323 if X86 else 282, 1))",
    "makes a device": "os.mknod('/tmp/null', 0o20666, os.makedev(1, 3))",
    "writes to the root": "open('/x', 'w')",
    "writes to its libraries": "open(os.__file__, 'a')",
    "writes beside its libraries": "open(os.__file__ + '.spoilt', 'w')",
    "writes to a setting of the kernel": "open('/proc/sys/kernel/shmmax', 'w')",
    "takes System V shared memory": "call(libc.shmget(0, 400 << 20, 0o1600))",
    "takes a System V queue": "call(libc.msgget(0, 0o1600))",
    "takes System V semaphores": "call(libc.semget(0, 200, 0o1600))",
    "takes a POSIX queue": "call(libc.mq_open(b'/x', 66, 0o600, None))",
    "takes a file in memory": "os.memfd_create('x')",
    "takes shared pages": "mmap.mmap(-1, 1 << 20)",
    "takes huge pages": "call(libc.mmap(0, 2 << 20, 3, 0x40022, -1, 0))",
    "takes disk behind its output": "call(libc.fallocate(1, 1, ctypes.c_long(0), ctypes.c_long(1 << 30)))",
    "writes a large file": "os.truncate(open('/tmp/large', 'w').name, 2 << 20)",
    "fills the folder": "for n in range(100):\n open(f'/tmp/{n}', 'wb').write(bytes(10**6))",
    "fills shared memory": "for n in range(100):\n open(f'/dev/shm/s{n}', 'wb').write(bytes(10**6))",
    "makes endless files": "for n in range(10**4):\n os.mknod(f'/tmp/n{n}')",
    "opens endless files": "held = [open('/dev/null') for n in range(100)]",
}  # fmt: skip
DENIED_PROGRAM = f"""
import ctypes, errno, mmap, os, platform, resource, shutil, socket, sys, time
libc, X86 = ctypes.CDLL(None, use_errno=True), platform.machine() == "x86_64"
PYTHON = {{part for prefix in (sys.prefix, sys.base_prefix) for part in prefix.split("/")}}
EVENTS = (ctypes.c_uint32 * 28)(1, 112, *[0] * 8, 0x60)  # a software counter of one's own process
def call(status):  # another error than of permission is a deed that got through
    if status < 0 and ctypes.get_errno() in (errno.EPERM, errno.EACCES):
        raise OSError(ctypes.get_errno())
def child(status):
    if status == 0:
        os._exit(0)
    if status < 0:
        raise OSError
done = []
for deed, program in {DENIED!r}.items():
    try:
        exec(program)
        done.append(deed)
    except (OSError, ValueError, AssertionError):
        pass
    for name in os.listdir("/tmp"):
        if os.path.isfile(f"/tmp/{{name}}") or os.path.islink(f"/tmp/{{name}}"):
            os.unlink(f"/tmp/{{name}}")
assert not done, done
"""

FORK = "import os, time\nfor _ in range({}):\n    if os.fork() == 0:\n        {}\n"
# Each ends a sandbox of its own, for the reason beside it. None would do harm to a machine on
# which it is not contained: bombs are of 100 processes, memory is 600 MB.
ENDED = {
    "leaves early": ("print('passed')\nraise SystemExit(0)", "SystemExit"),
    "leaves at once": ("import os\nprint('passed', flush=True)\nos._exit(0)", "passed"),
    "leaves in a signal": (
        "import os, signal\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.1)\n"
        "while True: pass", "exit 0"),
    "leaves in a thread": (
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
        "while True: pass", "exit 0"),
    "guesses the nonce": (
        "import os\nos.write(1, b'\\n' + b'0' * 32 + b'\\n')\nos._exit(0)", "0{32}"),
    "cannot leave": ("import os\nos._exit = lambda code: None\nassert 0", "AssertionError"),
    "says no error": ("import os\nos.write = lambda *a: 0\nassert 0", "AssertionError"),
    "has another assert": (
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = SystemExit\n"
        "assert 0", "AssertionError"),
    "has an error that cannot be said": (
        "import os\nclass E(Exception):\n    __str__ = lambda self: os._exit(0)\nraise E",
        "exit 0"),
    "forks without end": (FORK.format(100, "time.sleep(9)"), "BlockingIOError"),
    "starts threads without end": (
        "import threading, time\nfor _ in range(100):\n"
        "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "can't start"),
    "eats memory": ("x = bytearray(600 << 20)", "MemoryError"),
    "eats private pages": (
        "import mmap\nx = mmap.mmap(-1, 600 << 20, flags=34)\nx.write(bytes(600 << 20))",
        "Cannot allocate memory"),
    "eats memory in many processes": (
        FORK.format(6, "x = b'x' * (100 << 20)\n        time.sleep(9)\n        os._exit(0)")
        + "os.wait()", "MB in all processes, 256 are allowed"),
    "recurses without end": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x) + 1\nf(1)",
        "MemoryError|SIGSEGV|MB in all"),
    "recurses without end in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**5):\n    x = [x]\n"
        "repr(x)", "SIGSEGV|MemoryError"),
    "ends by itself": ("import ctypes\nctypes.string_at(1)", "SIGSEGV"),
    "floods": ("while True:\n    print('x' * 10**6)", "x{200}"),
    "floods its errors": ("import os\nwhile True:\n    os.write(2, b'x' * 10**5)", "x{200}"),
    "ends its group": ("import os\nos.kill(0, 9)", "SIGKILL"),
}  # fmt: skip
# Each goes on until its time is over.
ENDLESS = {
    "never ends": "",
    "sleeps": "import time\ntime.sleep(1000)",
    "lets no signal end it": (
        "import ctypes, signal, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for n in set(signal.valid_signals()) - {9, 19}:\n    signal.signal(n, signal.SIG_IGN)\n"
        "time.sleep(1000)"
    ),
    "computes where no signal is heard": "sum(range(10**13))",
    "computes a huge number": "10 ** 10 ** 8",
    "ends everybody else": (
        "import os\nfor n in 9, 19, 15, 2:\n    os.kill(1, n)\n"
        "try:\n    os.kill(-1, 9)\nexcept ProcessLookupError:\n    pass\n"
    ),
    "leaves a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(1000)\n    os._exit(0)\n"
    ),
}  # fmt: skip

# Where anything is seen that Python does not need, this names it.
SEEN = """
import os, sys
python = f"/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
allowed = {f"{p}/{n}" for p in ("", "/usr", "/usr/local", sys.prefix, sys.base_prefix)
           for n in ("lib", "lib64", "pyvenv.cfg")}
allowed |= {sys.executable, sys.base_prefix + python, "/etc/ld.so.cache"}
allowed |= {"/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/dev/shm", "/proc"}
others = []
for folder, folders, files in os.walk("/"):
    paths = {name: os.path.join(folder, name) for name in folders + files}
    ours = {name for name, path in paths.items() if path in allowed}
    leading = {n for n, path in paths.items() if any(a.startswith(path + "/") for a in allowed)}
    others += [paths[name] for name in set(paths) - ours - leading - {"tmp"}]
    folders[:] = [name for name in folders if name not in ours]
assert not others, others
"""

USEFUL = {
    "numpy": "import numpy\nassert numpy.linalg.eigvalsh(numpy.eye(3)).sum() == 3",
    "processes": "import multiprocessing as m\nwith m.Pool(2) as p: assert p.map(abs, [-1]) == [1]",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "coroutines": "import asyncio\nassert asyncio.run(asyncio.sleep(0, 1)) == 1",
    "another python": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', '0'], check=True)",
    "files": "open('x', 'w').write('x')\nassert open('/tmp/x').read() == 'x'",
    "libraries": "import datetime, decimal, hashlib, random, re, sqlite3, ssl, zoneinfo",
}
