"""The GPU that these tests run on, and why they do not run where there is none."""

from __future__ import annotations

import pytest
import torch

CPU, CARD = torch.device("cpu"), torch.device("cuda")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here")
