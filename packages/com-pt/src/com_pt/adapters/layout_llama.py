"""Layout of transformers' Llama."""

from typing import Any

from torch import nn

from com_pt.method.layout import Layout, Tower, rules


def is_llama(model: nn.Module) -> bool:
    """Whether this is a Llama with a language-model head."""
    return type(model).__name__ == "LlamaForCausalLM"


def llama_layout(model: Any) -> Layout:
    """Describe a ``LlamaForCausalLM``; head size, rope and vocabulary stay fixed along a chain."""
    # Sizes of the one tower.
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tower = Tower(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm="rms",
        eps=config.rms_norm_eps,
    )

    # Roles of the axes of every parameter.
    layer = "layers.N."
    table = (
        *rules(
            {
                f"{layer}self_attn.q_proj.weight": "HEAD <WIDTH",
                f"{layer}self_attn.q_proj.bias": "HEAD",
                f"{layer}self_attn.[kv]_proj.weight": "KVHEAD <WIDTH",
                f"{layer}self_attn.[kv]_proj.bias": "KVHEAD",
                f"{layer}self_attn.o_proj.weight": "+WIDTH <HEAD",
                f"{layer}self_attn.o_proj.bias": "+WIDTH",
                f"{layer}mlp.(gate|up)_proj.weight": "MLP <WIDTH",
                f"{layer}mlp.(gate|up)_proj.bias": "MLP",
                f"{layer}mlp.down_proj.weight": "+WIDTH <MLP",
                f"{layer}mlp.down_proj.bias": "+WIDTH",
                "embed_tokens.weight": "VOCAB +WIDTH",
            },
            prefix="model.",
        ),
        *rules({"lm_head.weight": "VOCAB <WIDTH"}),
        *rules(
            {
                f"{layer}(input|post_attention)_layernorm.weight": "WIDTH",
                "norm.weight": "WIDTH",
            },
            prefix="model.",
            kind="norm",
        ),
    )

    # What must not change along a chain.
    fixed = {
        "vocabulary": config.vocab_size,
        "rope": dict(getattr(config, "rope_parameters", None) or {}),
        "activation": config.hidden_act,
        "tied embeddings": config.tie_word_embeddings,
        "positions": config.max_position_embeddings,
    }
    return Layout("Llama", table, {"": tower}, fixed)
