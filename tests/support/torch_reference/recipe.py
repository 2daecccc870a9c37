"""The optimiser step of the DLAS trainer for UnifiedVoice, its learning-rate schedule and its two parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tests.support.torch_reference.unified_voice import SAMPLES_PER_CODE, UnifiedVoice

UNDECAYED_MODULES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm)
HISTORY_COLUMNS = ("text_loss", "mel_loss", "total", "decayed_norm", "undecayed_norm", "learning_rate")


@dataclass(frozen=True)
class Recipe:
    """Upstream's settings; `milestones` are the optimiser steps, from 0, that first run at the reduced rate."""

    lr: float = 1e-5
    weight_decay: float = 1e-2
    clip_per_group: float = 4.0
    milestones: tuple[int, ...] = (500, 1000, 1400, 1800)
    gamma: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.96
    eps: float = 1e-8
    text_weight: float = 0.01
    mel_weight: float = 1.0


def parameter_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the decayed parameters (weights of layers) and of the undecayed (biases, norms, embeddings)."""
    decayed, undecayed = [], []
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(module_name, recurse=False):
            plain = isinstance(module, UNDECAYED_MODULES) or name.endswith("bias")
            (undecayed if plain else decayed).append(name)
    return decayed, undecayed


class Trainer:
    """Runs optimiser steps on one model and keeps a row of HISTORY_COLUMNS for each."""

    def __init__(self, model: UnifiedVoice, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        parameters = dict(model.named_parameters())
        self.groups = [[parameters[name] for name in names] for names in parameter_groups(model)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.groups[0], "weight_decay": recipe.weight_decay},
                {"params": self.groups[1], "weight_decay": 0.0},
            ],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
        )
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, recipe.milestones, recipe.gamma)
        self.history: list[list[float]] = []

    def step(self, batch: Mapping[str, torch.Tensor], micro_batches: int = 1) -> None:
        """One step on a batch of cond_mel (b, r, m, t), text, text_lengths, codes and code_lengths.

        micro_batches: the mean of their losses is minimised, as upstream takes a batch of 128 as four.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        found = []
        for micro in zip(*(array.chunk(micro_batches) for array in batch.values()), strict=True):
            losses = self.losses(dict(zip(batch, micro, strict=True)))
            (losses[-1] / micro_batches).backward()
            found.append([loss.item() for loss in losses])
        norms = [nn.utils.clip_grad_norm_(group, self.recipe.clip_per_group) for group in self.groups]
        self.optimizer.step()
        self.schedule.step()
        means = [sum(column) / micro_batches for column in zip(*found, strict=True)]
        self.history.append(means + [norm.item() for norm in norms] + [learning_rate])

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of text, of codes, and what is minimised."""
        text_loss, mel_loss, _ = self.model(
            self.model.conditioning_latent(batch["cond_mel"]),
            batch["text"],
            batch["text_lengths"],
            batch["codes"],
            batch["code_lengths"] * SAMPLES_PER_CODE,
        )
        return text_loss, mel_loss, self.recipe.text_weight * text_loss + self.recipe.mel_weight * mel_loss


def train(model: UnifiedVoice, batches: Iterable[Mapping[str, torch.Tensor]], recipe: Recipe) -> torch.Tensor:
    """Trains the model in place; returns the history (steps, 6), float64, before-clipping norms."""
    trainer = Trainer(model, recipe)
    for batch in batches:
        trainer.step(batch)
    return torch.tensor(trainer.history, dtype=torch.float64)
