"""The python tool: an interpreter that a rollout keeps."""

from axpo.tools.base import Conversation, Tool, ToolResult
from axpo.tools.sandbox import START, Interpreter, isolation_works


def make_python(timeout: float = 30.0, isolated: bool | None = None) -> Tool:
    """The tool `python`, each call of which may take `timeout` seconds.

    `isolated` says whether the interpreter runs under bubblewrap; None means: where that works.
    """
    wrapped = isolation_works() if isolated is None else isolated

    async def python(code: str, conversation: Conversation) -> ToolResult:
        """Run Python code. Variables are kept.

        Args:
            code: The code.
        """
        interpreter = conversation.state.get("python")
        if interpreter is None:
            interpreter = conversation.state["python"] = Interpreter(wrapped)
            conversation.on_close(interpreter.close)
        result: ToolResult = await interpreter.run(code, timeout)
        return result

    # The interpreter keeps the deadline itself, to show what was printed until then; the toolbox's stands behind it.
    python.timeout = timeout + 2 * START  # type: ignore[attr-defined]
    return python
