"""Claims about data.py: what is found, what is refused, what is downloaded or drawn.

Everything here is offline: the only server is on 127.0.0.1, the files are small.
"""

import ast
import functools
import gzip
import hashlib
import http.server
import os
import socket
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data

PROFILE = settings(derandomize=True, deadline=None, database=None, print_blob=True)
STAR_DATA = os.environ.get("STAR_DATA", "")  # before the tests hide it
OFFICIAL = data.FASHION_MNIST
EACH = [(source, where) for source in ("real", "auto") for where in ("arg", "env")]


def pack(array, shape=None, kind=8):
    """`array` as a gzipped idx file, whose header may lie."""
    shape = array.shape if shape is None else shape
    header = bytes([0, 0, kind, len(shape)]) + np.array(shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def small_arrays():
    rng = np.random.RandomState(1)
    shapes = (30, 28, 28), (30,), (20, 28, 28), (20,)
    return [rng.randint(256 if len(s) > 1 else 10, size=s).astype("u1") for s in shapes]


ARRAYS = small_arrays()
PACKED = {f.name: pack(a) for f, a in zip(OFFICIAL.files, ARRAYS, strict=True)}
SMALL = OFFICIAL._replace(
    files=tuple(
        data.File(f.name, hashlib.md5(PACKED[f.name]).hexdigest(), a.shape)
        for f, a in zip(OFFICIAL.files, ARRAYS, strict=True)
    ),
    addresses=(),
    checksum=data.as_images(OFFICIAL, "", ARRAYS).checksum,
)
SMALL_MNIST = SMALL._replace(name="mnist")
BOTH = pytest.mark.parametrize(
    ("name", "load"), [("fashion-mnist", data.fashion_mnist), ("mnist", data.mnist)]
)
NAMES = [file.name for file in SMALL.files]


def write(folder, packed=PACKED):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    return folder


def is_small(images):
    got = images.train_images, images.train_labels, images.test_images
    same = zip((*got, images.test_labels), ARRAYS, strict=True)
    return all((a.reshape(b.shape) == b).all() for a, b in same) and not images.stand_in


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with an empty cache, no `$STAR_DATA`, and 50 images to find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STAR_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "FASHION_MNIST", SMALL)
    monkeypatch.setattr(data, "MNIST", SMALL_MNIST)
    draw = functools.partial(data.fashion_mnist_stand_in, train=20, test=10)
    monkeypatch.setattr(data, "fashion_mnist_stand_in", draw)
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
        for name, small in (("FASHION_MNIST", SMALL), ("MNIST", SMALL_MNIST)):
            monkeypatch.setattr(data, name, small._replace(addresses=addresses))
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def files_under(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refusal(source="auto", data_dir=None):
    """The message of the DataError that fashion_mnist raises."""
    with pytest.raises(data.DataError) as caught:
        data.fashion_mnist(source, data_dir, log=lambda _: None)
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
    return data.fashion_mnist_stand_in()


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


@BOTH
def test_stand_in_asked_for_needs_no_files(home, name, load):
    """source="stand-in" looks at no folder and prints nothing."""
    images = load("stand-in", home / "nowhere", log=pytest.fail)
    assert (images.stand_in, images.name) == (True, f"{name} stand-in")


# Finding files


@BOTH
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("source", "where"), EACH)
def test_files_are_found_where_the_user_points(
    home, monkeypatch, name, load, nested, source, where
):
    """The files may lie in the folder pointed at, or in the data set's folder there."""
    write(home / "mine" / name if nested else home / "mine")
    images = load(source, point(monkeypatch, where, home / "mine"), log=pytest.fail)
    assert is_small(images)
    assert images.name == name


def test_data_sets_with_the_same_file_names_lie_side_by_side(home):
    """In one folder, each finds its own: fashion-mnist's here are MNIST's, reversed."""
    swapped = {f: pack(a[::-1]) for f, a in zip(NAMES, ARRAYS, strict=True)}
    write(home / "mine" / "mnist")
    write(home / "mine" / "fashion-mnist", swapped)
    assert is_small(data.mnist("real", home / "mine", log=pytest.fail))
    assert not is_small(data.fashion_mnist("real", home / "mine", log=lambda _: None))


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


@pytest.mark.parametrize(("source", "where"), EACH)
def test_a_missing_folder_is_an_error(home, monkeypatch, source, where):
    """A folder that the user names and that does not exist is never passed over."""
    write(home / "cache" / "star" / "fashion-mnist")
    argument = point(monkeypatch, where, home / "nowhere")
    assert "nowhere is not a folder" in refusal(source, argument)


@pytest.mark.parametrize("source", ["real", "auto"])
def test_an_argument_without_files_is_an_error(home, source):
    """`data_dir` must hold the data set, even when the cache does."""
    write(home / "cache" / "star" / "fashion-mnist")
    (home / "empty").mkdir()
    assert NAMES[0] in refusal(source, home / "empty")


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
    assert images.checksum != SMALL.checksum


def test_images_cannot_be_changed(home):
    """The arrays are read-only, so the checksum stays theirs."""
    for images in (
        data.fashion_mnist("real", write(home / "mine")),
        data.fashion_mnist("stand-in"),
    ):
        assert not any(array.flags.writeable for array in images[:4])


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


@BOTH
def test_a_download_lands_in_the_cache_and_is_found_again(serve, home, name, load):
    """The second call reads the cache and asks no server."""
    requests = serve(PACKED)
    assert is_small(load("auto", log=lambda _: None))
    assert files_under(home / "cache" / "star" / name) == sorted(NAMES)
    assert is_small(load("real", log=pytest.fail))
    assert requests == [(0, name) for name in NAMES]


def test_the_mirror_is_used_when_the_first_address_fails(serve, home):
    """A failing address is asked once, not once for each file."""
    requests = serve({}, PACKED)
    assert is_small(data.fashion_mnist("real", log=lambda _: None))
    assert requests == [(0, NAMES[0])] + [(1, name) for name in NAMES]


def test_an_interrupted_download_is_completed(serve, home):
    """Files already in the cache are not fetched again."""
    requests = serve(PACKED)
    cache = home / "cache" / "star" / "fashion-mnist"
    write(cache, {name: PACKED[name] for name in NAMES[:2]})
    assert is_small(data.fashion_mnist("real", log=lambda _: None))
    assert requests == [(0, name) for name in NAMES[2:]]


def test_a_wrong_checksum_leaves_nothing_behind(serve, home):
    """What fails its MD5 is deleted, and the error says which address sent it."""
    serve({name: content + b"\0" for name, content in PACKED.items()}, {})
    message = refusal("real")
    assert f"/0/{NAMES[0]}: its MD5 is" in message
    assert f"/1/{NAMES[0]}: HTTP Error 404" in message
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


def too_much(handler, block, pause):
    handler.send_response(200)
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


def test_a_slow_download_reports_progress_and_ends(serve, home, monkeypatch):
    """A file has a time limit, and until then its size and rate are shown."""
    monkeypatch.setattr(data, "FILE_SECONDS", 0.3)
    monkeypatch.setattr(data, "PROGRESS_SECONDS", 0.1)
    serve(functools.partial(too_much, block=b"x", pause=0.02))
    lines, start = [], time.monotonic()
    with pytest.raises(data.DataError, match="not whole after 0.3 s"):
        data.fashion_mnist("real", log=lines.append)
    assert time.monotonic() - start < 2
    assert any(line.endswith(" MB/s") for line in lines)
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


@BOTH
def test_without_any_source_auto_warns_and_draws(serve, home, capsys, name, load):
    """Offline, "auto" gives the stand-in under its own name after a loud warning."""
    serve({}, {})
    images = load()
    assert (images.stand_in, images.name) == (True, f"{name} stand-in")
    warning = capsys.readouterr().err
    assert f"WARNING: no {name}" in warning
    assert "STAND-IN" in warning
    assert warning.count("!" * 80) == 2


def test_a_cache_that_cannot_be_written_is_no_crash(serve, home):
    """A file in the cache's place means no download, not a traceback."""
    serve(PACKED)
    (home / "cache").write_text("in the way")
    assert data.fashion_mnist("auto", log=lambda _: None).stand_in
    assert "cache" in refusal("real")


# The module


def test_data_needs_numpy_alone():
    """data.py imports numpy and the standard library only, and never unpickles."""
    nodes = list(ast.walk(ast.parse(Path(data.__file__).read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == {"numpy"}
    assert not roots & {"pickle", "marshal", "shelve"}
