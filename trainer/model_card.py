"""MODEL_CARD.md: what a stranger has to know before using an exported encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

USE = """```python
from model import Encoder   # the file beside this one

encoder = Encoder(".")
vectors = encoder(["a.jpg", "b.png"])   # [2, dim]; bytes, base64 strings and data URLs work too
```"""
LIMITS = (
    "It tells images of the kinds it was trained on apart; of others its vectors mean little. Measure it on your own images.",
    "A cosine or a distance is no probability. Thresholds hold for images like those of the evaluation set.",
    "It was not examined for unfair differences between people. Do not identify persons with it without their consent.",
)


def model_card(card: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Markdown. card: `name`, and headings with text, a list or a mapping of facts; settings: what preprocessing.json holds."""
    size, dims = settings["image_size"], settings["dims"]
    runtime = f"onnxruntime (ONNX opset {settings['opset']})" if settings["runtime"] == "onnx" else f"torch {settings['torch']}"
    raw = settings["distance"] == "euclidean"
    vectors = "raw vectors of {} numbers, of any length; compare them by euclidean distance"
    vectors = vectors if raw else "unit vectors of {} numbers; the dot product of two is their cosine"
    interface = {
        "input": f"images of any size and mode; turned by EXIF, on white, RGB, {settings['resize']} to {size} x {size}",
        "output": "float32 " + vectors.format(settings["dim"]),
        **({} if raw else _smaller(dims)),
        "runs with": f"{runtime}, numpy, pillow",
    }
    sections = {
        "Interface": interface,
        "Use": USE,
        **({"Match thresholds": _thresholds(settings["thresholds"], raw=raw)} if settings["thresholds"] else {}),
        **{heading: body for heading, body in card.items() if heading != "name"},
        "Limits": LIMITS,
    }
    title = card.get("name", "Image encoder")
    return f"# {title}\n" + "".join(f"\n## {heading}\n\n{_block(body)}\n" for heading, body in sections.items())


def _smaller(dims: Sequence[int]) -> dict[str, str]:
    return {
        "lengths": f"{', '.join(map(str, dims))}: `dim=` cuts the vectors to it and scales them to length 1 again",
        "int8": "with MLflow, `params={'int8': True}`: vectors times 127, rounded",
    }


def _thresholds(thresholds: Mapping[str, Mapping[str, float]], *, raw: bool) -> str:
    names = sorted({name for of_dim in thresholds.values() for name in of_dim})
    head = ["dim", *names]
    rows = [[dim, *(f"{of_dim[name]:.4f}" if name in of_dim else "" for name in names)] for dim, of_dim in thresholds.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    near, at = ("distance is at most", "below") if raw else ("cosine is at least", "above")
    return (
        f"Two images show the same thing when their {near} this. `far_1e-3`: one in 1000 pairs of different things\n"
        f"is {at} it; `best_f1`: where precision and recall are best together. `encoder.match(a, b)` applies it.\n\n{table}"
    )


def _block(body: Any) -> str:
    if isinstance(body, Mapping):
        return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in body.items())])
    if isinstance(body, (list, tuple)):
        return "\n".join(f"- {item}" for item in body)
    return str(body)
