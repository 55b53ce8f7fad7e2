"""The interpreter behind the python tool: the program of the child process.

It is started as `python -I -S -u -c PROGRAM SOCKET MEMORY CPU FILE PROCESSES [PATH ...]` and imports only what costs
nothing, since each rollout that computes waits for it to start.

A request on the socket is a line with the length of the code in bytes, then the code in UTF-8. A reply is a line with
the request's number, counted from 1, and the length of the traceback in bytes (0 where the code ran through), then the
traceback. Reply 0 says that the interpreter is ready. Standard output and error are a file that the parent reads.
"""

import _ast  # not ast, which takes as long to import as the interpreter to start
import os
import resource
import sys

TRACEBACK = 2000  # characters of a traceback that are kept, the last ones


def serve(socket: int, search_path: list[str]) -> None:
    os.set_inheritable(socket, False)  # or a process that the code leaves behind would hide that this one has died
    sys.path += search_path
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    process = os.getpid()
    programs: dict[str, str] = {}
    with os.fdopen(socket, "rb") as requests:
        reply(socket, 0, "")
        for number, header in enumerate(requests, start=1):
            code = requests.read(int(header)).decode()
            name = f"<call {number}>"
            programs[name] = code
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            report = ""
            try:
                evaluate(code, name, module.__dict__)
            except SystemExit as error:
                report = describe(error, programs) if error.code else ""
            except BaseException as error:
                report = describe(error, programs)
            if os.getpid() != process:  # the code has forked, and only one may answer
                os._exit(0)
            reply(socket, number, report)


def evaluate(code: str, name: str, namespace: dict[str, object]) -> None:
    """Run the code; the value of a last expression is printed as an interactive interpreter does."""
    tree = compile(code, name, "exec", _ast.PyCF_ONLY_AST)
    assert isinstance(tree, _ast.Module)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is not None:
        exec(compile(_ast.Interactive([last]), name, "single"), namespace)


def describe(error: BaseException, programs: dict[str, str]) -> str:
    """The traceback within the policy's own code."""
    try:
        import linecache
        import traceback

        for name, code in programs.items():
            linecache.cache[name] = (len(code), None, f"{code}\n".splitlines(keepends=True), name)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename not in programs:
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames))
    except BaseException:
        text = type(error).__name__  # no memory is left, or the exception itself is at fault
    return text if len(text) <= TRACEBACK else f"...{text[-TRACEBACK:]}"


def reply(socket: int, number: int, report: str) -> None:
    text = report.encode("utf-8", "replace")
    message = b"%d %d\n%b" % (number, len(text), text)
    while message:
        message = message[os.write(socket, message) :]


def limit(memory: int, cpu: int, file: int, processes: int) -> None:
    """Limits that the code cannot raise: bytes of memory, seconds of CPU, bytes of a file, processes (0: any)."""
    for which, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (value, value))
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


if __name__ == "__main__":
    limit(*map(int, sys.argv[2:6]))
    serve(int(sys.argv[1]), sys.argv[6:])
