"""Vectors of short texts, such as names and keywords: TF-IDF and latent semantic analysis, no model to download."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Texts:
    """What the classes are called: `labels` [n], `texts` [n], and `categories` [n] where there are such."""

    labels: list[str]
    texts: list[str]
    categories: list[str] | None


def read_texts(path: str) -> Texts:
    """Columns `label` and `text`, perhaps `category`, of a parquet, CSV or JSONL file. Raises ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"no file {path!r}; it is to hold columns label and text")
    try:
        if path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
        else:
            text = pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in ("label", "text", "category")})
            is_csv = path.endswith(".csv")
            table = pyarrow.csv.read_csv(path, convert_options=text) if is_csv else pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path!r} cannot be read as a table: {str(error).splitlines()[0]}") from error
    missing = [name for name in ("label", "text") if name not in table.column_names]
    if missing:
        raise ValueError(f"{path!r} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    columns = {name: ["" if value is None else str(value) for value in table[name].to_pylist()] for name in table.column_names}
    labels = columns["label"]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{path!r}: a label is there twice; give one text for each")
    return Texts(labels, columns["text"], columns.get("category"))


def lsa(texts: list[str], dim: int) -> NDArray[np.float32]:
    """Unit vectors [n, dim] of n texts: the first `dim` singular directions of their TF-IDF (Deerwester et al. 1990).

    Words with a dash or underscore count as several. Raises ValueError when the texts are too few or have too few words.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        weights = TfidfVectorizer(token_pattern=r"[^\W_]+", sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise ValueError(f"no words in the texts: {error}") from error
    most = min(weights.shape) - 1
    if not 1 <= dim <= most:
        raise ValueError(f"--dim {dim}: {len(texts)} texts of {weights.shape[1]} different words give at most {most}")
    found = TruncatedSVD(dim, algorithm="arpack", random_state=0).fit_transform(weights)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if (lengths < 1e-9).any():
        number = int(np.flatnonzero(lengths[:, 0] < 1e-9)[0])
        raise ValueError(f"the text {texts[number]!r} shares no word with any other, so it has no vector of {dim} numbers")
    return np.asarray(found / lengths, np.float32)


def write_vectors(path: str, texts: Texts, vectors: NDArray[np.float32]) -> None:
    """A parquet file with columns label, text, category, embedding. Raises ValueError when it is there already."""
    if os.path.exists(path):
        raise ValueError(f"{path!r} is there already; remove it or choose another name")
    columns: dict[str, pa.Array] = {"label": pa.array(texts.labels), "text": pa.array(texts.texts)}
    if texts.categories is not None:
        columns["category"] = pa.array(texts.categories)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    temporary = f"{path}.partial"
    pyarrow.parquet.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)
