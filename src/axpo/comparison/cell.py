"""The process of one cell: the ordinary command, which ends with the process that started it."""

import os
import signal
import threading

from axpo.cli import main


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed, however the parent ended
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
