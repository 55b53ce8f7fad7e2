"""The filter is run by an interpreter of classic BPF of its own, and its numbers are compared with Linux's headers."""

import errno
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("namespaces and seccomp are Linux's", allow_module_level=True)

from axpo.tools.interpreter import confine

X86, ARM = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
I386 = 0x40000003
ALLOW, KILL = "allow", "kill"
ARCHITECTURES = {"x86_64": X86, "aarch64": ARM}
HEADERS = {
    "x86_64": [f"/usr/include/{folder}asm/unistd_64.h" for folder in ("x86_64-linux-gnu/", "")],
    "aarch64": ["/usr/include/asm-generic/unistd.h"],
}


def verdict(program: bytes, number: int, architecture: int, *arguments: int) -> str | int:
    """What the filter says of a call: ALLOW, KILL, or the number of an error."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    place, accumulator, steps = 0, 0, 0
    while True:
        code, if_so, if_not, value = struct.unpack_from("<HBBI", program, 8 * place)
        place, steps = place + 1, steps + 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            assert value % 4 == 0
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:  # BPF_RET | BPF_K
            assert steps < 4096
            action, number = value & 0xFFFF0000, value & 0xFFFF
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(action) or (number if action == 0x00050000 else "?")
        else:
            # BPF_JMP | BPF_K with BPF_JEQ, BPF_JGE, BPF_JSET
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            place += if_so if holds else if_not


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return str(request.param)


def test_every_call_of_the_table_is_refused_and_no_other(machine: str) -> None:
    program, architecture = confine.seccomp_filter(), ARCHITECTURES[machine]
    column = list(ARCHITECTURES).index(machine)
    refused = {numbers[column] for numbers in confine._REFUSED.values()}
    asked = {name: numbers[column] for name, numbers in confine._CALLS.items()}
    for number in range(1024):
        expected: str | int = errno.EPERM if number in refused else ALLOW
        if number == asked["clone3"]:
            expected = errno.ENOSYS
        if number in (asked["socket"], asked["socketpair"]):
            expected = errno.EAFNOSUPPORT  # the family is 0 here
        assert verdict(program, number, architecture) == expected


def test_the_program_is_one_that_the_kernel_takes(machine: str) -> None:
    program = confine.seccomp_filter()
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
    assert verdict(program, 0, ARCHITECTURES[machine]) == ALLOW


@pytest.mark.parametrize("machine", HEADERS, indirect=True)
def test_numbers_are_those_of_the_headers(machine: str) -> None:
    header = next((path for path in map(Path, HEADERS[machine]) if path.exists()), None)
    if header is None:
        pytest.skip("Linux's headers are not installed")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
    column = list(ARCHITECTURES).index(machine)
    newest = max(int(number) for name, number in found.items() if name != "syscalls")
    checked = 0
    for name, numbers in {**confine._REFUSED, **confine._CALLS}.items():
        number = numbers[column]
        if number is None:
            assert name not in found
        elif name in found:
            assert number == int(found[name]), name
            checked += 1
        else:
            assert number > newest, name  # the kernel of these headers did not have it
    assert checked > 50


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no seccomp filter for riscv64, only for x86_64 and aarch64"):
        confine.seccomp_filter()


@pytest.mark.parametrize("architecture", [I386, ARM, 0], ids=["i386", "aarch64", "none"])
def test_calls_of_another_architecture_kill(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert {verdict(confine.seccomp_filter(), number, architecture) for number in range(500)} == {KILL}


def test_calls_of_x32_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    program = confine.seccomp_filter()
    assert {verdict(program, 0x40000000 + number, X86) for number in (0, 39, 101, 520, 547)} == {errno.ENOSYS}
    assert verdict(program, -1, X86) == errno.ENOSYS


def test_clone_makes_threads_and_processes_but_no_namespaces(machine: str) -> None:
    program, architecture = confine.seccomp_filter(), ARCHITECTURES[machine]
    clone = confine._CALLS["clone"][list(ARCHITECTURES).index(machine)]
    threads = 0x3D0F00  # CLONE_VM to CLONE_CHILD_CLEARTID, as pthread_create has it
    forks, vforks = 0x01200011, 0x4111
    for flags in (threads, forks, vforks, 17, 0):
        assert verdict(program, clone, architecture, flags) == ALLOW
    # CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h
    for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(program, clone, architecture, flag | 17) == errno.EPERM
        assert verdict(program, clone, architecture, flag | threads) == errno.EPERM
        assert verdict(program, clone, architecture, flag | 1 << 40) == errno.EPERM


@pytest.mark.parametrize("call", ["socket", "socketpair"])
def test_sockets_of_other_families_are_refused(machine: str, call: str) -> None:
    program, architecture = confine.seccomp_filter(), ARCHITECTURES[machine]
    number = confine._CALLS[call][list(ARCHITECTURES).index(machine)]
    allowed = {family for family in range(100) if verdict(program, number, architecture, family) == ALLOW}
    assert allowed == {1, 2, 10}  # AF_UNIX, AF_INET, AF_INET6
    assert verdict(program, number, architecture, 40) == errno.EAFNOSUPPORT  # AF_VSOCK
    assert verdict(program, number, architecture, 0x1_0000_0010) == errno.EAFNOSUPPORT  # the kernel sees 16


def test_ioctls_and_fallocate_are_refused_by_what_they_ask(machine: str) -> None:
    program, architecture = confine.seccomp_filter(), ARCHITECTURES[machine]
    ioctl, fallocate = (confine._CALLS[n][list(ARCHITECTURES).index(machine)] for n in ("ioctl", "fallocate"))
    asked = {0x5412: "TIOCSTI", 0x541C: "TIOCLINUX", 0x40305828: "FS_IOC_RESVSP", 0x4030582A: "FS_IOC_RESVSP64"}
    for request in asked:
        assert verdict(program, ioctl, architecture, 1, request) == errno.EPERM
        assert verdict(program, ioctl, architecture, 1, 0xF00000000 | request) == errno.EPERM
    assert verdict(program, ioctl, architecture, 0x5412, 0x5401) == ALLOW  # TCGETS on descriptor 0x5412
    for mode in range(1, 256):
        assert verdict(program, fallocate, architecture, 1, mode) == errno.EOPNOTSUPP
    assert verdict(program, fallocate, architecture, 1, 0) == ALLOW


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """One that other users may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_program_of_the_user_is_made_read_only(public_folder: Path) -> None:
    """A copy of Python, owned by an ordinary user, starts again and cannot change its own mode."""
    source = shutil.which("python3", path="/usr/bin:/usr/local/bin") if os.getuid() == 0 else sys.executable
    if source is None:
        pytest.skip("no Python that other users may run")
    user = os.getuid() or 65533
    program = public_folder / "python"
    shutil.copy(os.path.realpath(source), program)
    for path in (program, public_folder):
        os.chown(path, user, -1)
    code = Path(confine.__file__).read_text() + (
        "\nprint('started')\n"
        "try: run_from_read_only([sys.executable])\n"
        "except OSError as error: sys.exit(f'cannot: {error}')\n"
        "try: os.chmod('/proc/self/exe', 0o777)\n"
        "except OSError as error: print(error.strerror)\n"
        "print(os.getuid(), open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    )
    ran = subprocess.run(
        [str(program), "-S", "-P", "-u", "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONHOME": sysconfig.get_config_var("prefix") if os.getuid() else str(Path(source).parents[1])},
        **({"user": user, "group": user, "extra_groups": []} if os.getuid() == 0 else {}),
    )
    if "cannot: " in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.stdout.splitlines() == ["started", "started", "Read-only file system", f"{user} {'0' * 16}"], ran
    assert program.stat().st_mode & 0o777 == 0o755
