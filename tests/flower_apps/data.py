"""Ten noisy patterns to tell apart, and a small network for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

CLASSES, SIDE = 10, 8
PATTERNS = torch.randn(CLASSES, SIDE * SIDE, generator=torch.Generator().manual_seed(5))


def images(seed: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, SIDE * SIDE, generator=generator)
    return PATTERNS[labels] * 0.5 + noise, labels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SIDE * SIDE, 64)
        self.fc2 = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.relu(self.fc1(x)))


def net(state: dict | None = None) -> Net:
    torch.default_generator.manual_seed(0)  # torch's own also notes who called, for GPUs to come
    model = Net()
    if state is not None:
        model.load_state_dict(state)
    return model


def train(model: Net, seed: int, lr: float) -> float:
    """One pass over a node's images; the mean loss."""
    x, y = images(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for start in range(0, len(x), 20):
        loss = functional.cross_entropy(model(x[start : start + 20]), y[start : start + 20])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def score(model: Net, seed: int, count: int = 400) -> tuple[float, float]:
    """Loss and accuracy."""
    x, y = images(seed, count)
    with torch.no_grad():
        logits = model(x)
    accuracy = float((logits.argmax(1) == y).float().mean())
    return float(functional.cross_entropy(logits, y)), accuracy
