"""What tests of data sets share: a machine without any, a local server, a small CIFAR-10."""

import http.server
import pickle
import threading
from functools import partial

import numpy as np
import pytest

from experiments.data import cifar10, fashion_mnist


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The empty download cache of a machine without data sets."""
    monkeypatch.delenv("CQJAX_DATA_DIR", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "cqjax"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server: the folder it serves, its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture
def small_cifar10(monkeypatch):
    """What CIFAR-10's files hold, by name, with 40 images each; the reader expects so few."""
    monkeypatch.setattr(cifar10, "IMAGES", 40)
    rng = np.random.default_rng(0)
    files = {}
    for name in cifar10.MD5:
        labels = rng.permutation(np.arange(40) % 10)
        data = rng.integers(0, 156, (40, 3072)) + 10 * labels[:, None]  # brighter by class
        files[name] = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": data.astype(np.uint8),
            b"filenames": [b"picture.png"] * 40,
        }
    names = b"airplane automobile bird cat deer dog frog horse ship truck".split()
    return files | {"batches.meta": {b"label_names": names}}


@pytest.fixture
def cifar10_folder(small_cifar10, tmp_path):
    """Its folder."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, value in small_cifar10.items():
        (folder / name).write_bytes(pickle.dumps(value, protocol=2))
    return folder
