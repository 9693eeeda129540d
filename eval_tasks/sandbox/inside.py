"""The inside of the sandbox: closes the doors, then runs the program. Standard library only.

python -I inside.py <seconds> <memory MB> <output bytes>, as root of new namespaces; standard input
is a line with a nonce and the program. The nonce is printed when the last line is reached. The
first process of the namespaces only watches time and memory: the program, which runs in a second
one, can neither stop nor outlive it.
"""

import ctypes
import errno
import os
import resource
import select
import signal
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
MOUNT_SETATTR = 442  # the same number on every architecture since Linux 5.12
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
LAST_CAPABILITY = 63
PROCESSES = 32
OPEN_FILES = 32  # a pair of sockets holds up to 0.4 MB that is in no process's size
LOOKS_EVERY = 0.02  # seconds; a core writes some 100 MB in that time
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_NOSUID_NODEV, MNT_DETACH = 0x1000, 0x4000, 0x6, 2
# A number of files, too: an empty one takes a kilobyte of the kernel's memory.
TMP_OPTIONS = b"size=64m,nr_inodes=4096,mode=1777"
OLD_ROOT = "/.outside"
# What no program that solves a task needs, by name, the argument that is refused (else all) and why.
EQUAL_MASKED, GREATER, NOT_EQUAL = 7, 6, 1
REFUSED: list[tuple[str, tuple[int, int, int, int] | None]] = [
    # memory that is in no process's size, so that the supervisor does not see it
    *((name, None) for name in ("shmget", "msgget", "semget", "mq_open", "memfd_create")),
    *((name, None) for name in ("io_uring_setup", "bpf", "perf_event_open", "userfaultfd")),
    ("mmap", (3, EQUAL_MASKED, 0x21, 0x21)),  # MAP_SHARED | MAP_ANONYMOUS
    ("mmap", (3, EQUAL_MASKED, 0x40000, 0x40000)),  # MAP_HUGETLB
    ("fallocate", None),  # takes disk past the limit on file size
    # a user namespace would give all capabilities back, within it
    ("unshare", None),
    ("clone", (0, EQUAL_MASKED, CLONE_NEWUSER, CLONE_NEWUSER)),
    ("clone3", None),
    # families that have no network namespace, such as AF_VSOCK; the last that has is AF_INET6
    ("socket", (0, GREATER, 10, 0)),
    # the supervisor, and keys of the user
    *((name, None) for name in ("ptrace", "setpriority", "sched_setscheduler", "sched_setattr")),
    ("prlimit64", (0, NOT_EQUAL, 0, 0)),
    *((name, None) for name in ("keyctl", "add_key", "request_key")),
]
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000


def check(status: int, what: str) -> None:
    if status:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def visible() -> list[str]:
    """What Python needs: its libraries, its executable and the shared libraries of the system."""
    prefixes = (sys.prefix, sys.base_prefix, "/usr/local", "/usr", "")
    paths = [f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64", "pyvenv.cfg")]
    paths += [sys.executable, os.path.realpath(sys.executable), "/etc/ld.so.cache"]
    paths += ["/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/proc"]
    return [path for path in paths if os.path.exists(path)]


def close_file_system() -> None:
    """A root of its own: what Python needs, at its own paths and read-only, and an empty /tmp."""
    sources = {path: os.path.realpath(path) for path in visible()}
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID_NODEV, b"size=1m,mode=755")
    os.mkdir(f"/tmp{OLD_ROOT}")
    check(LIBC.pivot_root(b"/tmp", f"/tmp{OLD_ROOT}".encode()), "new root")
    os.chdir("/")
    os.mkdir("/tmp")
    # Before what is visible, which may lie in it.
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID_NODEV, TMP_OPTIONS)
    for path, source in sorted(sources.items()):
        if os.path.isdir(OLD_ROOT + source):
            os.makedirs(path, exist_ok=True)
        elif not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        mount(OLD_ROOT + source, path, "", MS_BIND | MS_REC, None)
    os.symlink("/tmp", "/dev/shm")
    check(LIBC.umount2(OLD_ROOT.encode(), MNT_DETACH), "old root")
    os.rmdir(OLD_ROOT)
    set_mount("/", AT_RECURSIVE, MountAttr(set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID))
    set_mount("/tmp", 0, MountAttr(clear=MOUNT_ATTR_RDONLY))
    os.chdir("/tmp")


def mount(source: str, path: str, kind: str, flags: int, options: bytes | None) -> None:
    check(LIBC.mount(source.encode(), path.encode(), kind.encode(), flags, options), path)


def set_mount(path: str, flags: int, attributes: MountAttr) -> None:
    size = ctypes.sizeof(attributes)
    arguments = (path.encode(), flags, ctypes.byref(attributes), size)
    check(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, *arguments), "read-only file system")


def become_nobody() -> None:
    """Root's code gets the uid of nobody and a user namespace in which no other exists."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    check(LIBC.unshare(CLONE_NEWUSER), "user namespace")


def drop_capabilities() -> None:
    """Drop all of them, so that running another program gives none back."""
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those the kernel lacks
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capabilities")
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    # `unshare --kill-child` set this, but a change of uid clears it.
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "end with the caller")


class Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [
        ("argument", ctypes.c_uint), ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64), ("second", ctypes.c_uint64),
    ]  # fmt: skip


def refuse_system_calls() -> None:
    """A seccomp filter, through libseccomp: it knows the numbers of every architecture."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(SCMP_ACT_ALLOW))
    for name, compared in REFUSED:
        number = library.seccomp_syscall_resolve_name(name.encode())
        # Where clone3 does not exist, the C library takes clone, whose arguments a filter can read.
        error = errno.ENOSYS if name == "clone3" else errno.EPERM
        arguments = ctypes.byref(Comparison(*compared)) if compared else None
        action = SCMP_ACT_ERRNO | error
        if library.seccomp_rule_add_array(rules, action, number, 1 if compared else 0, arguments):
            sys.exit(f"libseccomp cannot refuse {name}")
    if library.seccomp_load(rules):
        sys.exit("the kernel takes no seccomp filter")


def limit(seconds: float, memory_mb: int, output_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: output_bytes,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 1,  # with 0 a core would still be sent to the system's collector
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def run(program: str, nonce: str) -> None:
    """Never returns: the process ends with 0 after the program's last line, with 1 before it."""
    write, end = os.write, os._exit  # the program may replace these
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
    except BaseException as error:
        write(2, f"\n{type(error).__name__}: {error}\n".encode()[-1000:])
        end(1)
    write(1, f"\n{nonce}\n".encode())
    end(0)


def supervise(process: int, seconds: float, memory_mb: int) -> None:
    """Never returns: its own end ends every process of the namespace."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no other signal of the program's reaches it
    end, handle = time.monotonic() + seconds, os.pidfd_open(process)
    while not select.select([handle], [], [], LOOKS_EVERY)[0]:
        if time.monotonic() > end:
            os.write(2, f"\nno end after {seconds:g} s\n".encode())
            os._exit(1)
        if (used := resident_mb()) > memory_mb:
            os.write(2, f"\n{used} MB in all processes, {memory_mb} are allowed\n".encode())
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code < 0:
        os.write(2, f"\nended by {signal.Signals(-code).name}\n".encode())
    os._exit(min(abs(code), 1))


def resident_mb() -> int:
    """Memory of all processes of the namespace: RLIMIT_AS limits each one separately."""
    kilobytes = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/status") as status:
                    lines = [line for line in status if line.startswith(("VmRSS", "VmSwap"))]
            except OSError:
                continue  # it ended meanwhile
            kilobytes += sum(int(line.split()[1]) for line in lines)
    return kilobytes >> 10


def main() -> None:
    seconds, memory_mb, output_bytes = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    nonce, _, program = sys.stdin.read().partition("\n")
    os.close(0)
    with open("/proc/self/uid_map") as uids:
        is_root = uids.read().split()[1] == "0"
    close_file_system()
    if is_root:
        become_nobody()
    drop_capabilities()
    refuse_system_calls()
    process = os.fork()
    if process:
        supervise(process, seconds, memory_mb)
    # A separate group: signals to it reach neither the supervisor nor the caller.
    os.setsid()
    limit(seconds, memory_mb, output_bytes)
    run(program, nonce)


if __name__ == "__main__":
    main()
