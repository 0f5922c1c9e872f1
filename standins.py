"""Drawn stand-ins for the data sets, used where the real ones cannot be had.

Learnable but not trivial, and the same bytes on every machine: the stream of
RandomState is frozen for good, and no operation but the exactly rounded ones is used
(no sine, no matrix product).  `data` says when one of these is in use.
"""

from collections.abc import Callable

import numpy as np

# Class, whether to mirror its outlines at x = 0, and contours; a pixel inside an odd
# number of them is cloth.  A contour is two outlines, x y x y ... in percent of half
# the width, y down, and each one drawn lies between the two.  Look-alikes overlap.
SILHOUETTES = (
    ("t-shirt", True, [
        ("0 -62 16 -74 42 -68 78 -38 66 -18 42 -36 40 70 0 70",
         "0 -66 20 -80 52 -74 88 40 68 48 50 -26 50 88 0 88")]),
    ("trousers", True, [
        ("0 -88 30 -88 36 88 18 88 5 -30 0 -30",
         "0 -84 46 -84 56 88 20 88 2 -40 0 -40")]),
    ("pullover", True, [
        ("0 -68 16 -76 42 -72 82 40 68 46 46 -24 44 72 0 72",
         "0 -72 20 -80 52 -74 92 76 70 82 52 -18 54 84 0 84")]),
    ("dress", True, [
        ("0 -78 16 -88 26 -84 34 -64 30 -56 20 -20 28 88 0 88",
         "0 -70 20 -84 50 -76 80 -10 62 -4 42 -24 60 88 0 88")]),
    ("coat", True, [
        ("0 -74 14 -82 42 -76 76 40 62 46 44 -24 44 84 0 84",
         "0 -78 18 -88 52 -80 86 72 68 78 50 -22 56 92 0 92"),
        ("0 -60 0 -60 0 60 0 60",
         "0 -50 5 -50 5 92 0 92")]),
    ("sandal", False, [
        ("-90 26 -60 24 -20 14 30 -6 88 -10 90 22 70 22 60 6 20 26 -90 36",
         "-90 16 -60 4 -20 0 30 -30 88 -50 90 36 66 36 56 0 10 36 -90 38"),
        ("-70 20 -40 8 -20 8 -30 24 -10 24 0 8 20 0 20 18 0 26 -60 30",
         "-60 20 -50 0 -30 -4 -30 24 0 20 0 -8 30 -30 40 -4 10 22 -60 30")]),
    ("shirt", True, [
        ("0 -60 16 -74 42 -68 80 -36 66 -16 42 -34 42 72 0 72",
         "0 -70 20 -80 52 -74 92 76 70 82 52 -18 54 86 0 86"),
        ("0 -66 0 -66 0 0 0 0",
         "0 -50 4 -50 4 84 0 84")]),
    ("sneaker", False, [
        ("-90 22 -60 10 -20 -6 20 -26 60 -20 86 -26 90 34 -88 36",
         "-92 14 -60 0 -20 -16 8 -50 50 -58 80 -64 88 44 -90 46")]),
    ("bag", True, [
        ("0 -40 30 -38 40 -20 80 -18 84 60 0 62",
         "0 -84 44 -74 56 -30 88 -30 92 76 0 78"),
        ("0 -30 22 -28 30 -20 0 -20",
         "0 -72 34 -64 44 -26 0 -26")]),
    ("boot", False, [
        ("-90 20 -60 6 -20 -10 10 -36 14 -46 72 -48 84 0 88 40 -88 40",
         "-84 52 -60 34 -20 20 2 -20 4 -88 70 -90 76 40 82 84 -82 86")]),
)  # fmt: skip
SIDE, VARIANTS = 56, 128  # of a template: pixels a side, and how many a class


def silhouettes(train: int, test: int) -> list[np.ndarray]:
    """[x (train, 28, 28), y, x_test, y_test] uint8: ten classes of grey clothes."""
    rng = np.random.RandomState(0)
    templates = draw_all_templates(rng)

    def draw(labels):
        cloth, inside = draw_cloth(rng, templates, labels, 28)
        return np.clip(cloth * inside, 0, 255).astype(np.uint8)

    return labelled(rng, (train, test), len(SILHOUETTES), draw)


def coloured_silhouettes(train: int, test: int, classes: int = 10) -> list[np.ndarray]:
    """[x (train, 32, 32, 3), y, x_test, y_test] uint8: clothes before a background.

    Ten classes: the outline tells the class, and about half the clothes have its colour.
    A hundred: the first digit of the class is the outline, the second the colour.
    """
    rng = np.random.RandomState(classes)
    templates = draw_all_templates(rng)
    kinds = len(SILHOUETTES)

    def draw(labels):
        n, labels = len(labels), labels.astype(np.int32)
        shape, colour = divmod(labels, kinds)
        if classes == kinds:
            own = rng.randint(2, size=n, dtype=np.int32) == 0
            other = rng.randint(kinds, size=n, dtype=np.int32)
            shape, colour = labels, np.where(own, labels, other)
        cloth, inside = draw_cloth(rng, templates, shape, 32)
        hue = colour * 60 + rng.randint(-45, 46, n, np.int32)  # neighbours overlap
        front = dye(np.clip(cloth, 0, 255), hue, 56)
        ground = draw_ground(rng, n, 32)
        back = dye(ground, rng.randint(600, size=n, dtype=np.int32), 156)
        return np.where(inside[..., None], front, back)

    return labelled(rng, (train, test), classes, draw)


def labelled(
    rng: np.random.RandomState, sizes: tuple[int, ...], classes: int, draw: Callable
) -> list[np.ndarray]:
    """Balanced labels in random order and their images: [x, y, x_test, y_test]."""
    arrays = []
    for n in sizes:
        labels = rng.permutation(np.arange(n) % classes).astype(np.uint8)
        chunks = np.split(labels, range(500, n, 500))  # 500 images fit a CPU's cache
        arrays += [np.concatenate([draw(c) for c in chunks]), labels]
    return arrays


def uniform(
    rng: np.random.RandomState, low: float, high: float, shape: tuple[int, ...]
) -> np.ndarray:
    """As rng.uniform, which some compilers round differently (fused multiply-add)."""
    return low + (high - low) * rng.random_sample(shape)


def draw_all_templates(rng: np.random.RandomState) -> np.ndarray:
    return np.stack([draw_templates(rng, *row[1:]) for row in SILHOUETTES])


def draw_templates(
    rng: np.random.RandomState, mirror: bool, contours: list[tuple[str, str]]
) -> np.ndarray:
    """Masks of one class, (VARIANTS, SIDE, SIDE) bool, by the even-odd rule."""
    y, x = (np.mgrid[:SIDE, :SIDE] * 2 + 1) / SIDE - 1  # float64, as the corners are
    x = np.abs(x) if mirror else x
    inside = np.zeros((VARIANTS, SIDE, SIDE), bool)
    between = rng.random_sample((VARIANTS, 1, 1))
    for outlines in contours:
        one, other = (np.array(o.split(), float).reshape(-1, 2) / 100 for o in outlines)
        corners = one + (other - one) * between  # (VARIANTS, corners, 2)
        moves = uniform(rng, -0.04, 0.04, corners.shape)
        corners += moves * (corners != 0)  # what lies on the axis stays there
        corners = corners.transpose(1, 2, 0)[..., None, None]
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
            slope = (x1 - x0) / np.where(y1 == y0, 1, y1 - y0)  # (VARIANTS, 1, 1)
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + slope * (y - y0))
    return inside


def draw_cloth(
    rng: np.random.RandomState, templates: np.ndarray, labels: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """A template for each label, bent and dyed grey: brightness, and where it shows.

    (n,) -> (n, side, side) float32, not yet limited to 0 .. 255, and as many booleans.
    """
    n = len(labels)

    def some(low, high):
        return uniform(rng, low, high, (n, 1, 1)).astype(np.float32)

    def some_integer(low, high):
        return rng.randint(low, high + 1, (n, 1, 1), np.int32)

    x, y = pixel_centres(side)
    x, y = x - some(-0.12, 0.12), y - some(-0.12, 0.12)  # (side, side) -> (n, ...)
    u = x * some(0.75, 1.25) + y * some(-0.2, 0.2) + y * y * some(-0.2, 0.2)
    v = y * some(0.75, 1.25) + x * some(-0.2, 0.2)
    column = ((u + 1) * (SIDE // 2)).astype(np.int32).clip(0, SIDE - 1)
    row = ((v + 1) * (SIDE // 2)).astype(np.int32).clip(0, SIDE - 1)
    template = labels[:, None, None].astype(np.int32) * VARIANTS
    template += some_integer(0, VARIANTS - 1)
    inside = templates.reshape(-1)[(template * SIDE + row) * SIDE + column]
    stripes = (column * some_integer(-2, 2) + row * some_integer(0, 2)) & 8 > 0
    shade = some(90, 255) + u * some(-40, 40) + stripes * some(-80, 80)
    noise = rng.randint(-60, 61, (n, side, side), np.int8)
    hidden = x * some(-1, 1) + y * some(-1, 1) > some(0.1, 1.2)
    return shade + noise, inside & ~hidden


def pixel_centres(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels, each (side, side) float32 in -1 .. 1."""
    y, x = (np.mgrid[:side, :side].astype(np.float32) * 2 + 1) / side - 1
    return x, y


def draw_ground(rng: np.random.RandomState, n: int, side: int) -> np.ndarray:
    """Backgrounds: a slope of brightness with noise, (n, side, side) in 0 .. 255."""
    x, y = pixel_centres(side)
    level, right, down = uniform(rng, -70, 70, (3, n, 1, 1)).astype(np.float32)
    noise = rng.randint(-30, 31, (n, side, side), np.int8)
    return np.clip(level + 120 + x * right + y * down + noise, 0, 255)


def dye(brightness: np.ndarray, hue: np.ndarray, white: int) -> np.ndarray:
    """Brightness (n, h, w) in 0 .. 255 in the colour of each hue -> (n, h, w, 3) uint8.

    hue: (n,) integers round a wheel of 600; white: 0 pure colour .. 256 none at all.
    """
    distance = np.abs(hue[:, None] % 600 - np.array([0, 200, 400], np.int32))
    distance = np.minimum(distance, 600 - distance)  # from red, green, blue
    pure = np.clip(200 - distance, 0, 100)  # (n, 3): full to 100 away, none from 200
    weight = (white + pure * (256 - white) // 100).astype(np.uint16)
    coloured = brightness.astype(np.uint16)[..., None] * weight[:, None, None] >> 8
    return coloured.astype(np.uint8)


WORDS, FOLLOWERS = 60, 4


def text(size: int) -> bytes:
    """`size` bytes of made-up words: which may follow hangs on the last two.

    Each pair of words has four followers, of odds 8 : 4 : 2 : 1.
    """
    rng = np.random.RandomState(0)
    words = draw_words(rng)
    # Small numbers are frequent among the products, as a few words are in a language.
    factors = rng.randint(1, WORDS + 1, (2, WORDS, WORDS, FOLLOWERS), np.int32)
    followers = (factors[0] * factors[1] - 1) // WORDS
    draws = rng.randint(15, size=size, dtype=np.int32)  # a word has a byte at least
    ranks = np.array([0] * 8 + [1] * 4 + [2] * 2 + [3])[draws].tolist()
    followers = followers.tolist()
    before, last, parts, length = 0, 1, [], 0
    while length < size:
        before, last = last, followers[before][last][ranks[len(parts)]]
        parts.append(words[last])
        length += len(words[last])
    return b"".join(parts)[:size]


def draw_words(rng: np.random.RandomState) -> list[bytes]:
    """A full stop with a new line, a comma, and words of one to three syllables."""
    words = [b".\n", b","]
    while len(words) < WORDS:
        syllables = rng.randint(80, size=rng.randint(1, 4), dtype=np.int32).tolist()
        word = "".join("bdfghklmnprstvwz"[s // 5] + "aeiou"[s % 5] for s in syllables)
        if (word := b" " + word.encode()) not in words:
            words.append(word)
    return words
