"""Prompts to CLIP's token ids, without any network access."""

import socket
import sys

import pytest
from test_biomedparse_teacher import TINY

from amkd_monai.teachers.biomedparse import BiomedParseTeacher

KNOWN = {
    "liver": [49406, 12639, 49407],
    "neoplastic cells": [49406, 557, 36270, 1561, 8890, 49407],
    "left heart ventricle in cardiac ultrasound": [49406, 1823, 1936, 1240, 9511, 579, 530, 21256, 29717, 49407],
    "  LIVER\n": [49406, 12639, 49407],
}


def teacher(*prompts):
    return BiomedParseTeacher("b", "random", prompts=prompts, sizes=TINY)


def test_prompts_have_the_published_ids(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert teacher(*KNOWN).token_ids == list(KNOWN.values())


@pytest.mark.parametrize("prompt", ["", "   ", "liver " * 80])
def test_prompts_without_words_or_with_too_many(prompt):
    with pytest.raises(ValueError, match=r"prompt 2 .* 1 to 75"):
        teacher("liver", prompt)


def test_without_the_vocabulary_token_ids_are_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    with pytest.raises(ValueError, match=r"open_clip_torch.*token_ids"):
        teacher("liver")
    assert BiomedParseTeacher("b", "random", token_ids=[KNOWN["liver"]], sizes=TINY).token_ids == [KNOWN["liver"]]
