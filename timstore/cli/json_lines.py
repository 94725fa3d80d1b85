"""Files of one JSON object per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timstore.errors import InvalidInputError


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line's object; empty lines are nothing.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidInputError: a line, named, holds something else.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            # Bytes that are no UTF-8 are a ValueError too.
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(f"{path}, line {number}: no JSON: {error}", path=str(path)) from error
            if not isinstance(row, dict):
                raise InvalidInputError(f"{path}, line {number}: a line holds one object", path=str(path))
            yield row
