"""Show a progress bar of measured rows, with the time left."""

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class _Terminal:
    """pytest's terminal as a file, which prints although pytest captures output."""

    def __init__(self, writer):
        self._writer = writer

    def write(self, text: str) -> None:
        self._writer.write(text, flush=True)

    def flush(self) -> None:
        self._writer.flush()


class Silent:
    """No progress bar."""

    def row(self, name: str) -> None:
        """Advance by one measured row."""


class Bar(Silent):
    """A bar in place of a dot for each test; ``rows`` are those selected, once they are."""

    def __init__(self, rows, writer):
        self._rows = rows
        console = Console(file=_Terminal(writer), force_terminal=True)
        columns = (
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None)

    def pytest_collection_finish(self, session):
        self._progress.update(self._task, total=len(self._rows))
        self._progress.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        if report.passed or report.skipped:
            return report.outcome, "", ""

    def row(self, name: str) -> None:
        self._progress.update(self._task, advance=1, description=name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        self._progress.stop()
