"""Models and losses of other projects (PEFT, torchtune, litgpt) with the benchmark's base and adapter."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drawn_base import drawn_base, is_drawn
from material import ALPHA, DTYPES, R
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.checkpoints.model_directory import read_config
from llamatune.shapes.llama_config import LlamaConfig, linear_path

PACKAGES = {"trainer": "peft", "sft": "trl", "torchtune": "torchtune.models.llama2", "litgpt": "litgpt.lora",
            "unsloth": "unsloth"}  # fmt: skip
"""The module of each peer. unsloth cannot be imported without a GPU."""


def version(peer: str) -> str | None:
    """The installed version of a peer that can be imported, else None."""
    try:
        importlib.import_module(PACKAGES[peer])
        return importlib.metadata.version(PACKAGES[peer].partition(".")[0])
    except (ImportError, NotImplementedError, RuntimeError, OSError):
        return None


class Peer(NamedTuple):
    """A model in training mode, and the mean loss of ids and labels (B, T), -100 where there is no target."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


def load(settings: dict[str, Any]) -> Peer:
    """The model that ``settings["peer"]`` names, on its device."""
    peer = {"trainer": _peft, "torchtune": _torchtune, "litgpt": _litgpt}[settings["peer"]](settings)
    peer.model.train()
    return peer


def peft_model(settings: dict[str, Any]) -> Any:
    """transformers' model with PEFT's adapter, in fp32 (PEFT's default) unless ``sixteen_bit``."""
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, dtype, device = Path(settings["base"]), DTYPES[settings["dtype"]][1], torch.device(settings["device"])
    if is_drawn(base):
        config = transformers.AutoConfig.from_pretrained(base)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(drawn_base(read_config(base), dtype, device), assign=True)
    else:
        kind = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
        model = AutoModelForCausalLM.from_pretrained(base, **{kind: dtype})
    return PeftModel.from_pretrained(
        model.to(device),
        settings["adapter"],
        is_trainable=True,
        autocast_adapter_dtype=not settings["sixteen_bit"],
    )


def _peft(settings: dict[str, Any]) -> Peer:
    model = peft_model(settings)
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(settings["device"], torch.bfloat16, enabled=settings["autocast"]):
            return model(input_ids=ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]

    return Peer(model, loss)


def _weights(settings: dict[str, Any]) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The base's configuration and tensors, and the adapter's matrices A by layer path, ``0.self_attn.q_proj``.

    B is zero on all sides.
    """
    base = {
        name: x for path in sorted(Path(settings["base"]).glob("*.safetensors")) for name, x in load_file(path).items()
    }
    tensors = load_file(Path(settings["adapter"]) / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.model.layers.", ".lora_A.weight"
    drawn = {name[len(prefix) : -len(suffix)]: x for name, x in tensors.items() if name.endswith(suffix)}
    return read_config(Path(settings["base"])), base, drawn


def _targets(settings: dict[str, Any]) -> list[str]:
    config = json.loads((Path(settings["adapter"]) / "adapter_config.json").read_text())
    return list(config["target_modules"])


def _torchtune(settings: dict[str, Any]) -> Peer:
    """As its lora_finetune_single_device recipe: adapters in the base's dtype, head and loss in eight chunks."""
    from torchtune import training
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    config, base, drawn = _weights(settings)
    targets, dtype = _targets(settings), DTYPES[settings["dtype"]][1]
    names = {"o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    attention = [names.get(name, name) for name in targets if linear_path(name).startswith("self_attn")]
    with training.set_default_dtype(dtype), torch.device(settings["device"]):
        model = lora_llama2(
            attention, "gate_proj" in targets, False, vocab_size=config.vocab_size, lora_rank=R, lora_alpha=ALPHA,
            num_layers=config.num_hidden_layers, num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads, embed_dim=config.hidden_size, max_seq_len=4096,
            intermediate_dim=config.intermediate_size, norm_eps=config.rms_norm_eps,
        )  # fmt: skip
    converted = hf_to_tune(base, config.num_attention_heads, config.num_key_value_heads, config.hidden_size)
    for path, A in drawn.items():
        layer, _, name = path.split(".")
        part = "attn" if "self_attn" in path else "mlp"
        converted[f"layers.{layer}.{part}.{names.get(name, name)}.lora_a.weight"] = A
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("lora_b.weight") for name in missing), missing
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b.weight"):
            nn.init.zeros_(parameter)
    set_trainable_params(model, get_adapter_params(model))
    function: Any = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(function.num_output_chunks)
    if settings["checkpointing"]:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if settings["compile"]:
        training.compile_model(model, verbose=False)
        training.compile_loss(function, verbose=False)
    return Peer(model, lambda ids, labels: function(model(tokens=ids), F.pad(labels[:, 1:], (0, 1), value=-100)))


def _litgpt(settings: dict[str, Any]) -> Peer:
    """As its finetune/lora.py: precision bf16-true, the head in chunks of 128 positions."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    config, base, drawn = _weights(settings)
    targets, dtype = _targets(settings), DTYPES[settings["dtype"]][1]
    shape = Config(
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size,
        n_query_groups=config.num_key_value_heads, intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size, block_size=4096, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=config.rms_norm_eps,
        mlp_class_name="LLaMAMLP", lora_r=R, lora_alpha=ALPHA, lora_query="q_proj" in targets,
        lora_key="k_proj" in targets, lora_value="v_proj" in targets, lora_projection="o_proj" in targets,
        lora_mlp="gate_proj" in targets,
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(shape, {}, state, base)  # type: ignore[arg-type]
    names = {"o_proj": "attn.proj", "gate_proj": "mlp.fc_1", "up_proj": "mlp.fc_2", "down_proj": "mlp.proj"}
    stacked: dict[str, list[Tensor]] = {}
    for path, A in sorted(drawn.items(), key=lambda item: "qkv".find(item[0].split(".")[-1][0])):
        layer, _, name = path.split(".")
        stacked.setdefault(f"transformer.h.{layer}.{names.get(name, 'attn.qkv')}.lora_A", []).append(A)
    state |= {name: torch.cat(parts) for name, parts in stacked.items()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(settings["device"]):
        model: Any = GPT(shape)
    torch.set_default_dtype(before)
    missing, unexpected = model.load_state_dict(state, strict=False)  # it renames the layers that hold an adapter
    assert not unexpected, unexpected
    assert all(name.endswith("lora_B") for name in missing), missing
    mark_only_lora_as_trainable(model)
    if settings["checkpointing"]:
        _recompute(model)
    if settings["compile"]:
        for block in model.transformer.h:
            block.compile()

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:])  # type: ignore[no-any-return]

    return Peer(model, loss)


def _recompute(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    kind = type(model.transformer.h[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
