"""Pack the results of all steps of ``gpu.py`` into one file, and open it again."""

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

NAME = "gpu.zip"


def plain(name: str) -> bool:
    """Return True if a member's path stays inside the folder it is unpacked to."""
    return bool(name) and not {"", ".", ".."} & {*name.split("/")} and not {*"\\:\0"} & {*name}


def members(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of the files in an archive.

    Raises:
        ValueError: A member would be written outside the folder.
    """
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    for name in names:
        if not plain(name):
            raise ValueError(f"{archive.filename}: a member named {name!r}")
    return names


def archive_folder(folder: Path, archive: Path) -> None:
    """Write the files in ``folder`` to an archive, in one step: an old one stays until the end."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    draft = archive.with_suffix(".draft")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as made:
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # A running step may rename its own files.
                if path.is_file() and path.suffix not in (".draft", archive.suffix):
                    made.write(path, path.name)
    draft.replace(archive)


@contextlib.contextmanager
def opened(given: Path) -> Iterator[Path]:
    """Yield a folder with the files of ``given``: an archive, its folder, or a folder of files.

    Raises:
        ValueError: ``given`` is none of these.
    """
    if (given / NAME).is_file():
        given = given / NAME
    if given.is_dir():
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(given) as archive:
                for name in members(archive):
                    archive.extract(name, folder)
        except (OSError, zipfile.BadZipFile) as e:
            raise ValueError(f"{given}: {e}") from e
        yield Path(folder)
