"""The settings of PEFT's methods: which give tensors meaning, and which are of training only.

From PEFT's configuration classes, version 0.21; a test compares. `compeft_fl.adapters.meaning` says
what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["BASE", "FREE", "INITS", "METHODS", "PLACES", "Method"]

# Of every method. Where tensors are is in their names, and which are biases too.
BASE: Final[Mapping[str, Any]] = {"base_model_name_or_path": None, "revision": None}
PLACES: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
FREE: Final = frozenset(
    [
        *PLACES,
        "auto_mapping",
        "bias",
        "feedforward_modules",
        "inference_mode",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "task_type",
    ]
)
INITS: Final = ("init_weights", "init_lora_weights", "init_ia3_weights")


@dataclass(frozen=True)
class Method:
    """The settings of one PEFT method.

    Attributes
    ----------
    meaning : dict of str to object
        The settings that must be the same, with PEFT's defaults.
    training : frozenset of str
        Those that may differ.
    random : tuple of str
        Ways to draw the start after which the tensors mean the same; so do True and False.
    only_with : dict of str to (str, object)
        Settings that are used only where another one has a value, or (None) any but None or False.
    """

    meaning: Mapping[str, Any]
    training: frozenset[str]
    random: tuple[str, ...]
    only_with: Mapping[str, tuple[str, Any]]


def _method(
    training: str = "",
    *,
    random: tuple[str, ...] = (),
    places: bool = False,
    only_with: Mapping[str, tuple[str, Any]] | None = None,
    **meaning: Any,
) -> Method:
    """A method's entry. ``places``: its tensors' names don't say which modules they are for."""
    if places:
        meaning |= dict.fromkeys(PLACES)
    return Method(meaning, frozenset(training.split()), random, only_with or {})


_LORA: Final[Mapping[str, Any]] = {
    "r": 8,
    "lora_alpha": 8,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "init_lora_weights": True,
    "rank_pattern": None,
    "alpha_pattern": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
    "enable_lora": None,  # of PEFT 0.2
}
_LORA_TRAINING: Final = (
    "lora_dropout megatron_config megatron_core loftq_config eva_config corda_config "
    "lora_ga_config velora_config runtime_config merge_weights"
)
_LORA_RANDOM: Final = ("gaussian", "eva", "orthogonal")
_LORA_WITH: Final = {"qalora_group_size": ("use_qalora", None)}
_PROMPT: Final[Mapping[str, Any]] = {
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_transformer_submodules": None,
    "num_attention_heads": None,
    "num_layers": None,
    "task_type": None,
}
_PROMPT_TRAINING: Final = (
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
)
_CAYLEY: Final = {"num_cayley_neumann_terms": ("use_cayley_neumann", None)}

METHODS: Final[Mapping[str, Method]] = {
    "LORA": _method(_LORA_TRAINING, random=_LORA_RANDOM, only_with=_LORA_WITH, **_LORA),
    "ADALORA": _method(
        f"{_LORA_TRAINING} target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
        random=_LORA_RANDOM,
        only_with=_LORA_WITH,
        **_LORA,
        init_r=12,
    ),
    "ADAMSS": _method(
        "use_asa asa_target_subspaces init_warmup final_warmup mask_interval asa_importance_beta "
        "asa_uncertainty_beta asa_schedule_exponent",
        random=("orthogonal",),
        only_with={"svd_threshold": ("use_dynamic_rank", None)},
        r=100,
        num_subspaces=5,
        subspace_rank=1,
        init_weights="orthogonal",
        use_dynamic_rank=False,
        svd_threshold=0.1,
        random_seed=0,
    ),
    "ADAPTION_PROMPT": _method(adapter_len=None, adapter_layers=None),
    "BEFT": _method(init_weights=True),
    "BOFT": _method(
        "boft_dropout",
        boft_block_size=4,
        boft_block_num=0,
        boft_n_butterfly_factor=1,
        fan_in_fan_out=False,
        init_weights=True,
    ),
    "C3A": _method(
        random=("gaussian", "kaiming_uniform", "xavier_uniform"),
        block_size=256,
        block_size_pattern=None,
        init_weights="xavier_uniform",
    ),
    "CARTRIDGE": _method("num_frozen_tokens", **_PROMPT),
    "CPT": _method(
        "opt_weighted_loss_type opt_loss_decay_factor opt_projection_epsilon "
        "opt_projection_format_epsilon tokenizer_name_or_path",
        **_PROMPT,
        cpt_token_ids=None,
        cpt_mask=None,
        cpt_tokens_type_mask=None,
    ),
    "DEFT": _method(
        "init_scale deft_dropout",
        r=8,
        decomposition_method="relu",
        alpha=None,
        para=False,
        fan_in_fan_out=False,
        init_weights=True,
    ),
    "DELORA": _method(
        "delora_lambda module_dropout lambda_pattern", r=8, init_weights=True, rank_pattern=None
    ),
    "FOURIERFT": _method(
        n_frequency=1000,
        scaling=150.0,
        random_loc_seed=777,
        fan_in_fan_out=False,
        n_frequency_pattern=None,
        init_weights=False,
    ),
    "FROD": _method(
        "frod_dropout progressbar runtime_offload_base_weight",
        projection_prng_key=0,
        save_projection=True,
        fan_in_fan_out=False,
        init_weights=True,
        sparse_rate=0.01,
        regularization_alpha=0.001,
    ),
    "GLORA": _method(
        r=8, config_A_B="lora", config_C="lora", config_D_E="constant", init_weights=True
    ),
    "GRALORA": _method(
        "gralora_dropout",
        r=32,
        hybrid_r=0,
        alpha=64,
        gralora_k=2,
        fan_in_fan_out=False,
        init_weights=True,
    ),
    "HIRA": _method(
        "hira_dropout",
        random=("gaussian",),
        r=32,
        fan_in_fan_out=False,
        init_weights=True,
        rank_pattern=None,
    ),
    "HRA": _method(r=8, apply_GS=False, init_weights=True),
    "IA3": _method(fan_in_fan_out=False, init_ia3_weights=True),
    "LILY": _method(r=32, stride_A=1, num_B=2, scaling=1.0, init_weights=True),
    "LN_TUNING": _method(),
    "LOHA": _method(
        "rank_dropout module_dropout",
        rank_pattern=None,
        alpha_pattern=None,
        r=8,
        alpha=8,
        use_effective_conv2d=False,
        init_weights=True,
    ),
    "LOKR": _method(
        "rank_dropout module_dropout rank_dropout_scale",
        random=("lycoris",),
        rank_pattern=None,
        alpha_pattern=None,
        r=8,
        alpha=8,
        use_effective_conv2d=False,
        decompose_both=False,
        decompose_factor=-1,
        init_weights=True,
    ),
    "MISS": _method("miss_dropout", r=64, mini_r=1, init_weights=True),
    "OFT": _method(
        "module_dropout",
        only_with={**_CAYLEY, "eps": ("coft", None)},
        r=0,
        oft_block_size=32,
        fan_in_fan_out=False,
        init_weights=True,
        coft=False,
        eps=6e-05,
        block_share=False,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=5,
    ),
    "SHIRA": _method(
        r=32, mask_type="random", random_seed=None, fan_in_fan_out=False, init_weights=True
    ),
    "PROMPT_TUNING": _method(_PROMPT_TRAINING, **_PROMPT),
    "MULTITASK_PROMPT_TUNING": _method(
        f"{_PROMPT_TRAINING} prompt_tuning_init_state_dict_path prompt_tuning_init_task",
        **_PROMPT,
        num_ranks=1,
        num_tasks=1,
    ),
    "OSF": _method(
        effective_rank=None, rank_pattern=None, init_weights=True, target_svd_config=None
    ),
    # What PEFT saves of these two is the prompt that their network makes, and not the network.
    "P_TUNING": _method(
        "encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout",
        **_PROMPT,
    ),
    "PREFIX_TUNING": _method("encoder_hidden_size prefix_projection", **_PROMPT, init_weights=None),
    "PEANUT": _method(r=32, depth=0, act_fn="relu", scaling=1.0, init_weights=True),
    "POLY": _method(r=8, init_weights=True, poly_type="poly", n_tasks=1, n_skills=4, n_splits=1),
    "PSOFT": _method(
        "psoft_dropout",
        only_with={
            **_CAYLEY,
            "cayley_neumann_eps": ("use_cayley_neumann", None),
            "psoft_svd_lowrank_niter": ("psoft_svd", "lowrank"),
        },
        r=32,
        psoft_alpha=32,
        fan_in_fan_out=False,
        ab_svd_init="psoft_init",
        psoft_svd="full",
        psoft_svd_lowrank_niter=10,
        random_seed=0,
        psoft_orth=True,
        psoft_mag_b=True,
        psoft_mag_a=True,
        use_cayley_neumann=False,
        num_cayley_neumann_terms=5,
        cayley_neumann_eps=None,
        init_weights=True,
    ),
    "PVERA": _method(
        "pvera_dropout d_initial",
        only_with={"generator_seed": ("sample_at_inference", None)},
        r=256,
        projection_prng_key=0,
        save_projection=True,
        fan_in_fan_out=False,
        init_weights=True,
        sample_at_inference=False,
        generator_seed=None,
    ),
    "RANDLORA": _method(
        "randlora_dropout",
        r=32,
        projection_prng_key=0,
        save_projection=True,
        sparse=False,
        very_sparse=False,
        fan_in_fan_out=False,
        randlora_alpha=640,
        init_weights=True,
    ),
    "ROAD": _method(variant="road_1", group_size=64, init_weights=True),
    "SHADOW": _method(
        "shadow_dropout auxiliary_loss_weight",
        r=8,
        shadow_alpha=0.1,
        init_weights=True,
        shadow_model="mirror",
        shadow_num_hidden_layers=None,
        shadow_hidden_size=None,
        shadow_num_attention_heads=None,
        shadow_intermediate_size=None,
        share_embeddings=True,
        update_hidden_size=None,
    ),
    "SUPERTUNING": _method(
        "lora_dropout",
        places=True,
        only_with={"lora_alpha": ("r", None)},
        sparsity=0.99,
        select_top=True,
        r=None,
        lora_alpha=None,
        init_weights=True,
        save_precomputed_indices=True,
    ),
    "TINYLORA": _method(
        "init_v_bound tinylora_dropout",
        random=("uniform",),
        places=True,
        r=2,
        u=64,
        weight_tying=0.0,
        projection_seed=42,
        save_projection=True,
        fan_in_fan_out=False,
        init_weights=True,
    ),
    "TRAINABLE_TOKENS": _method(token_indices=None, init_weights=True),
    "UNILORA": _method(
        "unilora_dropout init_theta_d_bound",
        places=True,
        r=4,
        proj_seed=42,
        theta_d_length=256,
        fan_in_fan_out=False,
        init_weights=True,
        save_indices=False,
    ),
    "VBLORA": _method(
        "vblora_dropout init_vector_bank_bound init_logits_std",
        r=4,
        num_vectors=256,
        vector_length=256,
        topk=2,
        save_only_topk_weights=False,
        fan_in_fan_out=False,
    ),
    "VERA": _method(
        "vera_dropout d_initial",
        r=256,
        projection_prng_key=0,
        save_projection=True,
        fan_in_fan_out=False,
        init_weights=True,
    ),
    "WAVEFT": _method(
        n_frequency=2592,
        scaling=25.0,
        wavelet_family="db1",
        use_idwt=True,
        random_loc_seed=777,
        fan_in_fan_out=False,
        n_frequency_pattern=None,
        proportional_parameters=False,
        init_weights=True,
    ),
    "XLORA": _method(
        "xlora_dropout_p use_trainable_adapters",
        hidden_size=None,
        adapters=None,
        enable_softmax=True,
        enable_softmax_topk=False,
        layerwise_scalings=False,
        xlora_depth=1,
        xlora_size=2048,
        softmax_temperature=1.0,
        top_k_lora=None,
        scaling_pass_value=0.0,
        global_scaling_weight=1.0,
    ),
}
