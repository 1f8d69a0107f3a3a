"""A transformer in 2 pipeline stages of 2 tensor-parallel ranks; instances come without the batch dim."""

from shardserve.server import distributed, register

model = distributed.declare_servable(rank_size=4, stage_size=2, with_batch_dim=True)


@register.register_method(output_names=["logits"])
def predict(ids, attention_mask):
    return register.add_stage(model, ids, attention_mask, outputs_count=1)
