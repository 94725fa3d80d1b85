"""What may happen to a file of a store, and what a reader gets out of it then."""

from stores import everything

import timstore


def seen(path):
    """Return all that a reader of this store can get out of it."""
    with timstore.open(path, "r") as store:
        return everything(store)


def bit_flip(draw, path, _):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncation(draw, path, _):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def extension(draw, path, _):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def deletion(_draw, path, _files):
    path.unlink()


def swap(draw, path, files):
    """Exchange two files, of equal size where there is another one."""
    size = path.stat().st_size
    others = [other for other in files if other != path]
    equal = [other for other in others if other.stat().st_size == size and other.read_bytes() != path.read_bytes()]
    other = draw.choice(equal or others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)
