"""Every `loss:` section on the page of names computes the formula of its row, and what the page says of torch is so."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from tests import loss_figures
from trainer.objective import build_objective

PAGE = Path(__file__).parents[2] / "trainer" / "losses" / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {
    cells[0].replace("`", "").strip(): yaml.safe_load(match.group(1))
    for line in TEXT.splitlines()
    if line.startswith("|") and (match := re.search(r"`(\{name: .*\})` \|$", line)) and (cells := line.strip("|").split(" | "))
}
Y = torch.arange(20) % 2
GROUP = torch.arange(24) % 6


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def d(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum(-1).sqrt()


def hinge(x: Tensor) -> Tensor:
    return x.clamp_min(0)


def contrastive(a: Tensor, b: Tensor, *, factor: float = 1.0) -> Tensor:
    return factor * (Y * d(a, b) ** 2 + (1 - Y) * hinge(1 - d(a, b)) ** 2).mean()


def inverted(a: Tensor, b: Tensor) -> Tensor:
    dissimilar = 1 - Y
    return ((1 - dissimilar) * d(a, b) ** 2 / 2 + dissimilar * hinge(1 - d(a, b)) ** 2 / 2).mean()


def squared(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0) -> Tensor:
    return hinge(d(a, p) ** 2 - d(a, n) ** 2 + margin).mean()


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Hadsell et al. 2006, eq. 4": inverted,
    "Caffe ContrastiveLoss": lambda a, b: contrastive(a, b, factor=0.5),
    "Caffe, legacy_version: true": lambda a, b: (Y * d(a, b) ** 2 + (1 - Y) * hinge(1 - d(a, b) ** 2)).mean() / 2,
    "TensorFlow contrastive_loss": contrastive,
    "linear pairwise ranking loss": lambda a, b: (Y * d(a, b) + (1 - Y) * hinge(1 - d(a, b))).mean(),
    "torch HingeEmbeddingLoss of d": lambda a, b: nn.HingeEmbeddingLoss(margin=1.0)(d(a, b), 2 * Y - 1),
    "torch CosineEmbeddingLoss": lambda a, b: nn.CosineEmbeddingLoss()(a, b, 2 * Y - 1),
    "siamese-triplet ContrastiveLoss": lambda a, b: contrastive(a, b, factor=0.5),
}
TRIPLETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch TripletMarginLoss": lambda a, p, n: nn.TripletMarginLoss()(a, p, n),
    "torch TripletMarginLoss(swap=True)": lambda a, p, n: nn.TripletMarginLoss(swap=True)(a, p, n),
    "torch TripletMarginWithDistanceLoss, 1 - cosine": lambda a, p, n: nn.TripletMarginWithDistanceLoss(
        distance_function=lambda u, v: 1 - F.cosine_similarity(u, v)
    )(a, p, n),
    "FaceNet, eq. 3": lambda a, p, n: squared(unit(a), unit(p), unit(n), 0.2),
    "Deep Ranking": lambda a, p, n: squared(unit(a), unit(p), unit(n)),
    "siamese-triplet TripletLoss": squared,
    "PyCaffe triplet layers": lambda a, p, n: squared(a, p, n) / 2,
    "torch MarginRankingLoss of similarities": lambda a, p, n: nn.MarginRankingLoss()(
        F.cosine_similarity(a, p), F.cosine_similarity(a, n), 2 * Y - 1
    ),
}


def pairs_of(group: Tensor) -> Iterator[tuple[int, int, list[int]]]:
    """(anchor, positive, negatives), ordered."""
    for a, p in itertools.permutations(range(len(group)), 2):
        if group[a] == group[p]:
            yield a, p, [n for n in range(len(group)) if group[n] != group[a]]


def mined(x: Tensor, group: Tensor, pick: Callable[[float, Tensor], list[int]], margin: float, power: int = 2) -> Tensor:
    """Mean of the hinges of what `pick` takes of the negatives' distances, for every (anchor, positive)."""
    terms = []
    for a, p, negatives in pairs_of(group):
        near, far = d(x[a], x[p]) ** power, d(x[a], x[negatives]) ** power
        terms += [hinge(near - far[i] + margin) for i in pick(float(near), far)]
    return torch.stack(terms).mean()


def semi_hard(near: float, far: Tensor) -> list[int]:
    farther = [i for i in range(len(far)) if far[i] > near]
    return [min(farther, key=far.__getitem__) if farther else int(far.argmax())]


def within(near: float, far: Tensor) -> list[int]:
    inside = [i for i in range(len(far)) if near < far[i] < near + 0.2]
    return [min(inside, key=far.__getitem__)] if inside else []


def hardest(x: Tensor, group: Tensor) -> Tensor:
    """Farthest positive less closest negative of every anchor, euclidean.  [2, n]"""
    near, far = torch.zeros(len(group), dtype=x.dtype), torch.zeros(len(group), dtype=x.dtype)
    for a, _, negatives in pairs_of(group):
        positives = [p for p in range(len(group)) if group[p] == group[a] and p != a]
        near[a], far[a] = d(x[a], x[positives]).max(), d(x[a], x[negatives]).min()
    return torch.stack([near, far])


def facenet_code(x: Tensor, group: Tensor) -> Tensor:
    """Random where there is a choice: the batch of this row has one negative, and each pair counts once."""
    terms = [hinge(d(x[a], x[p]) ** 2 - d(x[a], x[n]) ** 2 + 0.2) for a, p, (n, *_) in pairs_of(group) if a < p]
    return torch.stack([term for term in terms if term > 0]).mean()


def active(terms: Tensor) -> Tensor:
    return terms[terms > 0].mean()


def all_hinges(x: Tensor, group: Tensor, power: int, *, ordered: bool, margin: float) -> Tensor:
    found = [
        hinge(d(x[a], x[p]) ** power - d(x[a], x[n]) ** power + margin)
        for a, p, negatives in pairs_of(group)
        for n in negatives
        if ordered or a < p
    ]
    return torch.stack(found)


def wu(x: Tensor, group: Tensor) -> Tensor:
    same = group[:, None] == group
    distances = d(x[:, None], x)[~torch.eye(len(x), dtype=torch.bool)]
    signs = (2 * same.to(x.dtype) - 1)[~torch.eye(len(x), dtype=torch.bool)]
    return active(hinge(0.2 + signs * (distances - float(torch.tensor(1.2)))))  # the boundary is held in fp32


def online(x: Tensor, group: Tensor) -> Tensor:
    i, j = torch.combinations(torch.arange(len(x))).T
    return torch.where(group[i] == group[j], d(x[i], x[j]) ** 2, hinge(1 - d(x[i], x[j])) ** 2).mean()


def softmax(x: Tensor, group: Tensor, temperature: float, *, others: bool) -> Tensor:
    """Mean over anchors of the mean over positives; `others`: the anchor's other positives are in the denominator."""
    s, found = x @ x.T / temperature, []
    for a in range(len(x)):
        positives = [p for p in range(len(x)) if group[p] == group[a] and p != a]
        negatives = [n for n in range(len(x)) if group[n] != group[a]]
        found.append(
            torch.stack(
                [torch.logsumexp(s[a, (positives if others else [p]) + negatives], 0) - s[a, p] for p in positives]
            ).mean()
        )
    return torch.stack(found).mean()


BATCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "siamese-triplet OnlineContrastiveLoss, all pairs": online,
    "margin loss of Wu et al. 2017, all pairs": lambda x, g: wu(unit(x), g),
    "TensorFlow triplet_semihard_loss, squared": lambda x, g: mined(unit(x), g, semi_hard, 1.0),
    "FaceNet, text": lambda x, g: mined(unit(x), g, within, 0.2),
    "davidsandberg/facenet, code": lambda x, g: facenet_code(unit(x), g),
    "TensorFlow triplet_hard_loss, squared": lambda x, g: hinge(hardest(unit(x), g).square().diff(dim=0).neg() + 1).mean(),
    "TensorFlow triplet_hard_loss(soft=True), squared": lambda x, g: F.softplus(
        hardest(unit(x), g).square().diff(dim=0).neg()
    ).mean(),
    "Hermans et al. 2017, soft margin": lambda x, g: F.softplus(hardest(x, g).diff(dim=0).neg()).mean(),
    "omoindrot batch_all_triplet_loss": lambda x, g: active(all_hinges(x, g, 1, ordered=True, margin=0.5)),
    "siamese-triplet AllTripletSelector": lambda x, g: all_hinges(x, g, 2, ordered=False, margin=1.0).mean(),
    "InfoNCE": lambda x, g: softmax(unit(x), g, 0.07, others=False),
    "SupCon, L_out": lambda x, g: softmax(unit(x), g, 0.1, others=True),
}


def one_side(a: Tensor, p: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(a @ p.T / temperature, torch.arange(len(a)))


def nt_xent(a: Tensor, p: Tensor) -> Tensor:
    x = unit(torch.cat([a, p]))
    logits = (x @ x.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(x)).roll(len(a)))


def vse(a: Tensor, p: Tensor, *, largest: bool) -> Tensor:
    scores = unit(a) @ unit(p).T
    right = scores.diag()
    costs = [hinge(0.2 + scores - right[:, None]), hinge(0.2 + scores - right).T]
    parts = [cost.clone().fill_diagonal_(0) for cost in costs]
    return sum(((part.max(1).values if largest else part.sum(1)).sum() for part in parts), torch.zeros(())) / len(a)


VIEWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NT-Xent (SimCLR)": nt_xent,
    "N-pair loss, TensorFlow npairs_loss": lambda a, p: one_side(a, p, 1.0),
    "MultipleNegativesRankingLoss": lambda a, p: one_side(unit(a), unit(p), 1 / 20),
    "CLIP's contrastive loss": lambda a, p: (one_side(unit(a), unit(p), 0.07) + one_side(unit(p), unit(a), 0.07)) / 2,
    "VSE ContrastiveLoss, max-margin ranking": lambda a, p: vse(a, p, largest=False),
    "VSE++, max_violation": lambda a, p: vse(a, p, largest=True),
}


def draw(*shape: int) -> Tensor:
    """Vectors some of which are within a margin of 1."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5


def test_every_row_of_the_page_has_its_formula_here() -> None:
    assert {name.replace('"', "") for name in ROWS} == {*PAIRS, *TRIPLETS, *BATCHES, *VIEWS}
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("name", [*PAIRS, *TRIPLETS, *BATCHES, *VIEWS])
def test_the_loss_section_computes_the_rows_formula(name: str) -> None:
    """To twelve digits, in float64."""
    objective = build_objective({key.replace('"', ""): loss for key, loss in ROWS.items()}[name]).double()
    if name in BATCHES:
        alone = name == "davidsandberg/facenet, code"
        x, group = draw(24, 5), torch.tensor([0] * 23 + [1]) if alone else GROUP
        value, _ = objective(x, group)
        expected = BATCHES[name](x, group)
    else:
        views = list(draw(3 if name in TRIPLETS else 2, 20, 5))
        count = len(views)
        x, row = torch.stack(views, 1).flatten(0, 1), torch.arange(20 * count)
        match = Y if name in PAIRS or "MarginRanking" in name else None
        value, _ = objective(x, row // count, record=row // count, view=row % count, match=match)
        expected = {**PAIRS, **TRIPLETS, **VIEWS}[name](*views)
    assert float(expected) > 0.01
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_what_the_page_says_of_torch_is_so() -> None:
    assert not hasattr(nn, "ContrastiveLoss")
    a, p, n = draw(3, 20, 5)
    plain = F.relu(F.pairwise_distance(a, p, eps=0) - F.pairwise_distance(a, n, eps=0) + 1).mean()
    moved = F.relu((a - p + 1e-6).norm(dim=1) - (a - n + 1e-6).norm(dim=1) + 1).mean()
    torch.testing.assert_close(nn.TripletMarginLoss()(a, p, n), moved, rtol=1e-12, atol=0)
    assert nn.TripletMarginLoss()(a, p, n) != plain
    assert abs(float(nn.TripletMarginLoss()(a, p, n) - squared(a, p, n))) > 0.01
    near, far = torch.tensor([0.1]), torch.tensor([0.9])
    assert nn.MarginRankingLoss()(near, far, torch.tensor([1])) > 0, "distances with y = 1 rank backwards"
    assert nn.MarginRankingLoss()(far, near, torch.tensor([1])) == 0


def test_the_figures_are_what_the_losses_give(tmp_path: Path) -> None:
    """Curves against formulas; the files to the byte, where matplotlib is the pinned one."""
    for d_, hinged in ((0.0, 1.0), (0.4, 0.6), (1.4, 0.0)):
        found = [loss_figures.pair_curve(loss_figures.PAIRS[name], similar=False)(d_) for name in loss_figures.PAIRS]
        assert found == pytest.approx([hinged**2, hinged**2 / 2, hinged, max(0, 1 - d_**2) / 2])
    found = [loss_figures.triplet_curve(options)(0.5) for options in loss_figures.TRIPLETS.values()]
    assert found == pytest.approx([0.3, 0.31, 0.155, math.log1p(math.exp(0.1))])
    assert loss_figures.info_nce_curve(0.2)(0.7) == pytest.approx(math.log1p(math.exp(1)))
    names = {Path(name).name for name in re.findall(r"\(figures/(\w+\.svg)\)", TEXT)}
    assert {file.name for file in loss_figures.FOLDER.iterdir()} == names
    assert all(file.stat().st_size < 40_000 for file in loss_figures.FOLDER.iterdir())
    pinned = re.search(r"^matplotlib==(.*)$", (PAGE.parents[2] / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or version("matplotlib") != pinned.group(1):
        pytest.skip(f"matplotlib {version('matplotlib')} is not the pinned one, whose bytes the files are")
    loss_figures.draw(tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (loss_figures.FOLDER / name).read_bytes(), "run python -m tests.loss_figures"
