"""Downloads against a server on this machine: resume, checksums, refused archives."""

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from amkd_monai.__main__ import main
from amkd_monai.data.commands import fetch as fetching
from amkd_monai.data.commands.archive import extract
from amkd_monai.data.commands.download import ATTEMPTS, download
from amkd_monai.data.commands.fetch import SOURCES, Source, fetch
from amkd_monai.tasks import TASKS

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves ``files``; breaks off ``breaks`` times after ``after`` bytes; may ignore ranges."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.after, self.ranges, self.asked = {}, 0, 300_000, True, []
        self.tag = '"v1"'
        self.errors = []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        content = server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        start = 0
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(match[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", server.tag)
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            self.wfile.write(content[start : start + server.after])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

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


def test_a_file_comes_whole_and_its_hash_is_returned(server, tmp_path):
    server.files["a.bin"] = CONTENT
    assert download(server.url("a.bin"), tmp_path / "a.bin", f"sha256:{sha256(CONTENT)}") == sha256(CONTENT)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    download(server.url("a.bin"), tmp_path / "a.bin")
    assert len(server.asked) == 1, "what is there is not fetched again"


def test_a_broken_connection_is_continued(server, tmp_path):
    server.files["a.bin"], server.breaks = CONTENT, 2
    download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_later_call_goes_on_where_the_first_gave_up(server, tmp_path):
    server.files["a.bin"], server.breaks, server.after = CONTENT, ATTEMPTS, 100_000
    with pytest.raises(OSError, match=r"broke off 5 times .*it goes on from 500000 bytes"):
        download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    assert not (tmp_path / "a.bin").exists()
    download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.asked[-1] == "bytes=500000-"


@pytest.mark.parametrize("change", ["no ranges", "new version"])
def test_what_cannot_be_continued_starts_afresh(server, tmp_path, change):
    server.files["a.bin"], server.breaks = CONTENT, ATTEMPTS
    server.after = 10
    with pytest.raises(OSError, match="broke off"):
        download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    if change == "no ranges":
        server.ranges = False
    else:
        server.files["a.bin"], server.tag = CONTENT[::-1], '"v2"'
    download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]


def test_a_busy_server_is_asked_again_a_missing_file_is_not(server, tmp_path):
    server.files["a.bin"], server.errors = CONTENT, [503]
    download(server.url("a.bin"), tmp_path / "a.bin", pause_s=0)
    server.asked.clear()
    with pytest.raises(OSError, match=r"/b\.bin answers 404"):
        download(server.url("b.bin"), tmp_path / "b.bin", pause_s=0)
    assert len(server.asked) == 1


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_another_file_than_expected_is_refused_and_removed(server, tmp_path, algorithm):
    server.files["a.bin"] = CONTENT
    with pytest.raises(ValueError, match=f"has the {algorithm} .*, expected 00"):
        download(server.url("a.bin"), tmp_path / "a.bin", f"{algorithm}:00", pause_s=0)
    assert list(tmp_path.iterdir()) == []


def test_only_https_is_trusted(tmp_path):
    for url in ("http://example.org/a.zip", "file:///etc/passwd", "ftp://example.org/a"):
        with pytest.raises(ValueError, match="is not an https address"):
            download(url, tmp_path / "a")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_data_set_is_fetched_unpacked_and_recorded(server, tmp_path, kind):
    server.files[f"set.{kind}"] = packed({"Set/images/a.png": b"a", "Set/masks/a.png": b"b"}, kind)
    digest = sha256(server.files[f"set.{kind}"])
    sources = {"set": Source("Set", "CC0.", ((server.url(f"set.{kind}"), None),))}
    folder = fetch("set", tmp_path, sources, pause_s=0)
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
    folder = fetch("set", tmp_path, {"set": Source("Set", "CC0.", urls, inside=True)}, pause_s=0)
    assert sorted(p.name for p in folder.iterdir()) == ["Data", "Truth", "c.csv"]


def test_an_archive_without_the_folder_is_said_and_kept(server, tmp_path):
    server.files["a.zip"] = packed({"Other/1.jpg": b"1"})
    sources = {"set": Source("Set", "CC0.", ((server.url("a.zip"), None),))}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"hold.* no folder Set"):
            fetch("set", tmp_path, sources, pause_s=0)


def test_an_interrupted_fetch_keeps_what_it_has(server, tmp_path):
    server.files["a.zip"] = packed({"Set/a.bin": CONTENT})
    server.breaks = ATTEMPTS
    server.after = 1000
    sources = {"set": Source("Set", "CC0.", ((server.url("a.zip"), None),))}
    with pytest.raises(OSError, match="broke off"):
        fetch("set", tmp_path, sources, pause_s=0)
    assert not (tmp_path / "Set").exists()
    assert (fetch("set", tmp_path, sources, pause_s=0) / "a.bin").read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={ATTEMPTS * 1000}-"


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil_of_a_test", "a/../../evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, kind, name):
    archive = tmp_path / f"a.{kind}"
    archive.write_bytes(packed({"good": b"1", name: b"2"}, kind))
    with pytest.raises(ValueError, match="leaves the folder"):
        extract(archive, tmp_path / "out")
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
        extract(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bombs_are_refused(tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed_zip:
        packed_zip.writestr("zeros", b"\0" * 30_000_000)
    with pytest.raises(ValueError, match=r"unpacks to more than \d+ bytes"):
        extract(archive, tmp_path / "out")
    archive.write_bytes(packed({str(n): b"" for n in range(12)}))
    with pytest.raises(ValueError, match="more than 10 files"):
        extract(archive, tmp_path / "out", most_files=10)
    archive.write_bytes(packed({"a": b"1" * 100}))
    with pytest.raises(ValueError, match="more than 50 bytes"):
        extract(archive, tmp_path / "out", most_bytes=50)
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_and_foreign_archives_are_refused(tmp_path):
    archive = tmp_path / "a.zip"
    for content in (b"nothing", b"", packed({"a": CONTENT}, "tar")[:5000]):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match="fetch it again"):
            extract(archive, tmp_path / "out")
    content = bytearray(packed({"a": CONTENT}))
    content[5000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be unpacked .*CRC"):
        extract(archive, tmp_path / "out")


def test_what_is_there_is_never_replaced(tmp_path):
    (tmp_path / "a.zip").write_bytes(packed({"x/a": b"new"}))
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="x is there already"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert list((tmp_path / "out" / "x").iterdir()) == []


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
