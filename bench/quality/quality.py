"""Quality on SmolLM2-135M-Instruct: `python bench/quality/quality.py CALIBRATION.txt TEST.txt [OTHER.txt ...]`.

Every cell of the study (method, pattern, seed, calibration text) is one run of the product in a process of its own, and
one line of the results file. A cell in the file is not run again, so an interrupted study goes on. By default these are
the cells of every table in the documents; options select others. All of them are evaluated on the language reference of
this Python, too; --study and --settings, which compare settings, do not look at it.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import quality_baselines
import texts
from checkpoint_smollm2 import build_checkpoint
from dense_layers import dense_layers
from quality_cells import NSAMPLES, OWN, PATTERNS, REFERENCE, SEED, SEQLEN, Cell, cells_of_everything, named, select
from quality_curves import measure_curves
from quality_documents import write_documents
from quality_results import ALL, RESULTS, load, made_by, missing, remaining, save
from quality_run import Study, code_version, folder_of, run_apart, run_cell
from quality_settings import measure_budgets, measure_settings
from quality_settings import table as settings_table
from quality_tables import tables

import sparsefw.run

# Patterns of the pictures in docs/results.md.
PLOTTED = ("0.6", "2:4")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", type=Path, nargs="*", metavar="TEXT.txt", help="text to calibrate on, then held-out texts; without "
        "any nothing is run")  # fmt: skip
    add("--model", type=Path, default=Path("smollm2"), help="checkpoint, made if it is not there")
    add("--results", type=Path, default=RESULTS, help=f"cells in it are not run again (default: {RESULTS.name} in "
        "bench/results)")  # fmt: skip
    add("--work", type=Path, metavar="DIR", help="keep unfinished cells there: the same command goes on with them, if "
        "the code is the same")  # fmt: skip
    add("--table", action="store_true", help="run nothing, print what is in the results")
    add("--plan", action="store_true", help="run nothing, print how many cells are missing and how long they take")
    add("--again", default="", metavar="COMMIT", help=f"run the selected cells that this commit has made again, "
        f"'{ALL}': those of every commit but the present one")  # fmt: skip
    add("--documents", action="store_true", help="write the tables of README.md and docs/results.md")
    add("--plots", type=Path, metavar="DIR", help="draw the results there (needs matplotlib)")
    add("--study", action="store_true", help="the settings instead of the methods")
    add("--only", default="", metavar="TEXT", help="the method of this name, else methods whose name contains it")
    add("--patterns", type=lambda text: text.split(","), metavar="P,P", help="the methods at these, with one seed")
    add("--reference", action="store_true", help="only what is calibrated on the language reference")
    for name, default in (("seeds", SEED), ("nsamples", NSAMPLES)):
        add(f"--{name}", type=_numbers, metavar="N,N", help=f"the methods with these, in place of {default}")
    add("--curves", type=_numbers, default="8", metavar="N,N", help="blocks whose errors by step are measured, '' for "
        "none (default: 8)")  # fmt: skip
    add("--settings", type=_numbers, default="", metavar="N,N", help="blocks on whose layers settings are compared by "
        "their error on held-out text (default: none)")  # fmt: skip
    add("--seqlen", type=int, default=SEQLEN)
    add("--eval-windows", type=int, default=20)
    arguments = parser.parse_args(argv)
    if arguments.reference and (arguments.study or arguments.patterns or arguments.seeds or arguments.nsamples):
        parser.error("--reference goes with --only alone")
    arguments.table |= arguments.documents and not arguments.texts
    if not (arguments.table or arguments.plan) and len(arguments.texts) < 2:
        parser.error("a text to calibrate on and a held-out text are needed")
    names = [*(path.name for path in arguments.texts), texts.CALIBRATION, texts.TEST]
    if len(set(names)) < len(names):
        parser.error("two texts have the same file name, by which the results tell them apart")
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """The selected cells."""
    if arguments.reference or not (arguments.study or arguments.patterns or arguments.seeds or arguments.nsamples):
        cells = [c for c in cells_of_everything() if c.calibrated_on == REFERENCE or not arguments.reference]
        chosen = named(arguments.only, [cell.method for cell in cells])
        return [cell for cell in cells if cell.method in chosen]
    return select(
        settings=arguments.study,
        only=arguments.only,
        wanted=arguments.patterns,
        seeds=arguments.seeds or [SEED],
        nsamples=arguments.nsamples or [NSAMPLES],
    )


def _to_run(arguments: argparse.Namespace, results: dict, cells: list[Cell]) -> list[Cell]:
    """The cells that are missing, and those that --again names."""
    # A plan needs no texts: it takes those of the results.
    names = [path.name for path in arguments.texts[1:]] or list(_held_out(results))
    again = made_by(results, cells, arguments.again, code_version()) if arguments.again else []
    chosen = {*missing(results, cells, names), *again}
    return [cell for cell in cells if cell in chosen]


def _held_out(results: dict) -> list[str]:
    """Names of the texts that settings may be compared on."""
    return [name for text in results["study"].get("held_out", []) for name in text]


def _run(arguments: argparse.Namespace, results: dict, cells: list[Cell], reference: texts.Reference,
         launch: Callable[[list[str]], int]) -> None:  # fmt: skip
    """Run what is missing, and save the results after every part."""
    calibration, *held_out = arguments.texts
    study = Study(arguments.model, calibration, held_out, reference, arguments.seqlen, arguments.eval_windows,
                  arguments.work)  # fmt: skip
    try:
        study.check(results["study"])
    except ValueError as error:
        sys.exit(f"{arguments.results}: {error}; give another file with --results")
    results["study"] = study.header()
    if not study.model.exists():
        build_checkpoint(study.model)
    for cell in _to_run(arguments, results, cells):
        with folder_of(cell, study) as folder:
            results["cells"][cell.key] = run_cell(cell, study, folder, launch)
            save(arguments.results, results)
        print(f"{cell.key}: {results['cells'][cell.key]['perplexity']}", file=sys.stderr, flush=True)
    options = {"nsamples": (arguments.nsamples or [NSAMPLES])[0], "seqlen": study.seqlen}
    for block in (b for b in arguments.curves if str(b) not in results["curves"]):
        results["curves"][str(block)] = measure_curves(study.model, calibration, block, **options)
        save(arguments.results, results)
    by_blocks = ",".join(map(str, arguments.settings))
    if by_blocks and by_blocks not in results["settings"]:
        options |= {"limit": study.eval_windows}
        layers = list(dense_layers(study.model, calibration, held_out, arguments.settings, **options))
        results["settings"][by_blocks] = measure_settings(layers, PATTERNS)
        results["budgets"][by_blocks] = measure_budgets(layers)
        save(arguments.results, results)


def main(argv: list[str] | None = None, launch: Callable[[list[str]], int] = run_apart) -> None:
    """Run what is missing, print the tables, write those of the documents, draw the plots."""
    quality_baselines.register()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--cell"]:
        sys.exit(sparsefw.run.main(argv[1:]))
    arguments = _parse(argv)
    cells, results = _cells(arguments), load(arguments.results)
    if arguments.plan:
        print(remaining(results, _to_run(arguments, results, cells), len(cells)))
        return
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            # A run goes on with the texts that it began with, and knows them by their paths.
            _run(arguments, results, cells, texts.write_reference(arguments.work or Path(folder)), launch)
    print(tables(results, cells))
    for section in ("settings", "budgets"):
        for blocks, measured in results[section].items():
            print(f"\n{section.capitalize()}, blocks {blocks}\n\n{settings_table(measured, _held_out(results))}")
    if arguments.documents:
        try:
            nowhere = write_documents(results)
        except ValueError as error:
            sys.exit(f"--documents: {error}")
        for name in nowhere:
            print(f"table {name}: in no document", file=sys.stderr)
    if arguments.plots:
        # Imported only here: nothing else needs matplotlib.
        from quality_plots import plot

        plotted = [c for c in cells if c.pattern in (arguments.patterns or PLOTTED) and c.calibrated_on == OWN]
        plot(results, plotted, arguments.plots)


if __name__ == "__main__":
    main()
