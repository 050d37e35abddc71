"""After Flower's quickstart-pytorch: FedAvg over a whole model that is trained and evaluated."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flower_apps import data


def training_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = data.net(msg.content["arrays"].to_torch_state_dict())
        partition = context.node_config["partition-id"]
        loss = data.train(model, partition, msg.content["config"]["lr"])
        metrics = {"train_loss": loss, "num-examples": 200}
        arrays = ArrayRecord(model.state_dict())
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=msg)

    return app


def client_app(*mods: Any) -> ClientApp:
    app = training_app(*mods)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        model = data.net(msg.content["arrays"].to_torch_state_dict())
        loss, accuracy = data.score(model, 100 + context.node_config["partition-id"])
        metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": 400}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=msg)

    return app


def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    loss, accuracy = data.score(data.net(arrays.to_torch_state_dict()), 999)
    return MetricRecord({"accuracy": accuracy, "loss": loss})


def main(grid: Grid, strategy: Strategy, num_rounds: int = 8) -> Result:
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(data.net().state_dict()),
        train_config=ConfigRecord({"lr": 0.05}),
        num_rounds=num_rounds,
        evaluate_fn=global_evaluate,
    )


def strategy() -> FedAvg:
    return FedAvg(fraction_evaluate=0.5)
