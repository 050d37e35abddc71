"""The ready-made app with nodes that differ: ranks by tier, B alone, densities by link."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from test_app_federation import NODES, run

from compeft_fl.adapters import Adapter, cut_folder, load_folder, lora_settings, save_folder
from compeft_fl.app.config import AppConfig
from compeft_fl.app.node_keys import link_of, of_rank, rank_of, same_run, tensor_rules
from compeft_fl.errors import AdapterError, ConfigError

# --- LoRA's settings at a lower rank -----------------------------------------------------------


@pytest.mark.parametrize("root", [False, True])
def test_the_scaling_of_each_module_stays(root):
    whole = {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": root,
        "rank_pattern": {"q": 4, "v": 16},
        "alpha_pattern": {"q": 7, "v": 32},
    }
    for rank in (1, 3, 6, 8, 20):
        cut = lora_settings(whole, rank)
        pairs = [
            (12, 8, cut["lora_alpha"], cut["r"]),
            (7, 4, cut["alpha_pattern"]["q"], cut["rank_pattern"]["q"]),
            (32, 16, cut["alpha_pattern"]["v"], cut["rank_pattern"]["v"]),
        ]
        for alpha, r, its_alpha, its_r in pairs:
            assert its_r == min(rank, r)
            power = 0.5 if root else 1.0
            assert its_alpha / its_r**power == pytest.approx(alpha / r**power)
    one_sided = lora_settings({"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}}, 2)
    assert one_sided["alpha_pattern"] == {"q": 8}  # 16 / 4 = 8 / 2
    assert lora_settings({"r": 8, "lora_alpha": 16, "alpha_pattern": {"q": 4}}, 2)[
        "rank_pattern"
    ] == {"q": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 16}, "LoRA's rank under 'r'"),
        ({"r": 8, "peft_type": "ADALORA"}, "expected LoRA"),
        (
            {"r": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"v": 2}},
            "rank_pattern and alpha_pattern of the same modules",
        ),
    ],
)
def test_settings_that_have_no_meaning_at_another_rank_are_refused(settings, said):
    with pytest.raises(AdapterError, match=said):
        lora_settings(settings, 2)


def test_a_rank_s_part_of_a_folder_is_a_folder_that_peft_loads(tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))

    network = get_peft_model(base(), LoraConfig(r=4, lora_alpha=10, target_modules=["0", "1"]))
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    network.save_pretrained(tmp_path / "whole")
    for rank in (1, 2, 4):
        cut_folder(tmp_path / "whole", rank, tmp_path / f"{rank}")
        loaded = PeftModel.from_pretrained(base(), tmp_path / f"{rank}")
        layer, whole = loaded.base_model.model[1], network.base_model.model[1]
        a, b = (getattr(whole, x)["default"].weight for x in ("lora_A", "lora_B"))
        expected = 10 / 4 * b[:, :rank] @ a[:rank]
        torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    with pytest.raises(AdapterError):
        cut_folder(tmp_path / "nothing", 2, tmp_path / "x")
    save_folder(Adapter({"peft_type": "IA3"}, {"ia3_l": np.ones(3, "f4")}), tmp_path / "ia3")
    with pytest.raises(AdapterError, match="LoRA's rank"):
        cut_folder(tmp_path / "ia3", 2, tmp_path / "x")


# --- keys --------------------------------------------------------------------------------------


def test_a_node_s_rank_and_link_by_tier():
    config = AppConfig(ranks="2, 4,8", links="1,10,100.5")
    of = [({"partition-id": index}) for index in range(4)]
    assert [rank_of(config, node) for node in of] == [2, 4, 8, 2]
    assert [link_of(config, node) for node in of] == [1.0, 10.0, 100.5, 1.0]
    assert rank_of(config, {"partition-id": 0, "tier": 2}) == 8
    assert rank_of(config, {"partition-id": 0, "lora-rank": 4}) == 4
    assert link_of(config, {"partition-id": 0, "link-mbps": 5.0}) is None  # the mod takes that
    assert rank_of(AppConfig(), {"partition-id": 1}) == 0
    assert link_of(AppConfig(), {"partition-id": 1}) is None
    for node in ({"tier": 3}, {"tier": -1}, {"tier": "large"}, {"lora-rank": 3}):
        with pytest.raises(ConfigError, match="of the node config"):
            rank_of(config, node)


@pytest.mark.parametrize(
    "keys",
    [
        {"ranks": "2,4"},  # none of them the run's
        {"ranks": "2,16"},
        {"ranks": "2;8"},
        {"ranks": "0,8"},
        {"ranks": "8", "peft_method": "ia3"},
        {"ranks": "2,8", "strategy": "fedavg"},
        {"ranks": "2,8", "strategy": "ties", "rank_merge": "product"},
        {"rank_merge": "svd"},
        {"trainable": "A"},
        {"trainable": "B", "peft_method": "ia3"},
        {"links": "1,fast"},
        {"links": "0"},
        {"links": "inf"},
        {"upload_seconds": -1.0},
        {"upload_seconds": 1.0, "codec": "dense"},
        {"upload_seconds": 1.0, "strategy": "fedavg"},
        {"upload_tiers": "0.1,1.5"},
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys):
    with pytest.raises(ConfigError):
        AppConfig(**keys)


def test_the_configuration_of_a_rank():
    config = AppConfig(
        ranks="2,8", peft={"r": 8}, peft_options='{"use_rslora": true, "bias": "none"}'
    )
    own = of_rank(config, 2)
    assert (own.peft["r"], own.peft["lora_alpha"]) == (2, 8)
    assert json.loads(own.peft_options) == {"use_rslora": True, "bias": "none"}
    assert of_rank(config, 8) is config
    assert of_rank(config, 0) is config
    assert same_run(config, own)
    assert not same_run(config, dataclasses.replace(own, seed=1))
    assert tensor_rules(config) == {}


# --- federations -------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"trainable": "B"}, {"rank_merge": "cover"}])
def test_ranks_by_tier_in_one_federation(tiny_config, tmp_path, keys):
    import torch
    from peft import PeftModel
    from transformers import BertModel

    config = dataclasses.replace(tiny_config, ranks="1,2,8", **keys)
    summary = run(config, tmp_path)
    assert summary["replies"] == [NODES] * 2
    nodes = summary["ledger"]["by_node"].values()
    assert sorted(node["rank"] for node in nodes) == [1, 2, 8]
    half = 2 if keys.get("trainable") == "B" else 1
    dense = 4 * 2 * 2 * 2 * 32 * (1 + 2 + 8) // half
    assert summary["uplink_dense_bytes"] == [dense] * 2
    assert summary["downlink_dense_bytes"][1] == dense  # before, no node had said its rank
    assert summary["downlink_payload_bytes"][0] == 0  # nodes make their parts of the start
    whole = load_folder(tmp_path / "adapter")
    for rank in (1, 2, 8):
        folder = tmp_path / "adapters" / f"rank-{rank}"
        part = load_folder(folder)
        assert part.config["lora_alpha"] / part.config["r"] == 2
        loaded = PeftModel.from_pretrained(BertModel.from_pretrained(config.model), folder)
        assert loaded.peft_config["default"].r == rank
        for name, value in whole.state.items():
            keep = value[:rank] if "lora_A" in name else value[:, :rank]
            assert torch.equal(torch.as_tensor(part.state[name]), torch.as_tensor(keep))


def test_b_alone_takes_half_the_bytes_and_leaves_a_as_the_seed_made_it(tiny_config, tmp_path):
    both = run(tiny_config, tmp_path / "both")
    alone = run(dataclasses.replace(tiny_config, trainable="B"), tmp_path / "alone")
    assert alone["num_parameters"] == both["num_parameters"] / 2
    assert alone["uplink_dense_bytes"] == [x // 2 for x in both["uplink_dense_bytes"]]
    assert sum(alone["uplink_payload_bytes"]) < 0.7 * sum(both["uplink_payload_bytes"])
    assert alone["downlink_payload_bytes"][0] == 0
    assert sum(alone["ledger"]["downlink_raw_bytes"]) == sum(alone["downlink_dense_bytes"])
    run(dataclasses.replace(tiny_config, rounds=0), tmp_path / "start")
    start, end = (load_folder(tmp_path / n / "adapter").state for n in ("start", "alone"))
    for name, value in start.items():
        assert np.array_equal(value, end[name]) == ("lora_A" in name)


def test_densities_by_link(tiny_config, tmp_path):
    config = dataclasses.replace(
        tiny_config, rounds=3, links="0.2,1,100", upload_seconds=0.02, upload_tiers="0.02,0.1,0.5,8"
    )
    summary = run(config, tmp_path)
    nodes = sorted(summary["ledger"]["by_node"].values(), key=lambda node: node["link_mbps"])
    assert [node["link_mbps"] for node in nodes] == pytest.approx([0.2, 1.0, 100.0])
    sizes = [node["payload_bytes"] for node in nodes]
    assert sizes[0] < sizes[1] < sizes[2]
    assert all(node["transfer_seconds"] >= 0 for node in nodes)
    assert summary["replies"] == [NODES] * 3
