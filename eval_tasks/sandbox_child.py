"""The inside of the sandbox: closes the doors, then runs the program. Standard library alone.

python -I sandbox_child.py <seconds> <memory MB> <output bytes>, as root of new namespaces; standard
input is a line with a nonce and the program. The nonce is printed when the last line is reached.
"""

import ctypes
import os
import resource
import signal
import sys
from types import FrameType

LIBC = ctypes.CDLL(None, use_errno=True)
MOUNT_SETATTR = 442  # the same number on every architecture since Linux 5.12
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 0x1, 0x2
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_DUMPABLE = 38, 24, 4
LAST_CAPABILITY = 63
PROCESSES = 32
NOBODY = 65534
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_NOSUID_NODEV = 0x1000, 0x4000, 0x6
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm")


def check(status: int, what: str) -> None:
    if status:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


class MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def close_file_system() -> None:
    """Every mount read-only, then empty writable folders where programs expect them."""
    hide_private_folders()
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


def hide_private_folders() -> None:
    """Cover folders that are not everybody's, such as a home; keep Python's own that lie in one."""
    opened = {path: os.open(path, os.O_PATH) for path in sys.path if os.path.isdir(path)}
    covered = {path: private_ancestor(path) for path in opened}
    for folder in sorted({folder for folder in covered.values() if folder}):
        check(LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID_NODEV, b"mode=755"), folder)
    for path, descriptor in opened.items():
        if covered[path]:
            os.makedirs(path, exist_ok=True)
            source = f"/proc/self/fd/{descriptor}".encode()
            check(LIBC.mount(source, path.encode(), None, MS_BIND | MS_REC, None), path)
        os.close(descriptor)


def private_ancestor(path: str) -> str | None:
    """The topmost folder on the way to `path` that others may not enter."""
    parts = path.split("/")
    for end in range(2, len(parts) + 1):
        ancestor = "/".join(parts[:end])
        if os.stat(ancestor).st_mode & 0o005 != 0o005:
            return ancestor
    return None


def become_nobody() -> None:
    """Root's code gets the uid of nobody and a user namespace in which no other exists."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    check(LIBC.unshare(CLONE_NEWUSER), "user namespace")


def drop_capabilities() -> None:
    """None left, and none to be had by running another program."""
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those the kernel lacks
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capabilities")
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


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

    def out_of_time(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\nno end after {seconds:g} s\n".encode())
        os._exit(1)

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)


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
    code = compile(program, "program.py", "exec")
    limit(seconds, memory_mb, output_bytes)
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException as error:
        sys.stdout.flush()
        os.write(2, f"\n{type(error).__name__}: {error}\n".encode()[-1000:])
        os._exit(1)
    sys.stdout.flush()
    os.write(1, f"\n{nonce}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
