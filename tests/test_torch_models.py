"""Models of torch and adapters of PEFT, whole, through a federation."""

from __future__ import annotations

from typing import Any

import adapter_folders
import numpy as np
import pytest
import tiny
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid

from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage, Compressed

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

PROTOTYPES = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(5))


class Net(torch.nn.Module):
    """Two convolutions, each with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.nn.Sequential
        pool, relu = torch.nn.MaxPool2d(2), torch.nn.ReLU()
        self.one = block(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8), relu, pool)
        self.two = block(torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.BatchNorm2d(16), relu, pool)
        self.head = torch.nn.Linear(16 * 16, 10)

    def forward(self, images: Any) -> Any:
        return self.head(self.two(self.one(images)).flatten(1))


def images(seed: int, number: int = 200) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (number,), generator=generator)
    noise = torch.randn(number, 1, 16, 16, generator=generator)
    return PROTOTYPES[labels] * 0.5 + 0.7 * noise + 0.5, labels


def cnn_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = Net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        inputs, labels = images(int(context.node_config["partition-id"]))
        for start in range(0, 200, 20):
            batch = slice(start, start + 20)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 200})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def accuracy_of(strategy: Any, *mods: Any) -> tuple[float, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = Net()
    grid = LocalGrid(cnn_app(*mods), 3)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=7)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    inputs, labels = images(999, 500)
    with torch.no_grad():
        right = (model.eval()(inputs).argmax(1) == labels).float().mean()
    return float(right), tiny.state_of(result.arrays)


@pytest.mark.parametrize("kind", ["average", "compressed"])
def test_a_cnn_with_batch_norm_learns_as_with_the_stock_strategy(kind):
    stock, _ = accuracy_of(FedAvg(fraction_evaluate=0))
    ours = {
        "average": ComPEFTAverage(fraction_evaluate=0),
        "compressed": Compressed(FedAvg(fraction_evaluate=0)),
    }[kind]
    accuracy, state = accuracy_of(ours, CompressionMod())
    assert accuracy > stock - 0.06
    for name, value in state.items():
        if name.endswith("running_var"):
            assert (value > 0).all()
        if name.endswith("num_batches_tracked"):
            assert value.dtype == np.int64
            assert value == 70


CONFIGS = {
    "shira": lambda: peft.ShiraConfig(r=2, random_seed=1, target_modules=["query", "value"]),
    "frod": lambda: peft.FrodConfig(target_modules=["query"]),
    "vblora": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=8, topk=2, target_modules=["query", "value"]
    ),
    "vblora, indices alone": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=8, topk=2, save_only_topk_weights=True,
        target_modules=["query", "value"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_indices_of_adapters_are_exact(kind):
    """Each node trains the entries that the server's indices name, whatever its own would be."""
    model = peft.get_peft_model(adapter_folders.base_model(), CONFIGS[kind]())
    state = peft.get_peft_model_state_dict(model)
    start = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
    integers = [name for name, value in start.items() if value.dtype.kind == "i" or "ind" in name]
    assert integers or kind == "vblora"

    def train(arrays: dict[str, np.ndarray], context: Context) -> dict[str, np.ndarray]:
        assert list(arrays) == list(start)
        for name in integers:
            assert arrays[name].tobytes() == start[name].tobytes()
        return {
            name: value + np.float32(0.1) if value.dtype.kind == "f" else value
            for name, value in arrays.items()
        }

    app = tiny.client_app(CompressionMod(density=0.3), train=train)
    result = ComPEFTAverage(fraction_evaluate=0).start(
        LocalGrid(app, 3), tiny.arrays(start), num_rounds=3
    )
    found = tiny.state_of(result.arrays)
    assert list(found) == list(start)
    for name in integers:
        assert found[name].dtype == start[name].dtype
        assert found[name].tobytes() == start[name].tobytes()
    if "alone" not in kind:  # which PEFT itself loads for inference only
        trained = {name: torch.from_numpy(value) for name, value in found.items()}
        peft.set_peft_model_state_dict(model, trained)
        back = peft.get_peft_model_state_dict(model)
        for name, value in found.items():
            np.testing.assert_array_equal(back[name].detach().numpy(), value)
