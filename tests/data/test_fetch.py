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
from amkd_monai.data.commands import fetch as fetching
from amkd_monai.data.commands.fetch import SOURCES, Source, fetch, unpack
from amkd_monai.tasks import TASKS

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


def one_file(server, content, checksum=None):
    server.files["a.csv"] = content
    return {"set": Source("Set", "CC0.", ((server.url("a.csv"), checksum),), inside=True)}


@pytest.mark.parametrize("retries", [1, 0])
def test_a_broken_connection_or_a_busy_server_is_tried_again(server, tmp_path, retries):
    for fault in ("breaks", "errors"):
        setattr(server, fault, {"breaks": 1, "errors": [503]}[fault])
        sources = one_file(server, CONTENT, f"sha256:{sha256(CONTENT)}")
        if retries:
            assert (fetch("set", tmp_path / fault, sources, retries) / "a.csv").read_bytes() == CONTENT
        else:
            with pytest.raises(OSError, match=r"/a\.csv cannot be fetched"):
                fetch("set", tmp_path / fault, sources, retries)
            assert not (tmp_path / fault / "Set").exists()


def test_an_interrupted_fetch_keeps_the_files_that_are_complete(server, tmp_path):
    server.files = {"a.csv": CONTENT}
    urls = tuple((server.url(name), None) for name in ("a.csv", "b.csv"))
    sources = {"set": Source("Set", "CC0.", urls, inside=True)}
    with pytest.raises(OSError, match=r"/b\.csv cannot be fetched .*404"):
        fetch("set", tmp_path, sources, 0)
    assert not (tmp_path / "Set").exists()
    server.files["b.csv"] = b"b"
    folder = fetch("set", tmp_path, sources, 0)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a.csv": CONTENT, "b.csv": b"b"}
    assert server.asked == ["/a.csv", "/b.csv", "/b.csv"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_file_than_expected_is_refused_and_removed(server, tmp_path, algorithm):
    with pytest.raises(ValueError, match=r"a\.csv"):
        fetch("set", tmp_path, one_file(server, CONTENT, f"{algorithm}:00"))
    assert server.asked == ["/a.csv"], "once: it would be the same again"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_only_https_is_trusted_also_after_a_redirect(server, tmp_path):
    for url in ("http://example.org/a.zip", "file:///etc/passwd", "ftp://example.org/a"):
        with pytest.raises(ValueError, match="is not an https address"):
            fetch("set", tmp_path, {"set": Source("Set", "CC0.", ((url, None),))}, 0)
    server.redirect = f"http://{OTHER_LOOPBACK}:{server.server_address[1]}/a.csv"
    with pytest.raises(ValueError, match="is not an https address"):
        fetch("set", tmp_path, one_file(server, CONTENT), 0)
    assert not (tmp_path / "Set").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_data_set_is_fetched_unpacked_and_recorded(server, tmp_path, kind):
    server.files[f"set.{kind}"] = packed({"Set/images/a.png": b"a", "Set/masks/a.png": b"b"}, kind)
    digest = sha256(server.files[f"set.{kind}"])
    sources = {"set": Source("Set", "CC0.", ((server.url(f"set.{kind}"), None),))}
    folder = fetch("set", tmp_path, sources, retries=0)
    assert folder == tmp_path / "Set"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png")) == ["images/a.png", "masks/a.png"]
    record = json.loads((tmp_path / "Set.source.json").read_text())
    assert record["sha256"] == {server.url(f"set.{kind}"): digest} and record["terms"] == "CC0."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Set", "Set.source.json"]
    with pytest.raises(FileExistsError, match="Set is there already"):
        fetch("set", tmp_path, sources)


def test_several_files_land_in_one_folder(server, tmp_path):
    server.files = {"a.zip": packed({"Data/1.jpg": b"1"}), "b.zip": packed({"Truth/1.png": b"2"}), "c.csv": b"id\n"}
    urls = tuple((server.url(name), f"md5:{hashlib.md5(c).hexdigest()}") for name, c in server.files.items())
    folder = fetch("set", tmp_path, {"set": Source("Set", "CC0.", urls, inside=True)}, retries=0)
    assert sorted(p.name for p in folder.iterdir()) == ["Data", "Truth", "c.csv"]


def test_an_archive_without_the_folder_is_said_and_kept(server, tmp_path):
    server.files["a.zip"] = packed({"Other/1.jpg": b"1"})
    sources = {"set": Source("Set", "CC0.", ((server.url("a.zip"), None),))}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"hold.* no folder Set"):
            fetch("set", tmp_path, sources, retries=0)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil_of_a_test", "a/../../evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, kind, name):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(packed({"good": b"1", name: b"2"}, kind))
    with pytest.raises(ValueError, match="leaves the folder"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [] and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", ["tar symlink", "tar hard link", "tar device", "zip symlink"])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = tmp_path / "archive"
    if kind.startswith("tar"):
        with tarfile.open(archive, "w") as packed_tar:
            info = tarfile.TarInfo("link")
            info.type = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind[4:]]
            info.linkname = "/etc/passwd"
            packed_tar.addfile(info)
    else:
        with zipfile.ZipFile(archive, "w") as packed_zip:
            info = zipfile.ZipInfo("link")
            info.external_attr = 0o120777 << 16
            packed_zip.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="a link or device"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bombs_are_refused(tmp_path, monkeypatch):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed_zip:
        packed_zip.writestr("zeros", b"\0" * 30_000_000)
    with pytest.raises(ValueError, match="bytes"):
        unpack(archive, tmp_path / "out")
    monkeypatch.setattr(fetching, "MOST_FILES", 10)
    archive.write_bytes(packed({str(n): b"" for n in range(12)}))
    with pytest.raises(ValueError, match="10 files"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_and_foreign_archives_are_refused(tmp_path):
    archive = tmp_path / "a.zip"
    for content in (b"nothing", b"", packed({"a": CONTENT}, "tar")[:5000]):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match="fetch it again"):
            unpack(archive, tmp_path / "out")
    content = bytearray(packed({"a": CONTENT}))
    content[5000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be unpacked .*CRC"):
        unpack(archive, tmp_path / "out")


def test_a_name_twice_is_refused(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed_zip, pytest.warns(UserWarning, match="Duplicate"):
        packed_zip.writestr("a", b"1")
        packed_zip.writestr("a", b"2")
    with pytest.raises(ValueError, match="twice"):
        unpack(archive, tmp_path / "out")


def test_every_task_has_a_source_in_its_folder():
    assert TASKS.keys() <= SOURCES.keys()
    for name, source in SOURCES.items():
        assert name not in TASKS or source.folder == TASKS[name].folder
        assert bool(source.files) != bool(source.steps), name
        for url, checksum in source.files:
            algorithm, _, digest = (checksum or f"md5:{'0' * 32}").partition(":")
            assert url.startswith("https://") and len(digest) == hashlib.new(algorithm).digest_size * 2


def test_the_command(server, tmp_path, capsys, monkeypatch):
    assert main(["data", "fetch", "busi", "--to", str(tmp_path)]) == 0
    assert "is not fetched" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    assert main(["data", "fetch", "liver"]) == 1
    assert "Unknown data set 'liver'" in capsys.readouterr().err
    server.files["set.zip"] = packed({"Set/a.png": b"a"})
    monkeypatch.setitem(fetching.SOURCES, "set", Source("Set", "CC0.", ((server.url("set.zip"), None),)))
    assert main(["data", "fetch", "set", "--to", str(tmp_path)]) == 0
    assert "Set is complete. Terms: CC0." in capsys.readouterr().out
