"""bubblewrap's command line, and what of this machine a sandbox shows."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def executable() -> str:
    """The interpreter itself: a virtual environment's is a link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def packages() -> list[str]:
    """The folders of the installed packages."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def seen() -> list[str]:
    """What is to be seen of this Python, besides the system's own folders."""
    paths = (executable(), os.path.join(sys.base_prefix, "lib"), *packages())
    return [path for path in paths if os.path.exists(path) and not path.startswith("/usr/")]


def command() -> list[str]:
    """The command line: namespaces, and the few folders that are to be seen, read-only."""
    line = [shutil.which("bwrap") or "bwrap", "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    line += [f"--unshare-{namespace}" for namespace in ("user", "pid", "ipc", "net", "uts")]
    line += ["--hostname", "sandbox"]
    for folder in ("/usr", "/bin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            line += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            line += ["--ro-bind", folder, folder]
    shown = seen()
    system = [p for p in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/fonts") if os.path.exists(p)]
    # bubblewrap makes the folders above a mount for its own user only, unless told of each.
    above = {str(folder) for path in (*shown, *system, "/dev/null") for folder in Path(path).parents}
    for folder in sorted(above - {"/"}):
        line += ["--dir", folder]
    for path in (*system, *shown):
        line += ["--ro-bind", path, path]
    # Not --dev, whose /dev may be written into without bound.
    for device in ("null", "zero", "full", "random", "urandom"):
        line += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")):
        line += ["--symlink", target, f"/dev/{link}"]
    line += ["--symlink", "/proc/self/fd/2", "/dev/stderr", "--symlink", "/tmp", "/dev/shm"]
    # Read-only, so that no process can write into another's memory, or say that others be killed before it.
    line += ["--proc", "/proc", "--remount-ro", "/proc"]
    return [*line, "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
