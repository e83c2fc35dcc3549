"""How many ids do two answers share? What that says of who wrote them, beside `real_pool_authors`.

Averages of vectors do not see whether two answers use the same rare ids; two answers of one policy
do so more often than two of different policies. Ids of the prompt are left out and repeated ones
count once, which is the Jaccard coefficient of two sets. What a decoder can average are the three
numbers of `numbers`; a small MLP, fitted on ranked answers, makes evidence of them.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FRESH = 60
"""Fresh ids of an answer at which the entry of how many they are is a half."""
ROWS = 8
"""Of the MLP."""
JITTER = 0.03
"""Of the numbers while the MLP learns: a decoder has them a little wrong."""
_STEPS = 250


@dataclass(frozen=True)
class Overlap:
    """Evidence: `ratio` times the logarithm of a likelihood ratio, and an MLP of `numbers`.

    The MLP is `down @ (silu(gate @ x) * (up @ x))` with `gate` and `up` (ROWS, 4), `down` (ROWS,)
    and x the three numbers and a 1.
    """

    ratio: float
    gate: Tensor
    up: Tensor
    down: Tensor

    def evidence(self, likelihood: Tensor, x: Tensor) -> Tensor:
        """That two answers are of one policy, (...), from (...) and (..., 3)."""
        return self.ratio * likelihood + _mlp(self.gate, self.up, self.down, x)


def fresh(answer: list[int], prompt: list[int]) -> frozenset[int]:
    """Ids of an answer that are not the prompt's."""
    return frozenset(answer).difference(prompt)


def numbers(reference: Set[int], candidate: Set[int]) -> tuple[float, float, float]:
    """Share of the candidate's fresh ids that the reference lacks, and how few both have.

    The first is a share of the candidate's fresh ids and FRESH more, so that few ids say little.
    """
    own = FRESH + len(candidate)
    return len(candidate - reference) / own, FRESH / own, FRESH / (FRESH + len(reference))


def fit_overlap(likelihood: Tensor, x: Tensor, *, seed: int = 0) -> Overlap:
    """Fit on groups whose first candidate is of the reference's policy.

    Args:
        likelihood: (n, K) logarithm of the likelihood ratio, of policies that it was not fitted on.
        x: (n, K, 3) `numbers`.
        seed: of the first weights.
    """
    generator = torch.Generator().manual_seed(seed)
    middle, spread = x.mean((0, 1)), x.std((0, 1)).clamp(min=1e-3)
    ratio = nn.Parameter(torch.tensor(0.4))
    gate, up = (nn.Parameter(0.5 * torch.randn(ROWS, 4, generator=generator)) for _ in range(2))
    down = nn.Parameter(torch.zeros(ROWS))
    optimiser = torch.optim.AdamW([ratio, gate, up, down], lr=0.02, weight_decay=1e-3)
    standard = (x - middle) / spread
    for _ in range(_STEPS):
        wrong = JITTER * torch.randn(len(x), 1, 3, generator=generator) / spread
        scores = Overlap(ratio, gate, up, down).evidence(likelihood, standard + wrong)
        loss = -functional.logsigmoid(scores[:, :1] - scores[:, 1:]).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        back = torch.diag(torch.cat([1 / spread, torch.ones(1)]))
        back[:3, 3] = -middle / spread
        return Overlap(ratio.item(), gate @ back, up @ back, down.detach())


def _mlp(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    x = functional.pad(x, (0, 1), value=1.0)
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down
