"""PEFT adapters: models and folders to task vectors and back, and files of Updates.

>>> from compeft_fl.adapters import load_folder
"""

from __future__ import annotations

from compeft_fl.adapters.files import StoredUpdate, read_update, restore, write_update
from compeft_fl.adapters.folders import (
    Adapter,
    check_output,
    load_folder,
    load_peft_state,
    open_folder,
    parse_config,
    peft_state,
    require_torch,
    save_folder,
)
from compeft_fl.adapters.lora_ranks import cut_folder, lora_settings
from compeft_fl.adapters.starts import Start, start_of, task_vector

__all__ = [
    "Adapter",
    "Start",
    "StoredUpdate",
    "check_output",
    "cut_folder",
    "load_folder",
    "load_peft_state",
    "lora_settings",
    "open_folder",
    "parse_config",
    "peft_state",
    "read_update",
    "require_torch",
    "restore",
    "save_folder",
    "start_of",
    "task_vector",
    "write_update",
]
