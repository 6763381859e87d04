"""How large a file may claim to be: one check for every reader, made before memory is taken."""

from pathlib import Path

from fleetflow.types import FleetflowError

PIXEL_LIMIT = 2**28  # pixels in one picture or flow field; a flow field of this size takes 2 GiB
DEFLATE = 1032  # DEFLATE packs at most 1032 bytes into one (zlib.net/zlib_tech.html)
UNBOUNDED = 2**62  # codings that can store a plain picture in a few bytes
FREE = 2**28  # bytes that any file may unpack to if its coding allows it
PACKED = 100  # beyond that: bytes that one byte of the file may stand for; real pictures and flows stay under 20


def check_size(path: Path | str, height: int, width: int, needed: int = 0, present: int = 0, packing: int = 1) -> None:
    """Refuses a size that is not allowed, or that the file cannot hold.

    Args:
        path: the file, or what else it is, for the message.
        height: pixels, as the header claims.
        width: pixels, as the header claims.
        needed: bytes that so many pixels take when unpacked.
        present: bytes of the file that hold them.
        packing: bytes that one byte of the file stands for at most, in the coding of the file.

    Raises:
        FleetflowError: not at least 1x1 and at most 2^28 pixels; `needed` cannot come from `present`; or the file is
            packed as only a trap is: over 256 MiB, and over 100 bytes in one.
    """
    if height < 1 or width < 1 or height * width > PIXEL_LIMIT:
        raise FleetflowError(f"{path} claims {height}x{width} pixels; expected at least 1x1 and at most 2^28 pixels")
    if needed > present * packing:
        raise FleetflowError(f"{path} claims {height}x{width} pixels but is too short for them; get a complete copy")
    check_unpacked(path, needed, present)


def check_unpacked(path: Path | str, needed: int, present: int) -> None:
    """Refuses what `check_size` calls a trap, where there are no pixels to count; arguments as there."""
    if needed > FREE and needed > present * PACKED:
        raise FleetflowError(
            f"{path} would unpack {present} bytes to {needed / 2**20:.0f} MiB; expected at most "
            f"{FREE // 2**20} MiB, or {PACKED} bytes from one; store it less packed if it is what you want"
        )
