"""Find, download and verify images and text, or draw a stand-in for them.

All bytes stay uint8. A task divides pixels by 255. What a user points at is used or
refused, never passed over. The stand-in appears only when nothing was found. The
`name` of a result says when it is a stand-in or not the official data.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

ANSWER_SECONDS = 6  # for a server to answer, and between two packets
md5 = partial(hashlib.md5, usedforsecurity=False)


class DataError(Exception):
    """One line for the user: which file, folder or address, and what is wrong."""


class Images(NamedTuple):
    train_images: np.ndarray  # (n, height, width, channels) uint8, read-only
    train_labels: np.ndarray  # (n,) uint8, read-only
    test_images: np.ndarray  # as those to train, with an n of their own
    test_labels: np.ndarray
    classes: int
    name: str  # for plots, results and logs. It says what is not official
    checksum: str  # of the four arrays, so that a result names its data
    stand_in: bool


class Text(NamedTuple):
    train: np.ndarray  # the first 80 % of the bytes, (n,) uint8, read-only
    valid: np.ndarray  # the next 10 %
    test: np.ndarray  # and the last
    name: str  # as for `Images`
    checksum: str  # of the three arrays
    stand_in: bool


class DataSet(NamedTuple):
    name: str
    folders: tuple  # in the user's folder. The first is that of cache and archives
    read: Callable  # (data set, paths of its files) -> Images or Text
    files: dict  # name of each file to download -> its MD5
    address: str  # where to download them, with the "/" at its end
    sizes: tuple  # (pictures to train, to test), or (bytes of the stand-in,)
    shape: tuple = ()  # of a picture
    classes: int = 0
    unpacked: tuple = ()  # names of the same data unpacked, if not `files` without .gz
    checksum: str = ""  # `Images.checksum` of the official data, where it is known


def about(data: Images | Text) -> dict:
    """What a result says of the `Images` or `Text` it was made with."""
    found = {"dataset": data.name, "dataset_checksum": data.checksum}
    return found | {"stand_in": data.stand_in}


def about_formula(name: str = "drawn from its formula") -> dict:
    """`about` for what needs no files."""
    return {"dataset": name, "dataset_checksum": "", "stand_in": False}


# --- finding and downloading
def load(data_set: DataSet, source: str = "auto", data_dir: str | Path | None = None):
    """`data_set` as `Images` or `Text`.

    source: "real", "stand-in" or "auto". "auto" draws the stand-in, with a loud warning,
    when there is no real one. Files lie in `data_dir`, else in `$STAR_DATA`, else in the
    user's cache, else they are downloaded into it. Raises DataError for nothing or damaged
    files where the user pointed, and for "real" where none is found.
    """
    stand_in = stand_in_images if data_set.classes else stand_in_text
    if source == "stand-in":
        return stand_in(data_set)
    root = data_dir or os.environ.get("STAR_DATA")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "star", data_set.folders[0])
    paths = find(Path(root).expanduser(), data_set) if root else []
    if data_dir and not paths:
        raise DataError(f"{data_dir} has no file of {data_set.name}")
    try:
        paths = paths or [fetch(data_set, name, folder) for name in data_set.files]
    except (OSError, HTTPException) as error:
        looked = f"{root or '$STAR_DATA (not set)'} or {folder}"
        reason = f"no {data_set.name} in {looked}; {data_set.address}: {error}"
        if source != "auto":
            raise DataError(reason) from error
        sys.stderr.write(
            f"{'!' * 80}\nWARNING: {reason}.\nUsing a drawn STAND-IN: its numbers compare "
            "with nobody else's.\nFor the real one set STAR_DATA to a folder with it.\n"
        )
        return stand_in(data_set)
    return data_set.read(data_set, paths)


def find(root: Path, data_set: DataSet) -> list[Path]:
    """The files, else the unpacked ones, in one of root's folders or root, else [].

    A name with a star stands for all that match. Raises DataError when `root` is no
    folder, or when some of the files are missing.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder (looking for {data_set.name})")
    places = [root / folder for folder in data_set.folders] + [root]
    unpacked = data_set.unpacked or [x.removesuffix(".gz") for x in data_set.files]
    for names, folder in product((data_set.files, unpacked), places):
        found = {name: sorted(folder.glob(name)) for name in names}
        if all(found.values()):
            return sum(found.values(), [])
        if any(found.values()):
            lacks = ", ".join(name for name in names if not found[name])
            raise DataError(f"{folder} lacks {lacks} of {data_set.name}")
    return []


def fetch(data_set: DataSet, name: str, folder: Path) -> Path:
    """The verified `name` in `folder`, else downloaded whole. OSError if that fails."""
    path, url, digest = folder / name, data_set.address + name, data_set.files[name]
    if path.is_file():
        if md5(path.read_bytes()).hexdigest() != digest:
            raise DataError(f"{path} is damaged. Delete it, and it is downloaded again")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}", file=sys.stderr)
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
        raw = response.read()
    if (found := md5(raw).hexdigest()) != digest:
        raise OSError(f"the MD5 of {name} is {found} instead of {digest}")
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        whole = Path(aside, name)
        whole.write_bytes(raw)
        return whole.replace(path)


# --- reading. What cannot be read raises DataError, or OSError with the file's name.
def read_idx(data_set: DataSet, paths: list[Path]) -> Images:
    """`Images` from the four idx files, gzipped or not."""
    arrays = []
    shapes = [x for n in data_set.sizes for x in ((n, *data_set.shape), (n,))]
    for path, shape in zip(paths, shapes, strict=True):
        header = np.array([0x0800 + len(shape), *shape], ">u4").tobytes()  # 08: uint8
        raw = path.read_bytes()
        try:  # 31: the gzip format
            raw = zlib.decompress(raw, wbits=31) if path.suffix == ".gz" else raw
        except zlib.error as error:
            raise DataError(f"{path}: not a whole gzip file ({error})") from error
        if len(raw) != len(header) + prod(shape) or not raw.startswith(header):
            raise DataError(f"{path}: not an idx file of uint8 of shape {shape}")
        arrays += [np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)]
    images = as_images(data_set, data_set.name, arrays)
    remark = "" if images.checksum == data_set.checksum else " (not the official bytes)"
    return images._replace(name=data_set.name + remark)


def read_cifar(data_set: DataSet, paths: list[Path]) -> Images:
    """`Images` from the official archive, or from its files unpacked.

    Only the archive can be verified: .bin files may hold others, or fewer. A record is
    the class, then 32 x 32 red, green and blue. CIFAR-100 has a coarse class before it.
    """
    files = {path: path.read_bytes() for path in paths}
    first = 2 if data_set.classes == 100 else 1  # byte of the picture
    if verified := len(paths) == 1:
        (archive,), (digest,) = paths, data_set.files.values()
        if (found := md5(files[archive]).hexdigest()) != digest:
            raise DataError(f"{archive}: its MD5 is {found} instead of {digest}")
        with tarfile.open(archive) as tar:
            names = [f"{data_set.folders[0]}/{name}" for name in data_set.unpacked]
            files = {name: tar.extractfile(name).read() for name in names}
    size = first + prod(data_set.shape)
    for path, raw in files.items():
        if not raw or len(raw) % size:
            raise DataError(f"{path}: {len(raw)} bytes are no records of {size} bytes")
    *train, test = files.values()
    arrays = []
    for raw in b"".join(train), test:
        records = np.frombuffer(raw, np.uint8).reshape(-1, size)
        planes = records[:, first:].reshape(-1, 3, 32, 32)
        arrays += [planes.transpose(0, 2, 3, 1), records[:, first - 1]]
    sizes = len(arrays[0]), len(arrays[2])
    counts = "" if sizes == data_set.sizes else f"{sizes[0]} + {sizes[1]} pictures, "
    name = data_set.name + ("" if verified else f" ({counts}not verified)")
    return as_images(data_set, name, arrays)


def as_images(data_set, name, arrays, stand_in=False) -> Images:
    """[x (n, 28, 28) or (n, 32, 32, 3), y (n,), x_test, y_test] uint8 -> Images."""
    checksum, classes = seal(arrays), data_set.classes
    x, y, x_test, y_test = arrays
    if (found := max(y.max(), y_test.max())) >= classes:
        raise DataError(f"{name}: it has labels up to {found}, not {classes - 1}")
    x, x_test = (a.reshape(*a.shape[:3], -1) for a in (x, x_test))  # (n, h, w, c)
    return Images(x, y, x_test, y_test, classes, name, checksum, stand_in)


def read_text(data_set: DataSet, paths: list[Path]) -> Text:
    """`Text` from .txt files, joined in the order given."""
    raw, folder = b"".join(path.read_bytes() for path in paths), paths[0].parent
    if len(raw) < 10_000:  # a tenth has to hold sequences
        raise DataError(f"{folder}: {len(raw)} bytes of text, less than 10,000")
    official = md5(raw).hexdigest() in data_set.files.values()
    own = f"own text {folder.resolve().name} ({len(paths)} files)"
    return as_text(data_set.name if official else own, raw)


def as_text(name: str, raw: bytes, stand_in: bool = False) -> Text:
    n, x = len(raw), np.frombuffer(raw, np.uint8)
    arrays = np.split(x, [n * 8 // 10, n * 9 // 10])
    return Text(*arrays, name, seal(arrays), stand_in)


def seal(arrays: list[np.ndarray]) -> str:
    """The checksum of `arrays`, 16 hex digits. They become read-only, to keep it."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
        array.setflags(write=False)
    return digest.hexdigest()[:16]


# --- drawing. RandomState's stream is frozen: the same bytes on every machine.
SILHOUETTES = """
    .##.##. .#####. .##.##. ..#.#.. .##.##. ....... ..###.. ....... ..###.. ...###.
    ####### .#####. .#####. ..###.. .#####. .....## .#####. ....... .#...#. ...###.
    ####### .##.##. ####### ...#... ###.### ...##.# ####### ....##. .#...#. ...###.
    #.###.# .##.##. ####### ..###.. ###.### ..#.#.# #.###.# ...###. ####### ...###.
    ..###.. .##.##. #.###.# ..###.. ###.### .#..#.# #.###.# .#####. ####### ..####.
    ..###.. .##.##. #.###.# .#####. #.#.#.# ##..##. ..###.. ####### ####### ######.
    ..###.. .##.##. #.###.# .#####. #.#.#.# ####### ..###.. ####### ####### #######
    ....... .##.##. ..###.. ####### ..#.#.. ....... ..###.. ....... ....... .......
"""  # of Fashion-MNIST's ten classes


def stand_in_images(data_set: DataSet, sizes: tuple | None = None) -> Images:
    """`Images` drawn in place of `data_set`. sizes: pictures to train and to test.

    The silhouette is the last digit of the class, the colour the first or the next.
    """
    rng, arrays, classes = np.random.RandomState(0), [], data_set.classes
    for n in sizes or data_set.sizes:
        labels = rng.permutation(np.arange(n) % classes).astype(np.uint8)
        chunks = np.split(labels, range(500, n, 500))  # 500 pictures fit a CPU's cache
        drawn = [draw(rng, data_set.shape, chunk, classes) for chunk in chunks]
        arrays += [np.concatenate(drawn), labels]
    return as_images(data_set, f"{data_set.name} stand-in", arrays, stand_in=True)


def draw(rng, shape, labels, classes) -> np.ndarray:
    """Labels (n,) -> (n, *shape) uint8: noisy silhouettes, moved, bent, cut, dyed."""
    some = partial(rng.randint, size=(len(labels), 1, 1), dtype=np.int32)
    masks = np.array([list(row) for row in SILHOUETTES.split()]) == "#"
    masks = np.pad(masks.reshape(8, 10, 7), ((1, 1), (0, 0), (1, 1)))
    side = shape[0]
    y, x = np.mgrid[:side, :side].astype(np.int32) - side // 2
    right, down = x + some(-3, 4), y + some(-3, 4)  # (n, side, side), as what follows
    unit = 8192 // side  # of a pixel. A cell of a silhouette has 1024
    column = right * some(unit * 3 // 4, unit * 5 // 4) + down * some(-80, 80)
    row = down * some(unit * 3 // 4, unit * 5 // 4) + right * some(-80, 80)
    row, column = (row // 1024 + 5).clip(0, 9), ((column + 512) // 1024 + 4).clip(0, 8)
    shown = masks[row, labels[:, None, None] % 10, column]
    shown &= x * some(-8, 9) + y * some(-8, 9) < some(0, 5 * side)  # else cut off
    noise = rng.randint(-50, 50, (len(labels), side, side), np.int32)
    cloth = (some(90, 256) + noise).clip(0, 255) * shown
    if len(shape) == 2:
        return cloth.astype(np.uint8)
    ground = (some(0, 160) + noise).clip(0, 255) * ~shown  # grey, behind
    colour = (labels // (classes // 10) + rng.randint(2, size=len(labels))) % 10
    palette = np.random.RandomState(1).randint(40, 256, (10, 3), np.int32)
    dyed = cloth[..., None] * palette[colour][:, None, None] // 256  # (n, h, w, 3)
    return (dyed + ground[..., None]).astype(np.uint8)


def stand_in_text(data_set: DataSet, sizes: tuple | None = None) -> Text:
    """`Text` of sixty made-up words in place of `data_set`. sizes: (bytes,)."""
    rng, (size,) = np.random.RandomState(0), sizes or data_set.sizes
    lengths = rng.randint(1, 9, 60)
    words = [rng.randint(97, 123, n, np.uint8).tobytes() + b" " for n in lengths]
    # Small numbers are frequent among the products, as a few words are in a language.
    a, b = rng.randint(60, size=(2, size // 2))  # a word has two bytes at least
    raw = b"".join(words[i] for i in a * b // 60)[:size]
    return as_text(f"{data_set.name} stand-in", raw, stand_in=True)


# --- the data sets
FASHION_MNIST = DataSet(
    name="fashion-mnist",
    folders=("fashion-mnist", "FashionMNIST/raw"),  # the second is torchvision's
    read=read_idx,
    files={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    sizes=(60000, 10000),
    shape=(28, 28),
    classes=10,
    checksum="82d70dcdc5da191d",
)
MNIST = FASHION_MNIST._replace(
    name="mnist",
    folders=("mnist", "MNIST/raw"),
    files={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    address="https://ossci-datasets.s3.amazonaws.com/mnist/",
    checksum="2eb4d82c94e1e65a",
)
CIFAR_10 = DataSet(
    name="cifar-10",
    folders=("cifar-10-batches-bin",),
    read=read_cifar,
    files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    address="https://www.cs.toronto.edu/~kriz/",
    sizes=(50000, 10000),
    shape=(32, 32, 3),
    classes=10,
    unpacked=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
)
CIFAR_100 = CIFAR_10._replace(
    name="cifar-100",
    folders=("cifar-100-binary",),
    files={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    classes=100,
    unpacked=("train.bin", "test.bin"),
)
TINY_SHAKESPEARE = DataSet(
    name="tinyshakespeare",
    folders=("text",),
    read=read_text,
    files={"input.txt": "6fb458f1232090904fb40fe944165e91"},
    address="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    sizes=(1_000_000,),
    unpacked=("*.txt",),
)

fashion_mnist = partial(load, FASHION_MNIST)
mnist = partial(load, MNIST)
cifar10 = partial(load, CIFAR_10)
cifar100 = partial(load, CIFAR_100)  # with the 100 fine labels
text = partial(load, TINY_SHAKESPEARE)  # or all .txt files of a folder
