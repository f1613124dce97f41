"""Prepared volumes behind URLs: what is read, and that it is what the local folder holds."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import known_implementations
from torch.utils.data import DataLoader

from gvsl_lightning.data.crop import crop
from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolumes
from gvsl_lightning.data.remote import RemoteArray
from gvsl_lightning.datamodules import Decathlon, PretrainDataModule, SegmentationDataModule
from gvsl_lightning.datamodules.pairs import PairDataset
from gvsl_lightning.errors import InputError
from gvsl_lightning.tools.prepare import main, prepare

PATCH = (6, 5, 4)
SHAPES = [(12, 14, 16), (9, 14, 20), (16, 5, 9), (12, 12, 12), (7, 8, 9), (10, 11, 12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six prepared volumes of two channels, with labels."""
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for index, shape in enumerate(SHAPES):
        np.save(tmp_path / "images" / f"{index}.npy", generator.random((2, *shape)))
        np.save(tmp_path / "labels" / f"{index}.npy", generator.integers(0, 9, shape))
    source = PretrainDataModule(
        str(tmp_path / "images"), label_root=str(tmp_path / "labels"), channels=2
    )
    prepare(source, str(tmp_path / "prepared"))
    return tmp_path / "prepared"


class Handler(SimpleHTTPRequestHandler):
    """Serves ranges of bytes, unless told otherwise, and notes what was sent."""

    url: str
    ranges: bool
    sent: list[tuple[str, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        if self.ranges and (wanted := self.headers.get("Range")):
            first, last = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.sent.append((path.name, len(content)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def handler(folder: Path) -> Iterator[type[Handler]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url, Handler.ranges, Handler.sent = f"http://127.0.0.1:{server.server_port}", True, []
    yield Handler
    server.shutdown()
    server.server_close()


def in_memory(folder: Path) -> str:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.put(str(folder), "/bucket/prepared", recursive=True)
    return "memory://bucket/prepared"


def module(root: str | Path | list[str], **options: Any) -> PretrainDataModule:
    made = PretrainDataModule(
        root if isinstance(root, list) else str(root),
        channels=2,
        patch_size=PATCH,
        batch_size=2,
        val_count=2,
        **options,
    )
    made.setup()
    return made


def require_equal(found: PretrainDataModule, expected: PretrainDataModule) -> None:
    for which in ("train_dataloader", "val_dataloader"):
        for ours, theirs in zip(getattr(found, which)(), getattr(expected, which)(), strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                if isinstance(value, torch.Tensor):
                    assert ours[key].dtype == value.dtype
                    assert torch.equal(ours[key], value)
                else:
                    assert ours[key] == value


@pytest.mark.parametrize("protocol", ["memory", "file", "http", "simplecache"])
def test_a_url_is_read_like_the_folder(
    folder: Path, handler: type[Handler], protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = {
        "memory": in_memory(folder),
        "file": f"file://{folder}",
        "http": handler.url + "/",
        "simplecache": f"simplecache::{handler.url}",
    }[protocol]
    require_equal(module(url), module(folder))
    assert "fixed_label" in next(iter(module(url).val_dataloader()))
    require_equal(module(url, cache=True), module(folder))
    decathlon = Decathlon(url, val_count=2, patch_size=PATCH, modality="none")
    decathlon.setup()
    name = decathlon.validation_pairs[0]["fixed_name"]
    assert name in ("4", "5")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read_after_the_main_process_did(
    folder: Path, handler: type[Handler], context: str
) -> None:
    expected = module(folder)
    remote = module(handler.url)
    first = remote.train_pairs[(0, 1, 5)]  # the file system is in use before the workers are made
    assert torch.equal(first["fixed"], expected.train_pairs[(0, 1, 5)]["fixed"])
    assert isinstance(remote.train_pairs, PairDataset)
    loader = DataLoader(
        remote.train_pairs, batch_size=None, num_workers=2, multiprocessing_context=context
    )
    for index, pair in enumerate(loader):
        assert torch.equal(pair["moving"], expected.train_pairs[index]["moving"])


@pytest.mark.parametrize("patch", [(2, 3, 4), (12, 14, 16), (1, 1, 1), (20, 3, 20)])
def test_crops_are_those_of_the_array(folder: Path, patch: tuple[int, int, int]) -> None:
    local = np.load(folder / "volumes" / "0.npy")
    remote = RemoteArray(in_memory(folder) + "/volumes/0.npy")
    assert remote.shape == local.shape
    for position in (0.0, 0.3, 1.0):
        ours, theirs = (crop(array, patch, position) for array in (remote, local))
        assert torch.equal(ours, theirs)


def test_a_crop_reads_no_more_than_its_planes(folder: Path, handler: type[Handler]) -> None:
    volume = module(handler.url).train_pairs.volumes[0]
    handler.sent.clear()
    _, depth, height, width = volume["image"].shape
    crop(volume["image"], (3, 2, 2))
    assert handler.sent == [(f"{volume['name']}.npy", 3 * height * width * 2)] * 2
    assert depth > 3


def test_copies_are_made_once_and_mapped(
    folder: Path, handler: type[Handler], tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    remote = module(handler.url, cache_folder=str(copies))
    require_equal(remote, module(folder))
    assert isinstance(remote.train_pairs.volumes[0]["image"], np.memmap)
    assert len(list(copies.iterdir())) == 4 + 2 * 2  # training images, validation with labels
    handler.sent.clear()
    require_equal(module(handler.url, cache_folder=str(copies)), module(folder))
    assert {name for name, _ in handler.sent} == {"settings.json", "index.json"}


def test_a_validation_root_may_be_behind_a_url(folder: Path) -> None:
    made = PretrainDataModule(
        in_memory(folder), val_root=f"file://{folder}", channels=2, patch_size=PATCH
    )
    with pytest.raises(InputError, match="none; add volumes"):  # all of them validate
        made.setup()


def test_a_server_without_ranges_is_named(folder: Path, handler: type[Handler]) -> None:
    handler.ranges = False
    made = module(handler.url)
    with pytest.raises(
        InputError, match=r"/volumes/\d.npy .* does not serve ranges .* cache_folder"
    ):
        made.train_pairs[0]


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ("memory://elsewhere", "memory://elsewhere holds no settings.json of prepared volumes"),
        ("file:///nowhere/at/all", "file:///nowhere/at/all holds no settings.json"),
        ("dbfs2://bucket", "dbfs2://bucket/settings.json cannot be read .*Protocol not known"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9/settings.json cannot be read .* the network"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(root: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        module(root)
    assert len(str(raised.value).splitlines()) == 1


def test_missing_packages_and_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(fsspec.AbstractFileSystem):
        protocol = "locked"

        def cat_file(self, path: str, *_: Any, **__: Any) -> bytes:
            raise PermissionError("Unable to locate credentials")

    fsspec.register_implementation("locked", Locked, clobber=True)
    monkeypatch.setitem(
        known_implementations,
        "absent",
        {"class": "no_such_package.FileSystem", "err": "Install no_such_package"},
    )
    with pytest.raises(InputError, match=r"Unable to locate credentials.*check .* credentials"):
        module("locked://bucket/prepared")
    with pytest.raises(InputError, match=r"another package .Install no_such_package.; install it"):
        module("absent://bucket/prepared")


def test_damaged_copies_are_named(folder: Path) -> None:
    url = in_memory(folder)
    store = fsspec.filesystem("memory").store
    volumes = PreparedVolumes(PreparedFolder(url).volumes({}), labelled=False)
    content = store["/bucket/prepared/volumes/0.npy"].getvalue()
    for damaged, sentence in (
        (b"", "is no .npy file"),
        (b"nothing of the kind", "is no .npy file"),
        (content[:-500], "0.npy is shorter than its header says"),
    ):
        fsspec.filesystem("memory").pipe("/bucket/prepared/volumes/0.npy", damaged)
        with pytest.raises(InputError, match=sentence):
            crop(volumes[0]["image"], (2, 2, 2), 1.0)
    del store["/bucket/prepared/volumes/1.npy"]
    with pytest.raises(InputError, match=r"volumes/1.npy"):
        volumes[1]
    del store["/bucket/prepared/index.json"]
    with pytest.raises(InputError, match="bucket/prepared is not prepared to its end"):
        module(url)


def test_where_urls_are_not_understood(folder: Path, tmp_path: Path) -> None:
    url = in_memory(folder)
    with pytest.raises(InputError, match="with channels 2 and is to be read with channels 1"):
        PretrainDataModule(url).setup()
    with pytest.raises(InputError, match="is a URL, which only pre-training reads"):
        module([url, str(tmp_path)])
    with pytest.raises(InputError, match="is a URL, which only pre-training reads"):
        SegmentationDataModule(url, ["a", "b"]).setup("fit")
    with pytest.raises(InputError, match="is a URL; prepare the volumes into a local folder"):
        main(["--data.root", str(tmp_path / "images"), "--data.channels=2", "--out", url])
