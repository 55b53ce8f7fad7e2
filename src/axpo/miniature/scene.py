"""Pictures of the miniature: small print that can be read only after zooming in.

A scene is a 4 × 4 grid of cells with coloured plaques on it, each in a cell or half in the next, and each with a digit
in fine hatching. At the model's input resolution a cell is one vision token: colour and shape are plain, the
hatching is gone. A crop of just the plaque from the original shows it.
"""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 4
CELL = 128  # pixels of the original; the model sees a quarter of that
DIGIT_HEIGHT = 84
HATCHING = 4  # pixels from one light line to the next
CONTRAST = 60
COLOURS = {
    "red": (185, 80, 80),
    "green": (80, 160, 90),
    "blue": (80, 95, 185),
    "yellow": (180, 170, 75),
    "purple": (150, 75, 170),
    "orange": (185, 130, 70),
}
SHAPES = ("square", "disc", "diamond", "triangle")


@dataclass(frozen=True)
class Plaque:
    """One object: `cell`, of its top left corner, counts row by row from the top left, 0..15. `between`: whether it
    lies half in the next column. `scale`: its size, of the usual one."""

    colour: str
    shape: str
    cell: int
    digit: int
    between: bool = False
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        row, column = self.cell // GRID + 1, self.cell % GRID + 1
        return f"row {row}, columns {column}-{column + 1}" if self.between else f"row {row}, column {column}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its box in thousandths of the image: x1, y1, x2, y2."""
        return cell_box(self.cell, self.between)

    @property
    def cells(self) -> set[int]:
        """The cells that it lies in."""
        return {self.cell, self.cell + self.between}


def cell_box(cell: int, between: bool = False) -> tuple[int, int, int, int]:
    """The box of a cell, or of its right half and the next one's left, in thousandths of the image: x1, y1, x2, y2."""
    side = 1000 // GRID
    x, y = cell % GRID * side + between * side // 2, cell // GRID * side
    return x, y, x + side, y + side


def draw_scene(plaques: list[Plaque], rng: np.random.Generator) -> bytes:
    """The scene at its original resolution (512 × 512), as PNG bytes."""
    side = GRID * CELL
    image = Image.fromarray(_ground(side, rng))
    for plaque in plaques:
        x, y = plaque.cell % GRID * CELL + plaque.between * CELL // 2, plaque.cell // GRID * CELL
        _draw_plaque(image, x, y, plaque, rng)
    return png(image)


def draw_crop(plaque: Plaque, rng: np.random.Generator) -> bytes:
    """The plaque alone (128 × 128), as a zoom into the original shows it."""
    image = Image.fromarray(_ground(CELL, rng))
    _draw_plaque(image, 0, 0, plaque, rng)
    return png(image)


def png(image: Image.Image) -> bytes:
    """Encoded with little effort: these pictures live in memory, and encoding is in every step."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _ground(side: int, rng: np.random.Generator) -> np.ndarray:
    # The grain survives the shrinking to the model's resolution, where it drowns what is left of the hatching.
    grain = rng.normal(0, 12, (side // 8, side // 8, 1)) + rng.normal(0, 5, (side // 8, side // 8, 3))
    coarse = np.clip(128 + grain, 0, 255).astype(np.uint8)
    return np.repeat(np.repeat(coarse, 8, 0), 8, 1)


def _draw_plaque(image: Image.Image, x: int, y: int, plaque: Plaque, rng: np.random.Generator) -> None:
    region = image.crop((x, y, x + CELL, y + CELL))
    mask = Image.new("L", region.size, 0)
    shape = ImageDraw.Draw(mask)
    middle, reach = CELL // 2, int(50 * plaque.scale)
    low, high = middle - reach, middle + reach
    if plaque.shape == "square":
        shape.rectangle((low, low, high, high), fill=255)
    elif plaque.shape == "disc":
        shape.ellipse((low, low, high, high), fill=255)
    elif plaque.shape == "diamond":
        shape.polygon(((middle, low), (high, middle), (middle, high), (low, middle)), fill=255)
    else:
        shape.polygon(((middle, low), (high, high), (low, high)), fill=255)
    grain = np.asarray(region, dtype=np.float64) - 128.0
    paint = np.clip(np.array(COLOURS[plaque.colour]) + grain, 0, 255).astype(np.uint8)
    region.paste(Image.fromarray(paint), mask=mask)
    image.paste(_hatch(region, plaque, rng), (x, y))


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)


def _hatch(region: Image.Image, plaque: Plaque, rng: np.random.Generator) -> Image.Image:
    # Light and dark lines in equal parts: shrunk to a quarter, they average out by construction.
    glyph = Image.new("L", region.size, 0)
    moved = rng.integers(-3, 4, 2)
    centre = (CELL // 2 + int(moved[0]), CELL // 2 + int(8 * plaque.scale) + int(moved[1]))
    font = _font(int(DIGIT_HEIGHT * plaque.scale))
    ImageDraw.Draw(glyph).text(centre, str(plaque.digit), font=font, anchor="mm", fill=255, stroke_width=2)
    lines = np.where(np.arange(CELL) % HATCHING < HATCHING // 2, CONTRAST, -CONTRAST)
    relief = np.asarray(glyph, dtype=np.float64)[:, :, None] / 255 * lines[None, :, None]
    return Image.fromarray(np.clip(np.asarray(region) + relief, 0, 255).astype(np.uint8))
