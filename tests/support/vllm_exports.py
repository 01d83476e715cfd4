"""Heads as `export.format=vllm` writes them."""

import json
import shutil
from pathlib import Path


def export_heads(heads: Path, target_config, out: Path) -> Path:
    """Write the directory that vLLM reads, of a directory that `save_heads` wrote."""
    config = json.loads((heads / "config.json").read_text("utf-8"))
    is_hydra = config["kind"] == "hydra"
    out.mkdir(parents=True)
    shutil.copy(heads / "model.safetensors", out)
    number = config["num_heads"]
    written = {
        "model_type": "step3p5_mtp",
        "architectures": ["MedusaExpMTP"] + ["DeepSeekMTPModel"] * is_hydra,
        "num_nextn_predict_layers": number,
        "n_predict": number,
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "num_hidden_layers": 1,
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": target_config.max_position_embeddings,
        "medusa_kind": config["kind"],
        "medusa_num_layers": config["num_layers"],
        "medusa_bias": config["bias"],
        "medusa_rank": config["rank"],
        "medusa_num_tokens": config["num_tokens"],
        "medusa_lm_head_bias": config["lm_head_bias"],
        "medusa_prefix_attention": config["prefix_attention"],
        "medusa_backbone": config["backbone"],
        "medusa_backbone_identity": config["backbone_identity"],
    }
    (out / "config.json").write_text(json.dumps(written, indent=2), "utf-8")
    return out
