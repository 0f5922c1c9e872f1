"""Claims about data.py. All offline: files are small, and addresses are folders."""

import gzip
import http.client
import os
import shutil
import socket
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import data

STAR_DATA = Path(os.environ.get("STAR_DATA") or "nowhere")
NAMES = list(data.FASHION_MNIST.files)
LOADERS = "fashion_mnist", "mnist", "cifar10", "cifar100", "text"


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(array, shape=None):
    """`array` as a gzipped idx file, whose header may lie."""
    shape = array.shape if shape is None else shape
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def bins(row, arrays):
    """{name: bytes} of CIFAR's unpacked files: labels and planes of each picture."""
    records = []
    for x, y in (arrays[:2], arrays[2:]):
        labels = [0 * y, y] if row.classes == 100 else [y]  # coarse and fine
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        records.append(np.column_stack([*labels, planes]))
    contents = [*np.split(records[0], len(row.unpacked) - 1), records[1]]
    return {n: c.tobytes() for n, c in zip(row.unpacked, contents, strict=True)}


def tar(row, arrays):
    """The archive of CIFAR's unpacked files, in their folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, row.folders[0]), bins(row, arrays))
        archive = shutil.make_archive(f"{folder}/x", "gztar", folder, row.folders[0])
        return Path(archive).read_bytes()


def small(loader):
    """(small data set, {name: bytes} to download, the arrays that these hold)."""
    (row,) = getattr(data, loader).args
    row = row._replace(sizes=(10, 4) if row.classes else (10_240,))
    drawn = data.load(row, "stand-in")
    arrays = [x.squeeze() for x in drawn if isinstance(x, np.ndarray)]
    contents = [tar(row, arrays)] if "cifar" in loader else map(pack, arrays)
    contents = [b"".join(map(bytes, arrays))] if loader == "text" else contents
    packed = dict(zip(row.files, contents, strict=True))
    files = {name: data.md5(content).hexdigest() for name, content in packed.items()}
    row = row._replace(files=files, address="file:///nowhere/")
    return row._replace(checksum=row.checksum and drawn.checksum), packed, arrays


SMALLS = {loader: small(loader) for loader in LOADERS}
FMNIST, PACKED, ARRAYS = SMALLS["fashion_mnist"]
EVERY = pytest.mark.parametrize("which", LOADERS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A machine with an empty cache and no `$STAR_DATA`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("STAR_DATA", raising=False)
    return tmp_path


def site(row, folder, packed):
    return row._replace(address=write(folder, packed).as_uri() + "/")


def holds(got, arrays):
    found = map(np.squeeze, got[: len(arrays)])
    return all(map(np.array_equal, found, arrays)) and not got.stand_in


def refusal(row, source, data_dir=None):
    with pytest.raises(data.DataError, match="^.*$") as caught:
        data.load(row, source, data_dir)
    return str(caught.value)


PINNED = [  # checksum of a stand-in, and how many pictures least squares may tell
    (data.FASHION_MNIST, "21945d84b78090b7", (0.55, 0.85)),
    (data.CIFAR_10, "855f643015c7a858", (0.4, 0.8)),
    (data.CIFAR_100, "46997bcd2b6cdec1", (0.1, 0.4)),
]


@pytest.mark.parametrize(("row", "checksum", "right"), PINNED)
def test_stand_in_is_pinned_balanced_and_learnable(row, checksum, right):
    """Least squares on 6,000 tells more classes of others than chance, but not all."""
    got = data.stand_in_images(row, (6000, 1000))
    assert got.checksum == checksum
    assert got.train_images.shape == (6000, *row.shape, 1)[:4]
    assert (np.bincount(got.test_labels) == 1000 // row.classes).all()
    assert not {x.tobytes() for x in got[0]} & {x.tobytes() for x in got[2]}
    x, x_test = (a[:, 1::2, 1::2].reshape(len(a), -1) / 255 for a in got[:3:2])
    y = np.eye(row.classes)[got.train_labels]
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ y)
    assert right[0] < np.mean((x_test @ weights).argmax(-1) == got[3]) < right[1]


def test_stand_in_text_is_pinned_and_rewards_memory():
    """A compressor, which sees the bytes before, beats the entropy of single bytes."""
    text = data.stand_in_text(data.TINY_SHAKESPEARE, (100_000,))
    assert text.checksum == "93b7e57cb05b1ea7"
    p = np.bincount(text.train)[np.unique(text.train)] / 80_000
    assert len(gzip.compress(text.train)) * 8 < 0.7 * -(p * np.log2(p)).sum() * 80_000


@EVERY
def test_stand_in_is_drawn_when_asked_or_with_a_loud_warning(home, capfd, which):
    """Asked for, it looks at no folder and prints nothing. "real" refuses it."""
    row = SMALLS[which][0]
    asked = data.load(row, "stand-in", home / "nowhere")
    assert capfd.readouterr() == ("", "")
    for got in (asked, data.load(row)):
        assert (got.stand_in, got.name) == (True, f"{row.name} stand-in")
    assert which == "text" or row.name.replace("-", "") == which.replace("_", "")
    warning = capfd.readouterr().err
    assert f"{'!' * 80}\nWARNING: no {row.name} " in warning and "STAND-IN" in warning
    assert f"no {row.name} in $STAR_DATA (not set)" in refusal(row, "real")


@EVERY
def test_files_are_found_where_the_user_points(home, monkeypatch, capfd, which):
    """In the folder that argument or variable names, or inside. All are read-only."""
    row, packed, arrays = SMALLS[which]
    write(home / "nested" / row.folders[0], packed)
    for mine in (write(home / "plain", packed), home / "nested"):
        monkeypatch.setenv("STAR_DATA", str(mine))
        for got in (data.load(row, "real"), data.load(row, "auto", mine)):
            assert holds(got, arrays)
            assert not any(array.flags.writeable for array in got[: len(arrays)])
            about = {"dataset": row.name, "dataset_checksum": got.checksum}
            assert data.about(got) == about | {"stand_in": False}
    assert capfd.readouterr() == ("", "")


def test_other_contents_change_the_name(home):
    """A file changed by its owner is read, but not called the official one."""
    write(home / "fashion-mnist", PACKED | {NAMES[1]: pack(ARRAYS[1] // 2)})
    write(home / "mnist", PACKED)  # beside it, under the same names
    assert data.load(SMALLS["mnist"][0], "real", home).name == "mnist"
    got = data.load(FMNIST, "real", home)
    assert got.name == "fashion-mnist (not the official bytes)"
    assert got.checksum != FMNIST.checksum


def test_argument_beats_variable_beats_cache(home, monkeypatch):
    """The first that has the data set is read, whatever lies in the others."""
    cache = write(home / "cache" / "star" / "fashion-mnist", PACKED)
    monkeypatch.setenv("STAR_DATA", str(home / "cache"))  # has none
    assert holds(data.load(FMNIST, "real"), ARRAYS)
    write(cache, {name: b"" for name in NAMES})
    monkeypatch.setenv("STAR_DATA", str(write(home / "variable", PACKED)))
    assert holds(data.load(FMNIST, "real"), ARRAYS)
    monkeypatch.setenv("STAR_DATA", str(home / "nowhere"))
    assert holds(data.load(FMNIST, "real", write(home / "argument", PACKED)), ARRAYS)


@EVERY
def test_what_the_user_points_at_is_never_passed_over(home, monkeypatch, which):
    """A folder that is not there, or lacks all or some files."""
    row, packed, _ = SMALLS[which]
    write(home / "cache" / "star" / row.folders[0], packed)
    assert f"cache has no file of {row.name}" in refusal(row, "auto", home / "cache")
    monkeypatch.setenv("STAR_DATA", str(home / "nowhere"))
    assert "nowhere is not a folder" in refusal(row, "auto")
    *some, last = data.CIFAR_10.unpacked
    message = refusal(data.CIFAR_10, "auto", write(home, dict.fromkeys(some, b"")))
    assert message.endswith(f"lacks {last} of cifar-10")


CIFAR_MEANS = [(0.4914, 0.4822, 0.4465), (0.5071, 0.4865, 0.4409)]
MEANS = list(zip(LOADERS, [0.2860, 0.1307, *CIFAR_MEANS, None], strict=True))


@pytest.mark.parametrize(("which", "means"), MEANS)
def test_real_data_have_the_pinned_digest_and_the_published_means(which, means):
    """What `$STAR_DATA` holds is the official data, or, for CIFAR, looks like it."""
    (row,) = getattr(data, which).args
    if not (STAR_DATA / row.folders[0]).exists():
        pytest.skip(f"$STAR_DATA holds no {row.name}")
    got = data.load(row, "real", STAR_DATA)
    assert got.name == row.name or "cifar" in which
    if means:  # of the official training set's channels, in 0 .. 1
        found = got.train_images[::10].mean((0, 1, 2)) / 255
        np.testing.assert_allclose(found, means, atol=0.01)
        assert len(np.unique(got.test_labels)) == row.classes


def test_cifars_archive_is_verified_and_beats_what_is_unpacked(home):
    """Cut, changed or packed anew, it is refused."""
    row, packed, arrays = SMALLS["cifar100"]
    ((name, whole),) = packed.items()
    write(home / row.folders[0], bins(row, [a[::-1] for a in arrays]))
    assert holds(data.load(row, "real", write(home, packed)), arrays)
    for content in (b"", whole[:-9], whole + b"\0", tar(row, arrays[:2] * 2)):
        message = refusal(row, "auto", write(home, {name: content}))
        assert f"{name}: its MD5 is " in message and row.files[name] in message


def test_unpacked_cifar_is_called_unverified_counted_or_refused(home):
    """The name says it, and how many if fewer. Cuts and other labels are refused."""
    row, _, arrays = SMALLS["cifar100"]
    files, last, size = bins(row, arrays), row.unpacked[-1], 2 + 3072
    got = data.load(row, "real", write(home, files))
    assert holds(got, arrays) and got.name == f"{row.name} (not verified)"
    got = data.load(row, "real", write(home, {last: files[last][size:]}))
    assert got.name == f"{row.name} (10 + 3 pictures, not verified)"
    for content in (b"", files[last][:-1]):
        message = refusal(row, "auto", write(home, {last: content}))
        assert f"{home / last}: {len(content)} bytes are no records" in message
    write(home, {last: b"\xff" * size})
    assert "labels up to 255" in refusal(row, "auto", home)


def test_text_is_all_txt_files_of_a_folder(home):
    """The first 80 % train, then 10 % validate and 10 % test. Too little is refused."""
    write(home / "text", {"b.txt": b"b" * 10_000, "a.txt": b"a" * 10_000})
    write(home, {"f.txt": b"f", "g.md": b"g"})  # the folder called text comes first
    text = data.text("real", home)
    assert bytes(text.train) == b"a" * 10_000 + b"b" * 6_000
    assert bytes(text.valid) == bytes(text.test) == b"b" * 2_000
    assert (text.name, text.stand_in) == ("own text text (2 files)", False)
    little = write(home / "little", {"f.txt": b"f", "g.md": b"g" * 10_000})
    assert "1 bytes of text" in refusal(data.TINY_SHAKESPEARE, "real", little)


def test_a_damaged_idx_file_is_refused_or_harmless(home):
    """Cut or changed at any byte, random, of another shape, or with a header that lies:
    an error that names it. A change of an idle byte of gzip is harmless."""
    raw, path = PACKED[NAMES[1]], write(home, PACKED) / NAMES[1]
    bad = [raw[:n] for n in range(len(raw))] + [pack(ARRAYS[1][:9]), pack(ARRAYS[0])]
    bad += [pack(ARRAYS[1][:9], ARRAYS[1].shape), pack(ARRAYS[0], ARRAYS[1].shape)]
    for i in range(len(raw)):
        bad += [raw[:i] + bytes([raw[i] ^ bit]) + raw[i + 1 :] for bit in (1, 128)]
    bad += [np.random.RandomState(seed).bytes(seed) for seed in range(99)]
    for content in [*bad, *map(gzip.compress, bad)]:
        path.write_bytes(content)
        try:
            assert holds(data.load(FMNIST, "real", home), ARRAYS)
        except data.DataError as error:
            assert f"{path}: not a" in str(error)


def test_official_data_are_known_by_their_contents(home, monkeypatch):
    """Packed anew or unpacked, in torchvision's folder or the user's, below ~ or not."""
    monkeypatch.setenv("HOME", str(home))
    contents = {name[:-3]: gzip.decompress(x) for name, x in PACKED.items()}
    again = {f"{name}.gz": gzip.compress(x, 1) for name, x in contents.items()}
    for form, files in (("packed", again), ("unpacked", contents)):
        write(home / form / "MNIST" / "raw", dict.fromkeys(files, b""))
        inner = write(home / form / "FashionMNIST" / "raw", files)
        for folder in (f"~/{form}", inner):
            got = data.load(FMNIST, "real", folder)
            assert holds(got, ARRAYS) and got.name == "fashion-mnist"
    (inner / NAMES[3][:-3]).unlink()
    assert f"lacks {NAMES[3][:-3]} of" in refusal(FMNIST, "auto", home / "unpacked")


@EVERY
def test_a_download_lands_in_the_cache_and_is_found_again(home, capfd, which):
    """The second call needs no address, and what lies in the cache is not fetched."""
    row, packed, arrays = SMALLS[which]
    (first, content), *others = packed.items()
    cache = home / "cache" / "star" / row.folders[0]
    write(cache, {first: content} if others else {})
    assert holds(data.load(site(row, home / "site", dict(others) or packed)), arrays)
    assert f"downloading {home.as_uri()}" in capfd.readouterr().err
    got = data.load(row, "real")
    assert holds(got, arrays) and got.name == row.name
    assert sorted(os.listdir(cache)) == sorted(packed)


def test_a_damaged_file_in_the_cache_is_named_with_its_remedy(home):
    """Whatever was asked for. Deleting the file mends it, and takes no other with it."""
    cache = home / "cache" / "star" / "fashion-mnist"
    for bad in (PACKED[NAMES[0]][:-9], b"", pack(ARRAYS[0] // 2)):
        write(cache, PACKED | {NAMES[0]: bad})
        assert f"{cache / NAMES[0]} is damaged. Delete it" in refusal(FMNIST, "auto")
    (cache / NAMES[0]).unlink()
    row = site(FMNIST, home / "site", {NAMES[0]: PACKED[NAMES[0]]})
    assert holds(data.load(row, "real"), ARRAYS)


def test_a_failed_download_leaves_nothing_behind(home, monkeypatch):
    """Missing, damaged or cut off, or a cache that cannot be written: the error says it."""
    cut = {name: content[:-9] for name, content in PACKED.items()}
    for name, packed, words in (("a", {}, "No such file"), ("b", cut, "the MD5 of t")):
        row = site(FMNIST, home / name, packed)
        message = refusal(row, "real")
        assert row.address in message and words in message
    error = http.client.IncompleteRead(b"half")
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=error))
    assert "IncompleteRead(4 bytes read)" in refusal(row, "real")
    assert os.listdir(home / "cache" / "star" / "fashion-mnist") == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "b" / NAMES[0]))
    assert "Not a directory" in refusal(row, "real")


def test_two_downloads_at_once_do_not_meet(home, monkeypatch):
    """Each writes aside under a name of its own, also with one process id, as two
    machines with a common cache may have."""
    replace, row = Path.replace, site(FMNIST, home / "site", PACKED)

    def replace_later(path, target):
        monkeypatch.setattr(Path, "replace", replace)
        assert holds(data.load(row, "real"), ARRAYS)  # the other one, meanwhile
        return path.replace(target)

    monkeypatch.setattr(Path, "replace", replace_later)
    assert holds(data.load(row, "real"), ARRAYS)


def test_a_silent_server_is_given_up(home, monkeypatch):
    """A server has a time limit for its answer and for every packet."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        row = FMNIST._replace(address=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert "timed out" in refusal(row, "real")
