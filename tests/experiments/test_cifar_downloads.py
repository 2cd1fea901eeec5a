"""CIFAR's archives: fetched, unpacked, or refused; from a local server."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from cifar_files import python2_pickle

from experiments.data import DataError, MissingDataError, cifar


def archive(small, files=None, kind=tarfile.REGTYPE):
    """An archive like the official one, with more in it than is wanted."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as tar:
        for name in ("../escaped", "/tmp/cqjax-escaped", f"{small.family.folder}/readme.html"):
            tar.addfile(tarfile.TarInfo(name))
        for name, value in (small.files if files is None else files).items():
            content = python2_pickle(value)
            member = tarfile.TarInfo(f"{small.family.folder}/{name}")
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    return result.getvalue()


@pytest.fixture
def serve(server, small, monkeypatch):
    """Puts an archive on a local server, as the official one."""
    folder, url = server

    def put(content):
        path = folder / small.family.url.rsplit("/", 1)[-1]
        path.write_bytes(content)
        md5 = hashlib.md5(content).hexdigest()
        family = replace(small.family, url=url + path.name, md5=md5)
        monkeypatch.setattr(cifar, small.name, family)
        return path

    return put


@pytest.mark.parametrize("place", ["the cache", "the folder", "its parent"])
def test_download_and_find_it_there(serve, small, cache, tmp_path, place):
    served, parent = serve(archive(small)), tmp_path / "new"
    folder = small.family.folder
    given = {"the cache": None, "its parent": parent, "the folder": parent / folder}[place]
    if place == "the cache":
        parent = cache
    assert small.family.load(given, download=True).source == f"{parent}/{folder}"
    served.unlink()
    dataset = small.family.load(given, download=True)
    expected = small.files[small.family.test.name][small.family.labels]
    np.testing.assert_array_equal(dataset.test.labels, expected)
    found = sorted(path.name for path in parent.rglob("*"))
    assert found == sorted([*small.files, folder])
    assert not list(tmp_path.rglob("*escaped")) and not os.path.exists("/tmp/cqjax-escaped")


@pytest.mark.usefixtures("breaking_off")
def test_a_download_that_breaks_off_leaves_no_data_set(serve, small, cache):
    name = serve(archive(small)).name
    with pytest.raises(DataError, match=f"cannot download .*{name}"):
        small.family.load(None, download=True)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    with pytest.raises(MissingDataError):
        small.family.load(None, download=False)


def test_another_file_than_the_official_one_is_not_kept(serve, small, cache):
    serve(archive(small)).write_bytes(archive(small, {}))
    with pytest.raises(DataError, match="cannot download .*hash"):
        small.family.load(None, download=True)
    assert not [path for path in cache.rglob("*") if path.is_file()]


BAD_ARCHIVES = {
    "a file too few": lambda small: archive(small, dict([*small.files.items()][:-1])),
    "links": lambda small: archive(small, kind=tarfile.SYMTYPE),
    "no archive": lambda small: b"not found",
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_a_bad_archive_is_named_and_leaves_no_data_set(serve, small, cache, case):
    name = serve(BAD_ARCHIVES[case](small)).name
    with pytest.raises(DataError, match=f"{name} cannot be unpacked"):
        small.family.load(None, download=True)
    with pytest.raises(MissingDataError):
        small.family.load(None, download=False)


def test_what_was_unpacked_in_part_is_unpacked_again(serve, small, cache, monkeypatch):
    """The archive is still there, and so are the first files."""
    serve(archive(small))
    copies = []

    def copy_until_the_disk_is_full(source, target):
        copies.append(source.read())
        if len(copies) == len(small.files):
            target.write(copies[-1][:100])
            raise OSError("disk full")
        target.write(copies[-1])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("shutil.copyfileobj", copy_until_the_disk_is_full)
        small.family.load(None, download=True)
    with pytest.raises(MissingDataError, match=f"{small.family.meta} is missing"):
        small.family.load(None, download=False)
    assert len(small.family.load(None, download=True).test.labels) == 40
