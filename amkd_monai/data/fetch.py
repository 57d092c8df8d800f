"""Download of the data sets whose terms allow it: pooch fetches the files, and each archive is verified by checksum."""

import datetime
import logging
import shutil
import tarfile
import urllib.parse
import zipfile
from pathlib import Path, PurePosixPath

from amkd_monai.data.datasets import get_task
from amkd_monai.storage import atomic_write_json, file_sha256
from amkd_monai.terminal import is_quiet, logger, progress

TIMEOUT_S = 60
HEADERS = {"User-Agent": "amkd_monai", "Accept-Encoding": "identity"}
ARCHIVES = (".zip", ".tar", ".tar.gz")


def steps(name: str) -> str:
    """Return what to do by hand, as text."""
    source = get_task(name).source
    return f"{name} is not fetched. {source.terms}\n{source.steps}" if source else f"No source of {name} is known."


def fetch(name: str, to: str | Path = "data", retries: int = 4) -> Path | None:
    """Fetch a data set into a data root and return its folder; None where its terms ask for steps by hand.

    The folder appears when all files are there, verified and unpacked, with ``<folder>.source.json`` next to it:
    addresses, SHA-256, terms and date. A call after an interrupted one keeps complete files; ``retries`` are further
    attempts at a file whose download breaks off.

    Raises:
        ValueError: unknown name, not an HTTPS address, an archive without checksum or damaged, or a wrong checksum.
        FileExistsError, OSError: the folder is there already; a server cannot be reached.
    """
    import pooch
    import requests

    task, root = get_task(name), Path(to)
    if task.source is None or not task.source.files:
        return None
    folder, downloads = root / task.folder, root / f".{task.folder}.download"
    if folder.exists():
        raise FileExistsError(f"{folder} already exists: remove it to fetch it again.")
    unpacked, digests = downloads / "unpacked", {}
    place = unpacked / task.folder if task.source.inside else unpacked
    shutil.rmtree(unpacked, ignore_errors=True)  # of a call that was killed
    place.mkdir(parents=True)
    if is_quiet():
        pooch.get_logger().setLevel(logging.WARNING)
    for url, checksum in task.source.files:
        _check_address(url)
        file = PurePosixPath(url).name
        if checksum is None and file.endswith(ARCHIVES):
            raise ValueError(f"{url} has no checksum: only an archive with a known checksum is unpacked.")
        # without the checksum, as pooch would fetch a file again and again that its owner has changed
        store = pooch.create(downloads, "", registry={file: None}, urls={file: url}, retry_if_failed=retries)
        redirected = {"response": lambda response, **_: _check_address(response.url)}
        options = {"chunk_size": 1 << 20, "timeout": TIMEOUT_S, "headers": HEADERS, "hooks": redirected}
        with progress(desc=file, total=1, unit="B", unit_scale=True) as bar:
            try:
                path = Path(store.fetch(file, downloader=pooch.HTTPDownloader(progressbar=bar, **options)))
            except requests.RequestException as error:
                remedy = f"run the command again, complete files are kept, or get it by hand as {downloads / file}"
                raise OSError(f"{url} cannot be fetched ({error}): {remedy}.") from error
        digests[url] = file_sha256(path)
        if checksum is None:
            logger.warning("No checksum of %s is known: its SHA-256 %s is recorded.", url, digests[url])
        elif not pooch.hashes.hash_matches(path, checksum):
            path.unlink()
            raise ValueError(f"{url} does not have the checksum {checksum}: it is damaged or its owner has changed it.")
    for url in digests:
        unpack(downloads / PurePosixPath(url).name, place)
    if not (unpacked / task.folder).is_dir():
        raise ValueError(f"{', '.join(digests)} hold(s) no folder {task.folder}: unpack {downloads} by hand.")
    (unpacked / task.folder).rename(folder)
    today = datetime.date.today().isoformat()
    record = {"name": name, "terms": task.source.terms, "sha256": digests, "fetched": today}
    atomic_write_json(root / f"{task.folder}.source.json", record)
    shutil.rmtree(downloads)
    return folder


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")):
        raise ValueError(f"{url} is not an https address: nothing is fetched from it.")


def unpack(file: Path, folder: Path) -> None:
    """Unpack a verified .zip or .tar into a folder, or copy a file that is neither; nothing is written outside it.

    A damaged archive, or a tar with devices or with paths or links that leave the folder, is a ValueError.
    """
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as packed:
                packed.extractall(folder)  # drops what would leave the folder from a path
        elif file.name.endswith(ARCHIVES):
            shutil.unpack_archive(file, folder, filter="data")
        else:
            shutil.copy(file, folder)
    except (zipfile.BadZipFile, tarfile.TarError, shutil.ReadError, EOFError) as error:
        raise ValueError(f"{file} cannot be unpacked ({error}): remove it and fetch it again.") from error
