"""Softmax cross entropy over classes, each a row of a linear layer that may be spread over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.section import Dim
from trainer import collectives
from trainer.centres import Centres, Classes, Samples, Shard, Share


class SoftmaxHead(Centres):
    """-log softmax(W x + b)_y, y the class of the row's group; mean over valid rows of known classes.

    The classification baseline: the head is thrown away after training. The sum over classes is completed over the ranks by
    one gather of (maximum, sum) a chunk of samples, so that it is exact, and nothing is computed twice.
    """

    cosine = False
    scale = 1.0

    def __init__(self, num_classes: Classes, dim: Dim, bias: bool = True, shard: Shard = "auto") -> None:
        super().__init__(num_classes, dim, bias=bias, shard=shard)

    def target_logit(self, own: Tensor, label: Tensor) -> Tensor:
        """The logit of a sample's own class, before scaling, from its product with the centre; differentiable.  [g]"""
        return own

    @torch.no_grad()
    def compare(self, samples: Samples, centres: Tensor, bias: Tensor | None) -> Share:
        x, count = samples.x, max(len(samples.x), 1)
        grad_x, grad_centres = torch.zeros_like(x), torch.zeros_like(centres)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        numbers = torch.zeros(3, dtype=torch.float64, device=x.device)  # sums of loss, of similarity, of probability
        width = samples.widest * self.per_class * x.element_size() * 4  # logits, their gradient and two temporaries
        per_chunk = max(1, samples.chunk_bytes // width)
        for start in range(0, len(x), per_chunk):
            part = slice(start, start + per_chunk)
            products = torch.mm(x[part], centres.T)  # [g, num * K]
            if bias is not None:
                products += bias
            products, which = _nearest(products, self.per_class)  # [g, num]
            slope, sums = self._slopes_(products, samples.label[part], samples)
            numbers += sums
            slope *= self.scale / count
            slope = _spread(slope, which, self.per_class)
            grad_x[part] = slope @ centres
            grad_centres.addmm_(slope.T, x[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        stats = {}
        if samples.with_stats:
            num_own = ((samples.label >= samples.first) & (samples.label < samples.first + samples.num)).sum().double()
            stats = {
                "target_similarity": torch.stack([numbers[1], num_own]),
                "target_probability": torch.stack([numbers[2], num_own]),
            }
        return Share(numbers[0] / count, grad_x, grad_centres, grad_bias, stats)

    def _slopes_(self, products: Tensor, label: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Turn products [g, num] into the derivative of each sample's loss by product / scale; and the three sums.

        Collective: every rank calls it for the same samples.
        """
        place = label - samples.first
        own = (place >= 0) & (place < samples.num)  # samples whose class this rank holds
        zeros = products.new_zeros(len(label))
        target = by_target = zeros
        column = place.clamp(0, max(samples.num - 1, 0))[:, None]
        logits = products
        if samples.num:
            target = products.gather(1, column)[:, 0]
            with torch.enable_grad():
                leaf = target.detach().requires_grad_()
                shifted = self.target_logit(leaf, label)
                (by_target,) = torch.autograd.grad(shifted.sum(), leaf)
            logits.scatter_(1, column, torch.where(own, shifted.detach(), target)[:, None])
        logits.mul_(self.scale)
        own_logit = logits.gather(1, column)[:, 0] if samples.num else zeros
        everyone, highest = _log_sum_exp_(logits)  # [g]; logits become exp(logits - highest)
        softmax = logits.mul_((highest - everyone).exp()[:, None])
        probability = (own_logit - everyone).exp()
        if samples.num:
            by_own = torch.where(own, (softmax.gather(1, column)[:, 0] - 1) * by_target, softmax.gather(1, column)[:, 0])
            softmax.scatter_(1, column, by_own[:, None])
        sums = [t.where(own, zeros).sum().double() for t in (everyone - own_logit, target, probability)]
        return softmax, torch.stack(sums)


def _log_sum_exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Over the classes of all ranks, and this rank's maximum, [g] each; overwrites logits by exp(logits - maximum).

    Collective: every rank calls it. A rank without classes contributes nothing.
    """
    if logits.shape[1]:
        highest = logits.amax(1)
        sums = logits.sub_(highest[:, None]).exp_().sum(1)
    else:
        highest, sums = logits.new_full((len(logits),), -torch.inf), logits.new_zeros(len(logits))
    every = collectives.gather(torch.stack([highest, sums])[None], [1] * collectives.world())  # [W, 2, g]
    top = every[:, 0].amax(0)
    return top + (every[:, 1] * (every[:, 0] - top).exp()).sum(0).log(), highest


def _nearest(products: Tensor, per_class: int) -> tuple[Tensor, Tensor | None]:
    """Each class's nearest centre: products [g, num * K] -> [g, num], and which one it was."""
    if per_class == 1:
        return products, None
    nearest = products.view(len(products), -1, per_class).max(2)
    return nearest.values, nearest.indices


def _spread(slope: Tensor, which: Tensor | None, per_class: int) -> Tensor:
    """The reverse of `_nearest`: [g, num] -> [g, num * K], zero at the other centres."""
    if which is None:
        return slope
    full = slope.new_zeros((*slope.shape, per_class))
    return full.scatter_(2, which[:, :, None], slope[:, :, None]).flatten(1)
