"""The command `panfoma`: thin verbs over the package `panfoma_hf`.

It is a package of its own because Python imports ``panfoma_hf``, and with it PyTorch and Transformers, before any
module inside of it: help and mistyped options would take seconds.
"""

from .app import app, main


__all__ = ["app", "main"]
