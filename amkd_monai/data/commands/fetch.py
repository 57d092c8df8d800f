"""Where the data sets come from; those whose terms allow it are fetched by pooch and unpacked."""

from __future__ import annotations

import datetime
import logging
import shutil
import tarfile
import urllib.parse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from amkd_monai.atomic import atomic_write_json
from amkd_monai.terminal import is_quiet, progress

logger = logging.getLogger("amkd_monai")

TIMEOUT_S = 60
ARCHIVES = (".zip", ".tar", ".tar.gz")
MOST_FILES = 100_000
MOST_GROWTH = 200
"""An archive of images hardly shrinks; one that unpacks to 200 times its size is no data set."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        folder: the name of its folder in a data root.
        terms: its licence in a sentence.
        files: addresses with checksums (``sha256:...``, ``md5:...`` or None where none is known); empty if it is not
            fetched.
        inside: whether archives are unpacked inside ``folder``; otherwise they bring it along.
        steps: what to do by hand where it is not fetched.
    """

    folder: str
    terms: str
    files: tuple[tuple[str, str | None], ...] = ()
    inside: bool = False
    steps: str = ""


_ISIC = "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_"

SOURCES: dict[str, Source] = {
    "aptos2019": Source(
        "aptos2019-blindness-detection",
        "The rules of the competition allow non-commercial and academic use and no passing on.",
        steps="Accept the rules at https://www.kaggle.com/competitions/aptos2019-blindness-detection, then: "
        "kaggle competitions download -c aptos2019-blindness-detection, and unpack into a folder of that name.",
    ),
    "busi": Source(
        "Dataset_BUSI_with_GT",
        "No licence of the data is known.",
        steps="Download Dataset_BUSI.zip from https://scholar.cu.edu.eg/?q=afahmy/pages/dataset and unpack it; "
        "it holds Dataset_BUSI_with_GT/.",
    ),
    "covid": Source(
        "COVID",
        "COVID-SemiSeg is for non-commercial use only.",
        steps="Follow https://github.com/DengPingFan/Inf-Net to COVID-SemiSeg.zip and unpack it as COVID/, so that "
        "COVID/TrainingSet and COVID/TestingSet are there.",
    ),
    "covid_volumes": Source(
        "COVID-volumes",
        "See the page for the terms of each of its three sources.",
        steps="Download COVID-19-CT-Seg_20cases.zip and Infection_Mask.zip from https://zenodo.org/records/3757476 and "
        "unpack each into a folder of its name in COVID-volumes/.",
    ),
    "isic2017": Source(
        "ISIC2017",
        "CC-0.",
        files=(
            (f"{_ISIC}Training_Data.zip", "md5:a14a7e622c67a358797ae59abb8a0b0c"),
            (f"{_ISIC}Training_Part1_GroundTruth.zip", "md5:77fdbeb6fbec4139937224416b250f4c"),
            (f"{_ISIC}Training_Part3_GroundTruth.csv", "md5:0cb4add57c65c22ca1a1cb469ad1f0c5"),
            (f"{_ISIC}Validation_Data.zip", "md5:8d6419d942112f709894c0d82f6c9038"),
            (f"{_ISIC}Validation_Part1_GroundTruth.zip", "md5:64d3e68fa2deeb8a5e89aa8dec2efd44"),
            (f"{_ISIC}Validation_Part3_GroundTruth.csv", "md5:8d4826a76adcd8fb928ca52a23ebae4c"),
            (f"{_ISIC}Test_v2_Data.zip", "md5:5f6a0b5e1f2972bd1f5ea02680489f09"),
            (f"{_ISIC}Test_v2_Part1_GroundTruth.zip", "md5:b1742de6bd257faca3b2b21a4aa3b781"),
            (f"{_ISIC}Test_v2_Part3_GroundTruth.csv", None),
        ),
        inside=True,
    ),
    "kvasir_seg": Source(
        "Kvasir-SEG",
        "Research and education only; anything else needs the owners' permission. Cite Jha et al., MMM 2020.",
        files=(
            (
                "https://datasets.simula.no/downloads/kvasir-seg.zip",
                "sha256:03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7",
            ),
        ),
    ),
    "msd_heart": Source(
        "Task02_Heart",
        "CC-BY-SA 4.0.",
        files=(
            (
                "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task02_Heart.tar",
                "md5:06ee59366e1e5124267b774dbd654057",
            ),
        ),
    ),
}
SOURCES["isic2017_lesion"] = SOURCES["isic2017"]


def fetch(name: str, to: str | Path = "data", sources: Mapping[str, Source] = SOURCES, retries: int = 4) -> Path | None:
    """Fetch a data set into a data root, or return None where its terms ask for steps by hand.

    The folder appears when all files are there, verified and unpacked. Beside it ``<folder>.source.json`` records
    addresses, SHA-256, terms and date. A call that follows an interrupted one keeps the files that were complete.

    Args:
        name: a key of ``sources``.
        to: the data root.
        sources: where data sets come from.
        retries: further attempts at a file whose download breaks off.

    Returns:
        The data set's folder.

    Raises:
        ValueError: unknown name, not an HTTPS address, a wrong checksum, or an archive that is refused.
        FileExistsError: the folder is there already.
        OSError: a server cannot be reached.
    """
    import pooch

    if name not in sources:
        raise ValueError(f"Unknown data set '{name}': use one of {', '.join(sorted(sources))}.")
    source, root = sources[name], Path(to)
    if not source.files:
        return None
    folder = root / source.folder
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: remove it to fetch it again.")
    downloads = root / f".{source.folder}.download"
    urls = {PurePosixPath(url).name: url for url, _ in source.files}
    # without checksums, as pooch would fetch a file again and again that its owner has changed
    store = pooch.create(downloads, "", registry=dict.fromkeys(urls), urls=urls, retry_if_failed=retries)
    if is_quiet():
        pooch.get_logger().setLevel(logging.WARNING)
    unpacked, digests = downloads / "unpacked", {}
    shutil.rmtree(unpacked, ignore_errors=True)  # of a call that was killed
    for file, (url, checksum) in zip(urls, source.files, strict=True):
        path = _download(store, file)
        algorithm, _, expected = (checksum or "").partition(":")
        if checksum and pooch.file_hash(path, alg=algorithm) != expected:
            Path(path).unlink()
            raise ValueError(
                f"{url} does not have the checksum {checksum}: it is damaged or was changed by its owner; nothing was "
                "unpacked."
            )
        digests[url] = pooch.file_hash(path)
    place = unpacked / source.folder if source.inside else unpacked
    for file in urls:
        if file.endswith(ARCHIVES):
            unpack(downloads / file, place)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(downloads / file, place / file)
    complete = unpacked / source.folder
    if not complete.is_dir():
        raise ValueError(
            f"{', '.join(urls)} hold(s) no folder {source.folder}: unpack by hand the files of {downloads}."
        )
    complete.rename(folder)
    record = {"name": name, "terms": source.terms, "sha256": digests, "fetched": datetime.date.today().isoformat()}
    atomic_write_json(root / f"{source.folder}.source.json", record)
    for url, checksum in source.files:
        if checksum is None:
            logger.warning("No checksum of %s is known: its SHA-256 %s was recorded.", url, digests[url])
    shutil.rmtree(downloads)
    return folder


def _download(store: Any, file: str) -> str:
    """Return the path of a file that is complete."""
    import pooch
    import requests

    url = store.get_url(file)
    _check_address(url)
    with progress(desc=file, total=1, unit="B", unit_scale=True) as bar:
        get = pooch.HTTPDownloader(
            progressbar=bar,
            chunk_size=1 << 20,
            timeout=TIMEOUT_S,
            headers={"User-Agent": "amkd_monai", "Accept-Encoding": "identity"},
            hooks={"response": lambda response, **_: _check_address(response.url)},  # redirects too
        )
        try:
            return str(store.fetch(file, downloader=get))
        except requests.RequestException as error:
            raise OSError(
                f"{url} cannot be fetched ({error}): run the command again, complete files are kept, or get it by hand "
                f"as {store.abspath / file}."
            ) from error


def _check_address(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url} is not an https address: nothing is fetched from it.")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar into a folder of the caller's own.

    Raises:
        ValueError: no such archive format, a damaged archive, one that would grow without limit, a path that leaves the
            folder, links or devices, or one name twice; all but a damaged archive is found before anything is written.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                kinds = {0: "file", 4: "folder", 8: "file"}  # by the upper bits of a Unix mode, 0 where there is none
                entries = [
                    (i.filename, i.file_size, "folder" if i.is_dir() else kinds.get(i.external_attr >> 28, ""))
                    for i in packed.infolist()
                ]
                _check_entries(entries, archive, folder)
                packed.extractall(folder)
        else:
            with tarfile.open(archive) as packed_tar:
                entries = [
                    (m.name, m.size, "folder" if m.isdir() else "file" if m.isfile() else "")
                    for m in packed_tar.getmembers()
                ]
                _check_entries(entries, archive, folder)
                packed_tar.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}): remove it and fetch it again.") from error


def _check_entries(entries: list[tuple[str, int, str]], archive: Path, folder: Path) -> None:
    """Check names, sizes in bytes and kinds (``file``, ``folder``, else "") of what an archive holds."""
    folder.mkdir(parents=True, exist_ok=True)
    room = min(shutil.disk_usage(folder).free, max(1 << 20, archive.stat().st_size * MOST_GROWTH))
    fault = ""
    for name, _, kind in entries:
        parts = PurePosixPath(name.replace("\\", "/")).parts or ("",)
        if parts[0] == "/" or ".." in parts or ":" in parts[0]:
            fault = f"the path '{name}', which leaves the folder"
        elif not kind:
            fault = f"a link or device, '{name}'"
    files = [name for name, _, kind in entries if kind == "file"]
    if len(set(files)) < len(files):
        fault = "a name twice"
    if len(files) > MOST_FILES or sum(size for _, size, _ in entries) > room:
        fault = f"more than {MOST_FILES} files or {room} bytes"
    if fault:
        raise ValueError(f"{archive} holds {fault}: it is not unpacked.")


def steps(name: str) -> str:
    """Return what to do by hand, as text."""
    source = SOURCES[name]
    return f"{name} is not fetched. {source.terms}\n{source.steps}"
