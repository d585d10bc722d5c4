"""How commands answer: text for people, or one JSON object."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def print_result(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)
