"""The sandbox of one interpreter: namespaces that bubblewrap makes, joined by a fork of the template.

bubblewrap starts only programs; an interpreter is to be a fork, which has imported everything already. So bubblewrap
starts a placeholder (cat), and the fork joins the placeholder's namespaces by setns(2). What bubblewrap does for
the programs that it starts, dropping privileges and installing a seccomp filter, is then done here.

Linux 5.8 or later, x86-64 or aarch64. Before 5.14 the limit on processes counts those of all sandboxes together, and
with an ordinary user's trainer all of that user's.
"""

import ctypes
import json
import os
import platform
import signal
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

_NAMESPACES = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "ipc": 0x08000000,
    "net": 0x40000000,
    "uts": 0x04000000,
}
_NEW_NAMESPACE = 0x7E020000 | 0x80  # any CLONE_NEW… flag
NOBODY = 65534
_MS_READ_ONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_RECURSIVE, _MS_PRIVATE = 32, 1 << 12, 1 << 14, 1 << 18


class Sandbox:
    """A bubblewrap sandbox that holds a placeholder; `hold` must stay open as long as it is to live."""

    def __init__(self, command: list[str], output: int) -> None:
        """Start it. `output` gets what bubblewrap has to complain of."""
        placeholder_in, self.hold = os.pipe()
        self._echo, placeholder_out = os.pipe()
        self._info, info = os.pipe()
        mapped, self._map = os.pipe()
        rules, writer = os.pipe()
        os.write(writer, seccomp_filter())
        os.close(writer)
        options = ["--info-fd", str(info), "--seccomp", str(rules)]
        inherited = [info, rules]
        if os.getuid() == 0:
            options += ["--userns-block-fd", str(mapped)]
            inherited.append(mapped)
        else:
            options += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
        for fd in inherited:
            os.set_inheritable(fd, True)
        duplicates = [
            (os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((placeholder_in, 0), (placeholder_out, 1), (output, 2))
        ]
        try:
            self.pid = os.posix_spawn(command[0], [*command, *options, "cat"], {}, file_actions=duplicates)
        except OSError:
            os.close(self.hold)
            self.release()
            raise
        finally:
            for fd in (placeholder_in, placeholder_out, info, mapped, rules):
                os.close(fd)

    def release(self) -> None:
        """Close what only `join` needs."""
        for fd in (self._echo, self._info, self._map):
            os.close(fd)

    def join(self) -> None:
        """Put this process into the sandbox's namespaces; its next child is in the pid namespace as well.

        Raises OSError where bubblewrap has failed or the kernel refuses.
        """
        info = b""
        while not info.endswith(b"}\n"):
            read = os.read(self._info, 4096)
            if not read:
                raise OSError("bubblewrap made no sandbox")
            info += read
        placeholder = int(json.loads(info)["child-pid"])
        if os.getuid() == 0:
            self._map_users(placeholder)
            os.setgroups([])
        os.write(self.hold, b"\n")  # echoed once bubblewrap has mounted everything and started the placeholder
        if not os.read(self._echo, 1):
            raise OSError("bubblewrap did not start the sandbox")
        process = os.pidfd_open(placeholder)
        _check("setns", _libc.setns(process, sum(_NAMESPACES.values())))

    def _map_users(self, placeholder: int) -> None:
        """Root's sandboxes know two users: root, who sets it up, and nobody, whom the limit on processes binds."""
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{placeholder}/{kind}", "w") as file:
                file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        os.write(self._map, b"\n")


def run_from_read_only(programs: list[str]) -> None:
    """Start this program again, with the files of these programs mounted read-only, unless they are already.

    A fork's /proc/self/exe leads out of the sandbox, to this program's file where it lay when it was started. Where
    that file is the user's own, his interpreters could change its mode, or set it suid. Raises OSError.
    """
    if all(os.statvfs(program).f_flag & os.ST_RDONLY for program in programs):
        return
    user, group = os.getuid(), os.getgid()
    _check("unshare", _libc.unshare(_NAMESPACES["user"] | _NAMESPACES["mnt"]))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _check("mount /", _libc.mount(None, b"/", None, _MS_RECURSIVE | _MS_PRIVATE, None))
    for program in programs:
        path = os.fsencode(program)
        kept = os.statvfs(program).f_flag & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)  # an ordinary user cannot drop them
        _check(f"mount {program}", _libc.mount(path, path, None, _MS_BIND, None))
        flags = _MS_REMOUNT | _MS_BIND | _MS_READ_ONLY | kept
        _check(f"mount {program} read-only", _libc.mount(None, path, None, flags, None))
    os.execv(sys.orig_argv[0], sys.orig_argv)


def first_to_be_killed_for_memory() -> None:
    """Where the machine runs out of memory, the kernel is to take the policy's code and not the trainer."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def die_with_parent() -> None:
    """Be killed when the template is, which cannot kill anybody then. It does not hold for this process's children."""
    _check("parent's death", _libc.prctl(1, signal.SIGKILL, 0, 0, 0))


def adopt_orphans() -> None:
    """Become the parent of interpreters and of bubblewrap's first processes when their own parents end. A sandbox lasts
    until its dead are collected, which the first process of a container may never do."""
    _check("become a subreaper", _libc.prctl(36, 1, 0, 0, 0))


def make_tmp(size: int, files: int, shown: list[str]) -> None:
    """Mount an empty /tmp of at most `size` bytes and so many files. The paths `shown`, which lie there, stay."""
    kept = [(path, os.open(path, os.O_PATH)) for path in shown]
    options = f"size={size},nr_inodes={files},mode=1777".encode()
    _check("mount /tmp", _libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, options))
    for path, fd in kept:
        source = f"/proc/self/fd/{fd}"
        if os.path.isdir(source):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        _check(f"mount {path}", _libc.mount(source.encode(), os.fsencode(path), None, _MS_BIND | _MS_RECURSIVE, None))
        os.close(fd)


def give_up_privileges() -> None:
    """No capability, no way to gain one, and no system call that manages the machine or other processes."""
    prctl_no_new_privileges, prctl_drop_bound, prctl_ambient, prctl_seccomp = 38, 24, 47, 22
    for capability in range(64):
        if _libc.prctl(prctl_drop_bound, capability, 0, 0, 0) != 0:
            break
    _check("clear ambient capabilities", _libc.prctl(prctl_ambient, 4, 0, 0, 0))
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check("drop capabilities", _libc.capset(header, none))
    _check("no new privileges", _libc.prctl(prctl_no_new_privileges, 1, 0, 0, 0))
    rules = ctypes.create_string_buffer(seccomp_filter())
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", (len(rules) - 1) // 8, ctypes.addressof(rules)))
    _check("seccomp", _libc.prctl(prctl_seccomp, 2, ctypes.addressof(program), 0, 0))


def _check(what: str, outcome: int) -> None:
    if outcome != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# The system calls that are refused -----------------------------------------------------------------------------------

# By name: number on x86-64, number on aarch64 (None where it has none); asm/unistd.h of Linux.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "inotify_init": (253, None),  # counts against what the user may have outside
    "inotify_init1": (294, 26),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    # memory that no limit counts
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    # keys
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # large kernel surfaces
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH of linux/audit.h
_CALLS = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "fallocate": (285, 47),
}
_SOCKETS = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: a sandbox has them to itself, unlike AF_VSOCK
# TIOCSTI and TIOCLINUX type into a terminal; FS_IOC_RESVSP and FS_IOC_RESVSP64 are fallocate by another name.
_IOCTLS = (0x5412, 0x541C, 0x40305828, 0x4030582A)
_EPERM, _ENOSYS, _EOPNOTSUPP, _EAFNOSUPPORT = 1, 38, 95, 97


def seccomp_filter() -> bytes:
    """The classic BPF program that answers the calls above, new namespaces and foreign sockets with an error.

    All else is allowed: what a call may do is bounded by the namespaces. Raises OSError on other machines.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(f"no seccomp filter for {machine}, only for {' and '.join(_MACHINES)}")
    column, architecture = _MACHINES[machine]
    calls = {name: numbers[column] for name, numbers in _CALLS.items()}
    rules = [_load(4), _jump(_EQUAL, architecture, 1, 0), _return(_KILL), _load(0)]
    if machine == "x86_64":
        rules += [_jump(_AT_LEAST, 0x40000000, 0, 1), _return(_ENOSYS_ERROR)]  # the numbers of x32
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            rules += [_jump(_EQUAL, number, 0, 1), _return(_error(_EPERM))]
    # clone3 has its flags in memory, where no filter sees them; libc falls back to clone.
    rules += [_jump(_EQUAL, calls["clone3"], 0, 1), _return(_ENOSYS_ERROR)]
    rules += [_jump(_EQUAL, calls["clone"], 0, 4), _load(16), _jump(_ANY_BIT, _NEW_NAMESPACE, 0, 1)]
    rules += [_return(_error(_EPERM)), _return(_ALLOW)]
    for call in ("socket", "socketpair"):
        rules += _choose(calls[call], 0, _SOCKETS, _ALLOW, _error(_EAFNOSUPPORT))
    rules += _choose(calls["ioctl"], 1, _IOCTLS, _error(_EPERM), _ALLOW)
    # In its modes other than 0 it takes space without heed of the limit on a file's size.
    rules += _choose(calls["fallocate"], 1, (0,), _ALLOW, _error(_EOPNOTSUPP))
    return b"".join([*rules, _return(_ALLOW)])


def _choose(call: int, argument: int, values: tuple[int, ...], found: int, other: int) -> list[bytes]:
    """Answer a call with `found` where the low half of one of its arguments is among the values, else with `other`."""
    tests = [_jump(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [
        _jump(_EQUAL, call, 0, 3 + len(values)),
        _load(16 + 8 * argument),
        *tests,
        _return(other),
        _return(found),
    ]


_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def _error(number: int) -> int:
    return 0x00050000 | number


_ENOSYS_ERROR = _error(_ENOSYS)


def _load(offset: int) -> bytes:
    """Load a word of struct seccomp_data: the call's number at 0, the architecture at 4, the arguments from 16."""
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _jump(kind: int, value: int, if_so: int, if_not: int) -> bytes:
    return struct.pack("HBBI", kind, if_so, if_not, value)


def _return(value: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, value)
