"""The tiles that `--tiles` asks for."""

from helpers.checked_launches import own_tiles, tiles_of_a_gpu  # noqa: F401
