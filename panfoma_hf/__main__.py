"""``python -m panfoma_hf`` is the command `panfoma`."""

from .cli import app


app(prog_name="panfoma")
