"""Claims about data.py: what is found, what is refused, what is downloaded or drawn.

Everything here is offline: the only server is on 127.0.0.1, the files are small.
"""

import ast
import collections
import functools
import gzip
import hashlib
import http.server
import io
import os
import socket
import sys
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import standins

PROFILE = settings(derandomize=True, deadline=None, database=None, print_blob=True)
STAR_DATA = os.environ.get("STAR_DATA", "")  # before the tests hide it
OFFICIAL = data.FASHION_MNIST
EACH = [(source, where) for source in ("real", "auto") for where in ("arg", "env")]


def pack(array, shape=None, kind=8):
    """`array` as a gzipped idx file, whose header may lie."""
    shape = array.shape if shape is None else shape
    header = bytes([0, 0, kind, len(shape)]) + np.array(shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def small_arrays(classes, *shapes):
    rng = np.random.RandomState(1)
    tops = [256 if len(shape) > 1 else classes for shape in shapes]
    return [
        rng.randint(n, size=s).astype("u1") for n, s in zip(tops, shapes, strict=True)
    ]


ARRAYS = small_arrays(10, (30, 28, 28), (30,), (20, 28, 28), (20,))
PACKED = {f.name: pack(a) for f, a in zip(OFFICIAL.files, ARRAYS, strict=True)}
SMALL = OFFICIAL._replace(
    files=tuple(
        data.File(f.name, hashlib.md5(PACKED[f.name]).hexdigest(), a.shape)
        for f, a in zip(OFFICIAL.files, ARRAYS, strict=True)
    ),
    addresses=(),
    sizes=(20, 10),
    checksum=data.as_images(OFFICIAL, "", ARRAYS).checksum,
)
BOTH = pytest.mark.parametrize(
    ("name", "load"), [("fashion-mnist", data.fashion_mnist), ("mnist", data.mnist)]
)
NAMES = [file.name for file in SMALL.files]


def tar(members):
    """A .tar.gz of {name: bytes}, in the folder that the official one has."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def bins(data_set, arrays):
    """{name: bytes} of a CIFAR's unpacked files, by a loop over the records."""
    x, y, x_test, y_test = arrays
    names = data_set.forms[-1]
    pictures = np.split(x, len(names) - 1) + [x_test]
    classes = np.split(y, len(names) - 1) + [y_test]
    out = {}
    for name, xs, ys in zip(names, pictures, classes, strict=True):
        out[name] = b""
        for picture, label in zip(xs, ys, strict=True):
            coarse = [] if len(data_set.labels) == 1 else [label // 5]
            planes = [picture[:, :, channel].tobytes() for channel in range(3)]
            out[name] += bytes([*coarse, label]) + b"".join(planes)
    return out


class Small(NamedTuple):
    row: data.DataSet
    packed: dict  # {name: bytes}, as the server has them
    arrays: list  # what they hold


def small_cifar(row):
    shapes = (10, 32, 32, 3), (10,), (4, 32, 32, 3), (4,)
    arrays = small_arrays(row.labels[-1], *shapes)
    packed = {row.files[0].name: tar(bins(row, arrays))}
    return small_row(row, packed, arrays, (10, 4))


def small_text():
    content = np.random.RandomState(1).randint(256, size=10_007).astype("u1")
    arrays = np.split(content, [8005, 9006])
    packed = {"input.txt": content.tobytes()}
    return small_row(data.TINY_SHAKESPEARE, packed, arrays, (10_000,))


def small_row(row, packed, arrays, sizes):
    (file,), (content,) = row.files, packed.values()
    digest = hashlib.new(file.algorithm, content).hexdigest()
    file = data.File(file.name, digest, (len(content),), file.algorithm)
    row = row._replace(files=(file,), addresses=(), sizes=sizes)
    return Small(row, packed, arrays)


SMALLS = {
    "fashion_mnist": Small(SMALL, PACKED, ARRAYS),
    "mnist": Small(SMALL._replace(name="mnist", folder="mnist"), PACKED, ARRAYS),
    "cifar10": small_cifar(data.CIFAR_10),
    "cifar100": small_cifar(data.CIFAR_100),
    "text": small_text(),
}
ROWS = {  # what they are called in data.py
    "fashion_mnist": "FASHION_MNIST",
    "mnist": "MNIST",
    "cifar10": "CIFAR_10",
    "cifar100": "CIFAR_100",
    "text": "TINY_SHAKESPEARE",
}
EVERY = pytest.mark.parametrize("which", SMALLS)
CIFAR = pytest.mark.parametrize("which", ["cifar10", "cifar100"])


def load(which, *args, **kwargs):
    return getattr(data, which)(*args, **kwargs)


def write(folder, packed=PACKED):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    return folder


def is_small(got, which="fashion_mnist"):
    arrays = SMALLS[which].arrays
    same = zip(got[: len(arrays)], arrays, strict=True)
    return all((a.reshape(b.shape) == b).all() for a, b in same) and not got.stand_in


@functools.cache
def templates(draw=standins.draw_all_templates):
    return draw(np.random.RandomState(0))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with an empty cache, no `$STAR_DATA`, and small data sets to find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STAR_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    for which, small in SMALLS.items():
        monkeypatch.setattr(data, ROWS[which], small.row)
    monkeypatch.setattr(standins, "draw_all_templates", lambda rng: templates())
    return tmp_path


@pytest.fixture
def serve(home, monkeypatch):
    """serve(*sites): makes them the addresses, in order; returns the list of requests.

    A site is a dict of file contents, or a function that answers by itself.
    """
    servers, requests = [], []

    def start(*sites):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                _, site, name = self.path.split("/")
                requests.append((int(site), name))
                site = sites[int(site)]
                if callable(site):
                    site(self)
                elif name not in site:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(site[name])

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,)).start()
        host = f"http://127.0.0.1:{servers[-1].server_port}"
        addresses = tuple(f"{host}/{i}/" for i in range(len(sites)))
        for which, small in SMALLS.items():
            row = small.row._replace(addresses=addresses)
            monkeypatch.setattr(data, ROWS[which], row)
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def files_under(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def quiet(line):
    pass


def refusal(source="auto", data_dir=None, which="fashion_mnist"):
    """The message of the DataError that the loader raises."""
    with pytest.raises(data.DataError) as caught:
        load(which, source, data_dir, log=quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def point(monkeypatch, where, folder):
    """Points the user's argument or variable at `folder`; returns the argument."""
    if where == "arg":
        return folder
    monkeypatch.setenv("STAR_DATA", str(folder))


# The stand-in


@pytest.fixture(scope="module")
def stand_in():
    return data.stand_in_images(data.FASHION_MNIST)


def test_stand_in_is_the_same_everywhere(stand_in):
    """The stand-in is one fixed data set: its 70,000 images have one checksum."""
    assert stand_in.checksum == "080e074eff9c2b0f"


def test_stand_in_has_the_form_of_the_real_one(stand_in):
    """Shapes, dtype, ten balanced classes and brightness are Fashion-MNIST's."""
    assert stand_in.train_images.shape == (60000, 28, 28, 1)
    assert stand_in.test_images.shape == (10000, 28, 28, 1)
    assert all(a.dtype == np.uint8 for a in stand_in[:4])
    assert (np.bincount(stand_in.train_labels) == 6000).all()
    assert (np.bincount(stand_in.test_labels) == 1000).all()
    assert 0.2 < stand_in.train_images.mean() / 255 < 0.35
    assert (stand_in.classes, stand_in.stand_in) == (10, True)
    assert stand_in.name == "fashion-mnist stand-in"


def test_stand_in_is_learnable_but_not_trivial(stand_in):
    """Least squares on 6,000 images tells 55-85 % of unseen ones, and no class at 0."""
    x = stand_in.train_images[:6000].reshape(6000, -1) / np.float32(255)
    y = np.eye(10, dtype=np.float32)[stand_in.train_labels[:6000]]
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(784), x.T @ y)
    guess = (stand_in.test_images.reshape(10000, -1) / 255 @ weights).argmax(-1)
    right = guess == stand_in.test_labels
    assert 0.55 < right.mean() < 0.85
    assert min(right[stand_in.test_labels == c].mean() for c in range(10)) > 0.2


def test_stand_in_test_set_repeats_no_training_image(stand_in):
    """No test image occurs in the training set."""
    train = {image.tobytes() for image in stand_in.train_images}
    assert not any(image.tobytes() in train for image in stand_in.test_images)


@EVERY
def test_stand_in_asked_for_needs_no_files(home, which):
    """source="stand-in" looks at no folder and prints nothing."""
    got = load(which, "stand-in", home / "nowhere", log=pytest.fail)
    assert (got.stand_in, got.name) == (True, f"{SMALLS[which].row.name} stand-in")


@pytest.mark.parametrize(
    ("row", "checksum", "accuracy"),
    [
        (data.CIFAR_10, "f88b900dedab1f67", (0.4, 0.7)),
        (data.CIFAR_100, "f9a1910a9cb61b0a", (0.1, 0.4)),
    ],
    ids=["cifar-10", "cifar-100"],
)
def test_coloured_stand_ins_are_pinned_balanced_and_learnable(row, checksum, accuracy):
    """One fixed data set; least squares on 6,000 tells classes far better than chance."""
    got = data.stand_in_images(row, (6000, 1000))
    assert got.checksum == checksum
    assert got.train_images.shape == (6000, 32, 32, 3)
    assert got.train_images.dtype == got.train_labels.dtype == np.uint8
    assert (np.bincount(got.test_labels) == 1000 // got.classes).all()
    assert 0.3 < got.train_images.mean() / 255 < 0.5
    halved = [x[:, 1::2, 1::2].reshape(len(x), -1) / np.float32(255) for x in got[:3:2]]
    y = np.eye(got.classes, dtype=np.float32)[got.train_labels]
    weights = np.linalg.solve(
        halved[0].T @ halved[0] + 30 * np.eye(768), halved[0].T @ y
    )
    right = (halved[1] @ weights).argmax(-1) == got.test_labels
    assert accuracy[0] < right.mean() < accuracy[1]


def bits_per_byte(text, context):
    """Cross-entropy of text.valid under counts of text.train given `context` bytes."""

    def codes(x):
        windows = np.lib.stride_tricks.sliding_window_view(x, context + 1)
        return [tuple(row) for row in windows.tolist()]

    pairs = collections.Counter(codes(text.train))
    contexts = collections.Counter()
    for code, n in pairs.items():
        contexts[code[:-1]] += n
    p = [(pairs[c] + 1 / 256) / (contexts[c[:-1]] + 1) for c in codes(text.valid)]
    return -np.log2(p).mean()


def test_stand_in_text_is_pinned_and_rewards_memory():
    """1 MB, split in 80, 10 and 10 %; the more bytes a model sees, the more it knows."""
    text = data.stand_in_text(data.TINY_SHAKESPEARE)
    assert text.checksum == "6cbdcc57b52fc84e"
    assert [len(x) for x in text[:3]] == [800_000, 100_000, 100_000]
    short = text._replace(train=text.train[:200_000], valid=text.valid[:20_000])
    bits = [bits_per_byte(short, n) for n in (0, 2, 5)]
    assert bits[0] > 1.5 * bits[1] > 1.5 * bits[2] > 0.5


# Finding files


@EVERY
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("source", "where"), EACH)
def test_files_are_found_where_the_user_points(
    home, monkeypatch, which, nested, source, where
):
    """The files may lie in the folder pointed at, or in the data set's folder there."""
    row, packed, _ = SMALLS[which]
    write(home / "mine" / row.folder if nested else home / "mine", packed)
    folder = point(monkeypatch, where, home / "mine")
    got = load(which, source, folder, log=pytest.fail)
    assert is_small(got, which)
    assert got.name == row.name
    assert data.about(got) == {
        "dataset": row.name,
        "dataset_checksum": got.checksum,
        "stand_in": False,
    }


def test_data_sets_with_the_same_file_names_lie_side_by_side(home):
    """In one folder, each finds its own: fashion-mnist's here are MNIST's, reversed."""
    swapped = {f: pack(a[::-1]) for f, a in zip(NAMES, ARRAYS, strict=True)}
    write(home / "mine" / "mnist")
    write(home / "mine" / "fashion-mnist", swapped)
    assert is_small(data.mnist("real", home / "mine", log=pytest.fail), "mnist")
    assert not is_small(data.fashion_mnist("real", home / "mine", log=quiet))


@BOTH
def test_a_copy_packed_differently_is_the_official_one(home, name, load):
    """A user's copy goes by its contents, whatever its .gz: no note, one checksum."""
    again = {f: gzip.compress(gzip.decompress(x), 1) for f, x in PACKED.items()}
    assert all(again[f] != PACKED[f] for f in NAMES)
    images = load("real", write(home / "mine", again), log=pytest.fail)
    assert images.checksum == SMALL.checksum


def test_argument_beats_variable_beats_cache(home, monkeypatch):
    """A good `data_dir` hides a bad `$STAR_DATA`, which in turn hides a bad cache."""
    write(home / "cache" / "star" / "fashion-mnist", {name: b"" for name in NAMES})
    monkeypatch.setenv("STAR_DATA", str(write(home / "variable")))
    assert is_small(data.fashion_mnist("real"))
    monkeypatch.setenv("STAR_DATA", str(home / "nowhere"))
    assert is_small(data.fashion_mnist("real", write(home / "argument")))


def test_variable_without_this_data_set_falls_through_to_the_cache(home, monkeypatch):
    """`$STAR_DATA` may hold other data sets only."""
    (home / "others").mkdir()
    monkeypatch.setenv("STAR_DATA", str(home / "others"))
    write(home / "cache" / "star" / "fashion-mnist")
    assert is_small(data.fashion_mnist("real"))


@EVERY
@pytest.mark.parametrize(("source", "where"), EACH)
def test_a_missing_folder_is_an_error(home, monkeypatch, which, source, where):
    """A folder that the user names and that does not exist is never passed over."""
    row, packed, _ = SMALLS[which]
    write(home / "cache" / "star" / row.folder, packed)
    argument = point(monkeypatch, where, home / "nowhere")
    assert "nowhere is not a folder" in refusal(source, argument, which)


@EVERY
@pytest.mark.parametrize("source", ["real", "auto"])
def test_an_argument_without_files_is_an_error(home, which, source):
    """`data_dir` must hold the data set, even when the cache does."""
    row, packed, _ = SMALLS[which]
    write(home / "cache" / "star" / row.folder, packed)
    (home / "empty").mkdir()
    assert row.forms[-1][0] in refusal(source, home / "empty", which)


@pytest.mark.parametrize(("source", "where"), EACH)
def test_missing_files_are_named(home, monkeypatch, source, where):
    """Where some of the four files lie, the others must lie too."""
    write(home / "some", {name: PACKED[name] for name in NAMES[1:3]})
    message = refusal(source, point(monkeypatch, where, home / "some"))
    assert [name in message for name in NAMES] == [True, False, False, True]


def test_unknown_source_is_an_error(home):
    """A misspelt source is refused with the choices."""
    assert "'stand-in'" in refusal("standin")


def test_other_data_under_the_same_names_is_told_apart(home):
    """Files of the right form with other contents (MNIST's, say) bring a note."""
    swapped = dict(PACKED)
    swapped[NAMES[1]] = pack(ARRAYS[1][::-1])
    lines = []
    images = data.fashion_mnist("real", write(home / "mine", swapped), lines.append)
    assert "not the official fashion-mnist" in lines[0]
    assert images.name == "fashion-mnist (not the official bytes)"
    assert images.checksum != SMALL.checksum


@EVERY
def test_arrays_cannot_be_changed(home, which):
    """They are read-only, so the checksum stays theirs."""
    folder = write(home / "mine", SMALLS[which].packed)
    for got in (load(which, "real", folder), load(which, "stand-in")):
        arrays = [x for x in got if isinstance(x, np.ndarray)]
        assert len(arrays) == len(SMALLS[which].arrays)
        assert not any(array.flags.writeable for array in arrays)


FASHION_COUNTS = [6000] * 10, [1000] * 10
MNIST_COUNTS = (
    [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
)


def official(name):
    """The folder of the real files, or the test is skipped."""
    folder = Path(STAR_DATA, name)
    if not STAR_DATA or not os.path.isfile(folder / NAMES[0]):
        pytest.skip(f"$STAR_DATA holds no {name}")
    return folder


@pytest.mark.parametrize(
    ("official_set", "load", "counts"),
    [
        (data.FASHION_MNIST, data.fashion_mnist, FASHION_COUNTS),
        (data.MNIST, data.mnist, MNIST_COUNTS),
    ],
    ids=["fashion-mnist", "mnist"],
)
def test_official_files_have_the_pinned_checksum(official_set, load, counts):
    """The real data sets read to the right number a class, under their checksums."""
    official(official_set.name)
    images = load("real", STAR_DATA, log=pytest.fail)
    assert images.checksum == official_set.checksum
    for labels, expected in zip(
        (images.train_labels, images.test_labels), counts, strict=True
    ):
        assert np.bincount(labels).tolist() == expected


def test_pinned_mnist_is_the_official_one_unpacked():
    """What has MNIST's checksum has, unpacked, the MD5s of its official files."""
    folder = official("mnist")
    found = [hashlib.md5(gzip.decompress((folder / f).read_bytes())) for f in NAMES]
    assert [md5.hexdigest() for md5 in found] == [
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ]


CIFAR_MEANS = {  # of red, green, blue over the official training set, in 0 .. 1
    "cifar10": (0.4914, 0.4822, 0.4465),
    "cifar100": (0.5071, 0.4865, 0.4409),
}


@CIFAR
def test_real_cifar_has_the_published_channel_means(which):
    """$STAR_DATA's copy, perhaps a sample, looks like CIFAR; if unpacked, says so."""
    row = getattr(data, ROWS[which])
    if not STAR_DATA or not Path(STAR_DATA, row.folder).is_dir():
        pytest.skip(f"$STAR_DATA holds no {row.name}")
    got = load(which, "real", STAR_DATA, log=quiet)
    means = got.train_images[::10].mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, CIFAR_MEANS[which], atol=0.01)
    assert len(np.unique(got.test_labels)) == got.classes
    assert (got.name == row.name) == Path(STAR_DATA, row.files[0].name).is_file()


def test_real_tinyshakespeare_is_known_by_its_digest():
    """Under whatever name: here `$STAR_DATA/text/tinyshakespeare.txt`."""
    path = Path(STAR_DATA, "text", "tinyshakespeare.txt")
    if not STAR_DATA or not path.is_file():
        pytest.skip("$STAR_DATA holds no tinyshakespeare.txt")
    text = data.text("real", path, log=pytest.fail)
    assert text.name == "tinyshakespeare"
    assert bytes(text.train[:14]) == b"First Citizen:"
    assert [len(x) for x in text[:3]] == [892315, 111539, 111540]


# CIFAR's files


@CIFAR
@pytest.mark.parametrize("nested", [False, True])
def test_unpacked_cifar_is_read_and_called_unverified(home, which, nested):
    """The .bin files hold the archive's pictures; the name says that nobody knows."""
    row, _, arrays = SMALLS[which]
    write(home / "mine" / row.folder if nested else home / "mine", bins(row, arrays))
    lines = []
    got = load(which, "real", home / "mine", lines.append)
    assert is_small(got, which)
    assert got.name == f"{row.name} (not verified)"
    assert row.files[0].name in lines[0]


@CIFAR
def test_the_archive_beats_the_unpacked_files(home, which):
    """What can be verified comes first, beside the folder or in it, or pointed at."""
    row, packed, arrays = SMALLS[which]
    write(home / "mine" / row.folder, bins(row, [a[::-1] for a in arrays]))
    write(home / "mine", packed)
    for path in (home / "mine", home / "mine" / row.files[0].name):
        assert is_small(load(which, "real", path, log=pytest.fail), which)


@CIFAR
def test_fewer_pictures_are_counted_in_the_name(home, which):
    """Whole records are enough, whatever their number; the name tells it."""
    row, _, arrays = SMALLS[which]
    files = bins(row, arrays)
    record = len(row.labels) + 3072
    first, last = row.forms[-1][0], row.forms[-1][-1]
    files[first], files[last] = files[first][record:], files[last][: 3 * record]
    got = load(which, "real", write(home / "mine", files), log=quiet)
    assert got.name == f"{row.name} (9 + 3 pictures, not verified)"
    assert (got.train_images == arrays[0][1:]).all()
    assert (got.test_labels == arrays[3][:3]).all()


@CIFAR
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: b"", "0 bytes are no records"),
        (lambda raw: raw[:-1], "bytes are no records"),
        (lambda raw: raw + raw, "more than"),
        (lambda raw: b"\xff" + raw[1:], "labels up to 255, not "),
    ],
    ids=["empty", "cut", "long", "label"],
)
def test_damaged_cifar_files_are_refused(home, which, change, words):
    """A .bin file of another form is an error that names it."""
    row, _, arrays = SMALLS[which]
    files = bins(row, arrays)
    for name in (row.forms[-1][0], row.forms[-1][-1]):
        folder = write(home / name, files | {name: change(files[name])})
        message = refusal("auto", folder, which)
        assert f"{folder / name}: " in message
        assert words in message


def test_labels_out_of_range_are_refused(home):
    """The coarse label of CIFAR-100 is below 20, the fine one below 100."""
    row, _, arrays = SMALLS["cifar100"]
    files = bins(row, arrays)
    for raw, words in ((b"\x14\x00", "up to 20, not 19"), (b"\x00d", "to 100, not 99")):
        raw += files["test.bin"][2:]
        folder = write(home / "mine", files | {"test.bin": raw})
        assert words in refusal("real", folder, "cifar100")


@CIFAR
def test_missing_cifar_files_are_named(home, which):
    """Where some of the .bin files lie, the others must lie too."""
    row, _, arrays = SMALLS[which]
    files = bins(row, arrays)
    del files[row.forms[-1][-1]]
    message = refusal("auto", write(home / "mine", files), which)
    assert f"mine lacks {row.forms[-1][-1]} of {row.name}" in message


@CIFAR
def test_another_archive_is_never_unpacked(home, monkeypatch, which):
    """Cut, changed or packed anew, an archive is refused by its MD5 alone."""
    row, packed, arrays = SMALLS[which]
    (name, whole), (file,) = *packed.items(), row.files
    monkeypatch.setattr(tarfile, "open", pytest.fail)
    for content in (b"", whole[:-9], whole + b"\0", gzip.compress(b"no tar")):
        folder = write(home / "mine", {name: content})
        message = refusal("auto", folder, which)
        assert f"{folder / name}: its MD5 is " in message
        assert file.digest in message


@CIFAR
@pytest.mark.parametrize("content", ["short", "long", "lacking", "no tar", "no gzip"])
def test_an_archive_of_another_form_is_refused(home, monkeypatch, which, content):
    """Even one of the right MD5 is read within bounds, and never onto the disk."""
    row, _, arrays = SMALLS[which]
    files, last = bins(row, arrays), row.forms[-1][-1]
    if content == "short":
        files[last] = files[last][:-1]
    elif content == "long":
        files[last] += bytes(9000)
    elif content == "lacking":
        del files[last]
    raw = {"no tar": gzip.compress(b"no" * 999), "no gzip": b"no" * 999}
    packed = {row.files[0].name: raw.get(content) or tar(files)}
    changed = small_row(row, packed, arrays, row.sizes).row
    monkeypatch.setattr(data, ROWS[which], changed)
    message = refusal("real", write(home / "mine", packed), which)
    words = f"its {last} has" if content not in raw else "not a readable .tar.gz file"
    assert f"{row.files[0].name}: {words}" in message
    assert files_under(home) == [row.files[0].name]


@PROFILE
@given(st.sampled_from(["cifar10", "cifar100"]), st.binary(max_size=3 * 3074))
def test_any_records_are_read_or_refused(which, raw):
    """Any bytes are whole records of known labels, or give DataError."""
    row = SMALLS[which].row
    try:
        images, labels = data.read_records(row, "file", raw)
    except data.DataError:
        return
    assert images.nbytes + len(labels) * len(row.labels) == len(raw)
    assert labels.max() < row.labels[-1]


# Text files


def test_text_is_all_txt_files_sorted_each_split(home):
    """80, 10 and 10 % of every file; hidden files, folders and other names are no text."""
    files = {"b.txt": b"b" * 10_000, "a.txt": b"a" * 7_000 + b"A" * 3_000}
    write(home / "mine" / "text", files | {".c.txt": b"c", "d.md": b"d"})
    write(home / "mine" / "text" / "inside.txt", {"e.txt": b"e"})
    write(home / "mine", {"f.txt": b"f"})  # the folder called text comes first
    text = data.text("real", home / "mine", log=pytest.fail)
    assert bytes(text.train) == b"a" * 7000 + b"A" * 1000 + b"b" * 8000
    assert bytes(text.valid) == b"A" * 1000 + b"b" * 1000
    assert bytes(text.test) == bytes(text.valid)
    assert (text.name, text.stand_in) == ("own text text (2 files)", False)


def test_text_may_be_one_file_or_an_inner_folder(home, monkeypatch):
    """`data_dir` or `$STAR_DATA` may be a .txt file or any folder that has some."""
    path = write(home / "a$b", {"x$y.txt": b"x" * 10_000}) / "x$y.txt"
    for where in (path, path.parent):
        assert data.text("real", where).name == "own text x_y.txt"
    write(path.parent, {"z.txt": b"z"})
    assert data.text("real", path.parent).name == "own text a_b (2 files)"
    monkeypatch.setenv("STAR_DATA", str(path))
    assert data.text("real").name == "own text x_y.txt"
    assert "is not a folder" in refusal("real", path, "mnist")
    assert "is not a folder" in refusal(
        "real", write(home, {"t.md": b""}) / "t.md", "text"
    )


def test_text_has_a_least_and_a_most_size(home, monkeypatch):
    """Too little text to split is refused, and too much, whatever the files' number."""
    folder = write(home / "mine", {"a.txt": bytes(5_000), "b.txt": bytes(4_999)})
    assert "9999 bytes of text, less than 10000" in refusal("real", folder, "text")
    monkeypatch.setattr(data, "TEXT_BYTES", (1_000, 9_998))
    assert "b.txt: more than 4998 bytes" in refusal("real", folder, "text")
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to(folder / "nowhere")
    assert len(data.text("real", folder).train) == 4000


# Damaged files


@pytest.mark.parametrize("source", ["real", "auto"])
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (0, b"", "not an idx file"),
        (0, b"<html>not found</html>", "not a readable, whole gzip file"),
        (0, pack(ARRAYS[1]), "not an idx file of 3-d unsigned bytes"),
        (1, pack(ARRAYS[1], kind=9), "not an idx file of 1-d unsigned bytes"),
        (0, pack(ARRAYS[0][:29]), "does not say shape (30, 28, 28)"),
        (0, pack(ARRAYS[0][:29], ARRAYS[0].shape), "22752 bytes unpacked instead of"),
        (2, pack(ARRAYS[0], ARRAYS[2].shape), "more bytes unpacked instead of 15696"),
        (3, pack(ARRAYS[3] + 1), "labels up to 10"),
    ],
)
def test_damaged_files_are_refused(home, monkeypatch, source, file, content, words):
    """A damaged file is an error that names it, never half used, never replaced."""
    packed = PACKED | {NAMES[file]: content}
    monkeypatch.setenv("STAR_DATA", str(write(home / "mine", packed)))
    message = refusal(source)
    assert f"{home / 'mine' / NAMES[file]}: " in message
    assert words in message


def read_or_refuse(path, content):
    """True: DataError.  False: the original labels.  Anything else fails."""
    path.write_bytes(content)
    try:
        assert (data.read_idx(path, ARRAYS[1].shape) == ARRAYS[1]).all()
    except data.DataError as error:
        assert str(path) in str(error)
        return True
    return False


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "labels.gz"


def test_every_truncation_is_refused(scratch):
    """A gzip file cut at any byte is refused."""
    whole = PACKED[NAMES[1]]
    assert all(read_or_refuse(scratch, whole[:n]) for n in range(len(whole)))


@PROFILE
@given(st.integers(0, len(PACKED[NAMES[1]]) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_harmless(scratch, where, flip):
    """Any changed byte, header or body, gives DataError or the original array."""
    content = bytearray(PACKED[NAMES[1]])
    content[where] ^= flip
    refused = read_or_refuse(scratch, content)
    assert refused or where < 10  # the gzip header has idle bytes, the rest has a CRC


@PROFILE
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(scratch, content, packed):
    """Random bytes, gzipped or not, give DataError and nothing else."""
    assert read_or_refuse(scratch, gzip.compress(content) if packed else content)


def test_a_gzip_bomb_is_not_unpacked(scratch):
    """A file that would expand to 32 MB is refused within 1 MB of memory."""
    header = gzip.decompress(PACKED[NAMES[1]])[:8]
    scratch.write_bytes(gzip.compress(header + bytes(32 << 20), 1))
    tracemalloc.start()
    assert read_or_refuse(scratch, scratch.read_bytes())
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# Downloads


@EVERY
def test_a_download_lands_in_the_cache_and_is_found_again(serve, home, which):
    """The second call reads the cache and asks no server."""
    row, packed, _ = SMALLS[which]
    requests = serve(packed)
    assert is_small(load(which, "auto", log=quiet), which)
    assert files_under(home / "cache" / "star" / row.folder) == sorted(packed)
    got = load(which, "real", log=pytest.fail)
    assert is_small(got, which)
    assert got.name == row.name
    assert requests == [(0, name) for name in packed]


def test_the_mirror_is_used_when_the_first_address_fails(serve, home):
    """A failing address is asked once, not once for each file."""
    requests = serve({}, PACKED)
    assert is_small(data.fashion_mnist("real", log=quiet))
    assert requests == [(0, NAMES[0])] + [(1, name) for name in NAMES]


def test_an_interrupted_download_is_completed(serve, home):
    """Files already in the cache are not fetched again."""
    requests = serve(PACKED)
    cache = home / "cache" / "star" / "fashion-mnist"
    write(cache, {name: PACKED[name] for name in NAMES[:2]})
    assert is_small(data.fashion_mnist("real", log=quiet))
    assert requests == [(0, name) for name in NAMES[2:]]


@EVERY
def test_a_wrong_checksum_leaves_nothing_behind(serve, home, which):
    """What fails its digest is deleted, and the error says which address sent it."""
    packed = SMALLS[which].packed
    serve({name: content + b"\0" for name, content in packed.items()}, {})
    message, name = refusal("real", None, which), next(iter(packed))
    algorithm = "SHA256" if which == "text" else "MD5"
    assert f"/0/{name}: its {algorithm} is" in message
    assert f"/1/{name}: HTTP Error 404" in message
    assert files_under(home) == []


def test_a_truncated_download_leaves_nothing_behind(serve, home):
    """A connection that breaks off half-way is a failure like any other."""

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(PACKED[NAMES[0]])))
        handler.end_headers()
        handler.wfile.write(PACKED[NAMES[0]][:9000])

    serve(half)
    assert "its MD5 is" in refusal("real")
    assert files_under(home) == []


def too_much(handler, block, pause, length=None):
    handler.send_response(200)
    if length:
        handler.send_header("Content-Length", length)
    handler.end_headers()
    try:
        for _ in range(500):
            handler.wfile.write(block)
            time.sleep(pause)
    except OSError:
        pass  # the client has hung up


def test_a_download_that_does_not_end_is_cut(serve, home):
    """No more is taken than the file can have."""
    serve(functools.partial(too_much, block=bytes(5000), pause=0))
    assert "more than 24520 bytes" in refusal("real")
    assert files_under(home) == []


@pytest.mark.parametrize(("length", "end"), [(None, " MB/s"), ("500", " s left")])
def test_a_slow_download_reports_progress_and_ends(
    serve, home, monkeypatch, length, end
):
    """A file has a time limit; until then its size, rate and, if known, rest are shown."""
    monkeypatch.setattr(data, "FILE_SECONDS", 0.3)
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 0.1)
    serve(functools.partial(too_much, block=b"x", pause=0.02, length=length))
    lines, start = [], time.monotonic()
    with pytest.raises(data.DataError, match="not whole after 0.3 s"):
        data.fashion_mnist("real", log=lines.append)
    assert time.monotonic() - start < 2
    assert any(line.endswith(end) for line in lines)
    assert files_under(home) == []


def test_a_silent_server_costs_one_time_limit(home, monkeypatch):
    """A server that takes the call and says nothing is given up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        small = SMALL._replace(addresses=(address,))
        monkeypatch.setattr(data, "FASHION_MNIST", small)
        monkeypatch.setattr(data, "ANSWER_SECONDS", 0.2)
        start = time.monotonic()
        message = refusal("real")
    assert time.monotonic() - start < 2
    assert address in message


def test_a_slow_name_lookup_costs_one_time_limit(home, monkeypatch):
    """Name lookup, which no socket timeout covers, is given up too."""
    small = SMALL._replace(addresses=("http://a.invalid/", "http://b.invalid/"))
    monkeypatch.setattr(data, "FASHION_MNIST", small)
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.1)
    release = threading.Event()

    def lookup(*_, **__):
        release.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    start = time.monotonic()
    message = refusal("real")
    seconds = time.monotonic() - start
    release.set()
    assert seconds < 2
    assert message.count("no answer within 0.1 s") == 2


@EVERY
def test_without_any_source_auto_warns_and_draws(serve, home, capsys, which):
    """Offline, "auto" gives the stand-in under its own name after a loud warning."""
    serve({}, {})
    got, name = load(which), SMALLS[which].row.name
    assert (got.stand_in, got.name) == (True, f"{name} stand-in")
    warning = capsys.readouterr().err
    assert f"WARNING: no {name}" in warning
    assert "STAND-IN" in warning
    assert warning.count("!" * 80) == 2


def test_a_cache_that_cannot_be_written_is_no_crash(serve, home):
    """A file in the cache's place means no download, not a traceback."""
    serve(PACKED)
    (home / "cache").write_text("in the way")
    assert data.fashion_mnist("auto", log=quiet).stand_in
    assert "cache" in refusal("real")


# The module


def test_data_needs_numpy_alone():
    """data.py and standins.py need numpy beside the library, and never unpickle."""
    for module, others in ((data, {"numpy", "standins"}), (standins, {"numpy"})):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        roots = {name.split(".")[0] for name in names}
        assert roots - set(sys.stdlib_module_names) == others
        assert not roots & {"pickle", "marshal", "shelve"}
