"""Names of tensors in facebookresearch/memory, and ours. Needs no torch."""

# the head of a tied model, which is the embedding again
TIED_HEAD = "output.tied_module.weight"
TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# names after the layer; PEER has values_u and values_v in place of values
LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.keys": "memory.subkeys",
    "feed_forward.query_proj.query_mlps.0.weight": "memory.query.weight",
    "feed_forward.query_proj.query_mlps.0.bias": "memory.query.bias",
    "feed_forward.swilu_projection.weight": "memory.gate.weight",
    "feed_forward.swilu_projection.bias": "memory.gate.bias",
    "feed_forward.value_proj.weight": "memory.value_proj.weight",
    "feed_forward.value_proj.bias": "memory.value_proj.bias",
    "feed_forward.gating.weight": "memory.output_gate.weight",
    "feed_forward.gating.bias": "memory.output_gate.bias",
    "feed_forward.values.weight": "memory.table",
    "feed_forward.values_v.weight": "memory.table",
    "feed_forward.values_u.weight": "memory.down_table",
}
