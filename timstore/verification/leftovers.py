"""What lies in a store and is named by nothing."""

from collections.abc import Iterator, Sequence

from timstore.format import paths
from timstore.verification.findings import DAMAGE, LEFTOVER, Finding
from timstore.verification.inventory import Entry, Inventory
from timstore.verification.picture import Picture

_PLACES = {paths.SETTINGS, *(folder.rstrip("/") for folder in (paths.RUNS, paths.LOG, paths.DATA))}
_PLACES.add(paths.COMPACTIONS.rstrip("/"))


def data_folders(inventory: Inventory) -> list[Entry]:
    """Return what lies in `data/` and in the writers' folders there."""
    found = []
    for entry in inventory.entries(paths.DATA.rstrip("/")):
        writer = entry.sort == "folder" and not entry.hidden and paths.parse_fold_prefix(entry.path) is None
        found += inventory.entries(entry.path) if writer and _is_writer(entry.path) else [entry]
    return found


def leftovers(inventory: Inventory, picture: Picture, folders: Sequence[Entry]) -> Iterator[Finding]:
    """Yield a finding for everything in the root and in `data/` that is named by nothing.

    Args:
        folders: as `data_folders` returned them before the records of `picture` were read, so that a commit that was
            made in between does not look like a leftover.
    """
    yield from _at_root(inventory)
    named = {"/".join(commit.objects[0].path.split("/")[:3]) for commit in picture.commits if len(commit.objects)}
    if picture.checkpoint is not None:
        named |= {info.path.rpartition("/")[0] for info in picture.checkpoint.files}
    for entry in folders:
        if entry.hidden:
            yield Finding("temporary", entry.path, "readers ignore it", LEFTOVER)
        elif entry.path in named and entry.sort == "folder":
            continue
        elif entry.sort not in ("file", "folder"):
            # In the place of a commit's folder it is damage, and found with the commit's objects.
            yield Finding("not-a-file", entry.path, f"it is {entry.sort}; no record names it", LEFTOVER)
        elif paths.parse_fold_prefix(entry.path) is not None:
            yield from _fold(inventory, picture, entry)
        elif paths.parse_data_path(f"{entry.path}/any.parquet") is not None:
            yield from _commit(inventory, picture, entry)
        else:
            yield Finding("unexpected", entry.path, "it is no folder of a commit or a checkpoint", LEFTOVER)


def _at_root(inventory: Inventory) -> Iterator[Finding]:
    for entry in inventory.entries():
        if entry.path == paths.DATA.rstrip("/") and entry.sort != "folder":
            yield Finding("not-a-file", entry.path, f"it is {entry.sort}, not a folder: readers follow none", DAMAGE)
        elif entry.path not in _PLACES:
            kind = "temporary" if entry.hidden else "unexpected"
            yield Finding(kind, entry.path, "it is none of a store's files", LEFTOVER)


def _fold(inventory: Inventory, picture: Picture, entry: Entry) -> Iterator[Finding]:
    files, size = inventory.size_below(entry.path)
    number = paths.parse_fold_prefix(entry.path) or 0
    newest = picture.checkpoint.number if picture.checkpoint else 0
    if not files or picture.lost is not None:  # may be what the lost checkpoint named, which is a finding
        return
    what = f"{files} row files, {size:,} bytes, "
    if number > newest:
        yield Finding("unreferenced", entry.path, what + "of a roll-up on its way or given up", LEFTOVER)
    else:
        yield Finding(
            "superseded", entry.path, what + "that no checkpoint names; the next roll-up deletes it", LEFTOVER
        )


def _commit(inventory: Inventory, picture: Picture, entry: Entry) -> Iterator[Finding]:
    files, size = inventory.size_below(entry.path)
    _, writer, name = entry.path.split("/")
    seq = int(name[:12])
    chain = picture.chains.get(writer)
    newest = picture.checkpoint.newest.get(writer) if picture.checkpoint else None
    if not files:
        return
    if picture.covered is None and newest is not None and seq <= newest.seq:
        return  # of a commit that the checkpoint covers, perhaps: its files are a finding
    if picture.lost is not None and (chain is None or chain.first is None or seq <= chain.first):
        return
    why = "no record names it"
    if chain is not None and chain.is_broken(seq):
        why = f"perhaps what the damaged record {paths.record_path(writer, seq)} names: keep it"
    elif chain is None or (seq >= chain.next and not chain.ended):
        why = "no record names it (yet): of a commit on its way, or of one that was given up"
    yield Finding("unreferenced", entry.path, f"{files} files, {size:,} bytes: {why}", LEFTOVER, writer, seq)


def _is_writer(path: str) -> bool:
    return paths.parse_data_path(f"{path}/{0:012d}-{0:08x}/any.parquet") is not None
