"""The python tool: an interpreter that a rollout keeps."""

import math
from collections.abc import Sequence
from typing import Protocol

from axpo.tools.base import Conversation, Tool, ToolResult

_KEY = "python"  # in the state of a conversation


class Interpreter(Protocol):
    """One rollout's interpreter."""

    async def start(self) -> None: ...

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult: ...

    def close(self) -> None: ...


class Interpreters(Protocol):
    """What makes them: `axpo.tools.sandbox.Sandbox` or `axpo.tools.remote.RemoteSandbox`."""

    level: str

    def interpreter(self) -> Interpreter: ...


def make_python(sandbox: Interpreters, timeout: float = 30.0) -> Tool:
    """The tool `python`, each call of which may take `timeout` seconds."""

    async def python(code: str, conversation: Conversation) -> ToolResult:
        """Run Python code. Variables are kept.

        Args:
            code: The code.
        """
        interpreter: Interpreter = conversation.state[_KEY]
        return await interpreter.run(code, timeout, conversation.images)

    async def start(conversation: Conversation) -> None:
        if _KEY not in conversation.state:
            conversation.state[_KEY] = sandbox.interpreter()
            conversation.on_close(conversation.state[_KEY].close)
        await conversation.state[_KEY].start()

    # Interpreters keep the deadline themselves, to show what was printed until then.
    python.timeout = math.inf  # type: ignore[attr-defined]
    python.prepare = start  # type: ignore[attr-defined]
    python.level = sandbox.level  # type: ignore[attr-defined]
    return python
