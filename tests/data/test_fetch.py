"""Downloads against a server on this machine: retries, checksums, refused archives."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from amkd_monai.__main__ import main
from amkd_monai.data.datasets import TASKS, Source, Task
from amkd_monai.data.fetch import fetch, unpack

CONTENT = bytes(range(256)) * 4000


OTHER_LOOPBACK = "127.0.0.2"
"""This machine by an address that the command does not know as this machine's."""


class Server(ThreadingHTTPServer):
    """Serves ``files``; breaks off ``breaks`` times, answers ``errors`` first; may redirect."""

    def __init__(self):
        super().__init__(("0.0.0.0", 0), Handler)
        self.files, self.breaks, self.asked, self.errors, self.redirect = {}, 0, [], [], ""

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        content = server.files.get(self.path[1:])
        if server.errors or content is None:
            self.send_error(server.errors.pop(0) if server.errors else 404)
            return
        if server.redirect and OTHER_LOOPBACK not in self.headers["Host"]:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            self.wfile.write(content[:300_000])
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def source(monkeypatch):
    """Registers a data set "set" of these files, addresses and checksums."""

    def register(*files, inside=False):
        task = Task("set", (), "", "Set", (), source=Source("CC0.", files, inside))
        monkeypatch.setitem(TASKS, "set", task)

    return register


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def packed(files, kind="zip"):
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("retries", [1, 0])
def test_a_broken_connection_or_a_busy_server_is_tried_again(server, source, tmp_path, retries):
    server.files["a.csv"] = CONTENT
    source((server.url("a.csv"), f"sha256:{sha256(CONTENT)}"), inside=True)
    for fault in ("breaks", "errors"):
        setattr(server, fault, {"breaks": 1, "errors": [503]}[fault])
        if retries:
            assert (fetch("set", tmp_path / fault, retries) / "a.csv").read_bytes() == CONTENT
        else:
            with pytest.raises(OSError, match=r"/a\.csv cannot be fetched"):
                fetch("set", tmp_path / fault, retries)
            assert not (tmp_path / fault / "Set").exists()


def test_an_interrupted_fetch_keeps_the_files_that_are_complete(server, source, tmp_path):
    server.files = {"a.csv": CONTENT}
    source(*((server.url(name), None) for name in ("a.csv", "b.csv")), inside=True)
    with pytest.raises(OSError, match=r"/b\.csv cannot be fetched .*404"):
        fetch("set", tmp_path, 0)
    assert not (tmp_path / "Set").exists()
    server.files["b.csv"] = b"b"
    folder = fetch("set", tmp_path, 0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a.csv": CONTENT, "b.csv": b"b"}
    assert server.asked == ["/a.csv", "/b.csv", "/b.csv"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_file_than_expected_is_refused_and_removed(server, source, tmp_path, algorithm):
    server.files["a.csv"] = CONTENT
    source((server.url("a.csv"), f"{algorithm}:00"), inside=True)
    with pytest.raises(ValueError, match=r"a\.csv"):
        fetch("set", tmp_path)
    assert server.asked == ["/a.csv"], "once: it would be the same again"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_archive_without_a_checksum_is_not_fetched(server, source, tmp_path):
    source((server.url("a.zip"), None))
    with pytest.raises(ValueError, match=r"a\.zip has no checksum"):
        fetch("set", tmp_path)
    assert server.asked == []


def test_only_https_is_trusted_also_after_a_redirect(server, source, tmp_path):
    for url in ("http://example.org/a.zip", "file:///etc/passwd", "ftp://example.org/a"):
        source((url, "md5:00"))
        with pytest.raises(ValueError, match="is not an https address"):
            fetch("set", tmp_path, 0)
    server.files["a.csv"] = CONTENT
    server.redirect = f"http://{OTHER_LOOPBACK}:{server.server_address[1]}/a.csv"
    source((server.url("a.csv"), None), inside=True)
    with pytest.raises(ValueError, match="is not an https address"):
        fetch("set", tmp_path, 0)
    assert not (tmp_path / "Set").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_data_set_is_fetched_unpacked_and_recorded(server, source, tmp_path, kind):
    server.files[f"set.{kind}"] = packed({"Set/images/a.png": b"a", "Set/masks/a.png": b"b"}, kind)
    digest = sha256(server.files[f"set.{kind}"])
    source((server.url(f"set.{kind}"), f"sha256:{digest}"))
    folder = fetch("set", tmp_path, retries=0)
    assert folder == tmp_path / "Set"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")) == ["images/a.png", "masks/a.png"]
    record = json.loads((tmp_path / "Set.source.json").read_text())
    assert record["sha256"] == {server.url(f"set.{kind}"): digest} and record["terms"] == "CC0."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Set", "Set.source.json"]
    with pytest.raises(FileExistsError, match="Set already exists"):
        fetch("set", tmp_path)


def test_several_files_land_in_one_folder(server, source, tmp_path):
    server.files = {"a.zip": packed({"Data/1.jpg": b"1"}), "b.zip": packed({"Truth/1.png": b"2"}), "c.csv": b"id\n"}
    source(*((server.url(n), f"md5:{hashlib.md5(c).hexdigest()}") for n, c in server.files.items()), inside=True)
    assert sorted(p.name for p in fetch("set", tmp_path, retries=0).iterdir()) == ["Data", "Truth", "c.csv"]


def test_an_archive_without_the_folder_is_said_and_kept(server, source, tmp_path):
    server.files["a.zip"] = packed({"Other/1.jpg": b"1"})
    source((server.url("a.zip"), f"sha256:{sha256(server.files['a.zip'])}"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"hold.* no folder Set"):
            fetch("set", tmp_path, retries=0)
    assert server.asked == ["/a.zip"]


@pytest.mark.parametrize("name", ["../evil", "{}/evil", "a/../../evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside_the_folder(tmp_path, kind, name):
    archive, place = tmp_path / f"a.{kind}", tmp_path / "out"
    archive.write_bytes(packed({"good": b"1", name.format(tmp_path): b"2"}, kind))
    place.mkdir()
    if kind == "tar" and ".." in name:
        with pytest.raises(ValueError, match=r"a\.tar cannot be unpacked"):
            unpack(archive, place)
    else:
        unpack(archive, place)
    assert {p.name for p in tmp_path.iterdir()} == {archive.name, "out"}


@pytest.mark.parametrize("kind", ["tar symlink", "tar device", "zip symlink"])
def test_links_and_devices_lead_nowhere(tmp_path, kind):
    archive, place = tmp_path / f"a.{kind[:3]}", tmp_path / "out"
    place.mkdir()
    if kind.startswith("tar"):
        with tarfile.open(archive, "w") as packed_tar:
            info = tarfile.TarInfo("link")
            info.type = {"symlink": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}[kind[4:]]
            info.linkname = "/etc/passwd"
            packed_tar.addfile(info)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpack(archive, place)
    else:
        with zipfile.ZipFile(archive, "w") as packed_zip:
            info = zipfile.ZipInfo("link")
            info.external_attr = 0o120777 << 16
            packed_zip.writestr(info, "/etc/passwd")
        unpack(archive, place)
    assert not any(path.is_symlink() or not path.is_file() for path in place.iterdir())


def test_damaged_and_foreign_archives_are_refused(tmp_path):
    archive, content = tmp_path / "a.zip", bytearray(packed({"a": CONTENT}))
    content[5000] ^= 255
    for damaged in (b"nothing", b"", packed({"a": CONTENT}, "tar"), content):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.zip cannot be unpacked"):
            unpack(archive, tmp_path)
    archive = tmp_path / "a.tar"
    archive.write_bytes(packed({"a": CONTENT}, "tar")[:5000])
    with pytest.raises(ValueError, match=r"a\.tar cannot be unpacked"):
        unpack(archive, tmp_path)


def test_addresses_and_checksums_of_the_sources_are_well_formed():
    for task in TASKS.values():
        for url, checksum in task.source.files:
            algorithm, _, digest = (checksum or f"md5:{'0' * 32}").partition(":")
            assert url.startswith("https://") and len(digest) == hashlib.new(algorithm).digest_size * 2
            assert checksum or url.endswith(".csv")


def test_the_command(server, source, tmp_path, capsys):
    assert main(["data", "fetch", "busi", "--to", str(tmp_path)]) == 0
    assert "is not fetched" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    assert main(["data", "fetch", "liver"]) == 1
    assert "'liver'" in capsys.readouterr().err
    server.files["set.zip"] = packed({"Set/a.png": b"a"})
    source((server.url("set.zip"), f"sha256:{sha256(server.files['set.zip'])}"))
    assert main(["data", "fetch", "set", "--to", str(tmp_path)]) == 0
    assert "Set is complete. Terms: CC0." in capsys.readouterr().out
