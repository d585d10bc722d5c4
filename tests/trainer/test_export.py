"""The exported folder is the same encoder, reads any image, needs nothing of nearfar and no pickle."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.decode import decode
from pipelines.geometry import place, whole
from trainer.export import export_encoder, load_exported, parity
from trainer.portable_model import Encoder, column, preprocess, to_int8

SIZE = 24
LIMIT = 1_000_000


class SmallEncoder(nn.Module):
    """Convolutions, GroupNorm, dropout, a linear head; channels-last like the built-in one."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.image_size = 16, SIZE
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, self.dim))
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body((images - self.mean).contiguous(memory_format=torch.channels_last))
        return F.normalize(self.head(x.mean((2, 3))), dim=1)


def smooth(width: int = 60, height: int = 40) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, (x + y) / 2], -1) * 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def encoder() -> SmallEncoder:
    torch.manual_seed(0)
    return SmallEncoder()


@pytest.fixture(scope="module")
def folder(encoder: SmallEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "exported"
    card = {"name": "Small", "Data": {"classes": 3}, "Limits": ["toy"], "Note": "none"}
    thresholds = {8: {"far_1e-3": 0.6}, 16: {"far_1e-3": 0.5, "best_f1": -1.0}}
    about = {"name": "small"}
    done = export_encoder(
        encoder, folder, image_size=SIZE, resize="crop", card=card, dims=[8], thresholds=thresholds, about=about
    )
    assert (done.runtime, done.why_torch) == ("onnx", None)
    return folder


@pytest.fixture
def images() -> list[bytes]:
    random = np.random.default_rng(0)
    return [encoded(Image.fromarray(random.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8))) for i in range(7)]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 300])
def test_any_number_of_images_gives_float32_unit_vectors(folder: Path, images: list[bytes], n: int) -> None:
    vectors = load_exported(folder)([images[i % 7] for i in range(n)])
    assert vectors.shape == (n, 16)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_export_is_the_encoder_in_eval_mode_and_leaves_it_as_it_was(
    encoder: SmallEncoder, folder: Path, images: list[bytes]
) -> None:
    def reference(data: bytes) -> Tensor:  # torch's antialias filter, as the training pipeline uses it
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)[None]
        scale = SIZE / min(pixels.shape[2:])
        size = [max(SIZE, round(side * scale)) for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
        return pixels[0, :, top : top + SIZE, left : left + SIZE]

    assert encoder.training
    assert encoder.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert parity(encoder, load_exported(folder), images, reference) > 0.9999
    assert encoder.training


def test_parity_sees_another_encoder(folder: Path, images: list[bytes]) -> None:
    torch.manual_seed(1)
    assert (
        parity(SmallEncoder(), load_exported(folder), images, lambda d: torch.from_numpy(preprocess(d, SIZE, "crop", LIMIT)))
        < 0.99
    )


def test_vectors_are_cut_only_to_lengths_that_were_trained_for(folder: Path, images: list[bytes]) -> None:
    exported = load_exported(folder)
    whole, short = exported(images), exported(images, dim=8)  # type: ignore[call-arg]
    np.testing.assert_allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), rtol=1e-6)
    for dim in (0, 7, 17):
        with pytest.raises(ValueError, match=rf"dim {dim} is none of the lengths that this model was trained for: 8, 16$"):
            exported(images, dim=dim)  # type: ignore[call-arg]


def test_small_integers_keep_the_cosines(folder: Path, images: list[bytes]) -> None:
    vectors = load_exported(folder)(images)
    codes = to_int8(vectors)
    assert codes.dtype == np.int8
    again = codes.astype(np.float32) / 127
    np.testing.assert_allclose(again @ again.T, vectors @ vectors.T, atol=0.02)


def test_match_is_the_cosine_against_the_threshold_of_that_length(folder: Path, images: list[bytes]) -> None:
    encoder = Encoder(folder)
    black, white = (encoded(Image.new("RGB", (20, 20), colour)) for colour in ("black", "white"))
    for dim, at in ((None, "far_1e-3"), (8, "far_1e-3"), (None, "best_f1")):
        a, b = encoder([images[0], black], dim=dim), encoder([images[0], white], dim=dim)
        limit = encoder.thresholds[dim or 16][at]
        expected = (a * b).sum(1) >= limit
        np.testing.assert_array_equal(encoder.match([images[0], black], [images[0], white], at=at, dim=dim), expected)
    assert encoder.match(images[0], images[0]).tolist() == [True]
    with pytest.raises(ValueError, match="no match threshold 'best_f1'; it has far_1e-3"):
        encoder.match(images[0], images[1], at="best_f1", dim=8)
    with pytest.raises(ValueError, match="got 1 and 2"):
        encoder.match(images[0], images[:2])


def test_without_onnx_it_runs_with_torch_and_says_why(
    encoder: SmallEncoder, folder: Path, images: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.onnx_program.NEEDED", ("onnx", "nothing_of_this_name"))
    done = export_encoder(encoder, tmp_path / "a", image_size=SIZE, resize="crop", card={})
    assert done.runtime == "torch"
    assert done.why_torch == "nothing_of_this_name is not installed (pip install 'nearfar[onnx]')"
    assert not list((tmp_path / "a").glob("*.onnx*"))
    assert "runs with | torch" in (tmp_path / "a" / "MODEL_CARD.md").read_text()
    with pytest.raises(ValueError, match="it was exported without an evaluation set"):
        Encoder(tmp_path / "a").match(images[0], images[1])
    np.testing.assert_allclose(load_exported(tmp_path / "a")(images), load_exported(folder)(images), atol=1e-5)


def test_an_operation_that_onnx_does_not_have_is_no_obstacle(tmp_path: Path, images: list[bytes]) -> None:
    class Odd(SmallEncoder):
        def forward(self, images: Tensor) -> Tensor:
            return torch.special.bessel_j0(super().forward(images))

    done = export_encoder(Odd(), tmp_path / "odd", image_size=SIZE, resize="crop", card={})
    assert done.runtime == "torch"
    assert done.why_torch is not None
    assert done.why_torch.startswith("ONNX cannot express the encoder: ")
    assert load_exported(tmp_path / "odd")(images).shape == (7, 16)


def test_nothing_in_the_folder_names_a_path_of_this_machine(folder: Path) -> None:
    here = str(Path(__file__).parents[2]).encode()
    assert not [path.name for path in folder.iterdir() if here in path.read_bytes()]


MODES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: encoded(image, "JPEG", quality=98, subsampling=0),
    "webp": lambda image: encoded(image, "WEBP", lossless=True),
    "opaque RGBA": lambda image: encoded(image.convert("RGBA")),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "bmp": lambda image: encoded(image, "BMP"),
    "turned by EXIF": lambda image: encoded(image.transpose(Image.Transpose.ROTATE_90), exif=_orientation(6)),
}


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_file_gives_the_same_pixels(mode: str) -> None:
    expected = preprocess(encoded(smooth()), SIZE, "crop", LIMIT).astype(int)
    assert np.abs(preprocess(MODES[mode](smooth()), SIZE, "crop", LIMIT).astype(int) - expected).max() <= 3


def test_grey_palette_and_16_bit_images_become_rgb() -> None:
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (40, 1))
    expected = preprocess(encoded(Image.fromarray(np.stack([ramp] * 3, -1))), SIZE, "squash", LIMIT).astype(int)
    grey16 = Image.fromarray(ramp.astype(np.uint16) * 257)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp).convert("P"), grey16):
        assert np.abs(preprocess(encoded(image), SIZE, "squash", LIMIT).astype(int) - expected).max() <= 1


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (30, 30), (200, 0, 0, 0))
    half = Image.new("LA", (30, 30), (0, 128))
    palette = Image.new("P", (30, 30), 0)
    assert (preprocess(encoded(clear), SIZE, "crop", LIMIT) == 255).all()
    assert (preprocess(encoded(half), SIZE, "crop", LIMIT) == 127).all()
    assert (preprocess(encoded(palette, transparency=0), SIZE, "crop", LIMIT) == 255).all()


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (1, 500), (500, 1), (24, 24), (7, 5)])
def test_pad_keeps_the_whole_image_on_white_and_crop_fills_the_square(width: int, height: int) -> None:
    black = encoded(Image.new("RGB", (width, height)))
    assert (preprocess(black, SIZE, "crop", LIMIT) == 0).all()
    assert (preprocess(black, SIZE, "squash", LIMIT) == 0).all()
    short = max(1, round(SIZE * min(width, height) / max(width, height)))
    assert (preprocess(black, SIZE, "pad", LIMIT)[0] == 0).sum() == short * SIZE


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_the_pixels_are_those_that_evaluation_sees(resize: str) -> None:
    random = np.random.default_rng(1)
    files = [make(smooth()) for make in MODES.values()]
    for height, width in ((1, 900), (700, 2), (24, 24), (31, 90), (90, 31), (7, 5)):
        noise = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        files += [encoded(Image.fromarray(noise)), encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 200))]
    for data in files:
        pixels = decode(data)
        seen = place(pixels, whole(pixels.shape[1], pixels.shape[0], SIZE, resize), SIZE).numpy().astype(int)
        assert np.abs(preprocess(data, SIZE, resize, LIMIT).astype(int) - seen).max() <= 1


def test_bytes_paths_and_base64_are_the_same_image(folder: Path, images: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "an image with ünicode"
    path.write_bytes(images[0])
    text = base64.b64encode(images[0]).decode()
    wrapped = base64.encodebytes(images[0]).decode()
    vectors = load_exported(folder)(
        [images[0], bytearray(images[0]), path, str(path), text, wrapped, f"data:image/png;base64,{text}"]
    )
    assert (vectors == vectors[0]).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "row 1 is not an image"),
        (b"no image at all", "row 1 is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "row 1 is not an image"),
        (encoded(smooth())[:200], "row 1 is not a readable image"),
        (encoded(smooth(), "JPEG")[:400], "row 1 is not a readable image: .*(?i:truncated)"),
        (encoded(Image.new("1", (11_000, 10_000))), "row 1 .* 11000 x 10000 is more than 100000000 pixels"),
        (encoded(Image.new("1", (20_000, 20_000))), "row 1 .* decompression bomb"),
        ("nowhere/cat.jpg", "row 1 .*'nowhere/cat.jpg' is neither a file on this machine nor base64"),
        (None, "row 1 .*got NoneType"),
        (3.5, "row 1 .*got float"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_is_named_by_its_row(folder: Path, images: list[bytes], bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_exported(folder)([images[0], bad])  # type: ignore[list-item]


def test_a_column_is_found_in_what_people_pass() -> None:
    pandas = pytest.importorskip("pandas")
    for table in (
        ["a", "b"],
        np.array([["a"], ["b"]], dtype=object),
        pandas.DataFrame({"x": ["a", "b"]}),
        pandas.DataFrame({"id": [1, 2], "image": ["a", "b"]}),
        pandas.Series(["a", "b"]),
        {"image": ["a", "b"]},
        [{"image": "a"}, {"image": "b"}],
    ):
        assert column(table) == ["a", "b"]
    assert column(b"one") == [b"one"]
    with pytest.raises(ValueError, match=r"one named 'image'; got the columns \['a', 'b'\]"):
        column({"a": [1], "b": [2]})


def test_the_folder_loads_without_nearfar_and_without_mlflow(folder: Path, images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(images[0])
    code = """
import json, sys
sys.modules.update(dict.fromkeys(["trainer", "configs", "pipelines", "cluster", "pandas", "torch"]))
sys.path.insert(0, sys.argv[1])
from model import Encoder
assert "mlflow" not in sys.modules
print(json.dumps(Encoder(sys.argv[1])([sys.argv[2]]).tolist()))
"""
    command = [sys.executable, "-W", "error", "-c", code, str(folder), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), load_exported(folder)([images[0]]))


def test_the_weights_are_plain_numbers_not_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / "program.pt2") as archive:
        configs = [name for name in archive.namelist() if name.endswith("_config.json")]
        assert configs
        assert all('"use_pickle": true' not in archive.read(name).decode() for name in configs)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    load_exported(folder)


def test_an_export_replaces_an_export_and_nothing_else(encoder: SmallEncoder, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "cat.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="exists and is no exported encoder"):
        export_encoder(encoder, mine, image_size=SIZE, resize="crop", card={})
    before = set(folder.parent.iterdir())
    export_encoder(encoder, folder, image_size=SIZE, resize="crop", card={"name": "Again"})
    assert (folder / "MODEL_CARD.md").read_text(encoding="utf-8").startswith("# Again\n")
    assert set(folder.parent.iterdir()) == before


def test_an_encoder_that_cannot_be_traced_leaves_nothing_behind(tmp_path: Path) -> None:
    class Moody(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if images.sum().item() > 0 else images.sum((2, 3))

    with pytest.raises(RuntimeError, match=r"torch\.export cannot trace Moody"):
        export_encoder(Moody(), tmp_path / "out", image_size=SIZE, resize="crop", card={})
    assert list(tmp_path.iterdir()) == []


def test_a_format_we_do_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    (tmp_path / "preprocessing.json").write_text(json.dumps(settings | {"version": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match="holds format 99; this code reads 2"):
        load_exported(tmp_path)
