"""Augmentation is a function of its draws, image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from configs.schema import Augment
from pipelines.augment import Draw, apply, crop_box, draws
from pipelines.batch import NUM_DRAWS
from pipelines.geometry import whole

WIDE = (1.0, 16.0)  # a range of sigma that shows in images as small as these
EVERYTHING = Augment(
    crop=(0.5, 1.0),
    flip=0.5,
    rotate=30.0,
    scale=0.2,
    shift=0.1,
    color=0.4,
    hue=0.1,
    grayscale=0.3,
    blur=0.5,
    blur_sigma=WIDE,
    erase=0.5,
)
NOT_ALONE = ("crop", "aspect", "blur_sigma")
CONFIGS = {
    "all": EVERYTHING,
    **{
        name: Augment.model_validate({name: value, "blur_sigma": WIDE})
        for name, value in EVERYTHING
        if value and name not in NOT_ALONE
    },
}


def images(n: int = 7, height: int = 20, width: int = 23) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def some_draws(n: int = 7) -> torch.Tensor:
    ids = np.arange(n)
    return torch.from_numpy(draws(5, ids * 0 + 2, ids * 77, ids, ids * 0))


def with_draw(**values: float) -> torch.Tensor:
    drawn = torch.full((1, NUM_DRAWS), 0.5)  # the middle: no change
    for name, value in values.items():
        drawn[0, Draw[name]] = value
    return drawn


def test_draws_are_uniform_and_depend_on_every_part_of_the_key() -> None:
    n = 4000
    ids = np.arange(n)
    drawn = draws(1, ids * 0, ids, ids * 0, ids * 0)
    assert drawn.shape == (n, NUM_DRAWS)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 5 / math.sqrt(12 * n)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(NUM_DRAWS)).max() < 6 / math.sqrt(n)
    key = [np.asarray([3]) for _ in range(4)]
    base = draws(1, *key)
    assert (draws(2, *key) != base).any()
    for i in range(4):
        assert (draws(1, *[part + (j == i) for j, part in enumerate(key)]) != base).any()


def test_draws_do_not_depend_on_what_is_drawn_with_them() -> None:
    ids = np.arange(9)
    together = draws(1, ids, ids, ids, ids)
    assert (draws(1, ids[4:5], ids[4:5], ids[4:5], ids[4:5]) == together[4]).all()


def test_all_off_is_exact() -> None:
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(apply(images(), some_draws(), Augment(), dtype), images().to(dtype) / 255)


def test_how_images_lie_in_memory_changes_nothing() -> None:
    last = images().contiguous(memory_format=torch.channels_last)
    for config in (Augment(), EVERYTHING):
        found = apply(last, some_draws(), config)
        assert found.is_contiguous()
        assert torch.equal(found, apply(images(), some_draws(), config))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_image_depends_on_the_others(name: str) -> None:
    together = apply(images(), some_draws(), CONFIGS[name])
    for i in range(7):
        alone = apply(images()[i : i + 1], some_draws()[i : i + 1], CONFIGS[name])
        assert torch.equal(alone[0], together[i])
    assert torch.equal(apply(images()[2:5], some_draws()[2:5], CONFIGS[name]), together[2:5])


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_same_function_in_double_precision(name: str) -> None:
    double = apply(images(), some_draws(), CONFIGS[name], torch.float64)
    single = apply(images(), some_draws(), CONFIGS[name])
    assert double.dtype == torch.float64
    # An edge of an erased rectangle may fall on the other side of a pixel's centre.
    assert float(((double - single).abs() > 1e-4).double().mean()) < 1e-3
    assert float(double.min()) >= 0
    assert float(double.max()) <= 1
    assert not torch.equal(double, images() / 255.0)


def test_flip_is_a_mirror() -> None:
    plain = images(1) / 255.0
    assert torch.equal(apply(images(1), with_draw(FLIP=0.4), Augment(flip=0.5)), plain.flip(-1))
    assert torch.equal(apply(images(1), with_draw(FLIP=0.6), Augment(flip=0.5)), plain)


def test_a_third_of_the_hue_circle_changes_the_channels_round() -> None:
    plain = images(1).double() / 255
    turned = apply(images(1), with_draw(HUE=0.5 + 0.5 * 2 / 3), Augment(hue=0.5), torch.float64)
    assert float((turned - plain.roll(1, dims=1)).abs().max()) < 1e-6


def test_brightness_contrast_and_saturation_do_what_their_names_say() -> None:
    plain = images(1).double() / 255 * 0.5 + 0.2
    pixels = (plain * 255).round().to(torch.uint8)
    plain = pixels.double() / 255
    luma = (plain * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)
    cases = {
        "BRIGHTNESS": plain * 1.2,
        "CONTRAST": luma.mean() + 1.2 * (plain - luma.mean()),
        "SATURATION": luma + 1.2 * (plain - luma),
    }
    for name, expected in cases.items():
        found = apply(pixels, with_draw(**{name: 1.0}), Augment(color=0.2), torch.float64)
        assert float((found - expected.clamp(0, 1)).abs().max()) < 1e-6
    grey = apply(pixels, with_draw(GRAYSCALE=0.0), Augment(grayscale=0.1), torch.float64)
    assert float((grey - luma).abs().max()) < 1e-6


def test_a_quarter_turn_is_a_rotation_and_what_comes_in_is_white() -> None:
    square = images(1, 21, 21)
    turned = apply(square, with_draw(ROTATE=1.0), Augment(rotate=90.0), torch.float64)
    plain = square.double() / 255
    assert min(float((turned - torch.rot90(plain, k, (2, 3))).abs().max()) for k in (1, 3)) < 1e-6
    # Half a side to the right: what comes in from the left is white.
    shifted = apply(square[..., :20], with_draw(SHIFT_X=1.0), Augment(shift=0.5), torch.float64)
    assert float((shifted[..., 10:] - plain[..., :10]).abs().max()) < 1e-6
    assert float((shifted[..., :9] - 1).abs().max()) < 1e-9


def test_oblong_images_are_rotated_without_distortion() -> None:
    oblong = torch.full((1, 3, 20, 60), 255, dtype=torch.uint8)
    oblong[:, :, 5:15, 25:35] = 0  # a square in the middle stays one after a quarter turn
    turned = apply(oblong, with_draw(ROTATE=1.0), Augment(rotate=90.0), torch.float64)
    assert float((turned - oblong.double() / 255).abs().max()) < 1e-6


@pytest.mark.parametrize(("side", "sigmas"), [(224, (0.1, 2.0)), (48, (0.1, 2.0)), (40, (3.0, 16.0)), (8, (16.0, 16.0))])
def test_blur_is_scipys_gaussian_with_a_sigma_of_each_image(side: int, sigmas: tuple[float, float]) -> None:
    pixels, drawn = images(3, side, side), some_draws(3)
    drawn[:, Draw.BLUR] = torch.tensor([0.1, 0.9, 0.2])
    found = apply(pixels, drawn, Augment(blur=0.5, blur_sigma=sigmas), torch.float64)
    for index in (0, 2):
        share = float(drawn[index, Draw.BLUR_SIGMA])
        sigma = (sigmas[0] + (sigmas[1] - sigmas[0]) * share) * side / 224
        radius = math.ceil(3 * sigmas[1] * side / 224)
        plain = pixels[index].double().numpy() / 255
        expected = gaussian_filter(plain, (0, sigma, sigma), radius=(0, radius, radius), mode="nearest")
        assert np.abs(found[index].numpy() - expected).max() < 1e-12
    assert torch.equal(found[1], pixels[1].double() / 255)


def test_blur_keeps_a_plain_image_as_it_is_and_reaches_no_further_than_its_kernel() -> None:
    plain = torch.full((2, 3, 40, 40), 200, dtype=torch.uint8)
    config = Augment(blur=1.0, blur_sigma=(16.0, 16.0))
    assert float((apply(plain, some_draws(2), config) - 200 / 255).abs().max()) < 1e-6
    dot = torch.zeros((1, 3, 40, 40), dtype=torch.uint8)
    dot[:, :, 20, 20] = 255
    touched = torch.nonzero(apply(dot, with_draw(BLUR=0.0), config)[0, 0])
    reach = math.ceil(3 * 16 * 40 / 224)
    assert touched.amin(0).tolist() == [20 - reach, 20 - reach]
    assert touched.amax(0).tolist() == [20 + reach, 20 + reach]


def test_erasing_paints_one_grey_rectangle() -> None:
    black = torch.zeros((1, 3, 40, 40), dtype=torch.uint8)
    erased = apply(black, with_draw(ERASE=0.0), Augment(erase=0.5))[0, 0]
    rows, columns = torch.nonzero(erased.sum(1)).flatten(), torch.nonzero(erased.sum(0)).flatten()
    box = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (box == 0.5).all()
    assert 0.1 < box.numel() / 1600 < 0.17
    assert int((erased > 0).sum()) == box.numel()
    assert apply(black, with_draw(ERASE=0.5), Augment(erase=0.5)).sum() == 0


def test_without_a_crop_training_sees_what_evaluation_sees() -> None:
    drawn = some_draws()[0].numpy()
    assert crop_box(drawn, 70, 40, 32, "pad", Augment()) == whole(70, 40, 32, "pad")
    assert crop_box(drawn, 70, 40, 32, "pad", Augment(crop=(0.5, 0.5))) != whole(70, 40, 32, "pad")
