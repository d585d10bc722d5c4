"""How many of the triplets that records give are in order."""

from __future__ import annotations

import torch

from trainer.evaluate import Embedded


def triplet_accuracy(found: Embedded) -> float | None:
    """Share of given (anchor, positive, negative) whose positive is nearer to the anchor than the negative; a tie is half.

    The similarity precision of Wang et al. 2014, section 6.2. Rows come in the order of records and views; None where no
    record has an explicit negative.
    """
    record, view = found.sample[:, :2], found.sample[:, 2]
    new = torch.ones(len(view), dtype=torch.bool, device=view.device)
    new[1:] = (record[1:] != record[:-1]).any(1)
    anchor = new.nonzero()[:, 0][new.cumsum(0) - 1]  # [N] the first row of each row's record
    negative = ((view > 1) & (view[anchor] == 0)).nonzero()[:, 0]
    if not len(negative):
        return None
    a, p, n = (found.vectors[rows].double() for rows in (anchor[negative], anchor[negative] + 1, negative))
    if found.raw:
        lead = (a - n).norm(dim=1) - (a - p).norm(dim=1)
    else:
        lead = (a * p).sum(1) - (a * n).sum(1)
    return float(((lead > 0).double() + 0.5 * (lead == 0).double()).mean())
