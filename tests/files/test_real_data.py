"""Real images, masks and volumes stored in other ways are read alike, and none of them is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT, shared_data

from amkd_monai.data.check import check_data


def test_real_files_stored_otherwise_are_read_alike():
    script = [sys.executable, "benchmarks/stored_otherwise.py", "--data", str(shared_data()), "--count", "2"]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("(2 of") == 3 and "EXIF 8" in ended.stdout and "IPL" in ended.stdout


@pytest.mark.parametrize(
    ("task", "folder", "allowed"),
    [
        ("kvasir_seg", "Kvasir-SEG", ("look alike",)),
        ("busi", "BUSI/Dataset_BUSI_with_GT", ()),
        ("covid", "COVID/COVID-SemiSeg", ("look alike",)),
        ("isic2017_lesion", "ISIC2017", ()),
        ("msd_heart", "MSD-Heart/Task02_Heart_half", ()),
        ("aptos2019", "APTOS2019_standin_IDRiD", ("one image with the labels",)),
        ("isic2017", "ISIC2017", ()),
    ],
)
def test_no_real_file_is_refused(task, folder, allowed, tmp_path):
    report = check_data(task, shared_data(*folder.split("/")), tmp_path)
    assert len(report.items) > 5 and not report.damaged
    assert all(any(words in problem for words in allowed) for problem in report.problems), report.problems
    assert {"busi": "8 clusters", "msd_heart": "1 clusters: la_005 = la_026"}.get(task, "") in str(report)
