"""What a verification finds, for people and for programs."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from timstore.errors import CorruptionError, FormatError, NotFoundError, StorageError
from timstore.format import paths
from timstore.format.log import Commit, Moment

DAMAGE = "damage"
LEFTOVER = "leftover"

KINDS = {
    "missing": "a file that a record, a compaction or the layout of a store names is not there",
    "altered": "a data object whose size or crc32 is not that of its record",
    "torn": "a record whose check line does not match",
    "gap": "a number that is missing in a writer's sequence",
    "chain": "a record that does not follow the one before it",
    "foreign": "a record of another store",
    "misplaced": "a record that belongs under another name",
    "malformed": "a file with the right checksum that does not say what it should",
    "count": "a row file that holds more or fewer rows than its record says",
    "newer": "a file that needs a newer timstore",
    "not-a-file": "a symbolic link, a folder or something else where a file belongs",
    "unreadable": "a file that the system does not let be read",
    "lost-tail": "the newest record of a writer, torn, in a store made with durability='os': readers leave it out",
    "unreferenced": "data that no record names: of a commit on its way, or of one that was given up",
    "superseded": "what a compaction covers and a compaction that was cut short did not delete",
    "temporary": "a file in the making, or what is left of one",
    "unexpected": "a file that has no place in a store",
}

# Findings printed of one severity; `findings` holds all of them.
_PRINTED = 50
_COLUMNS = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect of a store.

    Attributes:
        kind: a key of `KINDS`.
        severity: `damage`: something that is or may be read is lost or wrong. `leftover`: nothing that is read is
            concerned; a sound store may have some, and has them for moments while somebody writes.
        path: of the file (or the folder, if all of it is concerned), relative to the store.
        writer, seq: the commit that is concerned, where it is one.
        steps: first and last (epoch, step) concerned; None when the metadata does not tell or there are none.
        samples: ids of the samples whose records are concerned, sorted, as far as the metadata tells.
    """

    kind: str
    path: str
    message: str
    severity: str = DAMAGE
    writer: str | None = None
    seq: int | None = None
    steps: tuple[Moment, Moment] | None = None
    samples: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, error: Exception, path: str, commit: Commit | None = None, *, severity: str = DAMAGE, **fields: Any
    ) -> Self:
        """Return what a reader said of a file.

        Args:
            path: of the file, where the error names none.
            commit: whose file it is, where it is one's.
        """
        path = str(getattr(error, "fields", {}).get("path", path))
        if commit is not None:
            fields = {"writer": commit.writer, "seq": commit.seq, "steps": commit.steps, **fields}
        elif named := paths.parse_record_path(path):
            fields = {"writer": named[0], "seq": named[1], **fields}
        return cls(_kind(error, path), path, str(error), severity, **fields)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        # A name in the store's folder may hold anything, line ends and broken characters too.
        yield f"{self.kind:<12} {self.path if self.path.isprintable() else ascii(self.path)}"
        where = [] if self.seq is None else [f"commit {self.seq} of writer {self.writer}"]
        if self.steps is not None:
            where.append(f"steps {self.steps[0]} to {self.steps[1]}")
        if self.samples:
            ids = ", ".join(map(str, self.samples[:12])) + (", ..." if len(self.samples) > 12 else "")
            where.append(f"{len(self.samples)} {'sample' if len(self.samples) == 1 else 'samples'} ({ids})")
        for text in (self.message, "; ".join(where)):
            yield from textwrap.wrap(
                text, _COLUMNS - 4, initial_indent=" " * 13, subsequent_indent=" " * 13, break_on_hyphens=False
            )


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked in a store, and what was found.

    Attributes:
        path: of the store.
        commits, records: in the log and under the compaction, superseded attempts included.
        objects, bytes: data objects read whole, and their size.
        findings: damage first, each severity by path.
    """

    path: str
    commits: int
    records: int
    objects: int
    bytes: int
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def damage(self) -> tuple[Finding, ...]:
        """What is lost or wrong."""
        return tuple(finding for finding in self.findings if finding.severity == DAMAGE)

    @property
    def leftovers(self) -> tuple[Finding, ...]:
        """What lies there and is not read."""
        return tuple(finding for finding in self.findings if finding.severity == LEFTOVER)

    @property
    def sound(self) -> bool:
        """Whether there is no damage; leftovers do none."""
        return not self.damage

    def to_dict(self) -> dict[str, Any]:
        """Return every field, and `sound`, as plain numbers, strings, lists and dicts, ready for JSON."""
        plain = {**asdict(self), "sound": self.sound}
        plain["findings"] = [
            {**asdict(finding), "samples": list(finding.samples), "steps": finding.steps and list(finding.steps)}
            for finding in self.findings
        ]
        return plain

    def __str__(self) -> str:
        lines = [
            f"{'sound' if self.sound else 'DAMAGED'}: {self.path}",
            f"  checked {self.commits:,} commits, {self.records:,} records, {self.objects:,} objects, "
            f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.2f} s",
        ]
        for severity, findings in (("damage", self.damage), ("leftovers", self.leftovers)):
            lines.append(f"  {severity}: {len(findings) or 'none'}")
            lines += [f"    {line}" for finding in findings[:_PRINTED] for line in str(finding).splitlines()]
            if len(findings) > _PRINTED:
                lines.append(f"    and {len(findings) - _PRINTED:,} more in `findings`")
        return "\n".join(lines)


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings as a report lists them, each once."""
    return tuple(sorted(set(findings), key=lambda one: (one.severity != DAMAGE, one.path, one.kind, one.message)))


def _kind(error: Exception, path: str) -> str:
    if isinstance(error, NotFoundError):
        return "missing"
    if isinstance(error, StorageError):
        return "unreadable"
    if isinstance(error, FormatError) and not isinstance(error, CorruptionError):
        return "newer"
    kind = getattr(error, "kind", "")
    if kind == "missing" and paths.parse_record_path(path):
        return "gap"
    return kind if kind in KINDS else "malformed"
