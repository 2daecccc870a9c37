"""What tortoise-tts's own classes compute from torch files and given inputs: for a Python that has that package.

  python convert/tortoise_reference.py FOLDER INPUTS.npz OUTPUTS.npz [SIZES.json]

Needs torch, numpy and tortoise-tts, and nothing of this project. verify.py compares the outputs with ours. SIZES: other
arguments of the constructors than those of the released models, by the names below.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

# As tortoise's api.py builds them.
SIZES: dict[str, dict[str, Any]] = {
    "autoregressive": dict(
        max_mel_tokens=604, max_text_tokens=402, max_conditioning_inputs=2, layers=30, model_dim=1024, heads=16,
        number_text_tokens=255, start_text_token=255, checkpointing=False, train_solo_embeddings=False,
    ),
    "clvp2": dict(
        dim_text=768, dim_speech=768, dim_latent=768, num_text_tokens=256, text_enc_depth=20, text_seq_len=350,
        text_heads=12, num_speech_tokens=8192, speech_enc_depth=20, speech_heads=12, speech_seq_len=430,
        use_xformers=True,
    ),
    "diffusion_decoder": dict(
        model_channels=1024, num_layers=10, in_channels=100, out_channels=200, in_latent_channels=1024, in_tokens=8193,
        dropout=0, use_fp16=False, num_heads=16, layer_drop=0, unconditioned_percentage=0,
    ),
    "vocoder": {},
    "hifidecoder": dict(
        in_channels=1024, out_channels=1, resblock_type="1", resblock_dilation_sizes=[[1, 3, 5]] * 3,
        resblock_kernel_sizes=[3, 7, 11], upsample_kernel_sizes=[16, 16, 4, 4], upsample_initial_channel=512,
        upsample_factors=[8, 8, 2, 2], cond_channels=1024,
    ),
    "rlg_auto": dict(channels=1024),
    "rlg_diffuser": dict(channels=2048),
}  # fmt: skip
# Keys that a file may have and a class not: constants, and embeddings of a training that synthesis does not read.
CONSTANT = (".attn.bias", ".attn.masked_bias", "_solo_embedding")


def built(name: str, folder: Path, sizes: dict[str, Any]) -> torch.nn.Module:
    """The package's model with the weights of the file, every key of which has its place."""
    without_torchaudio()
    from tortoise.models.autoregressive import UnifiedVoice
    from tortoise.models.clvp import CLVP
    from tortoise.models.diffusion_decoder import DiffusionTts
    from tortoise.models.hifigan_decoder import HifiganGenerator
    from tortoise.models.random_latent_generator import RandomLatentConverter
    from tortoise.models.vocoder import UnivNetGenerator

    half = RandomLatentConverter
    classes = [UnifiedVoice, CLVP, DiffusionTts, UnivNetGenerator, HifiganGenerator, half, half]
    model = dict(zip(SIZES, classes, strict=True))[name](**{**SIZES[name], **sizes.get(name, {})})
    state = torch.load(folder / f"{name}.pth", map_location="cpu", weights_only=True)
    state = {key: value for key, value in state.get("model_g", state).items() if not key.endswith(CONSTANT)}
    found = model.load_state_dict(state, strict=False)
    missing = [key for key in found.missing_keys if not key.endswith(CONSTANT)]
    if missing or found.unexpected_keys:
        raise SystemExit(f"{name}.pth: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")
    torch.nn.Module.eval(model)
    return model


def without_torchaudio() -> None:
    """Puts a stand-in where torchaudio does not load: only the package's spectrograms need it, no model does."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)


@torch.no_grad()
def outputs_of(name: str, model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name: arrays that verify.py computes too. Channels come last there and second here."""
    if name == "autoregressive":
        codes, text = given["codes"][None], given["text"][None]
        lengths = torch.tensor([text.shape[1]]), torch.tensor([codes.shape[1] * model.mel_length_compression])
        voice = model.get_conditioning(given["mel"].T[None, None])
        latents = model(voice, text, lengths[0], codes.clone(), lengths[1], return_latent=True, clip_inputs=False)
        return {"voice": voice[0], "latents": latents[0]}
    if name == "clvp2":
        return {"scores": model(given["clvp_text"][None], given["clvp_codes"][None], return_loss=False)}
    if name == "diffusion_decoder":
        frames = given["noise"].shape[0]
        voice = model.get_conditioning(given["mel_24k"].T[None, None])
        aligned = model.timestep_independent(given["latents"][None], voice, frames, False)
        out = model(given["noise"].T[None], given["step"], precomputed_aligned_embeddings=aligned)
        return {"diffusion_voice": voice[0], "denoised": out[0].T}
    if name == "vocoder":
        return {"waveform": model(given["vocoder_mel"].T[None], given["vocoder_noise"].T[None])[0, 0]}
    if name == "hifidecoder":
        return {"fast_waveform": model(given["fast_latents"].T[None], given["fast_voice"][None, :, None])[0, 0]}
    if name == "rlg_auto":
        return {"random_voice": model.layers(given["random_noise"][None])[0]}
    return {"random_diffusion_voice": model.layers(given["random_diffusion_noise"][None])[0]}


def main() -> None:
    folder, inputs, outputs = map(Path, sys.argv[1:4])
    sizes = json.loads(Path(sys.argv[4]).read_text()) if len(sys.argv) > 4 else {}
    given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
    found: dict[str, np.ndarray] = {}
    for name in SIZES:
        if (folder / f"{name}.pth").exists():
            found |= {key: value.numpy() for key, value in outputs_of(name, built(name, folder, sizes), given).items()}
    np.savez(outputs, **found)  # type: ignore[arg-type]
    print(f"tortoise-tts: {', '.join(found)}")


if __name__ == "__main__":
    main()
