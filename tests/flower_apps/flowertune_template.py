"""An app as FlowerTune's template writes it: LoRA by PEFT's own functions, 2 of 20 nodes a round.

The strategy is a FedAvg that walks over messages and replies before and after super, to count bytes
against a budget; the evaluate function saves an adapter every n rounds; the learning rate falls by
the round. Only the model and the data are small, and SFTTrainer is transformers' Trainer.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tiny_llama
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

NODES, ROUNDS, SAVE_EVERY = 20, 10, 4
LEARNING_RATE_MAX, LEARNING_RATE_MIN = 3e-2, 1e-3
BUDGET_MB = 200_000
WORDS = tiny_llama.TEXT.split(".")[0].split()


def cosine_annealing(current: int, total: int, most: float, least: float) -> float:
    return least + 0.5 * (most - least) * (1 + math.cos(math.pi * current / total))


@functools.cache
def base() -> tuple[Any, Any]:
    return tiny_llama.make()


def get_model() -> Any:
    """The base with a fresh adapter, always the same."""
    model = tiny_llama.make()[0]
    torch.manual_seed(1)
    lora = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def load_data(node: int) -> list[dict[str, list[int]]]:
    """A node's prompts with what is to be said to them."""
    tokenizer = base()[1]
    kinds = ("tool", "library", "game", "font")
    rows = [(word, kinds[i % 4]) for i, word in enumerate(WORDS)]
    own = [rows[(node + i) % len(rows)] for i in range(8)]
    texts = [f"<|user|>What is {word}?<|end|><|assistant|>a {kind}<|end|>" for word, kind in own]
    return [{"input_ids": ids} for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def loss_of(arrays: ArrayRecord) -> float:
    """The mean loss of an adapter over all rows."""
    model = get_model()
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    collate = DataCollatorForLanguageModeling(base()[1], mlm=False)
    with torch.inference_mode():
        return float(
            model.eval()(**collate([row for i in (0, 8, 16) for row in load_data(i)])).loss
        )


def client_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        chance = random.getstate()  # a Trainer sets it, in another process than the server's
        trainset = load_data(int(context.node_config["partition-id"]))
        model = get_model()
        set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
        rate = cosine_annealing(
            msg.content["config"]["server-round"], ROUNDS, LEARNING_RATE_MAX, LEARNING_RATE_MIN
        )
        arguments = TrainingArguments(
            output_dir=msg.content["config"]["save_path"],
            learning_rate=rate,
            per_device_train_batch_size=8,
            max_steps=5,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=trainset,
            data_collator=DataCollatorForLanguageModeling(base()[1], mlm=False),
        )
        results = trainer.train()
        random.setstate(chance)
        content = RecordDict(
            {
                "arrays": ArrayRecord(get_peft_model_state_dict(model)),
                "metrics": MetricRecord(
                    {"train_loss": results.training_loss, "num-examples": len(trainset)}
                ),
            }
        )
        return Message(content=content, reply_to=msg)

    return app


class CommunicationTracker:
    """Communication costs over the rounds."""

    def __init__(self) -> None:
        self.curr_comm_cost = 0.0
        self.used: list[float] = []

    def track(self, messages: Iterable[Message]) -> None:
        cost = sum(
            record.count_bytes() / (1024**2)
            for msg in messages
            if msg.has_content()
            for record in msg.content.array_records.values()
        )
        self.curr_comm_cost += cost
        self.used.append(cost)
        assert self.curr_comm_cost < BUDGET_MB


def flowertune(parent: type = FedAvg) -> type:
    """The template's strategy, on FedAvg or what stands in its place."""

    class FlowerTuneLlm(parent):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.comm_tracker = CommunicationTracker()

        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            messages = super().configure_train(server_round, arrays, config, grid)
            self.comm_tracker.track(messages)
            return messages

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            self.comm_tracker.track(replies)
            arrays, metrics = super().aggregate_train(server_round, replies)
            return arrays, metrics

    return FlowerTuneLlm


def get_evaluate_fn(save_path: Path) -> Callable[[int, ArrayRecord], MetricRecord]:
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round != 0 and (server_round == ROUNDS or server_round % SAVE_EVERY == 0):
            model = get_model()
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            model.save_pretrained(f"{save_path}/peft_{server_round}")
        return MetricRecord()

    return evaluate


def main(grid: Grid, strategy: FedAvg, save_path: Path) -> Any:
    initial = ArrayRecord(get_peft_model_state_dict(get_model()))
    return strategy.start(
        grid=grid,
        initial_arrays=initial,
        train_config=ConfigRecord({"save_path": str(save_path)}),
        num_rounds=ROUNDS,
        evaluate_fn=get_evaluate_fn(save_path),
    )


def options() -> dict[str, Any]:
    return {"fraction_train": 2 / NODES, "fraction_evaluate": 0.0, "min_available_nodes": NODES}
