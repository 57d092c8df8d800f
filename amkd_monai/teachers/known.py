"""Teachers that are known from an earlier run: as long as their files stay, none is read before it is asked."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from amkd_monai import __version__
from amkd_monai.storage import fingerprint, read_memo, write_memo
from amkd_monai.teachers.base import KINDS, Teacher, TeacherFacts, build_teacher
from amkd_monai.teachers.catalogue import CATALOGUE, find_weights
from amkd_monai.teachers.official import fixed_initialisation

MEMO = "known_teachers.json"
"""Table beside the cache: what was known of a teacher, by description, and its files with size and time of change."""

ONE_FILE = KINDS.keys() - {"transformers"}
"""Kinds that read one file of weights and nothing else."""


@dataclass
class KnownTeacher:
    """A teacher by its facts; the network is built when it is first needed.

    Attributes:
        of: description and folder of weights, from which it is built.
    """

    known: TeacherFacts
    of: tuple[Mapping[str, Any], str | None]
    built: Teacher | None = None

    def facts(self) -> TeacherFacts:
        """Return what is known of the teacher without its network."""
        return self.known

    def ready(self) -> Teacher:
        """Build the network unless it is there.

        Raises:
            ValueError: it is not the teacher that was known; it changed without its file's size or time.
        """
        if self.built is None:
            with fixed_initialisation():
                built = build_teacher(*self.of)
            if built.fingerprint != self.known.fingerprint:
                name, files = self.known.name, ", ".join(map(str, built.read_from))
                raise ValueError(
                    f"The teacher '{name}' changed, but {files} kept size and time: touch it and run again."
                )
            self.built = built
        return self.built


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def known_teacher(description: Mapping[str, Any], weights_dir: str | None, cache_dir: str | Path) -> KnownTeacher:
    """Return a teacher from the table of a cache folder; one that is not there, or whose file changed, is built.

    Only :data:`ONE_FILE` is kept, since of others it is not known which files they read.
    """
    memo, of = Path(cache_dir) / MEMO, (description, weights_dir)
    table, key = read_memo(memo, lambda entry: isinstance(entry, dict)), teacher_key(*of)
    try:
        entry = table[key]
        if all(_stamp(Path(file)) == stamp for file, stamp in entry["files"].items()):
            return KnownTeacher(TeacherFacts(**entry["facts"]), of)
    except (KeyError, TypeError, OSError):
        pass  # not known, or of another version, or a file is gone: building says so
    with fixed_initialisation():  # what follows is the same where the teacher is known
        teacher = build_teacher(*of)
    facts = teacher.facts()
    if description["kind"] in ONE_FILE and teacher.read_from and not teacher.is_random:
        entry = {"facts": asdict(facts), "files": {str(file): _stamp(file) for file in teacher.read_from}}
        write_memo(memo, {**table, key: entry})
    return KnownTeacher(facts, of, teacher)


def teacher_key(description: Mapping[str, Any], weights_dir: str | None) -> str:
    """Return what the facts of a teacher depend on besides the file: description, code, and which files are found."""
    weights = description.get("weights", weights_dir)
    found = [str(find_weights(e, weights)) for e in CATALOGUE if e.key and e.kind == description["kind"]]
    code = [[file.name, *_stamp(file)] for file in sorted(Path(__file__).parent.glob("*.py"))]
    plain = json.loads(json.dumps(description, default=str))
    return fingerprint(plain, str(weights), found, code, __version__, version("torch"), version("timm"))
