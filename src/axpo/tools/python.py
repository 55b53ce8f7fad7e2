"""The python tool: an interpreter that a rollout keeps."""

from collections.abc import Sequence
from typing import Protocol

from axpo.tools.base import Conversation, Tool, ToolResult


class Interpreter(Protocol):
    """One rollout's interpreter, at whatever level."""

    async def run(self, code: str, timeout: float, images: Sequence[bytes] = ()) -> ToolResult: ...

    def close(self) -> None: ...


class Interpreters(Protocol):
    """What makes interpreters: `axpo.tools.sandbox.Sandbox` or `axpo.tools.remote.RemoteSandbox`."""

    def interpreter(self) -> Interpreter: ...


def make_python(sandbox: Interpreters, timeout: float = 30.0) -> Tool:
    """The tool `python`, each call of which may take `timeout` seconds."""

    async def python(code: str, conversation: Conversation) -> ToolResult:
        """Run Python code. Variables are kept.

        Args:
            code: The code.
        """
        interpreter: Interpreter | None = conversation.state.get("python")
        if interpreter is None:
            interpreter = conversation.state["python"] = sandbox.interpreter()
            conversation.on_close(interpreter.close)
        return await interpreter.run(code, timeout, conversation.images)

    # The interpreter keeps the deadline itself, to show what was printed until then.
    python.timeout = None  # type: ignore[attr-defined]
    return python
