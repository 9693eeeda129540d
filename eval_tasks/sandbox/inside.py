"""The inside of the sandbox: closes the doors, then runs the program. Standard library only.

python -I inside.py <seconds> <memory MB> <output bytes> <home>, as root of new namespaces;
standard input is a line with a nonce and the program. The nonce is printed when the last line is
reached. The first process of the namespaces only watches time and memory: the program, which runs
in a second one, can neither stop nor outlive it.
"""

import ctypes
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
LOOKS_EVERY = 0.02  # seconds; a core writes some 100 MB in that time
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_NOSUID_NODEV = 0x1000, 0x4000, 0x6
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm")
# A read-only mount does not block sockets of services or terminals.
HIDDEN = ("/run", "/dev/pts")


def check(status: int, what: str) -> None:
    if status:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def close_file_system(home: str) -> None:
    """Every mount read-only, then empty writable folders where programs expect them."""
    hide_folders({os.path.realpath(folder) for folder in (*HIDDEN, home)} - {"/"})
    attributes = MountAttr(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    status = LIBC.syscall(
        MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), size
    )
    check(status, "read-only file system")
    for folder in WRITABLE:
        if os.path.isdir(folder):
            options = b"size=64m,mode=777"
            check(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, options), folder)
    os.chdir("/tmp")


def hide_folders(hidden: set[str]) -> None:
    """Cover `hidden` and folders on Python's path that not all may read; keep Python's own."""
    opened = {path: os.open(path, os.O_PATH) for path in sys.path if os.path.isdir(path)}
    covered = {path: hidden_ancestor(path, hidden) for path in opened}
    folders = {folder for folder in covered.values() if folder}
    folders |= {f for f in hidden if os.path.isdir(f) and not hidden_ancestor(f, folders)}
    for folder in sorted(folders):
        check(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, b"mode=755"), folder)
    for path, descriptor in opened.items():
        if covered[path]:
            os.makedirs(path, exist_ok=True)
            source = f"/proc/self/fd/{descriptor}".encode()
            check(LIBC.mount(source, path.encode(), None, MS_BIND | MS_REC, None), path)
        os.close(descriptor)


def hidden_ancestor(path: str, hidden: set[str]) -> str | None:
    """The topmost folder on the way to `path` that is hidden, or that others may not enter."""
    parts = path.split("/")
    for end in range(2, len(parts) + 1):
        ancestor = "/".join(parts[:end])
        if ancestor in hidden or os.stat(ancestor).st_mode & 0o005 != 0o005:
            return ancestor
    return None


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


def limit(seconds: float, memory_mb: int, output_bytes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: output_bytes,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def run(program: str, nonce: str) -> None:
    """Never returns: the process ends with 0 after the program's last line, with 1 before it."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        sys.stdout.flush()
        os.write(2, f"\n{type(error).__name__}: {error}\n".encode()[-1000:])
        os._exit(1)
    sys.stdout.flush()
    os.write(1, f"\n{nonce}\n".encode())
    os._exit(0)


def supervise(process: int, seconds: float, memory_mb: int) -> None:
    """Never returns: its own end ends every process of the namespace."""
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
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/statm") as sizes:
                    pages += int(sizes.read().split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile
    return pages * resource.getpagesize() >> 20


def main() -> None:
    seconds, memory_mb, output_bytes = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    nonce, _, program = sys.stdin.read().partition("\n")
    os.close(0)
    with open("/proc/self/uid_map") as uids:
        is_root = uids.read().split()[1] == "0"
    close_file_system(sys.argv[4])
    if is_root:
        become_nobody()
    drop_capabilities()
    process = os.fork()
    if process:
        supervise(process, seconds, memory_mb)
    # A separate group: signals to it reach neither the supervisor nor the caller.
    os.setsid()
    limit(seconds, memory_mb, output_bytes)
    run(program, nonce)


if __name__ == "__main__":
    main()
