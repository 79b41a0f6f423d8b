"""Names of flags in other code bases (nanoGPT, nanochat, litgpt, Hugging Face, ...), and what to
write instead of those that do not exist here."""

import difflib
from collections.abc import Collection
from dataclasses import Field

from system.settings import kind_of

# Other names with the same meaning, accepted but not shown by --help.
SYNONYMS = {
    "block_size": "context_len context_size cutoff_len seq_len seq_length sequence_len "
    "sequence_length max_seq_len max_seq_length n_ctx n_positions",
    "n_layer": "num_layers num_hidden_layers layers",
    "n_head": "num_heads num_attention_heads heads",
    "n_embd": "n_embed embed_dim emb_dim hidden_size",
    "n_kv_head": "n_kv_heads num_kv_heads num_key_value_heads n_query_groups",
    "head_size": "head_dim",
    "n_inner": "intermediate_size ffn_dim",
    "mlp": "activation",
    "pos": "pos_emb pos_embedding position_embedding pos_encoding position_encoding",
    "tie_weights": "weight_tying tie_word_embeddings tie_embeddings",
    "rope_theta": "rope_base",
    "data": "dataset data_path train_file input_file",
    "out_dir": "output_dir save_dir",
    "tag": "run_name",
    "overwrite": "overwrite_output_dir",
    "seed": "random_seed",
    "max_steps": "steps num_steps n_steps train_steps iters num_iters num_iterations",
    "batch_size": "micro_batch_size device_batch_size per_device_train_batch_size",
    "grad_accum": "grad_accum_steps grad_accumulation_steps gradient_accumulation_steps "
    "accumulation_steps accumulate_grad_batches",
    "lr_max": "lr max_lr peak_lr",
    "lr_min": "min_lr final_lr",
    "schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "warmup_steps": "warmup_iters lr_warmup_steps lr_warmup_iters num_warmup_steps",
    "weight_decay": "wd",
    "grad_clip": "clip_grad clip_grad_norm max_norm max_grad_norm gradient_clip_val",
    "patience": "early_stopping_patience",
    "optimizer": "optim",
    "eval_every": "eval_interval eval_steps eval_freq val_interval",
    "log_every": "log_steps logging_steps",
    "save_every": "save_steps save_interval",
    "wandb": "wandb_log use_wandb",
    "precision": "dtype",
    "compile": "torch_compile",
    "grad_checkpoint": "gradient_checkpointing grad_checkpointing activation_checkpointing",
    "lora_rank": "lora_r",
    "lora_targets": "lora_target",
}

# Names without an equal: the flag to use instead, which the script must have, and what to do.
HINTS = {
    "epochs epoch n_epochs num_epochs max_epochs num_train_epochs": (
        "max_steps",
        "set --max_steps (an epoch is tokens / (batch_size * block_size) steps; see --dry_run)",
    ),
    "eval_iters eval_iter eval_batches": (
        "eval_windows",
        "it counts batches; --eval_windows counts windows, batch_size times as many",
    ),
    "use_learned_pos_emb learned_pos_emb": ("pos", "write --pos learned"),
    "use_rope rope rotary": ("pos", "write --pos rope"),
    "use_swiglu swiglu": ("mlp", "write --mlp swiglu"),
    "use_rmsnorm rmsnorm": ("norm", "write --norm rmsnorm"),
    "depth": ("n_layer", "set --n_layer and --n_embd"),
    "lr_decay_iters lr_decay_steps": ("max_steps", "the learning rate decays until --max_steps"),
    "decay_lr": ("lr_min", "for a constant learning rate, give --lr_min and --lr_max one value"),
    "warmup_ratio lr_warmup_ratio warmup_fraction": (
        "warmup_steps",
        "write --warmup_steps, the ratio times max_steps",
    ),
    "beta1 beta2 adam_beta1 adam_beta2 momentum": (
        "optimizer",
        "it is set in configure_optimizers in train.py",
    ),
    "global_batch_size total_batch_size train_batch_size effective_batch_size": (
        "grad_accum",
        "a step has batch_size * grad_accum sequences: set --batch_size and --grad_accum",
    ),
    "per_device_eval_batch_size eval_batch_size": ("batch_size", "evaluations use --batch_size"),
    "attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop": (
        "dropout",
        "write --dropout, which applies to embeddings and residual branches",
    ),
    "val_size val_split val_fraction": (
        "eval_windows",
        "a tenth of the text is for validation; to choose a share, use prepare.py",
    ),
    "config config_file": ("preset", "settings are flags; --preset names a set of them"),
    "bf16 mixed_precision": ("precision", "write --precision bfloat16"),
    "fp16 half amp": ("precision", "write --precision float16"),
    "cpu use_cpu no_cuda": ("device", "write --device cpu"),
    "gpu cuda use_cuda": ("device", "write --device cuda"),
    "gpus num_gpus n_gpus devices num_devices": (
        "parallel",
        "start several processes: torchrun --nproc_per_node=N train.py",
    ),
    "model model_name model_type model_name_or_path": (
        "preset",
        "--preset names sizes, --arch components; finetune.py starts from a trained model",
    ),
    "init_from resume_from resume_from_checkpoint": (
        "resume",
        "--resume continues the run of --tag; finetune.py starts from a trained model",
    ),
    "eval_only": ("eval_every", "use evaluate.py"),
    "report_to": ("wandb", "write --wandb or --tensorboard"),
    "lora use_lora": ("lora_rank", "write --lora_rank 8"),
}
HINT_OF = {name: hint for names, hint in HINTS.items() for name in names.split()}


def flag_names(f: Field) -> list[str]:
    """The names of a field's flag, without the hyphens, the main one first."""
    if kind_of(f) is tuple:
        return []
    names = [f.name, *f.metadata.get("alias", "").split(), *SYNONYMS.get(f.name, "").split()]
    return names + [f"no_{name}" for name in names if kind_of(f) is bool]


def unknown_flag(name: str, fields: Collection[Field]) -> str:
    """What to write instead of an unknown flag, as ": ..."; empty if there is nothing like it.
    `name` has underscores only; `fields` are those that may be given."""
    flag, hint = HINT_OF.get(name, ("", ""))
    if flag in {f.name for f in fields}:
        return f": {hint}"
    spellings = [spelling for f in fields for spelling in flag_names(f)]
    near = difflib.get_close_matches(name, spellings, n=3, cutoff=0.75)
    near = [s for s in near if s[0] == name.strip("_")[:1]]  # otherwise --epochs suggests --pos
    return f": did you mean --{near[0]}?" if near else ""
