"""What the sections of a config are made of: frozen models that refuse what they do not know, and types with bounds."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME_BYTES = 255  # of a file or folder, on every file system in use


def _usable(path: str) -> str:
    """Raise ValueError for a path that no file system can have."""
    if any(len(name.encode()) > NAME_BYTES for name in path.split("/")):
        raise ValueError(f"a name in this path is longer than {NAME_BYTES} bytes; shorten it")
    if path.startswith("~") and os.path.expanduser(path).startswith("~"):
        raise ValueError(f"no home folder for {path.partition('/')[0]!r}; write the path out")
    return path


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Seconds = Annotated[float, Field(gt=0.0, le=30 * 24 * 3600)]  # a month; threads and sockets cannot wait for ever
Sigma = Annotated[float, Field(gt=0.0, le=16.0)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Records = Annotated[int, Field(ge=1, le=2**24)]  # of a batch
Dim = Annotated[int, Field(ge=1, le=2**16)]  # of vectors
Place = Annotated[str, Field(min_length=1), AfterValidator(_usable)]  # a path or a URL


class Section(BaseModel):
    """Frozen, refuses unknown keys and values of the wrong type."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Part(BaseModel):
    """A pluggable part, `{name, **options}`; the options are checked against the function that `name` stands for."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
