"""After Flower's quickstart-sklearn: logistic regression in float64, arrays without names."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flower_apps import data


def images(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    x, y = data.images(seed, count)
    return x.numpy().astype(np.float64), y.numpy()


def predict(coef: np.ndarray, intercept: np.ndarray, x: np.ndarray) -> np.ndarray:
    logits = x @ coef.T + intercept
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def accuracy(parameters: list[np.ndarray], seed: int) -> float:
    x, y = images(seed, 400)
    return float((predict(*parameters, x).argmax(1) == y).mean())


def client_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        coef, intercept = msg.content["arrays"].to_numpy_ndarrays()
        x, y = images(context.node_config["partition-id"])
        for _ in range(20):
            error = predict(coef, intercept, x) - np.eye(data.CLASSES)[y]
            coef = coef - 0.05 * error.T @ x / len(x)
            intercept = intercept - 0.05 * error.mean(0)
        metrics = MetricRecord({"num-examples": len(x)})
        content = RecordDict({"arrays": ArrayRecord([coef, intercept]), "metrics": metrics})
        return Message(content=content, reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        found = accuracy(msg.content["arrays"].to_numpy_ndarrays(), 100)
        metrics = MetricRecord({"accuracy": found, "num-examples": 400})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)

    return app


def main(grid: Grid, strategy: Strategy, num_rounds: int = 8) -> Result:
    start = [np.zeros((data.CLASSES, data.SIDE**2)), np.zeros(data.CLASSES)]
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(start),
        train_config=ConfigRecord(),
        num_rounds=num_rounds,
        evaluate_fn=lambda _, arrays: MetricRecord(
            {"accuracy": accuracy(arrays.to_numpy_ndarrays(), 999)}
        ),
    )


def strategy() -> FedAvg:
    return FedAvg(fraction_evaluate=0.5)
