"""One writer's records in order, however many of them are damaged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from timstore.errors import CorruptionError
from timstore.format import paths
from timstore.format.log import Commit, parse_record
from timstore.verification.findings import LEFTOVER, Finding
from timstore.verification.records import RecordReader, Sealed


@dataclass(slots=True)
class Chain:
    """What a writer's log says.

    Attributes:
        commits: of kind commit, those that no checkpoint covers.
        first: number of the first record that is there, None without any.
        next: the number after the last record, readable or not.
        ended: whether nothing may follow: a close or a fence was read.
        broken: numbers of records that are damaged, and ranges (first, last) of those that are missing.
    """

    writer: str
    commits: list[Commit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    first: int | None = None
    next: int = 0
    ended: bool = False
    broken: list[tuple[int, int]] = field(default_factory=list)

    def is_broken(self, seq: int) -> bool:
        """Say whether the record of that number is damaged or missing."""
        return any(first <= seq <= last for first, last in self.broken)


def read_chain(
    reader: RecordReader,
    writer: str,
    sorts: Mapping[int, str],
    newest: Commit | None,
    *,
    checkpoint_lost: bool,
    samples_of: Callable[[str, int], tuple[int, ...]],
) -> Chain:
    """Return what a writer's log says after the newest record that the checkpoint covers.

    Args:
        sorts: number to what lies under the record's name, as in `Entry.sort`.
        newest: of the checkpoint, None where it knows nothing of the writer.
        checkpoint_lost: the records that are missing before the first one are then no gap.
        samples_of: returns the samples in the data of a record that cannot be read.
    """
    covered = -1 if newest is None else newest.seq
    present = sorted(seq for seq in sorts if seq > covered)
    chain = Chain(writer, first=min(sorts, default=None), next=max(covered, *sorts, -1) + 1)
    if newest is not None:
        chain.ended = newest.kind != "commit" and not present
        _check_covered(reader, chain, sorts, newest)
    # What the next record has to name as the one before it: None when that cannot be told.
    before: Commit | None = newest
    expected = newest.digest if newest is not None else None
    known = True
    after = covered + 1
    if checkpoint_lost and present and present[0] > after:
        after, known = present[0], False
    for seq in present:
        if seq > after:
            _gap(chain, after, seq - 1, samples_of)
            known, before = False, None
        after = seq + 1
        last = seq == present[-1]
        found = _record(reader, chain, seq, sorts[seq], last, samples_of)
        if found is None:
            known, before = False, None
            continue
        sealed, commit = found
        path = paths.record_path(writer, seq)
        if known and sealed.fields.get("previous") != expected:
            message = "it does not follow the record before it: one of the two was replaced"
            chain.findings.append(Finding("chain", path, message, writer=writer, seq=seq, steps=commit.steps))
        if before is not None and before.kind != "commit":
            message = f"it comes after the {before.kind} of its writer"
            chain.findings.append(Finding("chain", path, message, writer=writer, seq=seq, steps=commit.steps))
        known, before, expected = True, commit, commit.digest
        chain.ended = commit.kind != "commit"
        if commit.kind == "commit":
            chain.commits.append(commit)
        elif commit.objects:
            message = f"a {commit.kind} that names data"
            chain.findings.append(Finding("malformed", path, message, writer=writer, seq=seq))
    return chain


def _record(
    reader: RecordReader,
    chain: Chain,
    seq: int,
    sort: str,
    last: bool,
    samples_of: Callable[[str, int], tuple[int, ...]],
) -> tuple[Sealed, Commit] | None:
    """Return the record of that number if it is of this place, whatever the one before it was."""
    path = paths.record_path(chain.writer, seq)
    sealed = reader.sealed(path)
    finding: Finding | None
    if isinstance(sealed, Finding):
        finding = sealed
        if finding.kind == "torn" and last and not reader.durable:
            message = "torn, and the newest of its writer: taken as lost in a power failure, and left out by readers"
            finding = replace(finding, kind="lost-tail", severity=LEFTOVER, message=message)
    else:
        finding = reader.foreign(path, sealed)
        named = sealed.fields.get("writer"), sealed.fields.get("seq")
        # A file of another sort has no such fields, and says what it lacks.
        if finding is None and "writer" in sealed.fields and named != (chain.writer, seq):
            finding = Finding("misplaced", path, f"it holds record {named[1]!r:.40} of writer {named[0]!r:.40}")
        if finding is None:
            try:
                fields = {**sealed.fields, "previous": None}
                commit = parse_record(fields, sealed.digest, path, reader.settings_of(sealed), None)
            except CorruptionError as error:
                finding = reader.fault(path, error)
            else:
                return sealed, commit
    chain.broken.append((seq, seq))
    samples = samples_of(chain.writer, seq)
    chain.findings.append(replace(finding, writer=chain.writer, seq=seq, samples=samples))
    return None


def _gap(chain: Chain, first: int, last: int, samples_of: Callable[[str, int], tuple[int, ...]]) -> None:
    chain.broken.append((first, last))
    path = paths.record_path(chain.writer, first)
    which = "this record is" if first == last else f"records {first} to {last} are"
    message = f"{which} missing, and a later record of the writer is there"
    samples = samples_of(chain.writer, first) if first == last else ()
    chain.findings.append(Finding("gap", path, message, writer=chain.writer, seq=first, samples=samples))


def _check_covered(reader: RecordReader, chain: Chain, sorts: Mapping[int, str], newest: Commit) -> None:
    """Look at the records that a checkpoint covers: readers need none of them, and the newest is kept."""
    for seq in sorted(seq for seq in sorts if seq < newest.seq):
        path = paths.record_path(chain.writer, seq)
        message = "a checkpoint covers it; the next roll-up deletes it"
        chain.findings.append(Finding("superseded", path, message, LEFTOVER, chain.writer, seq))
    path = paths.record_path(chain.writer, newest.seq)
    if newest.seq not in sorts:
        if not reader.inventory.sort_of(path):
            message = "the newest record that the checkpoint covers is kept, but is gone. Readers do not need it"
            chain.findings.append(Finding("missing", path, message, LEFTOVER, chain.writer, newest.seq))
        return
    sealed = reader.sealed(path)
    finding = None
    if isinstance(sealed, Finding):
        finding = sealed
    elif sealed.digest != newest.digest:
        finding = reader.foreign(path, sealed) or Finding(
            "misplaced", path, "it is not the record that the checkpoint covers"
        )
    if finding is not None:
        message = f"{finding.message}. A checkpoint covers it: readers do not need it"
        # A link or the like is refused by every listing, wherever it lies.
        severity = finding.severity if finding.kind == "not-a-file" else LEFTOVER
        chain.findings.append(replace(finding, message=message, severity=severity, writer=chain.writer, seq=newest.seq))
