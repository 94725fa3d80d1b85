"""One look at what a store's records say: all of them, as far as they can be read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from timstore.errors import TimstoreError
from timstore.format import paths
from timstore.format.compaction import Compaction, read_commits
from timstore.format.log import Commit
from timstore.format.schemas import FOLDED, read_rows
from timstore.verification.chain import Chain, read_chain
from timstore.verification.findings import LEFTOVER, Finding
from timstore.verification.inventory import Entry
from timstore.verification.records import RecordReader

_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Picture:
    """What the records of a store say.

    Attributes:
        checkpoint: the highest that can be read.
        lost: what is wrong with a higher one; what it covers cannot be told then.
        covered: the commits of the checkpoint; None if its row files do not tell.
        fresh: the others, of all writers.
        chains: by writer.
        findings: what is wrong with records, attempts and checkpoints.
    """

    checkpoint: Compaction | None
    lost: Finding | None
    covered: tuple[Commit, ...] | None
    fresh: tuple[Commit, ...]
    chains: Mapping[str, Chain]
    findings: tuple[Finding, ...]

    @property
    def commits(self) -> tuple[Commit, ...]:
        """All commits that are known."""
        return (self.covered or ()) + self.fresh

    def maybe_covered(self, commit: Commit) -> bool:
        """Say whether a checkpoint that cannot be read may have taken over the row files of a commit."""
        return self.lost is not None and self.chains[commit.writer].first == commit.seq


def look(reader: RecordReader) -> Picture:
    """Return what the records say now. A listing is not atomic: what seems to be missing is looked for again."""
    for _ in range(_LOOKS - 1):
        picture = _look(reader)
        if not any(finding.kind in ("missing", "gap") for finding in picture.findings):
            return picture
    return _look(reader)


def _look(reader: RecordReader) -> Picture:
    findings: list[Finding] = []
    # The log first, for the reasons of `view.read_view`.
    sorts = _log(reader, findings)
    checkpoint, lost = _checkpoint(reader, findings)
    newest = checkpoint.newest if checkpoint else {}
    if lost is None:
        lost = _vanished(reader, checkpoint, sorts)
    if lost is not None:
        findings.append(lost)
    chains = {
        writer: read_chain(
            reader,
            writer,
            sorts.get(writer, {}),
            newest.get(writer),
            checkpoint_lost=lost is not None,
            samples_of=lambda writer, seq: samples_in(reader, f"{paths.DATA}{writer}", f"{seq:012d}-"),
        )
        for writer in sorted({*sorts, *newest})
    }
    findings += [finding for chain in chains.values() for finding in chain.findings]
    covered: tuple[Commit, ...] | None = ()
    if checkpoint is not None:
        try:
            covered = read_commits(reader.objects, checkpoint)[0]
        except Exception:  # which of its files it is, and why, is found when they are checked
            covered = None
    fresh = tuple(commit for chain in chains.values() for commit in chain.commits)
    findings += _attempts(reader, [*(covered or ()), *fresh])
    return Picture(checkpoint, lost, covered, fresh, chains, tuple(findings))


def _log(reader: RecordReader, findings: list[Finding]) -> dict[str, dict[int, str]]:
    """Return what lies under the name of every record, by writer and number."""
    sorts: dict[str, dict[int, str]] = {}
    for folder in _plain(reader, [paths.LOG.rstrip("/")], findings):
        for entry in reader.inventory.entries(folder):
            for path in _plain(reader, [entry.path], findings):
                for record in reader.inventory.entries(path):
                    name = paths.parse_record_path(record.path)
                    if name is None:
                        findings += strays([record])
                    else:
                        sorts.setdefault(name[0], {})[name[1]] = record.sort
                        if record.sort == "folder":
                            findings += strays(reader.inventory.below(record.path))
    return sorts


def _plain(reader: RecordReader, paths: Iterable[str], findings: list[Finding]) -> list[str]:
    """Return those of the paths that are folders; what else is there is a finding."""
    folders = []
    for path in paths:
        sort = reader.inventory.sort_of(path)
        if sort == "folder" and not path.rpartition("/")[2].startswith("."):
            folders.append(path)
        elif sort is not None:
            findings += strays([Entry(path, sort)])
    return folders


def strays(entries: Iterable[Entry]) -> list[Finding]:
    """Return findings for what has no place in the log, under `runs/` or `ckpt/`: readers refuse links there."""
    findings = []
    for entry in entries:
        if entry.hidden:
            findings.append(Finding("temporary", entry.path, "readers ignore it", LEFTOVER))
        elif entry.sort == "a symbolic link":
            findings.append(Finding("not-a-file", entry.path, "it is a symbolic link: readers follow none"))
        else:
            findings.append(Finding("unexpected", entry.path, "readers ignore it", LEFTOVER))
    return findings


def _checkpoint(reader: RecordReader, findings: list[Finding]) -> tuple[Compaction | None, Finding | None]:
    """Return the highest checkpoint that can be read, and what is wrong with a higher one."""
    numbers: dict[int, str] = {}
    for folder in _plain(reader, [paths.COMPACTIONS.rstrip("/")], findings):
        for entry in reader.inventory.entries(folder):
            number = paths.parse_compaction_path(entry.path)
            if number is not None:
                numbers[number] = entry.path
            elif entry.hidden or entry.sort != "file":
                findings += strays([entry])
            else:
                message = "readers take it as the work of a newer timstore, and refuse the store"
                findings.append(Finding("newer", entry.path, message))
    lost: Finding | None = None
    for number in sorted(numbers, reverse=True):
        found = reader.checkpoint(numbers[number])
        if isinstance(found, Compaction):
            for older in (one for one in numbers if one < number):
                message = f"checkpoint {number} took its place; the next roll-up deletes it"
                findings.append(Finding("superseded", numbers[older], message, LEFTOVER))
            return found, lost
        if lost is None:
            folder = f"m-{number:012d}-"
            lost = replace(found, samples=samples_in(reader, paths.DATA.rstrip("/"), folder))
        else:
            findings.append(replace(found, severity=LEFTOVER))
    return None, lost


def _vanished(
    reader: RecordReader, checkpoint: Compaction | None, sorts: Mapping[str, Mapping[int, str]]
) -> Finding | None:
    """Return the finding if a checkpoint is gone without which other things that are gone cannot be explained."""
    number = checkpoint.number if checkpoint else 0
    folders = [entry.path for entry in reader.inventory.entries(paths.DATA.rstrip("/"))]
    written = max((paths.parse_fold_prefix(folder) or 0 for folder in folders), default=0)
    if written <= number:
        return None
    newest = checkpoint.newest if checkpoint else {}
    for writer, seqs in sorted(sorts.items()):
        covered = newest[writer].seq if writer in newest else -1
        present = [seq for seq in seqs if seq > covered]
        if present and (min(present) > covered + 1 or _lacks_rows(reader, writer, min(present))):
            path = paths.compaction_path(written)
            message = "its row files are there, and what it covers is gone from the log"
            samples = samples_in(reader, paths.DATA.rstrip("/"), f"m-{written:012d}-")
            return Finding("missing", path, message, samples=samples)
    return None


def _lacks_rows(reader: RecordReader, writer: str, seq: int) -> bool:
    """Say whether a record names row files that are not there, all of them."""
    found = reader.sealed(paths.record_path(writer, seq))
    named = [] if isinstance(found, Finding) else found.fields.get("objects", [])
    try:
        rows = [one["path"] for one in named if one["kind"] in FOLDED]
    except (TypeError, KeyError):
        return False
    return bool(rows) and all(reader.inventory.sort_of(str(path)) is None for path in rows)


def _attempts(reader: RecordReader, commits: Sequence[Commit]) -> list[Finding]:
    findings: list[Finding] = []
    numbers: set[int] = set()
    for folder in _plain(reader, [paths.RUNS.rstrip("/")], findings):
        for entry in reader.inventory.entries(folder):
            number = paths.parse_attempt_path(entry.path)
            if number is None:
                findings += strays([entry])
                continue
            numbers.add(number)
            found = reader.attempt(entry.path)
            if isinstance(found, Finding):
                findings.append(found)
    named = {commit.attempt: commit for commit in reversed(commits)}
    for number in sorted(named.keys() - numbers):
        findings.append(Finding("missing", paths.attempt_path(number), f"{named[number]} names it"))
    after = 0
    for number in sorted({*numbers, *named}):
        if number > after:
            which = "it is" if number == after + 1 else f"attempts {after} to {number - 1} are"
            message = f"{which} missing, and a later attempt exists"
            findings.append(Finding("missing", paths.attempt_path(after), message))
        after = number + 1
    return findings


def samples_in(reader: RecordReader, folder: str, prefix: str) -> tuple[int, ...]:
    """Return the samples in row files that nothing vouches for, below folders whose name begins with a prefix."""
    samples: set[int] = set()
    for entry in reader.inventory.entries(folder):
        if entry.name.startswith(prefix):
            for file in reader.inventory.below(entry.path):
                if file.name.startswith("records") and file.sort == "file":
                    try:
                        rows = read_rows(reader.objects.read(file.path), file.path, ["sample"])
                        samples.update(rows["sample"].to_pylist())
                    except TimstoreError:
                        continue
    return tuple(sorted(sample for sample in samples if sample is not None))
