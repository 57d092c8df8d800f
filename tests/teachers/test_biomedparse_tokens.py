"""Prompts to CLIP's token ids, without any network access."""

import gzip
import importlib.metadata
import os
import socket

import pytest

from amkd_monai.teachers.biomedparse import tokens
from amkd_monai.teachers.biomedparse.teacher import BiomedParseTeacher
from amkd_monai.teachers.biomedparse.tokens import END, MERGES, START, Vocabulary

KNOWN = {
    "liver": [49406, 12639, 49407],
    "neoplastic cells": [49406, 557, 36270, 1561, 8890, 49407],
    "left heart ventricle in cardiac ultrasound": [49406, 1823, 1936, 1240, 9511, 579, 530, 21256, 29717, 49407],
}
RULES = ["l i", "li v", "e r</w>", "liv er</w>", "l u", "lu n", "n g</w>", "u n", "a a", "aa a</w>"]
FIRST = 2 * 256
LETTER = {letter: ord(letter) - ord("!") for letter in "abcdefghijklmnopqrstuvwxyz2-_"}


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_merges(path, rules, compress):
    """A merge list of CLIP's length that starts with a few rules; the others join characters no prompt has."""
    filler = [f"{chr(0x4E00 + i // 256)} {chr(0x4E00 + i % 256)}" for i in range(MERGES - len(rules))]
    text = "\n".join(["#version: 0.2", *rules, *filler, "l iver</w>"]).encode()
    path.write_bytes(gzip.compress(text) if compress else text)
    return path


@pytest.fixture(params=[True, False], ids=["gzip", "text"])
def vocabulary(request, tmp_path):
    return write_merges(tmp_path / "merges", RULES, request.param)


def test_pairs_are_merged_in_the_order_of_the_list(vocabulary, offline):
    words = Vocabulary(vocabulary)
    assert words.tokenise("  LIVER\n") == [START, FIRST + 3, END]
    assert words.tokenise("lung") == [START, FIRST + 5, LETTER["g"] + 256, END]  # "lu n" comes before "n g"
    assert words.tokenise("liv er") == [START, FIRST, LETTER["v"] + 256, FIRST + 2, END]
    assert words.tokenise("aaaaa") == [START, FIRST + 8, FIRST + 9, END]
    assert words.tokenise("aab") == [START, FIRST + 8, LETTER["b"] + 256, END]


def test_words_are_cut_at_digits_and_marks(vocabulary, offline):
    words = Vocabulary(vocabulary)
    ends = {letter: number + 256 for letter, number in LETTER.items()}
    assert words.tokenise("t2-x_a") == [START, ends["t"], ends["2"], ends["-"], ends["x"], ends["_"], ends["a"], END]
    assert words.tokenise("22")[1:-1] == [ends["2"], ends["2"]]
    assert words.tokenise("t²")[1:-1] == [ends["t"], *words.tokenise("²")[1:-1]]
    assert words.tokenise("--")[1:-1] == [LETTER["-"], ends["-"]]


def test_letters_of_several_bytes(vocabulary, offline):
    first, second = "ü".encode()
    assert Vocabulary(vocabulary).tokenise("Ü")[1:-1] == [106 + first - ord("®"), 256 + 106 + second - ord("®")]


def test_the_teacher_reads_prompts_through_a_local_file(vocabulary, offline):
    sizes = {"backbone": 8, "depths": [1, 1, 1, 1], "width": 32, "heads": 2, "hidden": 8, "text_layers": 1}
    teacher = BiomedParseTeacher("b", "random", prompts=["liver", "lung"], vocabulary=vocabulary, sizes=sizes)
    assert teacher.token_ids == [[START, FIRST + 3, END], [START, FIRST + 5, LETTER["g"] + 256, END]]


def test_what_is_not_a_vocabulary_is_named(tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("#version\na b\n")
    whole = gzip.compress(b"#version\na b\n" * 500)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name in ("short.txt", "cut.gz", "binary", "absent"):
        with pytest.raises(ValueError, match=name) as error:
            Vocabulary(tmp_path / name)
        assert "\n" not in str(error.value) and "token_ids" in str(error.value)
    monkeypatch.setattr(tokens, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ValueError, match="not installed"):
        Vocabulary()


@pytest.mark.parametrize("prompt", ["", "   ", "liver " * 80])
def test_prompts_without_words_or_with_too_many(vocabulary, prompt):
    with pytest.raises(ValueError, match="1 to 75"):
        Vocabulary(vocabulary).tokenise(prompt)


def test_the_published_vocabulary_gives_the_known_ids(offline):
    try:
        importlib.metadata.distribution(tokens.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{tokens.DISTRIBUTION} is missing: it is required in CI")
        pytest.skip(f"{tokens.DISTRIBUTION} is missing: pip install it")
    words = Vocabulary()
    assert {prompt: words.tokenise(prompt) for prompt in KNOWN} == KNOWN
