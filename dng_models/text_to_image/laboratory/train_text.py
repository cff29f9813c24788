"""Training of a text encoder to tell what a caption says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from dng_models.support.progress import Progress
from dng_models.text_to_image.laboratory.captions import Event
from dng_models.text_to_image.laboratory.phrases import phrased
from dng_models.text_to_image.laboratory.training_batches import TrainingBatches
from dng_models.text_to_image.laboratory.worlds import World

ROLES = 4  # of an object in a caption: not named, needed, one of a list, excluded


class Contents(nn.Module):
    """Reads what a caption says from the mean of its embeddings.

    Parameters
    ----------
    world : World
    width : int
        Size of an embedding.
    """

    def __init__(self, world: World, width: int) -> None:
        super().__init__()
        self._shape = (len(world.objects), ROLES)
        self.scene = nn.Linear(width, 1 + len(world.scenes))
        self.roles = nn.Linear(width, len(world.objects) * ROLES)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the scene, (B, 1 + S), and of each object's role, (B, K, 4)."""
        mean = embeddings.mean(1)
        return self.scene(mean), self.roles(mean).reshape(-1, *self._shape)


def contents_of(events: list[Event], world: World) -> tuple[Tensor, Tensor]:
    """Number of the scene of each event, 0 for none, (B,), and role of each object, (B, K)."""
    names = [scene.name for scene in world.scenes]
    scenes = [0 if each.scene is None else 1 + names.index(each.scene) for each in events]
    roles = torch.zeros(len(events), len(world.objects), dtype=torch.int64)
    for row, event in zip(roles, events, strict=True):
        for group in event.required:
            for name in group:
                row[world.objects.index(name)] = 1 if len(group) == 1 else 2
        for name in event.excluded:
            row[world.objects.index(name)] = 3
    return torch.tensor(scenes), roles


def tokens_of(captions: list[str], tokenizer: CLIPTokenizer) -> Tensor:
    """Tokens of captions as pipelines make them, shape (B, L)."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_text_encoder(
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    batches: TrainingBatches,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: bool = True,
) -> float:
    """Train a text encoder so that a linear map tells what a caption says.

    Parameters
    ----------
    encoder : CLIPTextModel
        Is changed.
    tokenizer : CLIPTokenizer
    batches : TrainingBatches
        Whose captions it learns.
    steps : int
    learning_rate : float
        Largest of Adam; it falls to 0 as a cosine.
    seed : int
        Of the linear map and of the words of the captions.
    progress : bool
        Whether to show the time left.

    Returns
    -------
    float
        Share of the captions of the last tenth of the steps whose content was named without error,
        before the step that learned from them.
    """
    world = batches.model.world
    device = next(encoder.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        contents = Contents(world, encoder.config.hidden_size).to(device)
    parameters = [*encoder.parameters(), *contents.parameters()]
    adam = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    right: list[float] = []
    with Progress(steps, "training the text encoder", shown=progress) as bar:
        for step in range(steps):
            events = batches.events(step)
            rng = np.random.default_rng([seed, 1, step])
            captions = [phrased(event, world, rng) for event in events]
            wanted_scene, wanted_roles = (each.to(device) for each in contents_of(events, world))
            embeddings = encoder(tokens_of(captions, tokenizer).to(device))[0]
            scene, roles = contents(embeddings)
            loss = functional.cross_entropy(scene, wanted_scene)
            loss = loss + len(world.objects) / 4 * functional.cross_entropy(
                roles.flatten(0, 1), wanted_roles.flatten()
            )
            torch.autograd.backward(loss)
            for group in adam.param_groups:
                rise = min(1.0, (step + 1) / (0.05 * steps + 1))
                group["lr"] = learning_rate * rise * 0.5 * (1 + np.cos(np.pi * step / steps))
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                same = (roles.argmax(-1) == wanted_roles).all(-1)
                same &= scene.argmax(-1) == wanted_scene
            right.append(float(same.double().mean()))
            bar.update()
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
