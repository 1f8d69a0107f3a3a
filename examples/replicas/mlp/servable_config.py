"""A model that fits one device; start_servables says on how many devices it gets a replica."""

from shardserve.server import register

model = register.declare_model("device0/mlp.graph.json", "shardserve", with_batch_dim=True)


@register.register_method(output_names=["y"])
def predict(x):
    return register.add_stage(model, x, outputs_count=1)
