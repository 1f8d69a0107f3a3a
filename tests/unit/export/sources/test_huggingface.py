from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardserve.errors import ExportError
from shardserve.export import Plan, export, verify
from shardserve.export.sources import fill
from shardserve.export.sources.huggingface import load_folder

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, dtype="bfloat16"
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=24)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(model: Any, **options: Any) -> Path:
        torch.manual_seed(0)
        model.save_pretrained(tmp_path / "folder", **options)
        return tmp_path / "folder"

    return save


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(socket.socket, "connect", connect)


def exported(folder: Path, out: Path, **options: Any) -> Any:
    loaded = load_folder(folder)
    return export(
        loaded.model,
        (),
        name="m",
        out=out,
        kwargs=loaded.kwargs,
        dynamic_shapes=loaded.dynamic_shapes,
        weights=loaded.checkpoint,
        **options,
    )


def test_a_config_alone_is_planned(tmp_path: Path) -> None:
    """As --meta does, here by the plan that the model brings with it."""
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    loaded = load_folder(tmp_path, meta=True)
    assert loaded.checkpoint is None
    plan = Plan.from_tp_plan(loaded.model)
    report = export(loaded.model, (), name="m", out=None, tensor_parallel=2, plan=plan, kwargs=loaded.kwargs)
    assert dict(report.collectives()) == {"all_reduce": 3, "all_gather": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_config_without_architectures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    assert type(load_folder(tmp_path, meta=True).model).__name__ == "LlamaModel"
    assert "config.json: names no architectures: it is taken for LlamaModel, without a head" in caplog.text


def test_a_sharded_checkpoint_of_tied_weights(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(llama(), max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    layer = "model.layers.*"
    plan = Plan(
        {
            f"{layer}.self_attn.[qkv]_proj.weight": "Shard(0)",
            f"{layer}.self_attn.o_proj.weight": "Shard(1)",
            f"{layer}.mlp.gate_proj.weight": "Shard(0)",
            f"{layer}.mlp.up_proj.weight": "Shard(0)",
            f"{layer}.mlp.down_proj.weight": "Shard(1)",
        }
    )
    report = exported(folder, tmp_path / "out", plan=plan, tensor_parallel=2)
    assert not report.warnings
    assert {name: str(dim) for name, dim in report.signature.dims.items()} == {
        "batch": "1 to 64",
        "sequence": "1 to 64",
    }
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto", use_cache=False)
    result = verify(model, (), load_folder(folder).kwargs, tmp_path / "out", "m", atol=0.05)
    assert result.passed
    # The frequencies of the rotary embedding aren't in the file; bfloat16 ones would be less exact than what is there.
    weights = load_file(tmp_path / "out" / "device0" / "weights.safetensors")
    frequencies = next(tensor for name, tensor in weights.items() if "inv_freq" in name)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)


def test_the_base_model_s_prefix(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = bert()
    folder = saved(model)
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name.removeprefix("bert."): tensor for name, tensor in state.items()}, file)
    exported(folder, tmp_path / "out")
    assert verify(model, (), load_folder(folder).kwargs, tmp_path / "out", "m").passed
    # And the other way round: what only the whole has is unused.
    save_file(state, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    base = load_folder(folder)
    filled = fill(base.model, base.checkpoint)
    assert filled.warnings == ("weights: the model has no place for 2 tensors: 'classifier.bias', 'classifier.weight'",)
    assert not filled.missing
    assert all(torch.equal(value, model.bert.state_dict()[name]) for name, value in base.model.state_dict().items())


def test_experts_that_the_file_has_one_by_one(saved: Callable[..., Path]) -> None:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=12)
    model = transformers.MixtralForCausalLM(config)
    path = saved(model)
    assert len(load_file(path / "model.safetensors")) > len(model.state_dict())
    folder = load_folder(path)
    assert folder.dynamic_shapes["input_ids"][1].max == 2048
    assert folder.model.config._experts_implementation == "batched_mm"
    filled = fill(folder.model, folder.checkpoint)
    assert not filled.missing
    assert not filled.unused
    made = folder.model.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())


def test_parts_that_do_not_fit(saved: Callable[..., Path]) -> None:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    path = saved(transformers.MixtralForCausalLM(config))
    state = load_file(path / "model.safetensors")
    name = next(name for name in state if "experts.1.w1" in name)
    save_file({**state, name: torch.ones(3)}, path / "model.safetensors")
    folder = load_folder(path)
    with pytest.raises(ExportError, match=r"model\.safetensors \('.*experts\.0.*' there\): can't make '.*experts"):
        fill(folder.model, folder.checkpoint)


def test_sound(saved: Callable[..., Path]) -> None:
    config = transformers.WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        vocab_size=50, num_mel_bins=4, max_source_positions=10, max_target_positions=12, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    folder = load_folder(saved(transformers.WhisperForConditionalGeneration(config)))
    assert folder.kwargs["input_features"].shape == (2, 4, 20)
    assert folder.dynamic_shapes["decoder_input_ids"][1].max == 12
    assert not fill(folder.model, folder.checkpoint).missing


def test_text_and_images(saved: Callable[..., Path]) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=SIZES, vision_config={**vision, "num_hidden_layers": 1})
    folder = load_folder(saved(transformers.CLIPModel(config)))
    assert list(folder.kwargs) == ["input_ids", "attention_mask", "pixel_values"]
    fill(folder.model, folder.checkpoint)
    assert folder.model(**folder.kwargs).logits_per_image.shape == (2, 2)


def test_images(saved: Callable[..., Path]) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8)
    folder = load_folder(saved(transformers.ViTForImageClassification(config)))
    assert {name: tuple(value.shape) for name, value in folder.kwargs.items()} == {"pixel_values": (2, 3, 16, 16)}


def test_positions_that_begin_after_the_padding(saved: Callable[..., Path]) -> None:
    config = transformers.RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=1)
    folder = load_folder(saved(transformers.RobertaModel(config)))
    assert folder.dynamic_shapes["input_ids"][1].max == 18
    assert not (folder.kwargs["input_ids"] == 1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "mine", "auto_map": {}}, "has no model_type 'mine', and code of the folder's own is never run"),
        ({"architectures": ["MyBert"]}, "has no architecture 'MyBert'; write a module:function"),
        ({"quantization_config": {}}, "the weights are quantised"),
        ({"hidden_act": "none"}, "can't make the model: KeyError"),
    ],
)
def test_configs_that_will_not_do(saved: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    folder = saved(bert())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ExportError, match=rf"config\.json: .*{message}"):
        load_folder(folder)


def test_a_folder_of_pickles(saved: Callable[..., Path]) -> None:
    folder = saved(bert())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"holds no safetensors file; pytorch_model\.bin would have to"):
        load_folder(folder)


def test_without_transformers(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(bert())
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ExportError, match=r"pip install 'shardserve\[transformers\]'"):
        load_folder(folder)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json: No such file"):
        load_folder(tmp_path)
