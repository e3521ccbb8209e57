"""``python -m panfoma_hf`` is the command `panfoma`."""

from panfoma_cli import main


main()
