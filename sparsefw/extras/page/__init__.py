"""What people read of a report: report.html and README.md, the model card."""

from collections.abc import Callable
from pathlib import Path

from sparsefw.checkpoint.files import durably
from sparsefw.extras.page.card import write_card
from sparsefw.extras.page.html import page
from sparsefw.report.content import Report


def write_pages(report: Report, output: Path, source: Path | None, say: Callable[[str], None], folder: Path) -> None:
    """Write the page and the model card into a folder that has all other files of a model.

    Args:
        report: report of the run that has pruned the model.
        output: where the folder will be.
        source: folder of the model that was pruned or packed, or of its small files; None: there is none.
        say: called with a line for the log if a card that was edited is kept.
        folder: the folder.
    """
    durably(folder / "report.html", page(report))
    write_card(report, output, source, say, folder)
