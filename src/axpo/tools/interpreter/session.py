"""What an interpreter does: run one piece of code after another in the same namespace.

A request on the channel is a line with the length of the code in bytes and those of the conversation's new images, then
the code in UTF-8, then the images. They become the variables `image_0`, `image_1`, … in order of the conversation.

A reply is a line with the request's number, counted from 1, the length of the traceback in bytes (0 where the code ran
through) and those of the pictures to be shown, then the traceback, then the pictures as PNG. Reply 0 says that the
interpreter is ready. Standard output and error are a file that the trainer reads. The code may write to the channel or
close it: the trainer takes nothing here on trust. A few replies to other requests are passed over.
"""

import _ast
import builtins
import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from os import write  # the code may put something else in its place
from typing import Any

TRACEBACK = 2000  # characters of a traceback that are kept
PICTURES = 4  # of one call
PICTURE_PIXELS = 1 << 20  # a larger picture is scaled down


def serve(channel: int) -> None:
    """Answer requests until the channel is closed."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    process = os.getpid()
    programs: dict[str, str] = {}
    shown = Pictures()
    images = 0
    with os.fdopen(channel, "rb") as requests:
        reply(channel, 0, "", [])
        for number, header in enumerate(requests, start=1):
            length, *sizes = map(int, header.split())
            code = requests.read(length).decode()
            for size in sizes:
                module.__dict__[f"image_{images}"] = opened(requests.read(size))
                images += 1
            name = f"<call {number}>"
            programs[name] = code
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            report = ""
            try:
                with shown.hooked():
                    evaluate(code, name, module.__dict__)
            except SystemExit as error:
                report = describe(error, programs) if error.code else ""
            except BaseException as error:
                report = describe(error, programs)
            if os.getpid() != process:  # the code has forked, and only one may answer
                os._exit(0)
            reply(channel, number, report, shown.take())


def evaluate(code: str, name: str, namespace: dict[str, object]) -> None:
    """Run the code; the value of a last expression goes to `sys.displayhook` as in an interactive interpreter."""
    tree = compile(code, name, "exec", _ast.PyCF_ONLY_AST)
    assert isinstance(tree, _ast.Module)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is not None:
        exec(compile(_ast.Interactive([last]), name, "single"), namespace)


def opened(data: bytes) -> Any:
    """The image, decoded when it is used; its bytes where there is no Pillow."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        return data
    PIL.Image.MAX_IMAGE_PIXELS = None  # the conversation has its own limit, and this process one on memory
    try:
        image = PIL.Image.open(io.BytesIO(data))
        # Only what must be turned is decoded at once.
        return PIL.ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    except Exception:  # of one that does not open here the code may make what it can
        return data


class Pictures:
    """The pictures of a call: figures that are shown or left open, images that are shown or are its value."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.left_out = 0

    @contextlib.contextmanager
    def hooked(self) -> Any:
        """Catch what the code shows while it runs."""
        sys.displayhook = self.display
        builtins.display = self.display  # type: ignore[attr-defined]
        if image := sys.modules.get("PIL.Image"):
            image.Image.show = lambda picture, *_, **__: self.add(picture)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.show = lambda *_, **__: self.figures()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.figures()

    def display(self, value: object) -> None:
        if _is_image(value):
            self.add(value)
        elif value is not None:
            builtins._ = value  # type: ignore[attr-defined]
            print(repr(value))

    def figures(self) -> None:
        """Take the open figures and close them."""
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            width, height = figure.get_size_inches() * figure.dpi
            scale = min(1.0, (PICTURE_PIXELS / max(width * height, 1)) ** 0.5)
            self.encode(functools.partial(figure.savefig, format="png", dpi=figure.dpi * scale))
        pyplot.close("all")

    def add(self, image: Any) -> None:
        if image.width * image.height > PICTURE_PIXELS:
            scale = (PICTURE_PIXELS / (image.width * image.height)) ** 0.5
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGB")  # else it is no PNG
        self.encode(lambda file: image.save(file, "PNG", compress_level=1))

    def encode(self, save: Callable[[io.BytesIO], object]) -> None:
        if len(self.taken) == PICTURES:
            self.left_out += 1
            return
        file = io.BytesIO()
        save(file)
        self.taken.append(file.getvalue())

    def take(self) -> list[bytes]:
        if self.left_out:
            with contextlib.suppress(Exception):
                print(f"[{self.left_out} more pictures left out: {PICTURES} are shown of a call]")
        taken, self.taken, self.left_out = self.taken, [], 0
        return taken


def _is_image(value: object) -> bool:
    image: Any = sys.modules.get("PIL.Image")
    return image is not None and isinstance(value, image.Image)


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
        whole = traceback.TracebackException(type(error), error, frames)
        whole.stack = traceback.StackSummary.from_list(f for f in whole.stack if f.filename != __file__)
        text = "".join(whole.format())
    except BaseException:
        text = type(error).__name__  # no memory is left, or the exception itself is at fault
    return cut(text, TRACEBACK)


def cut(text: str, most: int) -> str:
    """The text without its middle where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def reply(channel: int, number: int, report: str, pictures: list[bytes]) -> None:
    text = report.encode("utf-8", "replace")
    sizes = " ".join(map(str, (number, len(text), *map(len, pictures))))
    message = b"".join((sizes.encode(), b"\n", text, *pictures))
    while message:
        message = message[write(channel, message) :]
