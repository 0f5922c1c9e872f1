"""Find, download and verify Fashion-MNIST and MNIST, or draw a stand-in for them.

The images stay uint8; a task divides by 255.  A data set is one `DataSet` row, one
function that reads its files, and one that makes its stand-in; `locate` does the
rest for all of them.  What a user points at is used or refused, never passed over;
the stand-in appears only when nothing was found, and says so in `Images.name`.
"""

import gzip
import hashlib
import http.client
import os
import queue
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

ANSWER_SECONDS = 6  # for a server to answer, name lookup and redirects included
FILE_SECONDS = 600  # for one whole file
PROGRESS_SECONDS = 2  # between two lines of progress


class DataError(Exception):
    """One line for the user: which file, folder or address, and what is wrong."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


class Images(NamedTuple):
    train_images: np.ndarray  # (60000, 28, 28, 1) uint8, as all four read-only
    train_labels: np.ndarray  # (60000,) uint8
    test_images: np.ndarray  # (10000, 28, 28, 1) uint8
    test_labels: np.ndarray  # (10000,) uint8
    classes: int
    name: str  # for plot titles, result files and logs; says when it is a stand-in
    checksum: str  # of the four arrays, so that a result names its data
    stand_in: bool


class File(NamedTuple):
    name: str
    md5: str  # of the download; a copy in a user's folder may be packed differently
    shape: tuple  # of the array inside


class DataSet(NamedTuple):
    name: str  # also its folder's
    files: tuple
    addresses: tuple  # where to download, in order of preference; each ends in "/"
    classes: int
    checksum: str  # `Images.checksum` of the official data


FASHION_MNIST_FILES = (
    ("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", (60000, 28, 28)),
    ("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe", (60000,)),
    ("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79", (10000, 28, 28)),
    ("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310", (10000,)),
)
FASHION_MNIST = DataSet(
    name="fashion-mnist",
    files=tuple(File(*row) for row in FASHION_MNIST_FILES),
    addresses=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    classes=10,
    checksum="82d70dcdc5da191d",
)
MNIST_FILES = (
    ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", (60000, 28, 28)),
    ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", (60000,)),
    ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", (10000, 28, 28)),
    ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", (10000,)),
)
MNIST = DataSet(
    name="mnist",
    files=tuple(File(*row) for row in MNIST_FILES),
    addresses=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    classes=10,
    checksum="2eb4d82c94e1e65a",
)


def log_to_stderr(text):
    print(text, file=sys.stderr, flush=True)


def fashion_mnist(source="auto", data_dir=None, log=log_to_stderr):
    """Fashion-MNIST as `Images`.

    source: "real", "stand-in", or "auto": the stand-in, with a loud warning, when
    there is no real one.  Looks in `data_dir`, else in `$STAR_DATA`, else in the user's
    cache, else downloads into the cache.  `log` gets each text meant for the user.
    Raises DataError: nothing or damaged files where the user pointed; "real" not found.
    """
    return idx_images(FASHION_MNIST, source, data_dir, log)


def mnist(source="auto", data_dir=None, log=log_to_stderr):
    """MNIST as `Images`, found as `fashion_mnist` finds its own; the same stand-in."""
    return idx_images(MNIST, source, data_dir, log)


def idx_images(data_set, source, data_dir, log):
    folder = locate(data_set, source, data_dir, log)
    if folder is None:
        return fashion_mnist_stand_in(data_set=data_set)
    return read_idx_images(data_set, folder, log)


def read_idx_images(data_set, folder, log):
    """`Images` from the four idx files in `folder`.  Raises DataError."""
    arrays = []
    for file in data_set.files:
        array = read_idx(folder / file.name, file.shape)
        if array.ndim == 1 and array.max() >= data_set.classes:
            raise DataError(f"{folder / file.name}: it has labels up to {array.max()}")
        arrays.append(array)
    images = as_images(data_set, data_set.name, arrays)
    if images.checksum != data_set.checksum:
        # Fashion-MNIST and MNIST share the names and shapes of their files
        log(f"note: {folder} is not the official {data_set.name}, by its checksum")
    return images


def as_images(data_set, name, arrays):
    """(x (N, 28, 28), y (N,), x_test (M, 28, 28), y_test (M,)) uint8 -> Images."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        array.setflags(write=False)  # the checksum stays true
    x, y, x_test, y_test = arrays
    return Images(
        train_images=x[..., None],  # (N, 28, 28) -> (N, 28, 28, 1)
        train_labels=y,
        test_images=x_test[..., None],
        test_labels=y_test,
        classes=data_set.classes,
        name=name,
        checksum=digest.hexdigest()[:16],
        stand_in=name != data_set.name,
    )


def read_idx(path, shape):
    """The uint8 array of `shape` in a gzipped idx file.  Raises DataError."""
    header = bytes([0, 0, 8, len(shape)])  # 8: unsigned bytes
    header += b"".join(n.to_bytes(4, "big") for n in shape)
    size = len(header) + prod(shape)
    try:
        with gzip.open(path) as file:
            raw = file.read(size + 1)  # bounded, whatever the file would expand to
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable, whole gzip file ({error})") from error
    if raw[:4] != header[:4]:
        raise DataError(f"{path}: not an idx file of {len(shape)}-d unsigned bytes")
    if raw[: len(header)] != header:
        raise DataError(f"{path}: its header does not say shape {shape}")
    if len(raw) != size:
        found = "more" if len(raw) > size else len(raw)
        raise DataError(f"{path}: {found} bytes unpacked instead of {size}")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)


def locate(data_set, source, data_dir, log):
    """The folder with every file of `data_set`, or None: use the stand-in."""
    if source not in ("real", "stand-in", "auto"):
        raise DataError(f"source is {source!r}, not 'real', 'stand-in' or 'auto'")
    if source == "stand-in":
        return None
    if data_dir is not None:
        folder = folder_in(data_dir, data_set)
        if folder is None:
            names = ", ".join(file.name for file in data_set.files)
            raise DataError(f"{data_dir} has no file of {data_set.name} ({names})")
        return folder
    star_data = os.environ.get("STAR_DATA")
    if star_data and (folder := folder_in(star_data, data_set)):
        return folder
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "star", data_set.name)
    failures = download(data_set, folder, log)
    if not failures:
        return folder
    where = f"no {data_set.name} in {star_data or '$STAR_DATA (not set)'} or {folder}"
    if source == "real":
        raise DataError("; ".join([where, *failures]))
    bar = "!" * 80
    log(
        f"{bar}\nWARNING: {where}, and it could not be downloaded.\n"
        "Using a drawn STAND-IN: its numbers compare with nobody else's.\n"
        f"To use the real one put its files in a folder and set STAR_DATA to it.\n{bar}"
    )
    return None


def folder_in(root, data_set):
    """root/name or root, whichever has files of `data_set`; None: neither has any.

    Raises DataError when `root` is no folder, or when some of the files are missing.
    """
    root = Path(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder (looking for {data_set.name})")
    for folder in (root / data_set.name, root):
        missing = missing_files(folder, data_set)
        if not missing:
            return folder
        if len(missing) < len(data_set.files):
            names = ", ".join(file.name for file in missing)
            raise DataError(f"{folder} lacks {names} of {data_set.name}")
    return None


def missing_files(folder, data_set):
    return [f for f in data_set.files if not os.path.isfile(folder / f.name)]


def download(data_set, folder, log):
    """Fetch what `folder` lacks.  Returns [], or a line on each address that failed.

    An address that failed once is not asked again, so being offline costs seconds.
    """
    addresses, failures = list(data_set.addresses), []
    for file in missing_files(folder, data_set):
        while addresses:
            try:
                fetch(addresses[0] + file.name, folder / file.name, file, log)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f"{addresses.pop(0)}{file.name}: {error}")
                log(f"download failed: {failures[-1]}")
    return failures if missing_files(folder, data_set) else []


def fetch(url, path, file, log):
    """Download `url` to `path`, which appears only when whole and verified.

    Raises OSError, HTTPException or ValueError, and then leaves nothing behind.
    """
    log(f"downloading {url}")
    with open_in_time(url) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with open(handle, "wb") as out:
                md5 = copy_stream(response, out, prod(file.shape) + 1000, log)
            if md5 != file.md5:
                raise ValueError(f"its MD5 is {md5} instead of {file.md5}")
            os.replace(partial, path)
            log(f"verified {path}")
        finally:
            Path(partial).unlink(missing_ok=True)


def copy_stream(response, out, max_bytes, log):
    """Copy `response` into `out`, reporting progress.  Returns the MD5, in hex."""
    digest, size = hashlib.md5(usedforsecurity=False), 0
    start = shown = time.monotonic()
    while block := response.read1(1 << 16):  # one packet: a slow server can't hold us
        out.write(block)
        digest.update(block)
        size, now = size + len(block), time.monotonic()
        if size > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        if now - start > FILE_SECONDS:
            raise TimeoutError(f"not whole after {FILE_SECONDS} s")
        if now - shown > PROGRESS_SECONDS:
            shown = now
            log(f"  {size / 1e6:.1f} MB, {size / 1e6 / (now - start):.2f} MB/s")
    return digest.hexdigest()


def open_in_time(url):
    """urlopen with a limit on the whole of it.

    Its own timeout counts for each of a server's addresses anew and not at all for
    the name lookup, so a thread does the waiting.
    """
    answers = queue.Queue()

    def work():
        try:
            answers.put(urllib.request.urlopen(url, timeout=ANSWER_SECONDS))
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                answers.put(OSError(str(error)))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


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


def fashion_mnist_stand_in(train=60000, test=10000, data_set=FASHION_MNIST):
    """`Images` drawn from a fixed seed: ten silhouettes instead of the `data_set`.

    The same bytes on every machine: the stream of RandomState is frozen for good, and
    no operation but the exactly rounded ones is used (no sine, no matrix product).
    """
    rng = np.random.RandomState(0)
    templates = np.stack([draw_templates(rng, *row[1:]) for row in SILHOUETTES])
    arrays = []
    for n in (train, test):
        labels = rng.permutation(np.arange(n) % len(SILHOUETTES)).astype(np.uint8)
        chunks = np.split(labels, range(500, n, 500))  # 500 images fit a CPU's cache
        arrays += [np.concatenate([draw(rng, templates, c) for c in chunks]), labels]
    return as_images(data_set, f"{data_set.name} stand-in", arrays)


def uniform(rng, low, high, shape):
    """As rng.uniform, which some compilers round differently (fused multiply-add)."""
    return low + (high - low) * rng.random_sample(shape)


def draw_templates(rng, mirror, contours):
    """Masks of one class, (VARIANTS, SIDE, SIDE) bool, by the even-odd rule."""
    y, x = (np.mgrid[:SIDE, :SIDE] * 2 + 1) / SIDE - 1  # pixel centres in -1 .. 1
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


def draw(rng, templates, labels):
    """An image for each label, (n,) -> (n, 28, 28) uint8: a template, bent and dyed."""
    n = len(labels)

    def some(low, high):
        return uniform(rng, low, high, (n, 1, 1)).astype(np.float32)

    def some_integer(low, high):
        return rng.randint(low, high + 1, (n, 1, 1), np.int32)

    y, x = (np.mgrid[:28, :28].astype(np.float32) * 2 + 1) / 28 - 1
    x, y = x - some(-0.12, 0.12), y - some(-0.12, 0.12)  # (28, 28) -> (n, 28, 28)
    u = x * some(0.75, 1.25) + y * some(-0.2, 0.2) + y * y * some(-0.2, 0.2)
    v = y * some(0.75, 1.25) + x * some(-0.2, 0.2)
    column = ((u + 1) * (SIDE // 2)).astype(np.int32).clip(0, SIDE - 1)
    row = ((v + 1) * (SIDE // 2)).astype(np.int32).clip(0, SIDE - 1)
    template = labels[:, None, None].astype(np.int32) * VARIANTS
    template += some_integer(0, VARIANTS - 1)
    inside = templates.reshape(-1)[(template * SIDE + row) * SIDE + column]
    stripes = (column * some_integer(-2, 2) + row * some_integer(0, 2)) & 8 > 0
    shade = some(90, 255) + u * some(-40, 40) + stripes * some(-80, 80)
    noise = rng.randint(-60, 61, (n, 28, 28), np.int8)
    hidden = x * some(-1, 1) + y * some(-1, 1) > some(0.1, 1.2)
    return np.clip((shade + noise) * (inside & ~hidden), 0, 255).astype(np.uint8)
