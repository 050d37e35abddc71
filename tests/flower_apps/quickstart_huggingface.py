"""After Flower's quickstart-huggingface: replies to evaluate messages carry the model too."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_apps import data, quickstart_pytorch

main, strategy = quickstart_pytorch.main, quickstart_pytorch.strategy


def client_app(*mods: Any) -> ClientApp:
    app = quickstart_pytorch.training_app(*mods)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        model = data.net(msg.content["arrays"].to_torch_state_dict())
        loss, accuracy = data.score(model, 100 + context.node_config["partition-id"])
        metrics = {"val_loss": loss, "val_accuracy": accuracy, "num-examples": 400}
        arrays = ArrayRecord(model.state_dict())
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=msg)

    return app
