"""Checkpoint folders, their cards, and the way to the Hub and back."""

from .card import Facts, Score, model_card, released_card
from .folder import CARD, CHECKPOINT_FILES, HUB_NAME, HubError, check_replaceable, checkpoint_files, written_whole
from .remote import pull, push_to_hub


__all__ = [
    "CARD",
    "CHECKPOINT_FILES",
    "HUB_NAME",
    "Facts",
    "HubError",
    "Score",
    "check_replaceable",
    "checkpoint_files",
    "model_card",
    "pull",
    "push_to_hub",
    "released_card",
    "written_whole",
]
