"""Save measured rows in a file at once, so that a run that was stopped can resume."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources() -> str:
    """Return a hash of all sources whose change may change a time."""
    sums = hashlib.sha256()
    for folder in ("llmos_kernels", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            tuned = path.suffix == ".json" and "tuned" in path.parts
            if tuned or path.suffix in (".py", ".cpp", ".h", ".cu"):
                sums.update(path.read_bytes())
    return sums.hexdigest()


class SavedRows:
    """Rows by the name of their tests, in the file ``path`` if it is given.

    Rows of other sources or of another machine do not count.
    """

    def __init__(self, path: str | None, about: dict):
        self._path, self._rows = Path(path) if path else None, {}
        told = json.dumps([sources(), about], sort_keys=True)
        self._stamp = hashlib.sha256(told.encode()).hexdigest()[:16]
        if self._path and self._path.exists():
            for text in self._path.read_text().splitlines():
                # The run was stopped while it wrote this line.
                with contextlib.suppress(ValueError):
                    row = json.loads(text)
                    if row["stamp"] == self._stamp:
                        self._rows[row["test"]] = row

    def get(self, test: str, wanted: Sequence[str]) -> dict | None:
        """Return a row's results if all selected providers were measured beside each other."""
        row = self._rows.get(test)
        if row is None or not set(row["wanted"]).issuperset(wanted):
            return None
        return row["found"]

    def add(self, test: str, wanted: Sequence[str], found: dict) -> None:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            row = {"stamp": self._stamp, "test": test, "wanted": list(wanted), "found": found}
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
