"""TorToiSe's autoregressive model on torch.nn and transformers' GPT2Model, with the released checkpoint's key names.

Axis letters: b batch, r clips of one row, m mel bands, t frames, d width, s text tokens, n codes, h heads, c head
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SAMPLES_PER_CODE = 1024
STOP_TEXT = 0
PROMPT_CODE = 1  # what tortoise fills the prompt with in front of the start code; the repetition penalty counts it


def group_count(width: int) -> int:
    """Groups of the conditioning encoder's norms."""
    groups = 8 if width <= 16 else 16 if width <= 64 else 32
    while width % groups:
        groups //= 2
    return groups


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) over (b, d, t), without a mask; q, k, v are interleaved per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(group_count(width), width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, d, t = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, self.heads, 3, d // self.heads, t).unbind(2)
        scores = torch.einsum("bhci,bhcj->bhij", q, k) * (d // self.heads) ** -0.5
        mixed = torch.einsum("bhij,bhcj->bhci", scores.softmax(-1), v)
        return x + self.proj_out(mixed.reshape(b, d, t))


class ConditioningEncoder(nn.Module):
    """Mel (b, m, t) -> the first time step (b, d) after six attention blocks."""

    def __init__(self, channels: int, width: int, heads: int, blocks: int = 6) -> None:
        super().__init__()
        self.init = nn.Conv1d(channels, width, 1)
        self.attn = nn.Sequential(*[AttentionBlock(width, heads) for _ in range(blocks)])

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.attn(self.init(mel))[:, :, 0]


class PositionEmbedding(nn.Module):
    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(positions, width)

    def forward(self, tokens: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Vectors (s, d) of the positions first, first + 1, … for tokens (b, s)."""
        return self.emb(torch.arange(first, first + tokens.shape[1], device=tokens.device))


class NoPositions(nn.Module):
    """Stands in for GPT-2's own position table, which upstream takes out."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)  # 0-d, so that it never widens a half-precision sum


def gpt2_blocks(layers: int, width: int, heads: int, positions: int, attention: str) -> GPT2Model:
    """GPT-2's blocks and last norm, without its token and position tables."""
    gpt = GPT2Model(
        GPT2Config(
            vocab_size=256,
            bos_token_id=None,
            eos_token_id=None,
            n_positions=positions,
            n_ctx=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            gradient_checkpointing=False,
            use_cache=False,
            attn_implementation=attention,
        )
    )
    del gpt.wte
    gpt.wpe = NoPositions()
    return gpt


class UnifiedVoice(nn.Module):
    """The text-to-codes model. `number_text_tokens` does not count the stop: the text table has one row more.

    `attention` is transformers' implementation: "eager" for plain values, "sdpa" for speed.
    """

    def __init__(
        self,
        layers: int = 30,
        model_dim: int = 1024,
        heads: int = 16,
        max_text_tokens: int = 402,
        max_mel_tokens: int = 604,
        number_text_tokens: int = 255,
        start_text_token: int = 255,
        number_mel_codes: int = 8194,
        start_mel_token: int = 8192,
        stop_mel_token: int = 8193,
        max_conditioning_inputs: int = 2,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        self.start_text_token = start_text_token
        self.start_mel_token = start_mel_token
        self.stop_mel_token = stop_mel_token
        text_positions = max_text_tokens + 2
        mel_positions = max_mel_tokens + 2 + max_conditioning_inputs

        self.conditioning_encoder = ConditioningEncoder(80, model_dim, heads)
        self.text_embedding = nn.Embedding(number_text_tokens + 1, model_dim)
        self.mel_embedding = nn.Embedding(number_mel_codes, model_dim)
        self.gpt = gpt2_blocks(layers, model_dim, heads, text_positions + mel_positions, attention)
        self.mel_pos_embedding = PositionEmbedding(mel_positions, model_dim)
        self.text_pos_embedding = PositionEmbedding(text_positions, model_dim)
        self.final_norm = nn.LayerNorm(model_dim)
        self.text_head = nn.Linear(model_dim, number_text_tokens + 1)
        self.mel_head = nn.Linear(model_dim, number_mel_codes)

    def conditioning_latent(self, cond_mel: torch.Tensor) -> torch.Tensor:
        """Clips (b, r, m, t) -> the mean of their vectors (b, d)."""
        return self.conditioning_encoder(cond_mel.flatten(0, 1)).unflatten(0, cond_mel.shape[:2]).mean(1)

    # Streams: a batch in, hidden states out

    def hidden_states(
        self, conditioning: torch.Tensor, text_inputs: torch.Tensor, code_inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states (b, s, d) and (b, n, d) at the text and code inputs (b, s), (b, n), starts included."""
        embedded = self.embed(conditioning, text_inputs, code_inputs)
        hidden = self.final_norm(self.gpt(inputs_embeds=embedded).last_hidden_state)[:, 1:]
        return hidden[:, : text_inputs.shape[1]], hidden[:, text_inputs.shape[1] :]

    def embed(self, conditioning: torch.Tensor, text_inputs: torch.Tensor, code_inputs: torch.Tensor) -> torch.Tensor:
        """What the blocks are given: (b, 1 + s + n, d)."""
        text = self.text_embedding(text_inputs) + self.text_pos_embedding(text_inputs)
        return torch.cat([conditioning[:, None], text, self.embed_codes(code_inputs)], dim=1)

    def embed_codes(self, code_inputs: torch.Tensor, first: int = 0) -> torch.Tensor:
        return self.mel_embedding(code_inputs) + self.mel_pos_embedding(code_inputs, first)

    # Upstream's training forward

    def streams(
        self,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        codes: torch.Tensor,
        wav_lengths: torch.Tensor,
        clip_inputs: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Upstream's padding: (text inputs, text targets, code inputs, code targets), each starting or ending longer.

        Text (b, s) is expected to be padded with 0, which is also its stop; codes (b, n) from wav_length // 1024 + 1
        on become stops. Then each stream gets a stop behind, and the inputs a start in front of it, the targets a
        second stop behind.
        """
        if clip_inputs:
            text = text[:, : int(text_lengths.max())]
            codes = codes[:, : int(wav_lengths.max()) // SAMPLES_PER_CODE]
        ends = torch.div(wav_lengths, SAMPLES_PER_CODE, rounding_mode="floor") + 1
        past_end = torch.arange(codes.shape[1], device=codes.device) >= ends[:, None]
        codes = codes.masked_fill(past_end, self.stop_mel_token)
        text = F.pad(text, (0, 1), value=STOP_TEXT)
        codes = F.pad(codes, (0, 1), value=self.stop_mel_token)
        return (
            F.pad(text, (1, 0), value=self.start_text_token),
            F.pad(text, (0, 1), value=STOP_TEXT),
            F.pad(codes, (1, 0), value=self.start_mel_token),
            F.pad(codes, (0, 1), value=self.stop_mel_token),
        )

    def forward(
        self,
        conditioning: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        codes: torch.Tensor,
        wav_lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Conditioning (b, d), text (b, s), codes (b, n), lengths (b,) in tokens and samples.

        Returns the text and the mel loss, means over every position with the padding, and the mel logits
        (b, code table, n + 2), where n is the longest wav_length // 1024.
        """
        text_in, text_out, codes_in, codes_out = self.streams(text, text_lengths, codes, wav_lengths)
        text_hidden, mel_hidden = self.hidden_states(conditioning, text_in, codes_in)
        text_logits = self.text_head(text_hidden).transpose(1, 2)
        mel_logits = self.mel_head(mel_hidden).transpose(1, 2)
        return F.cross_entropy(text_logits, text_out), F.cross_entropy(mel_logits, codes_out), mel_logits

    def latent(
        self,
        conditioning: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        codes: torch.Tensor,
        wav_lengths: torch.Tensor,
        clip_inputs: bool = True,
    ) -> torch.Tensor:
        """tortoise's return_latent: final hidden states (b, n, d) at the code inputs, the last two left out."""
        text_in, _, codes_in, _ = self.streams(text, text_lengths, codes, wav_lengths, clip_inputs)
        return self.hidden_states(conditioning, text_in, codes_in)[1][:, :-2]

    # One row without padding

    def row_logits(
        self, conditioning: torch.Tensor, text: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditioning (d,), text (s,), codes (n,), all real -> logits (s + 2, text table), (n + 2, code table).

        Position j predicts token j; position s (n) the stop. The last one predicts upstream's second stop.
        """
        text_in, _, codes_in, _ = self.streams(*one_row(text, codes))
        text_hidden, mel_hidden = self.hidden_states(conditioning[None], text_in, codes_in)
        return self.text_head(text_hidden[0]), self.mel_head(mel_hidden[0])

    def row_losses(
        self, conditioning: torch.Tensor, text: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropies summed over the real targets of one row: the s tokens and a stop, the n codes and a stop."""
        text_logits, mel_logits = self.row_logits(conditioning, text, codes)
        text_targets = F.pad(text, (0, 1), value=STOP_TEXT)
        mel_targets = F.pad(codes, (0, 1), value=self.stop_mel_token)
        return (
            F.cross_entropy(text_logits[:-1], text_targets, reduction="sum"),
            F.cross_entropy(mel_logits[:-1], mel_targets, reduction="sum"),
        )

    # Synthesis

    def prompt(self, text: torch.Tensor) -> torch.Tensor:
        """Text inputs (1, s + 2) of synthesis for text (s,): start, text, stop. tortoise's text ends in an extra 0."""
        return F.pad(F.pad(text, (0, 1), value=STOP_TEXT), (1, 0), value=self.start_text_token)[None]

    @torch.no_grad()
    def generate(
        self, conditioning: torch.Tensor, text: torch.Tensor, max_codes: int = 500, repetition_penalty: float = 1.0
    ) -> torch.Tensor:
        """The likeliest code at every step, without a cache, code j at position j.

        Conditioning (d,), text (s,) -> codes (n,), n <= max_codes, ending in the stop if it came.
        """
        seen = torch.tensor([PROMPT_CODE, self.start_mel_token], device=text.device)
        codes: list[torch.Tensor] = []
        while len(codes) < max_codes:
            _, hidden = self.hidden_states(conditioning[None], self.prompt(text), seen[None, 1:])
            logits = self.mel_head(hidden[0, -1])
            penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits[seen] = penalised[seen]
            codes.append(logits.argmax())
            if codes[-1] == self.stop_mel_token:
                break
            seen = torch.cat([seen, codes[-1][None]])
        return torch.stack(codes)

    @torch.no_grad()
    def sample(
        self,
        conditioning: torch.Tensor,
        text: torch.Tensor,
        samples: int = 1,
        max_codes: int = 500,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 0.8,
        repetition_penalty: float = 2.0,
        greedy: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Cached sampling with tortoise's settings and the positions of training.

        Conditioning (d,), text (s,) -> codes (samples, n), n <= max_codes, filled up with stops. `greedy` takes the
        likeliest code after the repetition penalty and ignores the other settings.
        """
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
        if not greedy:
            processors += [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]

        seen = torch.tensor([[PROMPT_CODE, self.start_mel_token]] * samples, device=text.device)
        stopped = torch.zeros(samples, dtype=torch.bool, device=text.device)
        embedded = self.embed(conditioning[None], self.prompt(text), seen[:1, 1:]).expand(samples, -1, -1)
        cache = None
        while True:
            output = self.gpt(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = processors(seen, self.mel_head(self.final_norm(output.last_hidden_state[:, -1])).float())
            drawn = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            drawn = drawn.masked_fill(stopped, self.stop_mel_token)
            stopped |= drawn == self.stop_mel_token
            seen = torch.cat([seen, drawn[:, None]], dim=1)
            generated = seen.shape[1] - 2
            if generated == max_codes or stopped.all():
                return seen[:, 2:]
            embedded = self.embed_codes(drawn[:, None], first=generated)

    @torch.no_grad()
    def hand_over(
        self,
        conditioning: torch.Tensor,
        text: torch.Tensor,
        codes: torch.Tensor,
        max_codes: int = 500,
        silence: int = 83,
        ending: tuple[int, int, int] = (45, 45, 248),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What tortoise gives its diffusion model for one clip: the codes as it repairs them, and the hidden states.

        Conditioning (d,), text (s,) with its extra 0, codes (n,) -> codes (max_codes,), hidden states (kept, d), cut
        where the ninth silence in a row stands. Codes without a stop (n = max_codes) are not repaired.
        """
        if codes.shape[0] > max_codes:
            raise ValueError(f"{codes.shape[0]} codes do not fit into max_codes={max_codes}")
        codes = torch.cat([codes, codes.new_full((max_codes - codes.shape[0],), self.stop_mel_token)])
        stops = (codes == self.stop_mel_token).nonzero()
        if len(stops):
            codes[stops[0, 0] :] = silence
            codes[-3:] = codes.new_tensor(ending)
        text_row, text_lengths, code_row, wav_lengths = one_row(text, codes)
        hidden = self.latent(conditioning[None], text_row, text_lengths, code_row, wav_lengths, clip_inputs=False)[0]
        silent = 0
        for position, code in enumerate(codes.tolist()):
            silent = silent + 1 if code == silence else 0
            if silent == 9:
                return codes, hidden[:position]
        return codes, hidden


def one_row(text: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text (s,) and codes (n,) as a batch of one with the lengths at which upstream adds no padding."""
    text_lengths = torch.tensor([text.shape[0]], device=text.device)
    wav_lengths = torch.tensor([codes.shape[0] * SAMPLES_PER_CODE], device=codes.device)
    return text[None], text_lengths, codes[None], wav_lengths
