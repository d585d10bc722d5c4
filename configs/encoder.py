"""The `encoder` section: one network for all members of a record, or one for anchors and one for what goes with them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from configs.plain import suggest
from configs.section import Part, Place

SIDES = ("anchor", "positive")
TOWERS = "towers"  # the name of an encoder that has them


class Tower(Part):
    """One network, with the settings that every one takes."""

    init: Place | None = Field(
        None, description="warm start: a run folder, a checkpoint, or models:/name@alias or models:/name/version"
    )
    init_skip: tuple[str, ...] = Field((), description="prefixes of weights that the warm start leaves as they were drawn")
    freeze: Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        (), description="prefixes of weights that do not learn, or the number of stages from the input on"
    )
    freeze_batchnorm: bool = Field(False, description="BatchNorm keeps the statistics, scales and biases it came with")


class Encoder(Tower):
    """The encoder: a network, or `anchor` and `positive`, two that share no weights."""

    anchor: Tower | None = Field(None, description="network of its own for anchors, left and labelled images")
    positive: Tower | None = Field(None, description="network of its own for positives, right images and explicit negatives")

    @model_validator(mode="before")
    @classmethod
    def _towers_alone(cls, section: Any) -> Any:
        """Sections with towers hold nothing else; they are given the name `towers`."""
        if not isinstance(section, dict):
            return section
        sides = [side for side in SIDES if section.get(side) is not None]
        if not sides:
            if section.get("name") == TOWERS:
                raise ValueError("two networks are given as encoder: {anchor: {name: ...}, positive: {name: ...}}")
            return section
        more = [key for key in section if key not in SIDES and not (key == "name" and section[key] == TOWERS)]
        if more:
            raise ValueError(
                f"{more[0]!r} beside {sides[0]!r}: towers have their settings each for itself, as encoder.anchor.name; "
                f"{suggest(str(more[0]), SIDES)}"
            )
        if len(sides) == 1:
            raise ValueError(f"{sides[0]!r} alone: give both anchor and positive, or one network without either")
        return {**section, "name": TOWERS}

    @model_serializer(mode="wrap")
    def _plainly(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        if self.anchor is not None:
            return {side: tree[side] for side in SIDES}
        return {key: value for key, value in tree.items() if key not in SIDES}

    @property
    def towers(self) -> bool:
        """Whether there are two networks."""
        return self.anchor is not None

    @property
    def warm(self) -> bool:
        """Whether any network begins with weights of another one."""
        return any(part.init is not None for part in self.parts().values())

    def parts(self) -> dict[str, Tower]:
        """Setting -> network: `encoder`, or `encoder.anchor` and `encoder.positive`."""
        if self.anchor is None or self.positive is None:
            return {"encoder": self}
        return {"encoder.anchor": self.anchor, "encoder.positive": self.positive}

    def replaced(self, parts: dict[str, Tower]) -> Encoder:
        """With the networks `parts`, as `parts()` has them, in place of its own."""
        if self.towers:
            return self.model_copy(update={key.removeprefix("encoder."): part for key, part in parts.items()})
        found = parts["encoder"]
        assert isinstance(found, Encoder)
        return found
