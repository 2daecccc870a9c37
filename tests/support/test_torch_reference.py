"""The torch reference models: their key names and sizes, and the upstream behaviour that parity tests rely on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.released import PARAMETERS, torch_model
from tests.support.torch_reference import (
    HISTORY_COLUMNS,
    SAMPLES_PER_CODE,
    Recipe,
    Trainer,
    UnifiedVoice,
    log_mel,
    mel_filters,
    parameter_groups,
    random_batch,
    record_outputs,
    tiny_dvae,
    tiny_unified_voice,
    train,
)
from tests.support.torch_reference.dvae import Codebook
from tests.support.torch_reference.unified_voice import AttentionBlock, group_count, one_row


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def weight_and_bias(*names: str) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def unified_voice_keys(layers: int) -> list[str]:
    keys = weight_and_bias("conditioning_encoder.init")
    for i in range(6):
        keys += weight_and_bias(*[f"conditioning_encoder.attn.{i}.{part}" for part in ("norm", "qkv", "proj_out")])
    keys += ["text_embedding.weight", "mel_embedding.weight"]
    for i in range(layers):
        parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        keys += weight_and_bias(*[f"gpt.h.{i}.{part}" for part in parts])
    keys += weight_and_bias("gpt.ln_f")
    keys += ["mel_pos_embedding.emb.weight", "text_pos_embedding.emb.weight"]
    return keys + weight_and_bias("final_norm", "text_head", "mel_head")


def forward(model: UnifiedVoice, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wav_lengths = batch["code_lengths"] * SAMPLES_PER_CODE
    conditioning = model.conditioning_latent(batch["cond_mel"])
    return model(conditioning, batch["text"], batch["text_lengths"], batch["codes"], wav_lengths)


@pytest.fixture(scope="module")
def model() -> UnifiedVoice:
    return tiny_unified_voice(seed=1).requires_grad_(False)


# Names and sizes


def test_unified_voice_of_the_released_size() -> None:
    state = torch_model("ar").state_dict()
    assert list(state) == unified_voice_keys(layers=30)
    assert len(state) == 410
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS["ar"]
    expected = {
        "conditioning_encoder.init.weight": (1024, 80, 1),
        "conditioning_encoder.attn.5.qkv.weight": (3072, 1024, 1),
        "text_embedding.weight": (256, 1024),
        "mel_embedding.weight": (8194, 1024),
        "gpt.h.29.attn.c_attn.weight": (1024, 3072),
        "gpt.h.29.mlp.c_proj.weight": (4096, 1024),
        "mel_pos_embedding.emb.weight": (608, 1024),
        "text_pos_embedding.emb.weight": (404, 1024),
        "text_head.weight": (256, 1024),
        "mel_head.weight": (8194, 1024),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected


def test_dvae_of_the_released_size() -> None:
    state = torch_model("dvae").state_dict()
    keys = weight_and_bias("encoder.0.0", "encoder.1.0")
    keys += weight_and_bias(*[f"encoder.{i}.net.{j}" for i in (2, 3, 4) for j in (0, 2, 4)], "encoder.5", "decoder.0")
    keys += weight_and_bias(*[f"decoder.{i}.net.{j}" for i in (1, 2, 3) for j in (0, 2, 4)])
    keys += weight_and_bias("decoder.4.0.conv", "decoder.5.0.conv", "decoder.6")
    keys += ["codebook.embed", "codebook.cluster_size", "codebook.embed_avg"]
    assert list(state) == keys
    assert len(state) == 53
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS["dvae"]
    assert tuple(state["codebook.embed"].shape) == (512, 8192)
    assert tuple(state["decoder.4.0.conv.weight"].shape) == (1024, 1024, 3)
    assert tuple(state["decoder.5.0.conv.weight"].shape) == (512, 1024, 3)


def test_dvae_without_res_blocks_has_no_first_decoder_convolution() -> None:
    dvae = tiny_dvae(num_resnet_blocks=0)
    assert "decoder.0.weight" not in dvae.state_dict()
    assert dvae.decode(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 80, 12)


@pytest.mark.parametrize("build", [tiny_dvae, tiny_unified_voice])
def test_builders_follow_their_seed(build) -> None:
    first, again, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key])
        assert not torch.equal(tensor, other[key])


# The dVAE


def test_codes_are_the_nearest_codebook_columns() -> None:
    dvae = tiny_dvae()
    with torch.no_grad():
        encoder_out, codes = dvae.encode(torch.randn(2, 80, 61, generator=torch.Generator().manual_seed(0)))
    assert encoder_out.shape == (2, 16, 24)  # ceil(61 / 4) codes
    distances = (encoder_out[..., None] - dvae.codebook.embed).pow(2).sum(2)
    assert torch.equal(codes, distances.argmin(-1))
    assert len(codes.unique()) > 8
    assert torch.equal(dvae.codebook.lookup(codes)[1, 5], dvae.codebook.embed[:, codes[1, 5]])


def test_codebook_follows_its_inputs() -> None:
    book = Codebook(dim=1, size=2)
    book.embed.copy_(torch.tensor([[0.0, 10.0]]))
    book.cluster_size.copy_(torch.tensor([2.0, 4.0]))
    book.embed_avg.copy_(torch.tensor([[0.0, 40.0]]))
    vectors = torch.tensor([[1.0], [3.0], [9.0]])
    book.update(vectors, book.codes(vectors))
    sizes = [0.99 * 2 + 0.01 * 2, 0.99 * 4 + 0.01 * 1]
    sums = [0.01 * (1 + 3), 0.99 * 40 + 0.01 * 9]
    total = sum(sizes)
    smoothed = [(size + 1e-5) / (total + 2 * 1e-5) * total for size in sizes]
    assert book.cluster_size.tolist() == pytest.approx(sizes)
    assert book.embed_avg[0].tolist() == pytest.approx(sums)
    assert book.embed[0].tolist() == pytest.approx([sums[0] / smoothed[0], sums[1] / smoothed[1]])


def test_dvae_training_step_uses_the_old_codebook_and_passes_gradients_straight_through() -> None:
    dvae = tiny_dvae()
    mel = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoder_out, codes = dvae.encode(mel)
        decoded, old_embed = dvae.decode(codes), dvae.codebook.embed.clone()
        quantized = dvae.codebook.lookup(codes)
    recon_loss, commit_loss, out = dvae.train_forward(mel)
    assert relative_error(out, decoded) < 1e-6
    assert torch.allclose(recon_loss, (decoded - mel).pow(2).mean())
    assert torch.allclose(commit_loss, (encoder_out - quantized).pow(2).mean())
    assert not torch.equal(dvae.codebook.embed, old_embed)
    recon_loss.backward()
    smooth_loss = tiny_dvae().train_forward(mel, smooth_l1=True)[0]
    assert torch.allclose(smooth_loss, F.smooth_l1_loss(decoded, mel))
    assert all(parameter.grad.abs().max() > 0 for parameter in dvae.parameters())


# The conditioning encoder


@pytest.mark.parametrize(("width", "groups"), [(16, 8), (20, 4), (64, 16), (96, 32), (100, 4), (1024, 32)])
def test_group_count(width: int, groups: int) -> None:
    assert group_count(width) == groups


def test_conditioning_attention_interleaves_q_k_v_per_head() -> None:
    block = AttentionBlock(width=8, heads=2)
    x = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        qkv = block.qkv(block.norm(x))[0]
        heads = []
        for start in (0, 12):
            q, k, v = qkv[start : start + 4], qkv[start + 4 : start + 8], qkv[start + 8 : start + 12]
            heads.append(v @ (q.T @ k / 2.0).softmax(-1).T)
        expected = x + block.proj_out(torch.cat(heads)[None])
        assert relative_error(block(x), expected) < 1e-6


def test_conditioning_is_the_mean_of_the_clips_and_depends_on_padding(model: UnifiedVoice) -> None:
    clips = random_batch(model, seed=0)["cond_mel"]
    single = torch.stack([model.conditioning_latent(clips[:, i : i + 1]) for i in range(2)])
    assert relative_error(model.conditioning_latent(clips), single.mean(0)) < 1e-6
    assert relative_error(model.conditioning_latent(F.pad(clips, (0, 8))), single.mean(0)) > 1e-2


def test_conditioning_is_read_at_the_first_frame(model: UnifiedVoice) -> None:
    clip = random_batch(model, seed=0)["cond_mel"][:1, :1]
    vector = model.conditioning_latent(clip)
    # The encoder has no positions: swapping later frames changes nothing, swapping the first one does.
    assert relative_error(model.conditioning_latent(clip.roll(5, -1)), vector) > 1e-2
    later_reversed = torch.cat([clip[..., :1], clip[..., 1:].flip(-1)], dim=-1)
    assert relative_error(model.conditioning_latent(later_reversed), vector) < 1e-5


# Upstream's batches


def test_streams_lay_out_stops_and_padding_as_upstream_does(model: UnifiedVoice) -> None:
    text = torch.tensor([[7, 8, 9, 0], [5, 0, 0, 0]])
    codes = torch.tensor([[1, 2, 3, 4], [11, 12, 13, 14]])
    wav_lengths = torch.tensor([3 * SAMPLES_PER_CODE + 1, SAMPLES_PER_CODE - 1])
    text_in, text_out, codes_in, codes_out = model.streams(text, torch.tensor([3, 1]), codes, wav_lengths)
    assert text_in.tolist() == [[255, 7, 8, 9, 0], [255, 5, 0, 0, 0]]
    assert text_out.tolist() == [[7, 8, 9, 0, 0], [5, 0, 0, 0, 0]]
    assert codes_in.tolist() == [[64, 1, 2, 3, 65], [64, 11, 65, 65, 65]]
    assert codes_out.tolist() == [[1, 2, 3, 65, 65], [11, 65, 65, 65, 65]]


def test_losses_are_means_over_every_position(model: UnifiedVoice) -> None:
    batch = random_batch(model, seed=0)
    with record_outputs(model) as outputs:
        text_loss, mel_loss, mel_logits = forward(model, batch)
    wav_lengths = batch["code_lengths"] * SAMPLES_PER_CODE
    _, text_out, _, codes_out = model.streams(batch["text"], batch["text_lengths"], batch["codes"], wav_lengths)
    assert mel_logits.shape == (3, 66, 22)
    assert torch.equal(mel_logits, outputs["mel_head"].transpose(1, 2))
    for loss, head, targets in ((text_loss, "text_head", text_out), (mel_loss, "mel_head", codes_out)):
        picked = outputs[head].log_softmax(-1).gather(2, targets[..., None])
        assert torch.allclose(loss, -picked.mean())


def test_padding_changes_a_row_in_upstreams_layout(model: UnifiedVoice) -> None:
    batch = random_batch(model, seed=0)
    padded = forward(model, batch)[2]
    conditioning = model.conditioning_latent(batch["cond_mel"])
    for row in range(3):
        text = batch["text"][row, : batch["text_lengths"][row]]
        codes = batch["codes"][row, : batch["code_lengths"][row]]
        alone = model.row_logits(conditioning[row], text, codes)[1]
        error = relative_error(padded[row, :, : len(codes) + 1].T, alone[:-1])
        # The longest row has no text padding in front of its codes; the others have.
        assert error < 1e-5 if row == 0 else error > 1e-2


def test_a_row_does_not_depend_on_the_others(model: UnifiedVoice) -> None:
    batch = random_batch(model, seed=0, text_lengths=(9, 9), code_lengths=(12, 12))
    together = forward(model, batch)[2]
    conditioning = model.conditioning_latent(batch["cond_mel"])
    for row in range(2):
        alone = model.row_logits(conditioning[row], batch["text"][row], batch["codes"][row])[1]
        assert relative_error(together[row].T, alone) < 1e-5
    assert relative_error(together[0], together[1]) > 1e-2


def test_row_losses_count_real_targets_only(model: UnifiedVoice) -> None:
    batch = random_batch(model, seed=0, text_lengths=(9,), code_lengths=(12,))
    conditioning = model.conditioning_latent(batch["cond_mel"])[0]
    text, codes = batch["text"][0], batch["codes"][0]
    text_logits, mel_logits = model.row_logits(conditioning, text, codes)
    assert text_logits.shape == (11, 256)
    assert mel_logits.shape == (14, 66)
    targets = [*codes.tolist(), 65]
    expected = -sum(mel_logits.log_softmax(-1)[j, target] for j, target in enumerate(targets))
    assert torch.allclose(model.row_losses(conditioning, text, codes)[1], expected)


def test_every_parameter_has_a_gradient() -> None:
    model = tiny_unified_voice()
    text_loss, mel_loss, _ = forward(model, random_batch(model, seed=0))
    (text_loss + mel_loss).backward()
    width = 64
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
        if name.endswith("c_attn.bias"):  # a constant added to every key shifts all scores of a query alike
            assert parameter.grad[width : 2 * width].abs().max() < 1e-6, name
        if name.endswith("qkv.bias"):
            assert parameter.grad.view(4, 3, -1)[:, 1].abs().max() < 1e-6, name


def test_dropout_is_off_until_training_starts() -> None:
    model = tiny_unified_voice()
    batch = random_batch(model, seed=0)
    assert torch.equal(forward(model, batch)[1], forward(model, batch)[1])
    model.train()
    assert not torch.equal(forward(model, batch)[1], forward(model, batch)[1])


def test_recorded_outputs_are_named_after_the_modules(model: UnifiedVoice) -> None:
    with record_outputs(model) as outputs:
        forward(model, random_batch(model, seed=0))
    assert outputs["gpt.h.2"].shape == (3, 1 + 16 + 22, 64)
    assert outputs["conditioning_encoder.attn.5"].shape == (6, 64, 37)
    assert relative_error(outputs["final_norm"], model.final_norm(outputs["gpt.ln_f"])) < 1e-6
    outputs.clear()
    forward(model, random_batch(model, seed=0))
    assert not outputs


# Synthesis


@pytest.fixture(scope="module")
def prompt(model: UnifiedVoice) -> tuple[torch.Tensor, torch.Tensor]:
    batch = random_batch(model, seed=0)
    return model.conditioning_latent(batch["cond_mel"])[0], batch["text"][0]


@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_cached_greedy_sampling_equals_the_uncached(model: UnifiedVoice, prompt, penalty: float) -> None:
    expected = model.generate(*prompt, max_codes=30, repetition_penalty=penalty)
    got = model.sample(*prompt, samples=2, max_codes=30, repetition_penalty=penalty, greedy=True)
    assert got.tolist() == [expected.tolist()] * 2
    assert len(expected.unique()) > 3


def test_generation_agrees_with_the_training_forward(model: UnifiedVoice, prompt) -> None:
    codes = model.generate(*prompt, max_codes=20)
    logits = model.row_logits(*prompt, codes[:-1])[1]
    assert torch.equal(logits[: len(codes)].argmax(-1), codes)


def test_slipped_positions_change_what_is_generated(model: UnifiedVoice, prompt, monkeypatch) -> None:
    expected = model.generate(*prompt, max_codes=30)
    embed_codes = model.embed_codes
    monkeypatch.setattr(model, "embed_codes", lambda codes, first=0: embed_codes(codes, first + (first > 0)))
    slipped = model.sample(*prompt, max_codes=30, repetition_penalty=1.0, greedy=True)[0]
    assert slipped.tolist() != expected.tolist()


def test_repetition_penalty_covers_the_start_code_and_code_1() -> None:
    model = tiny_unified_voice(seed=1).requires_grad_(False)
    conditioning, text = torch.zeros(64), torch.tensor([3, 4])
    for code in (1, model.start_mel_token):
        model.mel_head.weight.zero_()
        model.mel_head.bias.zero_()
        model.mel_head.bias[[code, 20]] = torch.tensor([3.0, 2.0])
        assert model.generate(conditioning, text, 1).tolist() == [code]
        assert model.generate(conditioning, text, 1, repetition_penalty=2.0).tolist() == [20]
        model.mel_head.bias.fill_(-9.0)
        model.mel_head.bias[[code, 20]] = torch.tensor([-2.0, -3.0])
        assert model.generate(conditioning, text, 1, repetition_penalty=2.0).tolist() == [20]


def test_sampling_follows_its_generator_and_its_limits(model: UnifiedVoice, prompt) -> None:
    def draw(seed: int, **settings) -> torch.Tensor:
        return model.sample(*prompt, samples=4, max_codes=10, generator=torch.Generator().manual_seed(seed), **settings)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    greedy = model.generate(*prompt, max_codes=10, repetition_penalty=2.0)
    assert draw(0, top_k=1).tolist() == [greedy.tolist()] * 4
    assert draw(0, top_p=1e-6).tolist() == [greedy.tolist()] * 4
    assert draw(0, temperature=1e-4).tolist() == [greedy.tolist()] * 4


def test_sampling_ends_at_the_stop_and_fills_up_with_it(prompt) -> None:
    model = tiny_unified_voice(seed=1).requires_grad_(False)
    model.mel_head.bias[model.stop_mel_token] += 2.0
    settings = dict(temperature=1.0, top_k=66, top_p=1.0, generator=torch.Generator().manual_seed(0))
    drawn = model.sample(*prompt, samples=8, max_codes=30, **settings)
    stops = drawn == model.stop_mel_token
    first_stops = [row.nonzero()[0, 0].item() if row.any() else drawn.shape[1] for row in stops]
    assert len(set(first_stops)) > 1
    for row, first in zip(stops, first_stops, strict=True):
        assert row[first:].all()
    model.mel_head.bias[model.stop_mel_token] += 1e3
    assert model.generate(*prompt, max_codes=30).tolist() == [model.stop_mel_token]
    assert model.sample(*prompt, samples=2, max_codes=30, greedy=True).tolist() == [[65], [65]]


def test_latent_is_the_hidden_state_at_the_code_inputs(model: UnifiedVoice, prompt) -> None:
    conditioning, text = prompt
    codes = torch.arange(2, 12)
    row = one_row(text, codes)
    latent = model.latent(conditioning[None], *row)
    assert latent.shape == (1, 10, 64)
    logits = model.row_logits(conditioning, text, codes)[1]
    assert relative_error(model.mel_head(latent[0]), logits[:-2]) < 1e-6


def test_hand_over_silences_the_tail_and_is_cut_at_the_ninth_silence(model: UnifiedVoice, prompt) -> None:
    spoken = torch.arange(20, 30)
    stopped = torch.cat([spoken, torch.tensor([65])])
    settings = dict(max_codes=30, silence=3, ending=(4, 4, 5))
    codes, hidden = model.hand_over(*prompt, stopped, **settings)
    assert codes.tolist() == [*range(20, 30), *[3] * 17, 4, 4, 5]
    assert hidden.shape == (10 + 8, 64)
    expected = model.latent(prompt[0][None], *one_row(prompt[1], codes))[0, :18]
    assert relative_error(hidden, expected) < 1e-6
    assert stopped[-1] == 65

    unstopped = torch.arange(20, 50)
    codes, hidden = model.hand_over(*prompt, unstopped, **settings)
    assert codes.tolist() == unstopped.tolist()
    assert hidden.shape == (30, 64)
    with pytest.raises(ValueError, match="31 codes do not fit into max_codes=30"):
        model.hand_over(*prompt, torch.arange(20, 51), **settings)


# The mel


def test_mel_filters_have_unit_area_and_rise_in_frequency() -> None:
    filters = mel_filters()
    assert filters.shape == (80, 513)
    area = filters.sum(1) * 22050 / 1024
    assert area[20:] == pytest.approx(torch.ones(60), abs=0.05)  # lower bands are too narrow for the bins to see
    assert (filters[20:].argmax(1).diff() > 0).all()
    assert filters[:, math.ceil(8000 / (22050 / 1024)) :].abs().max() == 0


def test_log_mel_finds_a_tone_where_the_htk_scale_puts_it() -> None:
    hz = 1000.0
    wav = 0.5 * torch.sin(2 * math.pi * hz * torch.arange(22050) / 22050)
    mel = log_mel(wav)
    assert mel.shape == (80, 1 + 22050 // 256)

    def scale(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    assert mel[:, 40].argmax().item() == round(scale(hz) / scale(8000) * 81) - 1


def test_log_mel_floor_norms_and_clipping() -> None:
    silence = log_mel(torch.zeros(4096))
    assert torch.allclose(silence, torch.tensor(math.log(1e-5)))
    norms = -torch.arange(1.0, 81.0)
    assert torch.equal(log_mel(torch.zeros(4096), norms)[:, 0], silence[:, 0] / norms)
    wav = 3 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(log_mel(wav), log_mel(wav.clamp(-1, 1)))


# The recipe


def test_groups_cover_every_parameter_once() -> None:
    model = tiny_unified_voice()
    decayed, undecayed = parameter_groups(model)
    assert sorted(decayed + undecayed) == sorted(dict(model.named_parameters()))
    layers = ("init", "qkv", "proj_out", "c_attn", "c_proj", "c_fc", "text_head", "mel_head")
    assert {name.split(".")[-2] for name in decayed} == set(layers)
    assert all(name.endswith(".weight") for name in decayed)
    assert (len(decayed), len(undecayed)) == (27, 59)


def test_first_step_is_adamw_with_each_group_clipped_by_itself() -> None:
    model = tiny_unified_voice()
    batch = random_batch(model, seed=0)
    recipe = Recipe(lr=1e-3, weight_decay=0.5, clip_per_group=1e-6)  # so small that Adam's eps shows the clipping
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    text_loss, mel_loss, _ = forward(model, batch)
    total = 0.01 * text_loss + mel_loss
    grads = dict(zip(before, torch.autograd.grad(total, list(model.parameters())), strict=True))
    trainer = Trainer(model, recipe)
    trainer.step(batch)
    norms = []
    for names, decay in zip(parameter_groups(model), (0.5, 0.0), strict=True):
        norm = math.sqrt(sum(grads[name].pow(2).sum().item() for name in names))
        norms.append(norm)
        for name in names:
            clipped = grads[name] * 1e-6 / (norm + 1e-6)
            expected = before[name] * (1 - 1e-3 * decay) - 1e-3 * clipped / (clipped.abs() + 1e-8)
            change, expected_change = model.get_parameter(name) - before[name], expected - before[name]
            assert (change - expected_change).abs().max() < 1e-6, name
    assert abs(norms[0] - norms[1]) > 0.1
    assert trainer.history[0] == pytest.approx([text_loss.item(), mel_loss.item(), total.item(), *norms, 1e-3])


def test_rate_is_halved_from_the_milestone_steps_on() -> None:
    model = tiny_unified_voice()
    batches = [random_batch(model, seed) for seed in range(5)]
    history = train(model, batches, Recipe(lr=1e-3, milestones=(1, 3)))
    assert history.shape == (5, len(HISTORY_COLUMNS))
    assert history[:, HISTORY_COLUMNS.index("learning_rate")].tolist() == [1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
