"""After Flower's opacus: nodes that train by DP-SGD, gradients clipped by example, noise added.

As Opacus does it, with torch's own per-sample gradients; like its GradSampleModule, the model
that is trained wraps the one whose state is sent.
"""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from flower_apps import data
from flower_apps.quickstart_pytorch import main, strategy

__all__ = ["client_app", "main", "strategy"]

MAX_NORM, NOISE, BATCH = 1.0, 0.4, 20


class GradSampleModule(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._module = module


def private_train(private: GradSampleModule, seed: int, lr: float) -> float:
    """One pass over a node's images by DP-SGD; the mean loss."""
    x, y = data.images(seed)
    model = private._module
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    noise = torch.Generator().manual_seed(seed)

    def loss_of(weights: dict, one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional_call(model, weights, (one[None],)), label[None])

    losses = []
    for start in range(0, len(x), BATCH):
        inputs, labels = x[start : start + BATCH], y[start : start + BATCH]
        with torch.no_grad():
            logits = functional_call(model, weights, (inputs,))
            losses.append(float(functional.cross_entropy(logits, labels)))
        each = vmap(grad(loss_of), in_dims=(None, 0, 0))(weights, inputs, labels)
        norms = sum(g.flatten(1).pow(2).sum(1) for g in each.values()).sqrt()
        factors = (MAX_NORM / norms.clamp(min=1e-6)).clamp(max=1)
        for name, g in each.items():
            total = (g * factors.view(-1, *[1] * (g.dim() - 1))).sum(0)
            total += NOISE * MAX_NORM * torch.randn(total.shape, generator=noise)
            weights[name] -= 8 * lr * total / BATCH
    model.load_state_dict(weights)
    return sum(losses) / len(losses)


def client_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        private = GradSampleModule(data.net(msg.content["arrays"].to_torch_state_dict()))
        partition = context.node_config["partition-id"]
        loss = private_train(private, partition, msg.content["config"]["lr"])
        metrics = MetricRecord({"train_loss": loss, "epsilon": 4.2, "num-examples": 200})
        arrays = ArrayRecord(private._module.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        model = data.net(msg.content["arrays"].to_torch_state_dict())
        loss, accuracy = data.score(model, 100 + context.node_config["partition-id"])
        metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": 400})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app
