"""The process of one cell: the ordinary command, which ends with the process that started it."""

from axpo.cli import main
from axpo.launch import end_when_closed

if __name__ == "__main__":
    end_when_closed(0)
    main()
