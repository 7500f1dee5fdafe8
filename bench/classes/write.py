"""Write the tiny checkpoint of one class, to look into it: `python -m classes.write NAME FOLDER`, from bench/."""

import sys
from pathlib import Path

from classes.examine import arguments_of, write_source
from classes.tiny_model import cases


def main(name: str, folder: str) -> None:
    """Write a checkpoint and two texts, and print the command that prunes it."""
    case = next(case for case in cases() if name in (case.model_type, case.class_name, case.key))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_source(case, path)
    print("python -m sparsefw.run", *arguments_of(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
