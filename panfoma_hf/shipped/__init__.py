"""Checkpoints that come with the package, so that nothing has to be downloaded."""

from pathlib import Path


NAMES = ("small",)


def checkpoint(name: str = "small") -> Path:
    """Folder of a checkpoint that comes with the package, for any ``from_pretrained``.

    Parameters
    ----------
    name
        "small": 128 hidden units, pretrained as docs/pretraining.md says.

    Raises
    ------
    ValueError
        If no such checkpoint comes with the package.
    """
    if name not in NAMES:
        raise ValueError(
            f"A checkpoint that comes with the package is one of {', '.join(NAMES)}, got {name!r}. Use one of these, "
            "or load another by its folder or its name on the Hub."
        )
    return Path(__file__).parent / name
