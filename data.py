"""Find, download and verify images and text, or draw a stand-in for them.

Fashion-MNIST, MNIST, CIFAR-10 and CIFAR-100 as `Images`, Tiny Shakespeare or any text
files as `Text`.  All stay uint8; a task divides by 255.  A data set is one `DataSet`
row, one function that reads its files, and one in `standins` that draws its stand-in;
`locate` does the rest for all of them.  What a user points at is used or refused, never
passed over; the stand-in appears only when nothing was found.  The `name` of what comes
back says when it is a stand-in, or not the official data.
"""

import fnmatch
import functools
import gzip
import hashlib
import http.client
import os
import queue
import re
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import standins

ANSWER_SECONDS = 6  # for a server to answer, name lookup and redirects included
FILE_SECONDS = 1800  # for one whole file
PROGRESS_SECONDS = 2  # between two lines of progress
TEXT_BYTES = 10_000, 1 << 28  # least and most; a tenth of it has to hold sequences
PIXELS = 3 * 32 * 32  # bytes of a picture of CIFAR


class DataError(Exception):
    """One line for the user: which file, folder or address, and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).splitlines()))


class Images(NamedTuple):
    train_images: np.ndarray  # (N, height, width, channels) uint8, as all read-only
    train_labels: np.ndarray  # (N,) uint8
    test_images: np.ndarray  # (M, height, width, channels) uint8
    test_labels: np.ndarray  # (M,) uint8
    classes: int
    name: str  # for plot titles, result files and logs; says what is not official
    checksum: str  # of the four arrays, so that a result names its data
    stand_in: bool


class Text(NamedTuple):
    train: np.ndarray  # (n,) uint8, as all read-only: the first 80 % of every file
    valid: np.ndarray  # the next 10 %
    test: np.ndarray  # and the last
    name: str  # as for `Images`
    checksum: str  # of the three arrays
    stand_in: bool


class File(NamedTuple):
    name: str
    digest: str  # of the download; a copy in a user's folder may be packed differently
    shape: tuple  # of the array inside; a download is not much longer
    algorithm: str = "md5"


class DataSet(NamedTuple):
    name: str
    folder: str  # where its files lie, in the user's root or in the cache
    files: tuple  # what to download
    forms: tuple  # file names that a folder may hold, the better choice first
    addresses: tuple  # where to download, in order of preference; each ends in "/"
    stand_in: Callable  # sizes -> arrays
    sizes: tuple  # of the official data and the stand-in: pictures to train and test
    labels: tuple = ()  # values a picture's label bytes can take; the last is its class
    checksum: str = ""  # `Images.checksum` of the official data, where it is known


# Fashion-MNIST and MNIST share the names and shapes of their files
IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
IDX_SHAPES = (60000, 28, 28), (60000,), (10000, 28, 28), (10000,)
FASHION_MNIST_DIGESTS = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
FASHION_MNIST = DataSet(
    name="fashion-mnist",
    folder="fashion-mnist",
    files=tuple(map(File, IDX_NAMES, FASHION_MNIST_DIGESTS, IDX_SHAPES)),
    forms=(IDX_NAMES,),
    addresses=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    stand_in=standins.silhouettes,
    sizes=(60000, 10000),
    labels=(10,),
    checksum="82d70dcdc5da191d",
)
MNIST_DIGESTS = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
MNIST = DataSet(
    name="mnist",
    folder="mnist",
    files=tuple(map(File, IDX_NAMES, MNIST_DIGESTS, IDX_SHAPES)),
    forms=(IDX_NAMES,),
    addresses=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    stand_in=standins.silhouettes,
    sizes=(60000, 10000),
    labels=(10,),
    checksum="2eb4d82c94e1e65a",
)
CIFAR_10_ARCHIVE = File(
    "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", (60000, 1 + 3072)
)
CIFAR_10 = DataSet(
    name="cifar-10",
    folder="cifar-10-batches-bin",
    files=(CIFAR_10_ARCHIVE,),
    forms=(
        (CIFAR_10_ARCHIVE.name,),
        (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    ),
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    stand_in=functools.partial(standins.coloured_silhouettes, classes=10),
    sizes=(50000, 10000),
    labels=(10,),
)
CIFAR_100_ARCHIVE = File(
    "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", (60000, 2 + 3072)
)
CIFAR_100 = DataSet(
    name="cifar-100",
    folder="cifar-100-binary",
    files=(CIFAR_100_ARCHIVE,),
    forms=((CIFAR_100_ARCHIVE.name,), ("train.bin", "test.bin")),
    addresses=("https://www.cs.toronto.edu/~kriz/",),
    stand_in=functools.partial(standins.coloured_silhouettes, classes=100),
    sizes=(50000, 10000),
    labels=(20, 100),  # coarse and fine
)
TINY_SHAKESPEARE = DataSet(
    name="tinyshakespeare",
    folder="text",
    files=(
        File(
            "input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            (1115394,),
            "sha256",
        ),
    ),
    forms=(("*.txt",),),
    addresses=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    ),
    stand_in=standins.text,
    sizes=(1_000_000,),
)


def log_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fashion_mnist(
    source: str = "auto",
    data_dir: str | Path | None = None,
    log: Callable = log_to_stderr,
) -> Images:
    """Fashion-MNIST as `Images`, (60000 and 10000, 28, 28, 1).

    source: "real", "stand-in", or "auto": the stand-in, with a loud warning, when
    there is no real one.  Looks in `data_dir`, else in `$STAR_DATA`, else in the user's
    cache, else downloads into the cache.  `log` gets each text meant for the user.
    Raises DataError: nothing or damaged files where the user pointed; "real" not found.
    """
    return load_images(FASHION_MNIST, read_idx_images, source, data_dir, log)


def mnist(
    source: str = "auto",
    data_dir: str | Path | None = None,
    log: Callable = log_to_stderr,
) -> Images:
    """MNIST as `Images`, found as `fashion_mnist` finds its own; the same stand-in."""
    return load_images(MNIST, read_idx_images, source, data_dir, log)


def cifar10(
    source: str = "auto",
    data_dir: str | Path | None = None,
    log: Callable = log_to_stderr,
) -> Images:
    """CIFAR-10 as `Images`, (50000 and 10000, 32, 32, 3), found as the others are.

    Only the official archive, `cifar-10-binary.tar.gz`, can be verified and has the
    plain name; the .bin files may hold fewer pictures, or others, and the name says so.
    """
    return load_images(CIFAR_10, read_cifar, source, data_dir, log)


def cifar100(
    source: str = "auto",
    data_dir: str | Path | None = None,
    log: Callable = log_to_stderr,
) -> Images:
    """CIFAR-100 as `Images` with the 100 fine labels; all else as for `cifar10`."""
    return load_images(CIFAR_100, read_cifar, source, data_dir, log)


def text(
    source: str = "auto",
    data_dir: str | Path | None = None,
    log: Callable = log_to_stderr,
) -> Text:
    """The bytes of all .txt files of one folder as `Text`, else Tiny Shakespeare.

    Looks where `fashion_mnist` looks: in the folder `text`, else in the root itself,
    not in folders inside; or `data_dir` is one .txt file.  Raises DataError.
    """
    paths = locate(TINY_SHAKESPEARE, source, data_dir, log)
    if paths is None:
        return stand_in_text(TINY_SHAKESPEARE)
    return read_text(TINY_SHAKESPEARE, paths)


def about(data: Images | Text) -> dict:
    """What a result says of the `Images` or `Text` it was made with."""
    return {
        "dataset": data.name,
        "dataset_checksum": data.checksum,
        "stand_in": data.stand_in,
    }


def about_formula(name: str = "drawn from its formula") -> dict:
    """`about` for what needs no files."""
    return {"dataset": name, "dataset_checksum": "", "stand_in": False}


def load_images(
    data_set: DataSet,
    read: Callable,
    source: str,
    data_dir: str | Path | None,
    log: Callable,
) -> Images:
    paths = locate(data_set, source, data_dir, log)
    if paths is None:
        return stand_in_images(data_set)
    return read(data_set, paths, log)


def stand_in_images(data_set: DataSet, sizes: tuple[int, ...] | None = None) -> Images:
    """`Images` drawn in place of `data_set`; sizes: pictures to train and to test."""
    arrays = data_set.stand_in(*(sizes or data_set.sizes))
    return as_images(data_set, f"{data_set.name} stand-in", arrays, stand_in=True)


def stand_in_text(data_set: DataSet, sizes: tuple[int, ...] | None = None) -> Text:
    """`Text` drawn in place of `data_set`; sizes: (bytes,)."""
    raw = data_set.stand_in(*(sizes or data_set.sizes))
    return as_text(f"{data_set.name} stand-in", [raw], stand_in=True)


def as_images(
    data_set: DataSet, name: str, arrays: list[np.ndarray], stand_in: bool = False
) -> Images:
    """(x (N, 28, 28) or (N, 32, 32, 3), y (N,), x_test, y_test) uint8 -> Images."""
    checksum = seal(arrays)
    x, y, x_test, y_test = arrays
    return Images(
        # (N, 28, 28) -> (N, 28, 28, 1); (N, 32, 32, 3) stays
        train_images=x.reshape(*x.shape[:3], -1),
        train_labels=y,
        test_images=x_test.reshape(*x_test.shape[:3], -1),
        test_labels=y_test,
        classes=data_set.labels[-1],
        name=name,
        checksum=checksum,
        stand_in=stand_in,
    )


def as_text(name: str, contents: list[bytes], stand_in: bool = False) -> Text:
    """The bytes of each file -> Text, 80, 10 and 10 % of each."""
    parts = [[], [], []]
    for raw in contents:
        array, n = np.frombuffer(raw, np.uint8), len(raw)
        pieces = np.split(array, [n * 8 // 10, n * 9 // 10])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    arrays = [np.concatenate(part) for part in parts]
    checksum = seal(arrays)
    return Text(*arrays, name=name, checksum=checksum, stand_in=stand_in)


def seal(arrays: list[np.ndarray]) -> str:
    """The checksum of `arrays`, 16 hex digits, which become read-only: it stays true."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
        array.setflags(write=False)
    return digest.hexdigest()[:16]


def read_idx_images(data_set: DataSet, paths: list[Path], log: Callable) -> Images:
    """`Images` from the four idx files.  Raises DataError."""
    arrays = []
    for path, file in zip(paths, data_set.files, strict=True):
        array = read_idx(path, file.shape)
        if array.ndim == 1 and array.max() >= data_set.labels[-1]:
            raise DataError(f"{path}: it has labels up to {array.max()}")
        arrays.append(array)
    images = as_images(data_set, data_set.name, arrays)
    if images.checksum == data_set.checksum:
        return images
    log(f"note: {paths[0].parent} is not the official {data_set.name}, by its checksum")
    return images._replace(name=f"{data_set.name} (not the official bytes)")


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
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


def read_cifar(data_set: DataSet, paths: list[Path], log: Callable) -> Images:
    """`Images` from the archive, verified, or from its files unpacked.  Raises DataError.

    The files that a user has unpacked may hold fewer records than the official ones.
    """
    archive, names = data_set.files[0], data_set.forms[-1]
    train, test = data_set.sizes
    record = len(data_set.labels) + PIXELS
    sizes = [train // (len(names) - 1) * record] * (len(names) - 1) + [test * record]
    if paths[0].name == archive.name:
        contents, remarks = read_archive(paths[0], archive, names, sizes), []
        paths = [paths[0]] * len(names)
    else:
        contents = [read_at_most(*row) for row in zip(paths, sizes, strict=True)]
        remarks = ["not verified"]
        log(
            f"note: {paths[0].parent} has no known checksum to be verified by as the "
            f"official {data_set.name}; {archive.name} has one"
        )
    parts = [read_records(data_set, *row) for row in zip(paths, contents, strict=True)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    x_test, y_test = parts[-1]
    if (len(y), len(y_test)) != (train, test):
        remarks.insert(0, f"{len(y)} + {len(y_test)} pictures")
    name = f"{data_set.name} ({', '.join(remarks)})" if remarks else data_set.name
    return as_images(data_set, name, [x, y, x_test, y_test])


def read_records(
    data_set: DataSet, path: str | Path, raw: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Records of `path` -> images (n, 32, 32, 3), classes (n,).  Raises DataError.

    A record is a byte for each of `data_set.labels`, then 32 x 32 red, green and blue.
    """
    labels = data_set.labels
    size = len(labels) + PIXELS
    if not raw or len(raw) % size:
        raise DataError(f"{path}: {len(raw)} bytes are no records of {size} bytes")
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    for column, values in enumerate(labels):
        if (found := records[:, column].max()) >= values:
            raise DataError(f"{path}: it has labels up to {found}, not {values - 1}")
    planes = records[:, len(labels) :].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (n, 32, 32, 3)
    return images, records[:, len(labels) - 1].copy()


def read_archive(
    path: Path, file: File, names: tuple[str, ...], sizes: list[int]
) -> list[bytes]:
    """The bytes of the members `names`, of `sizes`, of a .tar.gz with `file`'s digest.

    Nothing but the official archive is ever unpacked, and nothing onto the disk.
    Raises DataError.
    """
    try:
        with open(path, "rb") as raw:
            found = hashlib.file_digest(raw, lambda: new_digest(file)).hexdigest()
            if found != file.digest:
                raise DataError(f"{path}: {wrong_digest(file, found)}")
            raw.seek(0)
            contents, sizes = {}, dict(zip(names, sizes, strict=True))
            with tarfile.open(fileobj=raw, mode="r:gz") as tar:
                for member in tar:
                    name = member.name.split("/")[-1]
                    if name in sizes and member.isfile():
                        contents[name] = tar.extractfile(member).read(sizes[name] + 1)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: not a readable .tar.gz file ({error})") from error
    for name, size in sizes.items():
        if (found := len(contents.get(name, b""))) != size:
            raise DataError(f"{path}: its {name} has {found} bytes, not {size}")
    return [contents[name] for name in names]


def read_text(data_set: DataSet, paths: list[Path]) -> Text:
    """`Text` from .txt files, in the order given.  Raises DataError."""
    file = data_set.files[0]
    contents, (least, most) = [], TEXT_BYTES
    for path in paths:
        contents.append(read_at_most(path, most - sum(map(len, contents))))
    if (size := sum(map(len, contents))) < least:
        raise DataError(f"{paths[0].parent}: {size} bytes of text, less than {least}")
    if len(paths) > 1:
        name = f"own text {paths[0].parent.resolve().name} ({len(paths)} files)"
    elif new_digest(file, contents[0]).hexdigest() == file.digest:
        name = data_set.name
    else:
        name = f"own text {paths[0].name}"
    # It goes into plot titles, where a dollar sign would start a formula.
    return as_text(re.sub(r"[^\w(). -]", "_", name), contents)


def read_at_most(path: Path, size: int) -> bytes:
    """The bytes of a file.  Raises DataError: unreadable, or longer than `size`."""
    try:
        with open(path, "rb") as file:
            raw = file.read(size + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > size:
        raise DataError(f"{path}: more than {size} bytes")
    return raw


def locate(
    data_set: DataSet, source: str, data_dir: str | Path | None, log: Callable
) -> list[Path] | None:
    """The paths of the files to read, in the order of their form, or None: stand in."""
    if source not in ("real", "stand-in", "auto"):
        raise DataError(f"source is {source!r}, not 'real', 'stand-in' or 'auto'")
    if source == "stand-in":
        return None
    if data_dir is not None:
        paths = find(data_dir, data_set)
        if paths is None:
            names = " or ".join(", ".join(form) for form in data_set.forms)
            raise DataError(f"{data_dir} has no file of {data_set.name} ({names})")
        return paths
    star_data = os.environ.get("STAR_DATA")
    if star_data and (paths := find(star_data, data_set)):
        return paths
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "star", data_set.folder)
    failures = download(data_set, folder, log)
    if not failures:
        return [folder / file.name for file in data_set.files]
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


def find(root: str | Path, data_set: DataSet) -> list[Path] | None:
    """The files of a form in root/folder or in root, or root itself; None: no file.

    A name with a star stands for all that match, sorted.  Raises DataError when `root`
    is no folder and no such file, or when some of a form's files are missing.
    """
    root = Path(os.path.expanduser(root))
    alone = [form[0] for form in data_set.forms if len(form) == 1]
    if os.path.isfile(root) and any(map(root.match, alone)):
        return [root]
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder (looking for {data_set.name})")
    for form in data_set.forms:
        for folder in (root / data_set.folder, root):
            found = {name: matching(folder, name) for name in form}
            missing = [name for name in form if not found[name]]
            if not missing:
                return sum(found.values(), [])
            if len(missing) < len(form):
                names = ", ".join(missing)
                raise DataError(f"{folder} lacks {names} of {data_set.name}")
    return None


def matching(folder: Path, name: str) -> list[Path]:
    """The files in `folder` called `name`, sorted, without the hidden ones."""
    try:
        names = sorted(fnmatch.filter(os.listdir(folder), name))
    except OSError:
        return []
    paths = [folder / name for name in names if not name.startswith(".")]
    return [path for path in paths if os.path.isfile(path)]


def missing_files(folder: Path, data_set: DataSet) -> list[File]:
    return [f for f in data_set.files if not os.path.isfile(folder / f.name)]


def download(data_set: DataSet, folder: Path, log: Callable) -> list[str]:
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


def fetch(url: str, path: Path, file: File, log: Callable) -> None:
    """Download `url` to `path`, which appears only when whole and verified.

    Raises OSError, HTTPException or ValueError, and then leaves nothing behind.
    """
    log(f"downloading {url}")
    with open_in_time(url) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with open(handle, "wb") as out:
                found = copy_stream(response, out, file, log)
            if found != file.digest:
                raise ValueError(wrong_digest(file, found))
            os.replace(partial, path)
            log(f"verified {path}")
        finally:
            Path(partial).unlink(missing_ok=True)


def new_digest(file: File, raw: bytes = b"") -> Any:
    return hashlib.new(file.algorithm, raw, usedforsecurity=False)


def wrong_digest(file: File, found: str) -> str:
    return f"its {file.algorithm.upper()} is {found} instead of {file.digest}"


def copy_stream(
    response: http.client.HTTPResponse, out: BinaryIO, file: File, log: Callable
) -> str:
    """Copy `response` into `out`, reporting progress.  Returns its digest, in hex."""
    digest, size = new_digest(file), 0
    max_bytes = prod(file.shape) + 1000
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
            shown, rate = now, size / (now - start)
            left = (response.length or 0) / rate  # the server may not tell its size
            left = f", {left:.0f} s left" if left else ""
            log(f"  {size / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s{left}")
    return digest.hexdigest()


def open_in_time(url: str) -> http.client.HTTPResponse:
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
