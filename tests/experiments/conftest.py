"""What tests of data sets share: a machine without any, a local server, small CIFARs."""

import http.server
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
from cifar_files import Small, python2_pickle

from experiments.data import cifar, fashion_mnist


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The empty download cache of a machine without data sets."""
    monkeypatch.delenv("CQJAX_DATA_DIR", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "cqjax"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, or the first halves of them: with their lengths, or without."""

    broken: str | None = None

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if self.broken else content)

    def send_header(self, keyword, value):
        if keyword != "Content-Length" or self.broken != "without its length":
            super().send_header(keyword, value)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server: the folder it serves, its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def handler(*args):
        return Handler(*args, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture(params=["with its length", "without its length"])
def breaking_off(request, monkeypatch):
    """Lets the server break off each file in the middle."""
    monkeypatch.setattr(Handler, "broken", request.param)


@pytest.fixture
def small_cifar(monkeypatch):
    """Makes a CIFAR small: what its files hold, by name, with 40 images each."""

    def shrink(name):
        family = getattr(cifar, name)
        train = tuple(file._replace(images=40) for file in family.train)
        family = replace(family, train=train, test=family.test._replace(images=40))
        monkeypatch.setattr(cifar, name, family)
        rng, classes, files = np.random.default_rng(0), len(family.classes), {}
        for file in (*family.train, family.test):
            labels = rng.permutation(np.arange(40) * 7 % classes)
            data = rng.integers(0, 156, (40, 3072)) + 99 * labels[:, None] // classes
            files[file.name] = {  # brighter by class
                b"batch_label": file.name.encode(),
                family.labels: labels.tolist(),
                b"data": data.astype(np.uint8),
                b"filenames": [b"picture.png"] * 40,
            }
            if name == "CIFAR100":
                files[file.name][b"coarse_labels"] = (labels // 5).tolist()
        return files | {family.meta: {family.label_names: list(family.classes)}}

    return shrink


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def small(request, small_cifar, tmp_path):
    files = small_cifar(request.param)
    folder = tmp_path / "data" / getattr(cifar, request.param).folder
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_bytes(python2_pickle(value))
    return Small(request.param, files, folder)


@pytest.fixture
def cifar10_folder(small_cifar, tmp_path):
    """The folder of a small CIFAR-10."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, value in small_cifar("CIFAR10").items():
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
    return folder
