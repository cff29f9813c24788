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


class Contents(nn.Module):
    """Reads what a caption says from the mean of its embeddings.

    An object of a list is read as one that is needed is, and that it is a list, apart: what a UNet
    learns of the one serves the other.

    Parameters
    ----------
    world : World
    width : int
        Size of an embedding.
    """

    def __init__(self, world: World, width: int) -> None:
        super().__init__()
        self.scene = nn.Linear(width, 1 + len(world.scenes))
        self.objects = nn.Linear(width, 2 * len(world.objects) + 1)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the scene, (B, 1 + S), and of :func:`contents_of`, (B, 2 K + 1)."""
        mean = embeddings.mean(1)
        return self.scene(mean), self.objects(mean)


def contents_of(events: list[Event], world: World) -> tuple[Tensor, Tensor]:
    """What events say.

    Parameters
    ----------
    events : list of Event
        In which a list, of which one is needed, is alone.
    world : World

    Returns
    -------
    scenes : Tensor, shape (B,), int64
        Number of the scene, 0 for none.
    objects : Tensor, shape (B, 2 K + 1)
        1 for each object that is named as there, for each that is excluded, and for a list.
    """
    names = [scene.name for scene in world.scenes]
    scenes = [0 if each.scene is None else 1 + names.index(each.scene) for each in events]
    objects = torch.zeros(len(events), 2 * len(world.objects) + 1)
    for row, event in zip(objects, events, strict=True):
        for group in event.required:
            row[[world.objects.index(name) for name in group]] = 1.0
            row[-1] = max(float(row[-1]), float(len(group) > 1))
        row[[len(world.objects) + world.objects.index(name) for name in event.excluded]] = 1.0
    return torch.tensor(scenes), objects


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
            wanted_scene, wanted = (each.to(device) for each in contents_of(events, world))
            embeddings = encoder(tokens_of(captions, tokenizer).to(device))[0]
            scene, objects = contents(embeddings)
            loss = functional.cross_entropy(scene, wanted_scene)
            each = functional.binary_cross_entropy_with_logits(objects, wanted, reduction="none")
            loss = loss + each.sum(1).mean() / 4
            torch.autograd.backward(loss)
            for group in adam.param_groups:
                rise = min(1.0, (step + 1) / (0.05 * steps + 1))
                group["lr"] = learning_rate * rise * 0.5 * (1 + np.cos(np.pi * step / steps))
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                same = ((objects > 0) == (wanted > 0)).all(-1)
                same &= scene.argmax(-1) == wanted_scene
            right.append(float(same.double().mean()))
            bar.update()
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
