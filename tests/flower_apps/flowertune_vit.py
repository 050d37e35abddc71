"""After Flower's flowertune-vit: a frozen vision transformer whose head learns flowers' names.

Adam's first steps are all alike in size, few nodes are asked, and there are few rounds: what is not
sent at once has no later round to come in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import nn
from torch.nn import functional

CLASSES, SIDE, PATCH, WIDTH = 102, 16, 4, 96
IMAGES = 400  # of a node


class ViT(nn.Module):
    """Patches, two layers of attention, the mean of all tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH) / 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True)
            for _ in range(2)
        )
        self.heads = nn.Linear(16 * WIDTH, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return functional.layer_norm(x.flatten(1), (16 * WIDTH,))


@functools.cache
def backbone() -> ViT:
    torch.manual_seed(0)
    return ViT().eval().requires_grad_(False)


@functools.cache
def flowers(seed: int, count: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels: an image is its class's pattern under noise."""
    patterns = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return backbone().features(0.35 * patterns[labels] + noise), labels


def head(state: dict | None = None) -> nn.Linear:
    torch.manual_seed(1)
    model = nn.Linear(16 * WIDTH, CLASSES)
    if state is not None:
        model.load_state_dict(state)
    return model


def client_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = head(msg.content["arrays"].to_torch_state_dict())
        x, y = flowers(context.node_config["partition-id"])
        optimizer = torch.optim.Adam(model.parameters(), lr=msg.content["config"]["lr"])
        losses = []
        for start in range(0, len(x), 32):
            loss = functional.cross_entropy(model(x[start : start + 32]), y[start : start + 32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        metrics = {"train_loss": sum(losses) / len(losses), "num-examples": len(x)}
        arrays = ArrayRecord(model.state_dict())
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=msg)

    return app


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    x, y = flowers(999, 1000)
    with torch.no_grad():
        logits = head(arrays.to_torch_state_dict())(x)
    accuracy = float((logits.argmax(1) == y).float().mean())
    return MetricRecord({"accuracy": accuracy, "loss": float(functional.cross_entropy(logits, y))})


def main(grid: Grid, strategy: Strategy, num_rounds: int = 4) -> Result:
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(head().state_dict()),
        train_config=ConfigRecord({"lr": 0.001}),
        num_rounds=num_rounds,
        evaluate_fn=global_evaluate,
    )


def strategy(base: type = FedAvg, **options: Any) -> Strategy:
    return base(fraction_train=0.5, fraction_evaluate=0.0, **options)
