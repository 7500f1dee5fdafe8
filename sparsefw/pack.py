"""Pack a pruned checkpoint, so that its zeros take no space: `python -m sparsefw.pack PRUNED PACKED`.

Each pruned matrix is stored as its kept weights and one bit for each weight: at 60 % in bf16, 0.46 of its bytes. Other
tensors are copied. After `import sparsefw.packed` transformers loads the folder. `python -m sparsefw.unpack` restores
the same bits. After an interruption the same command resumes.
"""

import sys

from sparsefw.cli import Parser, folder, launched, load_libraries, refuse_ranks, say


def packer(command: str, description: str | None, argv: list[str] | None) -> int:
    """Pack or unpack a folder, as `command` says, and print the sizes; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = Parser(command, description)
        parser.add_argument(
            "source", type=folder, metavar="PRUNED" if command == "pack" else "PACKED", help="input folder"
        )
        parser.add_argument("output", type=folder, metavar="OUTPUT", help="folder for the result")
        parser.add_argument("--overwrite", action="store_true", help="replace an older checkpoint in OUTPUT")
        parser.add_argument("--restart", action="store_true", help="discard what an interrupted command has finished")
        arguments = parser.parse_args(argv)
        refuse_ranks(command)
        load_libraries()
        from sparsefw.extras.packed import folders

        convert = folders.pack_folder if command == "pack" else folders.unpack_folder
        before, after = convert(
            arguments.source, arguments.output, overwrite=arguments.overwrite, restart=arguments.restart
        )
        say(f"{arguments.output}: {after / 1e9:.3f} GB of tensors, {after / before:.3f} of {arguments.source}")
    return outcome.status


def main(argv: list[str] | None = None) -> int:
    """Pack from the command line; returns the exit status, see `Outcome`."""
    return packer("pack", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
