"""Checkpoint files as they are found in the wild, made from the torch reference models: one builder a variant.

A builder takes a model's state dict and returns what is saved. `WITH` lists the variants that must convert to the same
weights, `REFUSED` the files that must be refused, with what the message has to say.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def state_of(model: torch.nn.Module) -> State:
    return OrderedDict((key, value.clone()) for key, value in model.state_dict().items())


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- AR model: variants that convert ----------------------------------------------------------------------------------


def with_masks(state: State) -> State:
    """As transformers before 4.30 saved it: two buffers a layer, in front of the attention's own weights."""
    rows = state["mel_pos_embedding.emb.weight"].shape[0] + state["text_pos_embedding.emb.weight"].shape[0]
    masked: State = OrderedDict()
    for key, value in state.items():
        if key.startswith("gpt.h.") and key.endswith(".attn.c_attn.weight"):
            stem = key.removesuffix("c_attn.weight")
            masked[f"{stem}bias"] = torch.ones(rows, rows, dtype=torch.uint8).tril()[None, None]
            masked[f"{stem}masked_bias"] = torch.tensor(-1e4)
        masked[key] = value
    return masked


def with_inference_model(state: State, final_norm: bool = True) -> State:
    """As saved after generation: everything it needs once more, sharing memory. final_norm: tortoise 3.0 and later."""
    attached = OrderedDict(state)
    attached["gpt.wte.weight"] = state["mel_embedding.weight"]
    copies = {f"transformer.{key.removeprefix('gpt.')}": key for key in state if key.startswith("gpt.")}
    copies["transformer.wte.weight"] = "mel_embedding.weight"
    copies["text_pos_embedding.emb.weight"] = "mel_pos_embedding.emb.weight"
    copies["embeddings.weight"] = "mel_embedding.weight"
    for part in ("weight", "bias"):
        if final_norm:
            copies[f"final_norm.{part}"] = f"final_norm.{part}"
        copies[f"lm_head.0.{part}"] = f"final_norm.{part}"
        copies[f"lm_head.1.{part}"] = f"mel_head.{part}"
    return attached | {f"inference_model.{name}": state[key] for name, key in copies.items()}


def with_solo_embeddings(state: State) -> State:
    width = state["text_embedding.weight"].shape[1]
    solo = {name: torch.randn(1, 1, width) for name in ("mel_solo_embedding", "text_solo_embedding")}
    return OrderedDict(solo) | state


def with_alignment_head(state: State, name: str = "alignment_head") -> State:
    width = state["text_embedding.weight"].shape[1]
    return state | {f"{name}.weight": torch.randn(32, width), f"{name}.bias": torch.randn(32)}


def with_statistics(state: State) -> State:
    """A dVAE as XTTS's training saves it."""
    sizes = {"accumulator_index": 1, "accumulator_filled": 1, "accumulator": 4}
    return state | {f"discrete_loss.{name}": torch.zeros(size) for name, size in sizes.items()}


def with_prefix(state: Mapping[str, Any], prefix: str = "module.") -> State:
    return OrderedDict((prefix + key, value) for key, value in state.items())


WITH: dict[str, Callable[[State], Any]] = {
    "410 keys": lambda state: state,
    "470 keys": with_masks,
    "after generating with tortoise 3.0": with_inference_model,
    "after generating with tortoise 3.0, masks": lambda state: with_inference_model(with_masks(state)),
    "after generating with DL-Art-School": lambda state: with_inference_model(state, final_norm=False),
    "module.": with_prefix,
    "torch.compile": lambda state: with_prefix(state, "_orig_mod."),
    "both prefixes": lambda state: with_prefix(with_prefix(state, "_orig_mod.")),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}, "step": 7},
    "model_g": lambda state: {"model_g": state},
    "wrapper in wrapper": lambda state: {"model": {"state_dict": with_prefix(with_masks(state))}},
    "unified_voice3": lambda state: with_alignment_head(state, "aligned_head"),
    "unified_voice4": with_alignment_head,
    "train_solo_embeddings": with_solo_embeddings,
    "everything": lambda state: {
        "model": with_prefix(with_inference_model(with_masks(with_solo_embeddings(with_alignment_head(state)))))
    },
}


# --- files that are refused -------------------------------------------------------------------------------------------


def named(*keys: str) -> State:
    return {key: torch.zeros(2, 2) for key in keys}


def stable_embedding(state: State) -> State:
    norms = {
        f"{table}_embedding.norm.{part}": torch.ones(4) for table in ("text", "mel") for part in ("weight", "bias")
    }
    return state | norms


def raw_mel(state: State) -> State:
    rest = {key: value for key, value in state.items() if key != "mel_embedding.weight"}
    return rest | named("mel_embedding.encoder.0.weight", "mel_embedding.encoder.0.bias")


# name -> (content made from the AR state, what the message must hold)
REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "stable embedding": (stable_embedding, "StableEmbedding"),
    "raw mel": (raw_mel, "raw mels"),
    "xtts": (lambda s: {"model": named("mel_stats", "gpt.gpt.h.0.ln_1.weight", "hifigan_decoder.x")}, "XTTS"),
    "xtts trainer": (
        lambda s: {"model": named("xtts.gpt.gpt.h.0.ln_1.weight", "dvae.codebook.embed"), "config": {}, "step": 1},
        "XTTS",
    ),
    "optimiser state": (lambda s: {"epoch": 1, "iter": 2, "schedulers": [{}], "optimizers": [{}]}, "no weights at all"),
    "diffusion": (
        lambda s: named("latent_conditioner.0.weight", "conditioning_timestep_integrator.0.x", "mel_head.weight"),
        "diffusion decoder",
    ),
    "clvp": (lambda s: named("text_emb.weight", "to_text_latent.weight", "to_speech_latent.weight"), "CLVP"),
    "cvvp": (lambda s: named("to_conditioning_latent.weight", "to_speech_latent.weight"), "CVVP"),
    "vocoder": (lambda s: {"model_g": named("res_stack.0.x", "conv_pre.weight_g")}, "UnivNet"),
    "hifidecoder": (lambda s: named("conv_pre.weight_g", "ups.0.weight_g", "resblocks.0.x"), "HiFi-GAN"),
    "random latents": (lambda s: named(*(f"layers.{i}.weight" for i in range(6))), "random latent generator"),
    "classifier": (lambda s: named("enc.init.0.weight", "head.0.weight"), "classifier"),
    "voice": (lambda s: (torch.zeros(1, 8), torch.zeros(1, 16)), "voice's latents"),
    "mel norms": (lambda s: torch.zeros(80), "mel norms"),
    "another model": (lambda s: named("bert.encoder.layer.0.x"), "no known model"),
    "a list": (lambda s: [1, 2], "holds a list"),
    "empty": (lambda s: {}, "holds no tensors"),
    "a number inside": (lambda s: s | {"step": 3}, "'step' is a int"),
    "two models": (lambda s: {"model": s, "state_dict": s}, "several models"),
    "quantised": (lambda s: s | {"mel_head.weight": s["mel_head.weight"].to(torch.uint8)}, "mel_head.weight is uint8"),
    "float64": (lambda s: s | {"mel_head.weight": s["mel_head.weight"].double()}, "mel_head.weight is float64"),
    "sparse": (lambda s: s | {"mel_head.weight": s["mel_head.weight"].to_sparse()}, "mel_head.weight is sparse"),
    "meta": (lambda s: s | {"mel_head.weight": s["mel_head.weight"].to("meta")}, "on meta"),
    "a key too many": (lambda s: s | named("gpt.h.0.ln_3.weight"), 'key "gpt.h.0.ln_3.weight" belongs to no known'),
    "a misspelt key": (
        lambda s: {key.replace("final_norm", "finalnorm"): value for key, value in s.items()},
        'did you mean "final_norm.weight"',
    ),
    "a key missing": (
        lambda s: {key: value for key, value in s.items() if key != "gpt.h.1.mlp.c_fc.bias"},
        "key gpt.h.1.mlp.c_fc.bias is missing",
    ),
    "a layer missing": (
        lambda s: {key: value for key, value in s.items() if not key.startswith("gpt.h.1.")},
        "key gpt.h.1.ln_1.weight is missing",
    ),
    "a table missing": (
        lambda s: {key: value for key, value in s.items() if key != "text_embedding.weight"},
        "key text_embedding.weight is missing",
    ),
    "a layer too many": (
        lambda s: s | {"gpt.h.9.mlp.c_fc.bias": s["gpt.h.0.mlp.c_fc.bias"]},
        "gpt.h.9.mlp.c_fc.bias is one more",
    ),
    "misshapen": (
        lambda s: s | {"mel_head.bias": torch.zeros(3)},
        "mel_head.bias has shape (3,), the rest of the file",
    ),
    "another rank": (
        lambda s: s | {"mel_head.weight": torch.zeros(3)},
        "mel_head.weight has shape (3,), expected 2 axes",
    ),
    "transposed": (
        lambda s: s | {"gpt.h.0.mlp.c_fc.weight": s["gpt.h.0.mlp.c_fc.weight"].T.contiguous()},
        "gpt.h.0.mlp.c_fc.weight has shape",
    ),
    "no elements": (lambda s: s | {"text_embedding.weight": torch.zeros(0, 64)}, "none of them 0"),
    "a huge claim": (
        lambda s: s | {"mel_head.weight": torch.zeros(1).expand(10**6, 10**6)},
        "claims the shape (1000000, 1000000)",
    ),
    "many huge claims": (
        lambda s: s | {f"alignment_head.{i}": s["mel_embedding.weight"].view(-1) for i in range(500)},
        "its tensors claim",
    ),
    "a copy that differs": (
        lambda s: with_inference_model(s) | {"inference_model.lm_head.1.bias": s["mel_head.bias"] + 1},
        "inference_model.lm_head.1.bias differs from mel_head.bias",
    ),
    "a copy of nothing": (
        lambda s: s | {"inference_model.transformer.h.7.ln_1.bias": torch.zeros(64)},
        "should repeat gpt.h.7.ln_1.bias, which is missing",
    ),
    "not a number": (
        lambda s: s | {"mel_head.bias": s["mel_head.bias"].clone().index_fill_(0, torch.tensor([1, 2]), torch.nan)},
        "mel_head.bias has 2 values that are NaN or infinite",
    ),
    "infinite": (
        lambda s: s | {"gpt.h.1.ln_2.weight": torch.full((64,), -torch.inf)},
        "gpt.h.1.ln_2.weight has 64 values that are NaN or infinite",
    ),
}


# --- files that are no state dict at all, or damaged ------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled by anything that runs what it reads."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def malicious(path: Path, proof: Path) -> Path:
    return save(path, {"mel_embedding.weight": torch.zeros(2), "x": Payload(proof)})


def malicious_pickle(path: Path, proof: Path) -> Path:
    path.write_bytes(pickle.dumps(Payload(proof)))
    return path


def old_format(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def safetensors(path: Path, state: Mapping[str, torch.Tensor]) -> Path:
    save_file({key: value.clone() for key, value in state.items()}, path)
    return path


def flip(path: Path, position: int) -> Path:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    return path


def middle_of_largest_record(path: Path) -> int:
    """A byte well inside the largest tensor of a torch zip."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    return largest.header_offset + largest.file_size // 2 + 64


def deflated(path: Path, content: Any) -> Path:
    """A torch zip whose records are compressed, as a bomb's would be."""
    plain = save(path.with_suffix(".plain"), content)
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as write:
        for record in read.infolist():
            write.writestr(record.filename, read.read(record))
    return path


def huge_storage(path: Path, state: State) -> Path:
    """A file of the older format whose first tensor claims 8 GB of storage."""
    size = next(iter(state.values())).numel()
    content = old_format(path, state).read_bytes()
    claim = b"M" + size.to_bytes(2, "little")
    assert claim in content
    path.write_bytes(content.replace(claim, b"J" + (2**31 - 1).to_bytes(4, "little"), 1))
    return path


def huge_safetensors(path: Path, state: State) -> Path:
    """A header that claims a shape of 4 TB for the 8 bytes behind it."""
    shape = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 8]}
    header = json.dumps({"mel_head.weight": shape}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path
