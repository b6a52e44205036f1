"""The pictures of the demonstration zoo: pure functions from a random generator to a 32 x 32 RGB image.

Four families are drawn, each of nine or ten kinds: outlines of `shapes`, `digits` in a font, `textures` and road
`signs`. Every drawing takes a difficulty d in [0, 1]. At 0 the subject is large, upright and clean; towards 1 it gets
smaller, tilted, surrounded by clutter, low in contrast and noisy. Letters (`draw_letter`) belong to no task; they only
widen the mixture on which the base model is trained.

Pictures are drawn on a canvas of twice the size and averaged down, which smooths the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
CANVAS = 2 * SIDE

Colour = tuple[int, int, int]
Point = tuple[float, float]
Drawing = Callable[..., Image.Image]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "orange": (245, 140, 30),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
WHITE, BLACK, RED, BLUE, YELLOW = (COLOURS[name] for name in ("white", "black", "red", "blue", "yellow"))


# ---- outlines ---------------------------------------------------------------------------------------------------


def _regular(corners: int, inner: float | None = None, start: float = -math.pi / 2) -> list[Point]:
    """Corners on the unit circle; with `inner`, every other corner lies on a circle of that radius (a star)."""
    radii = [1.0] * corners if inner is None else [1.0, inner] * corners
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    height = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(math.sin(t) ** 3, -h / 16) for t, h in zip(turns, height, strict=True)]


def _crescent() -> list[Point]:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 20)]
    inner = [(0.35 + 0.8 * math.cos(a), 0.8 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.3, 1.3, 20)]
    return outer + inner


def _cross(arm: float = 0.32) -> list[Point]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


SHAPES: dict[str, list[Point]] = {
    "circle": _regular(28),
    "triangle": _regular(3),
    "square": _regular(4, start=-math.pi / 4),
    "star": _regular(5, inner=0.42),
    "cross": _cross(),
    "heart": _heart(),
    "arrow": [(-1, -0.25), (0.1, -0.25), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.25), (-1, 0.25)],
    "crescent": _crescent(),
    "bolt": [(0.2, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.05, -0.25), (0.5, -1)],
}


def _place(points: list[Point], centre: Point, radius: float, turn: float) -> list[Point]:
    """Points of the unit square turned by `turn` radians, scaled and moved onto the canvas."""
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    return [(centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y) for x, y in points]


# ---- what all families share --------------------------------------------------------------------------------------


def _any_colour(rng: Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _paper(rng: Generator, ink: Colour, contrast: float) -> Colour:
    """A random colour whose distance from the ink is at least `contrast` (of about 440 possible)."""
    while True:
        paper = _any_colour(rng)
        if math.dist(paper, ink) >= contrast:
            return paper


def _spot(rng: Generator, difficulty: float, largest: float, smallest: float) -> tuple[Point, float]:
    """Centre and radius of the subject: nearly central and large when easy, anywhere and small when hard."""
    low = largest - difficulty * (largest - smallest)
    radius = CANVAS * rng.uniform(low, largest)
    room = 0.25 * CANVAS * (0.15 + 0.85 * difficulty)
    x, y = CANVAS / 2 + rng.uniform(-room, room, 2)
    return (float(x), float(y)), float(radius)


def _clutter(draw: ImageDraw.ImageDraw, rng: Generator, pieces: int) -> None:
    """Lines and patches of random colours that have nothing to do with the subject."""
    for _ in range(pieces):
        x, y, dx, dy = rng.uniform(0, CANVAS, 4)
        if rng.random() < 0.5:
            draw.line([x, y, dx, dy], fill=_any_colour(rng), width=int(rng.integers(1, 5)))
        else:
            draw.rectangle([x, y, x + dx / 4, y + dy / 4], fill=_any_colour(rng))


def _finish(image: Image.Image, rng: Generator, difficulty: float) -> Image.Image:
    """Average down to the final size; dim and add pixel noise in proportion to the difficulty."""
    pixels = np.asarray(image.reduce(CANVAS // SIDE), dtype=np.float32)
    light = 1 - difficulty * rng.uniform(0, 0.5)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * (4 + 26 * difficulty * rng.random())
    return Image.fromarray(np.clip(light * pixels + noise, 0, 255).astype(np.uint8))


# ---- the families ---------------------------------------------------------------------------------------------------


def draw_shape(kind: str, rng: Generator, difficulty: float, colour: str | None = None) -> Image.Image:
    """The outline of a shape; hard ones are small, tilted and lie among clutter."""
    ink = COLOURS[colour] if colour else _any_colour(rng)
    image = Image.new("RGB", (CANVAS, CANVAS), _paper(rng, ink, 220 - 120 * difficulty))
    draw = ImageDraw.Draw(image)
    _clutter(draw, rng, int(difficulty * rng.integers(3, 9)))
    centre, radius = _spot(rng, difficulty, 0.44, 0.26)
    turn = difficulty * rng.uniform(-0.8, 0.8)
    corners = _place(SHAPES[kind], centre, radius, turn)
    draw.line([*corners, corners[0], corners[1]], fill=ink, width=int(rng.integers(5, 10)), joint="curve")
    return _finish(image, rng, difficulty)


def _draw_glyph(glyph: str, others: str, rng: Generator, difficulty: float) -> Image.Image:
    """A character; hard ones are slanted, turned and cut into by neighbours to the left and right."""
    ink = _any_colour(rng)
    image = Image.new("RGB", (CANVAS, CANVAS), _paper(rng, ink, 220 - 130 * difficulty))
    size = rng.uniform(0.95 - 0.4 * difficulty, 0.95) * CANVAS
    stencil = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(stencil)
    font = ImageFont.load_default(float(round(size)))
    middle = CANVAS / 2 + rng.uniform(-0.1, 0.1, 2) * CANVAS * difficulty
    bold = int(rng.integers(0, 4))
    draw.text(tuple(middle), glyph, font=font, fill=255, anchor="mm", stroke_width=bold)
    if rng.random() < difficulty:
        for side in (-1, 1):
            neighbour = others[rng.integers(len(others))]
            place = (middle[0] + side * 0.62 * size, middle[1] + rng.uniform(-4, 4))
            draw.text(place, neighbour, font=font, fill=255, anchor="mm", stroke_width=bold)
    slant, squeeze = difficulty * rng.uniform(-0.5, 0.5), 1 + difficulty * rng.uniform(-0.3, 0.4)
    half = CANVAS / 2
    matrix = (squeeze, slant, half - half * (squeeze + slant), 0.0, 1.0, 0.0)
    stencil = stencil.transform(stencil.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    stencil = stencil.rotate(difficulty * rng.uniform(-35, 35), Image.Resampling.BILINEAR)
    image.paste(ink, mask=stencil)
    return _finish(image, rng, difficulty)


def draw_digit(kind: str, rng: Generator, difficulty: float) -> Image.Image:
    """A decimal digit, named in words."""
    return _draw_glyph(str(DIGITS.index(kind)), "0123456789", rng, difficulty)


def draw_letter(kind: str, rng: Generator, difficulty: float) -> Image.Image:
    """A capital letter."""
    return _draw_glyph(kind, "".join(LETTERS), rng, difficulty)


def _fold(t: np.ndarray) -> np.ndarray:
    """The triangle wave of period 1 with values in [-1, 1]."""
    return 4 * np.abs(t - np.floor(t + 0.5)) - 1


def _wave(t: np.ndarray) -> np.ndarray:
    return np.sin(2 * math.pi * t)


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rows = np.floor(v)
    joint = (u / 2 + 0.5 * rows) % 1
    return np.where((v - rows < 0.22) | (joint < 0.12), 1.0, -1.0)


# Each texture maps coordinates counted in periods to values whose range is about [-1, 1].
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "horizontal stripes": lambda u, v: _wave(v),
    "vertical stripes": lambda u, v: _wave(u),
    "diagonal stripes": lambda u, v: _wave(0.7 * (u + v)),
    "checks": lambda u, v: np.sign(_wave(u / 2) * _wave(v / 2)),
    "dots": lambda u, v: np.where(_wave(u / 1.5) + _wave(v / 1.5) > 0.9, 1.0, -1.0),
    "waves": lambda u, v: _wave(v + 0.35 * _wave(u / 2)),
    "zigzags": lambda u, v: np.sign(_wave(v + 0.6 * _fold(u / 2))),
    "bricks": _bricks,
    "rings": lambda u, v: _wave(np.hypot(u - u.mean(), v - v.mean())),
    "grid": lambda u, v: np.where((u % 1 < 0.25) | (v % 1 < 0.25), 1.0, -1.0),
}


def draw_texture(kind: str, rng: Generator, difficulty: float, colour: str | None = None) -> Image.Image:
    """A field of a repeated pattern; hard ones are warped, turned a little, fine, and faint."""
    ink = np.array(COLOURS[colour] if colour else _any_colour(rng), dtype=np.float32)
    paper = np.array(_paper(rng, tuple(ink), 200), dtype=np.float32)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS
    periods = rng.uniform(3, 4 + 3 * difficulty)
    turn = 0.3 * difficulty * rng.uniform(-1, 1)
    bend = 0.06 * difficulty * rng.random()
    u = math.cos(turn) * x - math.sin(turn) * y + bend * _wave(1.3 * y + rng.random())
    v = math.sin(turn) * x + math.cos(turn) * y + bend * _wave(1.3 * x + rng.random())
    field = TEXTURES[kind](periods * u + rng.random(), periods * v + rng.random())
    strength = 0.5 * (1 - 0.75 * difficulty * rng.random())
    share = (0.5 + strength * field)[..., None]
    return _finish(Image.fromarray((paper + share * (ink - paper)).astype(np.uint8)), rng, difficulty)


# A sign is a pile of (outline, size, colour), the lowest first; None as a colour stands for the random backdrop.
_OCTAGON, _DISC = _regular(8, start=math.pi / 8), SHAPES["circle"]
_DOWN = [(x, -y) for x, y in SHAPES["triangle"]]
_BAR = [(-0.7, -0.2), (0.7, -0.2), (0.7, 0.2), (-0.7, 0.2)]
_MARK = [(-0.1, -0.4), (0.1, -0.4), (0.1, 0.45), (-0.1, 0.45)]
_BENT = [
    (0.6, 0.6),
    (0.25, 0.6),
    (0.25, -0.05),
    (-0.1, -0.05),
    (-0.1, 0.25),
    (-0.7, -0.22),
    (-0.1, -0.7),
    (-0.1, -0.4),
    (0.6, -0.4),
]
_P = [(-0.4, 0.8), (-0.4, -0.8), (0.4, -0.8), (0.6, -0.5), (0.6, -0.1), (0.4, 0.15), (0.0, 0.15), (0.0, 0.8)]
SIGNS: dict[str, list[tuple[list[Point], float, Colour]]] = {
    "stop": [(_OCTAGON, 1.0, WHITE), (_OCTAGON, 0.88, RED), (_BAR, 0.8, WHITE)],
    "no entry": [(_DISC, 1.0, RED), (_BAR, 1.0, WHITE)],
    "speed limit": [(_DISC, 1.0, RED), (_DISC, 0.72, WHITE), (_MARK, 0.9, BLACK)],
    "yield": [(_DOWN, 1.0, RED), (_DOWN, 0.6, WHITE)],
    "warning": [(SHAPES["triangle"], 1.0, RED), (SHAPES["triangle"], 0.6, WHITE), (_MARK, 0.5, BLACK)],
    "priority": [(_regular(4), 1.0, WHITE), (_regular(4), 0.75, YELLOW)],
    "turn left": [(_DISC, 1.0, BLUE), (_BENT, 0.8, WHITE)],
    "turn right": [(_DISC, 1.0, BLUE), ([(-x, y) for x, y in _BENT], 0.8, WHITE)],
    "parking": [(SHAPES["square"], 1.0, BLUE), (_P, 0.6, WHITE)],
    "crossing": [(SHAPES["square"], 1.0, BLUE), (SHAPES["triangle"], 0.6, WHITE), (_MARK, 0.5, BLACK)],
}


def draw_sign(kind: str, rng: Generator, difficulty: float) -> Image.Image:
    """A road sign; hard ones are small, tilted, faded towards the backdrop and partly hidden."""
    backdrop = _any_colour(rng)
    image = Image.new("RGB", (CANVAS, CANVAS), backdrop)
    draw = ImageDraw.Draw(image)
    _clutter(draw, rng, int(difficulty * rng.integers(4, 12)))
    centre, radius = _spot(rng, difficulty, 0.46, 0.2)
    turn = difficulty * rng.uniform(-0.4, 0.4)
    fade = difficulty * rng.uniform(0, 0.5)
    for outline, size, colour in SIGNS[kind]:
        fill = tuple(round((1 - fade) * c + fade * b) for c, b in zip(colour, backdrop, strict=True))
        draw.polygon(_place(outline, centre, size * radius, turn), fill=fill)
    _clutter(draw, rng, int(2 * difficulty * rng.random() + 0.5 * difficulty))
    return _finish(image, rng, difficulty)


KINDS: dict[str, tuple[str, ...]] = {
    "shapes": tuple(SHAPES),
    "digits": DIGITS,
    "textures": tuple(TEXTURES),
    "signs": tuple(SIGNS),
}
DRAWINGS: dict[str, Drawing] = {
    "shapes": draw_shape,
    "digits": draw_digit,
    "textures": draw_texture,
    "signs": draw_sign,
}
