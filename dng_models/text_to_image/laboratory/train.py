"""Training of a Stable Diffusion pipeline on a laboratory's world, which can be killed and resumed.

The network is distilled: it regresses on the world's exact ``E[x0 | x_t, caption]``
(:mod:`.training_batches`), in float32, at forward-noised pictures and at those that the network
itself is drawing (:mod:`.training_chains`).  First the text encoder learns to tell what a caption
says; then it is frozen, and the UNet learns.

Guidance is driven by the difference of two predictions at the same x_t, which is small and would be
learned last.  So wherever a picture was drawn from the scene alone, the scene is a caption of the
same x_t too, and the loss is

    mean |f - e|^2 / V  +  w mean( |(f_c - f_s) - (e_c - e_s)|^2 / (|e_c - e_s|^2 + b^2) ),

with f the network's and e the exact predictions given the caption c and the scene s, V the variance
of the latents, and squares that are means over them.  In the second term a picture that plainly
does not have what the caption names counts less, by p(c | x_t, s) / r where that is below 1: there
the difference hangs on which cell is the least unlikely one, and guidance has no use for it.  In
the first term it counts fully.

The random numbers of a step depend only on the seed and the step, so that a resumed training ends
with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dng_models.support import files, foreign
from dng_models.support.processes import versions
from dng_models.support.progress import Progress
from dng_models.support.threads import torch_threads
from dng_models.text_to_image.laboratory import networks
from dng_models.text_to_image.laboratory.captions import parse
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.muon import Muon
from dng_models.text_to_image.laboratory.phrases import phrased
from dng_models.text_to_image.laboratory.pipelines import BETAS
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.laboratory.train_text import tokens_of, train_text_encoder
from dng_models.text_to_image.laboratory.trained import save_trained
from dng_models.text_to_image.laboratory.training_batches import CaptionMix, TrainingBatches
from dng_models.text_to_image.laboratory.training_chains import TrainingChains
from dng_models.text_to_image.laboratory.training_config import LaboratoryTraining
from dng_models.text_to_image.laboratory.worlds import World

STATE = "state.safetensors"
LOSS = "loss.jsonl"
METADATA = "training.json"
PICTURES = 4096  # from which variance and principal components are computed
_KINDS = ("weights", "average")
# "One of two" is what negatives say.
MIX = CaptionMix(
    empty=0.08, scene=0.12, bare=0.12, one=0.18, two=0.10, either=0.22, without=0.14, mixed=0.04
)


def train_laboratory(
    out: Path | str,
    config: LaboratoryTraining | None = None,
    *,
    world: World | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Path:
    """Train a Stable Diffusion pipeline on a world of pictures.

    A stopped training resumes from its last state; a finished one is not repeated.

    Parameters
    ----------
    out : Path or str
        Folder of the pipeline, in diffusers' layout and half precision, with ``training.json`` and
        ``loss.jsonl`` beside.
    config : LaboratoryTraining, optional
        Default: its defaults.
    world : World, optional
        Default: the laboratory's.
    device : torch.device or str
        Where the networks are trained.
    progress : bool
        Whether to show the loss and the time left.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    ValueError
        If ``out`` holds a state or a pipeline of another configuration (the message names the
        field), a file there is damaged, or the loss is not finite.
    OSError
        If something cannot be written, or another process trains there.
    """
    config = LaboratoryTraining() if config is None else config
    world = laboratory_world() if world is None else world
    out = Path(out)
    identity = _identity(config, world)
    if not _is_finished(out, identity):
        out.mkdir(parents=True, exist_ok=True)
        with files.only_writer(out):
            # More threads mostly wait for each other in products of this size.
            with torch_threads(count=1):
                run = _Run(out, config, world, identity, torch.device(device))
                run.start(progress)
                run.train(progress)
                run.finish()
    return out


def _identity(config: LaboratoryTraining, world: World) -> dict[str, Any]:
    """Everything that the finished pipeline depends on."""
    scenes = {scene.name: dict(scene.shares) for scene in world.scenes}
    return {**config.identity, "objects": list(world.objects), "scenes": scenes}


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds a finished pipeline; ValueError if of another configuration."""
    path = out / METADATA
    if not path.is_file():
        return False
    _same(foreign.read_object(path).get("configuration"), identity, path)
    return True


def _same(saved: object, wanted: dict[str, Any], path: Path) -> None:
    """Raise a ValueError naming the first field in which two configurations differ, if any."""
    if not isinstance(saved, dict):
        raise ValueError(f"{path} does not say how it was trained: choose another folder")
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} is of another configuration: {name} is {saved.get(name)!r} there and "
                f"{value!r} here; remove it, or choose another folder"
            )


@dataclass(frozen=True, eq=False)
class _Batch:
    """What a step learns from: N captions, then the scenes of the P mismatched pictures again.

    ``chains`` of the N, the last ones, are of pictures that the network is drawing.  ``x`` and
    ``target`` (N + P, pixels, rows, columns) are noisy latents and exact predictions,
    ``embeddings`` (N + P, L, W) those of the captions, ``pairs`` (P,) the rows of the captions
    whose x the last P rows have, and ``weights`` (P,) how much their differences count.
    """

    x: Tensor
    target: Tensor
    weights: Tensor
    timesteps: Tensor
    embeddings: Tensor
    pairs: Tensor
    chains: slice


class _Run:
    """One training: the networks, their average, the optimizer and the current step."""

    def __init__(
        self,
        out: Path,
        config: LaboratoryTraining,
        world: World,
        identity: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.out, self.config, self.world = out, config, world
        self.identity, self.device = identity, device
        squares = DDPMScheduler(**BETAS).alphas_cumprod
        model = ExactModel(world, device=device)

        def batches(size: int) -> TrainingBatches:
            return TrainingBatches(
                model,
                squares,
                size=size,
                mix=MIX,
                mismatched=config.mismatched,
                seed=config.seed,
            )

        self.batches = batches(config.batch_size)
        self.captions = batches(config.text_batch_size)
        self.chains = TrainingChains(self.batches, config.chains) if config.chains else None
        self.tokenizer = networks.trained_tokenizer(world)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.text = networks.make_text_encoder(
                self.tokenizer, config.text_width, config.text_layers
            ).to(device)
            self.net = networks.make_unet(world, config.channels, config.text_width)
        pictures = model.sample("", PICTURES, generator=config.seed).latents
        self.variance = float(pictures.double().var())
        networks.start_from_pictures(self.net, pictures, config.seed)
        self.net.to(device)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = Muon(self.net.named_parameters(), config.learning_rate)
        # It sets the number of its threads itself: torch's setting is of the thread that calls it.
        self._worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._prepared: tuple[int, Future[_Batch]] | None = None
        self.step = 0
        self.told: dict[str, Any] = {}
        self.losses = torch.zeros(2, dtype=torch.float64)
        self.loss_count = 0

    # The state

    def save(self) -> None:
        """Save the state."""
        tensors = {"losses": self.losses}
        tensors |= {f"text.{name}": value for name, value in self.text.state_dict().items()}
        tensors |= {f"chains.{name}": value for name, value in self._chains().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors[f"weights.{name}"] = p
            tensors[f"average.{name}"] = average
        told = {
            "step": self.step,
            "loss_count": self.loss_count,
            "told": self.told,
            "configuration": self.identity,
        }
        metadata = {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
        files.save_tensors(self.out / STATE, tensors, metadata)

    def _chains(self) -> dict[str, Tensor]:
        return {} if self.chains is None else self.chains.state()

    def start(self, progress: bool) -> None:
        """Load the saved state; without one, train the text encoder."""
        path = self.out / STATE
        if path.is_file():
            self._load(path)
        else:
            config = self.config
            self.told["captions_named"] = train_text_encoder(
                self.text,
                self.tokenizer,
                self.captions,
                steps=config.text_steps,
                learning_rate=config.text_learning_rate,
                seed=config.seed,
                progress=progress,
            )
            self.save()
        self.text.eval().requires_grad_(False)
        self.net.train()
        _truncate_log(self.out / LOSS, self.step)

    def _load(self, path: Path) -> None:
        tensors, metadata = files.load_tensors(path)
        refused = f"{path} is not the state of a training here: remove it, or choose another folder"
        try:
            told = {name: foreign.parse_json(text, path) for name, text in metadata.items()}
            step, count = (foreign.member(told, name, int, path) for name in ("step", "loss_count"))
            configuration, self.told = told["configuration"], dict(told["told"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(refused) from None
        _same(configuration, self.identity, path)
        text = self.text.state_dict()
        wanted = {"losses", *(f"text.{name}" for name in text)}
        wanted |= {f"{kind}.{name}" for kind in _KINDS for name in self.names}
        wanted |= {f"chains.{name}" for name in self._chains()}
        moments = self.optimizer.state()
        wanted |= {f"optimizer.{name}" for name in moments}
        if tensors.keys() != wanted:
            raise ValueError(refused)
        if self.chains is not None:
            self.chains.load({name: tensors[f"chains.{name}"] for name in self.chains.state()})
        self.text.load_state_dict({name: tensors[f"text.{name}"] for name in text})
        with torch.no_grad():
            for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
                p.copy_(tensors[f"weights.{name}"])
                average.copy_(tensors[f"average.{name}"])
        self.optimizer.load({name: tensors[f"optimizer.{name}"] for name in moments}, step)
        self.step, self.loss_count, self.losses = step, count, tensors["losses"]

    # The steps

    def train(self, progress: bool) -> None:
        """Do all remaining steps, with logs and states."""
        config = self.config
        bar = Progress(config.steps, "training the UNet", initial=self.step, shown=progress)
        with bar, networks.folded_convolutions(self.net):
            while self.step < config.steps:
                self.losses += self.update().cpu().double()
                self.loss_count += 1
                self.step += 1
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    loss, difference = self._log()
                    bar.set_postfix(loss=f"{loss:.4f}", differences=f"{difference:.3f}")
                if last or self.step % config.checkpoint_every == 0:
                    self.save()

    def rate(self) -> float:
        """Learning rate of the next step."""
        config = self.config
        rise = min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        past = (self.step / config.steps - config.decay_from) / (1.0 - config.decay_from)
        return config.learning_rate * rise * (1.0 - 0.99 * max(0.0, past))

    def _next(self) -> _Batch:
        """The batch of this step, while another thread prepares that of the next one."""
        if self._prepared is None or self._prepared[0] != self.step:
            self._prepared = (self.step, self._worker.submit(self._prepare, self.step))
        batch = self._prepared[1].result()
        following = self.step + 1
        self._prepared = None
        if following < self.config.steps:
            self._prepared = (following, self._worker.submit(self._prepare, following))
        return batch

    @torch.no_grad()
    def _prepare(self, step: int) -> _Batch:
        """Draw the batch of a step, with the scene's prediction where pictures are of the scene."""
        world = self.world
        batch = self.batches.draw(step)
        pairs = torch.nonzero(batch.mismatched)[:, 0]
        scenes = [batch.scenes[i] for i in pairs.tolist()]
        x, target, timesteps, captions = batch.x, batch.x0, batch.timesteps, batch.captions
        chains = slice(len(captions), len(captions))
        if self.chains is not None:
            own = self.chains.draw(step)
            x, target = torch.cat([x, own.x]), torch.cat([target, own.x0])
            timesteps, captions = torch.cat([timesteps, own.timesteps]), captions + own.captions
            chains = slice(len(batch.captions), len(captions))
        weights = torch.ones(len(pairs), device=self.device)
        if scenes:
            alone = self.batches.model.x0(x[pairs], batch.alpha[pairs], batch.sigma[pairs], scenes)
            x, target = torch.cat([x, x[pairs]]), torch.cat([target, alone])
            timesteps = torch.cat([timesteps, timesteps[pairs]])
            named = [batch.captions[i] for i in pairs.tolist()]
            yes, _ = self.batches.model.log_posterior(
                batch.x[pairs], batch.alpha[pairs], batch.sigma[pairs], scenes, named
            )
            weights = (yes.exp() / self.config.relevant).clamp(max=1.0)
        rng = np.random.default_rng([self.config.seed, step, 2])
        words = [phrased(parse(each, world), world, rng) for each in (*captions, *scenes)]
        tokens = tokens_of(words, self.tokenizer).to(self.device)
        return _Batch(x, target, weights, timesteps, self.text(tokens)[0], pairs, chains)

    def update(self) -> Tensor:
        """Update the weights and their average by one step; return the two losses."""
        config = self.config
        batch = self._next()
        pairs = batch.pairs
        prediction = self.net(
            batch.x, batch.timesteps, encoder_hidden_states=batch.embeddings
        ).sample
        if self.chains is not None:
            self.chains.advance(self.step, prediction[batch.chains].detach())
        error = prediction - batch.target
        loss = error.square().mean() / self.variance
        difference = torch.zeros_like(loss)
        if len(pairs):
            alone = slice(-len(pairs), None)
            exact = (batch.target[pairs] - batch.target[alone]).square().mean((1, 2, 3))
            wrong = (error[pairs] - error[alone]).square().mean((1, 2, 3))
            difference = _mean(wrong / (exact + config.difference_floor**2), batch.weights)
        torch.autograd.backward(loss + config.difference_weight * difference)
        torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        self.optimizer.learning_rate = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        # Averaging over a share of the steps so far forgets the random initial weights.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - decay)
        return torch.stack([loss, difference]).detach()

    def _log(self) -> tuple[float, float]:
        """Append the mean losses since the last line to the log, and return them."""
        if not torch.isfinite(self.losses).all():
            raise ValueError(
                f"the loss is {float(self.losses.sum())} at step {self.step}: choose a lower "
                f"learning_rate than {self.config.learning_rate}"
            )
        loss, difference = (float(each) / self.loss_count for each in self.losses)
        self.losses, self.loss_count = torch.zeros_like(self.losses), 0
        values = {"difference": difference, "learning_rate": self.rate(), "loss": loss}
        line = json.dumps(values | {"step": self.step})
        files.append_line(self.out / LOSS, line)
        return loss, difference

    # The end

    def finish(self) -> None:
        """Write the pipeline, and delete the state."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        pipe = networks.trained_pipeline(self.world, self.tokenizer, self.text, self.net.eval())
        save_trained(pipe.to(torch.float16), self.world, self.out)
        told = {
            "configuration": self.identity,
            "steps": self.step,
            **self.told,
            "versions": versions("diffusers", "numpy", "torch", "transformers"),
        }
        files.write_json(self.out / METADATA, told)
        (self.out / STATE).unlink(missing_ok=True)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean; 0 if nothing counts."""
    return (weights * values).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _truncate_log(path: Path, step: int) -> None:
    """Drop log lines that are newer than the state, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + "\n")
    files.write_text(path, "".join(kept))
