"""Write report.html, and README.md, the model card, from a report."""

from pathlib import Path

from sparsefw.checkpoint.files import durably
from sparsefw.errors import Say
from sparsefw.extras.page.card import write_card
from sparsefw.extras.page.html import page
from sparsefw.report.content import Report


def write_pages(report: Report, output: Path, source: Path | None, say: Say, folder: Path) -> None:
    """Write the page and the model card into a folder with all other files of a model.

    Args:
        report: report of the run that pruned the model.
        output: path to which the folder will be renamed.
        source: folder of the model that was pruned or packed, or of its small files; None: no such folder.
        say: called with a line for the log if an edited card is kept.
        folder: the folder to write to.
    """
    durably(folder / "report.html", page(report))
    write_card(report, output, source, say, folder)
