"""An MCP server with the official package, by stdio, or by HTTP on the port that is given."""

import asyncio
import base64
import io
import os
import sys
import time
from typing import Any

import mcp_types
import PIL.Image
from mcp import MCPError
from mcp.server.mcpserver import MCPServer

server = MCPServer("test")
cancelled: list[str] = []


@server.tool(structured_output=False)
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool(structured_output=False)
def show(colour: str) -> list[Any]:
    """A square of this colour, and more."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), colour).save(file, "JPEG", quality=95)
    data = base64.b64encode(file.getvalue()).decode()
    blob = mcp_types.BlobResourceContents(uri="file:///a.pdf", mime_type="application/pdf", blob="AAAA")
    picture = mcp_types.BlobResourceContents(uri="file:///b.jpg", mime_type="image/jpeg", blob=data)
    return [
        mcp_types.TextContent(text="a square"),
        mcp_types.ImageContent(data=data, mime_type="image/jpeg"),
        mcp_types.EmbeddedResource(resource=mcp_types.TextResourceContents(uri="file:///n.txt", text="a note")),
        mcp_types.EmbeddedResource(resource=blob),
        mcp_types.EmbeddedResource(resource=picture),
        mcp_types.ImageContent(data="AAAA", mime_type="image/svg+xml"),
        mcp_types.AudioContent(data="AAAA", mime_type="audio/wav"),
        mcp_types.ResourceLink(name="more", uri="http://127.0.0.1/more"),
    ]


@server.tool(structured_output=False)
def strip(width: int) -> Any:
    """A picture of one line."""
    file = io.BytesIO()
    PIL.Image.new("L", (width, 1)).save(file, "PNG")
    return mcp_types.ImageContent(data=base64.b64encode(file.getvalue()).decode(), mime_type="image/png")


@server.tool(structured_output=False)
def noise(megabytes: int) -> Any:
    """A large picture."""
    file = io.BytesIO()
    side = int((megabytes * 2**20 / 3) ** 0.5) + 1
    PIL.Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, "PNG")
    return mcp_types.ImageContent(data=base64.b64encode(file.getvalue()).decode(), mime_type="image/png")


@server.tool()
def measure(text: str) -> dict[str, int]:
    """Count."""
    return {"length": len(text)}


@server.tool(structured_output=False)
def nothing() -> mcp_types.CallToolResult:
    """Say nothing, but in structure."""
    return mcp_types.CallToolResult(content=[], structured_content={"found": ["ä"]})


@server.tool(structured_output=False)
def fail() -> str:
    """Fail."""
    from mcp.server.mcpserver.exceptions import ToolError

    raise ToolError("no such page")


@server.tool(structured_output=False)
def refuse(code: int) -> str:
    """Fail by an error of the protocol."""
    raise MCPError(code, "not like this")


@server.tool(structured_output=False)
async def wait(name: str, seconds: float) -> str:
    """Wait."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        cancelled.append(name)
        raise
    return f"{name} waited"


@server.tool(structured_output=False)
def stopped() -> str:
    """Which waits were cancelled."""
    return " ".join(cancelled)


@server.tool(structured_output=False)
def know(name: str) -> str:
    """An environment variable."""
    return os.environ.get(name, "unset")


@server.tool(structured_output=False)
def pid() -> str:
    """The process."""
    return str(os.getpid())


@server.tool(structured_output=False)
def die(once: str) -> str:
    """Die, unless this file exists, which is then made."""
    if os.path.exists(once):
        return "alive"
    open(once, "w").close()
    print(f"dying, with {os.environ.get('AXPO_SECRET')} in mind", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool(structured_output=False)
async def freeze(seconds: float) -> str:
    """Block the whole server."""
    time.sleep(seconds)
    return "thawed"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        print("a line that nobody should see", file=sys.stderr, flush=True)
        server.run()
