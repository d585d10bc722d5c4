"""The licence that a model card names."""

from __future__ import annotations

import yaml

UNKNOWN = "not stated beside the weights; find it out before you publish"


def licence_of(card: str | None) -> str:
    """What the YAML head of a model card says, or that it says nothing."""
    if card is None or not card.startswith("---"):
        return UNKNOWN
    try:
        head = yaml.safe_load(card.split("---")[1])
    except yaml.YAMLError:
        return UNKNOWN
    named = [head.get(key) for key in ("license_name", "license")] if isinstance(head, dict) else []
    return next((str(name) for name in named if name), UNKNOWN)
