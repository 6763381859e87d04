"""Names of files that a library can open; nothing but Python is needed for it."""

import os

from fleetflow.types import FleetflowError


def check_utf8(path: str | os.PathLike, library: str) -> None:
    """Raises FleetflowError for a name that is not UTF-8, which some libraries cannot open."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise FleetflowError(f"{path} is no name in UTF-8, as {library} needs it; rename the file or folder") from None
