"""The training of a pipeline on a laboratory's world: networks, losses, resuming, saving."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dng_models.text_to_image.__main__ import main
from dng_models.text_to_image.laboratory import gate, networks, train
from dng_models.text_to_image.laboratory.captions import Event, parse
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.phrases import phrased
from dng_models.text_to_image.laboratory.train import train_laboratory
from dng_models.text_to_image.laboratory.train_text import contents_of
from dng_models.text_to_image.laboratory.trained import TEXT_WEIGHTS, load_trained
from dng_models.text_to_image.laboratory.training_chains import TrainingChains
from dng_models.text_to_image.laboratory.training_config import QUICK
from tests.helpers.small_worlds import events, small_world

WORLD = small_world(cell=4)  # pipelines draw pictures of 8 x 8 pixels and more
SEEDS = st.integers(0, 2**32 - 1)
UNET = "unet/diffusion_pytorch_model.safetensors"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(out, config=QUICK):
    """A training that was begun."""
    run = train._Run(out, config, WORLD, train._identity(config, WORLD), torch.device("cpu"))
    run.start(progress=False)
    return run


# ---------------------------------------------------------------------- captions


@given(events(), SEEDS)
def test_random_words_say_the_same(event, seed):
    assert parse(phrased(event, WORLD, np.random.default_rng(seed)), WORLD) == event


def test_the_content_of_captions():
    events_of = [parse(text, WORLD) for text in ("", "the sea with ball and cup without egg")]
    events_of.append(parse("a room with egg, ball", WORLD))
    scenes, objects = contents_of(events_of, WORLD)
    assert scenes.tolist() == [0, 2, 1]
    there, excluded, a_list = objects[:, :3], objects[:, 3:6], objects[:, 6]
    assert there.tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert excluded.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert a_list.tolist() == [0, 0, 1]


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("side, bias", [(1, True), (3, True), (3, False)])
def test_folded_convolutions_are_convolutions(rows, columns, side, bias):
    conv = nn.Conv2d(5, 4, side, padding=side // 2, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 5, rows, columns, dtype=torch.float64, generator=seeded())
    weights = torch.randn(3, 4, rows, columns, dtype=torch.float64, generator=seeded(1))
    wanted = conv(x)
    gradients = torch.autograd.grad((weights * wanted).sum(), list(conv.parameters()))
    with networks.folded_convolutions(conv):
        found = conv(x)
        folded = torch.autograd.grad((weights * found).sum(), list(conv.parameters()))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-13)
    for one, other in zip(folded, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-13)
    assert torch.equal(conv(x), wanted)


def test_a_clear_picture_is_in_the_span_of_the_first_and_last_weights():
    model = ExactModel(WORLD)
    latents = model.sample("", 512).latents
    net = networks.make_unet(WORLD, 8, 16)
    networks.start_from_pictures(net, latents, seed=0)
    first, last = (
        each.weight[:, :, 0, 0].detach().double() for each in (net.conv_in, net.conv_out)
    )
    torch.testing.assert_close(first @ first.T, torch.eye(8).double(), rtol=0.0, atol=1e-6)
    cells = latents.double().transpose(0, 1).flatten(1)
    values = torch.linalg.eigvalsh(cells @ cells.T / cells.shape[1])
    # Eight principal components leave what the other ones hold, and no other eight leave less.
    left = (cells - first.T @ (first @ cells)).square().sum() / cells.shape[1]
    assert float(left) == pytest.approx(float(values[:-8].sum()), rel=1e-5)
    basis = torch.linalg.qr(last)[0]
    torch.testing.assert_close(basis @ basis.T, first.T @ first, rtol=0.0, atol=1e-5)


# ---------------------------------------------------------------------- the loss


def test_the_losses_are_those_of_the_module(tmp_path):
    config = dataclasses.replace(QUICK, batch_size=24, mismatched=0.8)
    run = start(tmp_path, config)
    batch, own, exact = run.batches.draw(0), run.chains.draw(0), ExactModel(WORLD)
    assert batch.mismatched.sum() > 2
    rng = np.random.default_rng([config.seed, 0, 2])
    here = [i for i, wrong in enumerate(batch.mismatched.tolist()) if wrong]
    captions = [*batch.captions, *own.captions, *(batch.scenes[i] for i in here)]
    words = [phrased(parse(each, WORLD), WORLD, rng) for each in captions]
    ids = run.tokenizer(words, padding="max_length", return_tensors="pt").input_ids
    x, alpha, sigma, timesteps = (
        torch.cat([getattr(batch, name), getattr(own, name), getattr(batch, name)[here]])
        for name in ("x", "alpha", "sigma", "timesteps")
    )
    with torch.no_grad():
        found = run.net(x, timesteps, run.text(ids)[0]).sample.double()
    wanted = exact.x0(x, alpha, sigma, captions).double()
    total = differences = parts = 0.0
    for i, caption in enumerate(captions):
        if i < 24 and i in here:
            place = here.index(i)
            at = (batch.x[i : i + 1], float(batch.alpha[i]), float(batch.sigma[i]))
            yes, _ = exact.log_posterior(*at, batch.scenes[i], caption)
            weight = min(1.0, float(yes.exp()) / config.relevant)
            with_c, with_s = (each[i] - each[28 + place] for each in (found, wanted))
            off = float((with_c - with_s).square().mean())
            size = float(with_s.square().mean()) + config.difference_floor**2
            differences, parts = differences + weight * off / size, parts + weight
        total += float((found[i] - wanted[i]).square().mean())
    variance = float(exact.sample("", train.PICTURES, generator=config.seed).latents.var())
    loss, difference = run.update().tolist()
    assert loss == pytest.approx(total / len(captions) / variance, rel=1e-3)
    assert difference == pytest.approx(differences / parts, rel=1e-3)


def test_chains_are_what_the_network_draws(tmp_path):
    run = start(tmp_path)
    chains, exact = run.chains, ExactModel(WORLD)
    squares = run.batches.alphas_cumprod
    before = chains.draw(0)
    assert (before.timesteps >= 240).all() and (before.timesteps < 950).all()
    wanted = exact.x0(before.x, before.alpha, before.sigma, before.captions)
    torch.testing.assert_close(before.x0, wanted, rtol=0.0, atol=1e-5)
    net, embeddings = copy.deepcopy(run.net), run._next().embeddings[12:16]
    other = chains.draw(1)
    run.update()
    after = chains.draw(2)
    here = [i for i in range(4) if chains.numbers[0, i] == i]
    assert here and [after.captions[i] for i in here] == [before.captions[i] for i in here]
    assert torch.equal(after.timesteps[here], before.timesteps[here] - 20)
    # The other group waits for its turn.
    assert torch.equal(chains.draw(1).x, other.x)
    with torch.no_grad():
        t = before.timesteps
        found = net(before.x, t, embeddings).sample
    # The noise of a DDPM step is what is left of x after its mean, in units of its deviation.
    at, to = squares[t].reshape(-1, 1, 1, 1), squares[t - 20].reshape(-1, 1, 1, 1)
    beta = 1.0 - at / to
    mean = (at / to).sqrt() * (1 - to) / (1 - at) * before.x + to.sqrt() * beta / (1 - at) * found
    noise = ((after.x - mean) / (beta * (1 - to) / (1 - at)).sqrt())[here].flatten()
    # n normal numbers: mean within 5 / sqrt(n), and mean square within 8 / sqrt(n) of 1, but for
    # one seed in a million.
    n = len(noise)
    assert abs(float(noise.mean())) < 5.0 / n**0.5
    assert abs(float(noise.square().mean()) - 1.0) < 8.0 / n**0.5


def test_a_chain_that_ends_is_followed_by_a_new_one():
    batches = train.TrainingBatches(
        ExactModel(WORLD), torch.linspace(0.99, 0.01, 100), often=(9, 80)
    )
    chains = TrainingChains(batches, 3, stride=30, first=(40, 50), last=30)
    seen = set()
    for step in range(8):
        batch = chains.draw(step)
        assert (batch.timesteps >= 30).all() and (batch.timesteps < 50).all()
        assert len(set(batch.captions)) > 1
        seen |= set(chains.numbers[step % 2].tolist())
        chains.advance(step, batch.x0)
    assert seen == set(range(6 + 3 * 6))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size must be an integer >= 1"),
        ({"stride": 0}, "stride must be an integer >= 1"),
        ({"last": 10}, "last must be an integer from 20"),
        ({"first": (40, 900)}, "first must be an integer from 240"),
        ({"first": (800, 800)}, "first must be an integer from 801"),
    ],
)
def test_chains_refuse_what_is_not_allowed(wrong, message):
    batches = train.TrainingBatches(ExactModel(WORLD), torch.linspace(0.99, 0.01, 1000))
    with pytest.raises(ValueError, match=message):
        TrainingChains(batches, **({"size": 2} | wrong))


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    config = dataclasses.replace(QUICK, steps=60, learning_rate=5e-3, warmup_steps=0, log_every=10)
    train_laboratory(tmp_path, config, world=WORLD, progress=False)
    lines = (tmp_path / "loss.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    config = dataclasses.replace(QUICK, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(ValueError, match="the loss is nan at step .*learning_rate than 1e"):
        train_laboratory(tmp_path, config, world=WORLD, progress=False)


# ---------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return train_laboratory(out, QUICK, world=WORLD, progress=False)


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_an_interrupted_training_ends_with_the_same_bits(finished, tmp_path, monkeypatch, stop):
    update = train._Run.update

    def stopped(self):
        if self.step == stop:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "update", stopped)
        train_laboratory(tmp_path, QUICK, world=WORLD, progress=False)
    assert (tmp_path / train.STATE).is_file() and not (tmp_path / train.METADATA).exists()
    train_laboratory(tmp_path, QUICK, world=WORLD, progress=False)
    for name in (UNET, "text_encoder/model.safetensors"):
        one, other = load_file(finished / name), load_file(tmp_path / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    for name in ("loss.jsonl", "training.json"):
        assert (finished / name).read_bytes() == (tmp_path / name).read_bytes()
    assert not (tmp_path / train.STATE).exists()


def test_a_finished_training_is_not_repeated(finished, monkeypatch):
    monkeypatch.setattr(train, "_Run", None)
    assert train_laboratory(finished, QUICK, world=WORLD, progress=False) == finished


def test_another_configuration_is_refused(finished):
    other = dataclasses.replace(QUICK, mismatched=0.2)
    with pytest.raises(ValueError, match=r"mismatched is 0\.3 there and 0\.2 here"):
        train_laboratory(finished, other, world=WORLD, progress=False)


def test_a_state_of_another_configuration_or_of_something_else_is_refused(tmp_path):
    start(tmp_path).save()
    other = dataclasses.replace(QUICK, steps=7)
    with pytest.raises(ValueError, match="steps is 6 there and 7 here"):
        train_laboratory(tmp_path, other, world=WORLD, progress=False)
    train.files.save_tensors(tmp_path / train.STATE, {"x": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="is not the state of a training here"):
        train_laboratory(tmp_path, QUICK, world=WORLD, progress=False)


# ---------------------------------------------------------------------- saving


@pytest.mark.slow
def test_the_pipeline_is_unmodified_and_loads_in_a_fresh_process(finished):
    assert {path.suffix for path in finished.rglob("*") if path.is_file()} <= {
        *(".json", ".jsonl", ".safetensors"),
        ".txt",  # older tokenizers write their merges apart
    }
    for name in (UNET, "text_encoder/model.safetensors"):
        assert {each.dtype for each in load_file(finished / name).values()} <= {
            torch.float16,
            torch.int64,
        }
    pipe = load_trained(finished)
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.unet) is UNet2DConditionModel
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    here = pipe("a room with ball", generator=seeded(), **options).images
    program = (
        "import sys, torch, numpy\n"
        "import dng_models.text_to_image.laboratory.cells_vae\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)\n"
        "image = pipe('a room with ball', generator=torch.Generator().manual_seed(0),\n"
        "    num_inference_steps=2, guidance_scale=1.0, output_type='np').images\n"
        "numpy.save(sys.argv[2], image)\n"
    )
    file = finished.parent / "image.npy"
    subprocess.run([sys.executable, "-c", program, str(finished), str(file)], check=True)
    np.testing.assert_allclose(np.load(file), here, atol=1e-4)


def test_the_network_is_the_averaged_one_in_half_precision(tmp_path, monkeypatch):
    kept = {}
    finish = train._Run.finish

    def noted(self):
        kept.update(zip(self.names, (each.clone() for each in self.average), strict=True))
        finish(self)

    monkeypatch.setattr(train._Run, "finish", noted)
    train_laboratory(tmp_path, QUICK, world=WORLD, progress=False)
    saved = load_file(tmp_path / UNET)
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], value.half()) for name, value in kept.items())


def test_it_is_saved_as_transformers_4_reads_it(finished):
    """Which took random weights for the text encoder, and found no vocabulary."""
    vocabulary = json.loads((finished / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = load_trained(finished).tokenizer
    assert vocabulary == tokenizer.get_vocab()
    merges = (finished / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert all(left + right in vocabulary for left, right in (line.split() for line in merges[1:]))
    assert all(name.startswith("text_model.") for name in load_file(finished / TEXT_WEIGHTS))


def test_weights_that_transformers_does_not_read_are_refused(finished, tmp_path):
    """By another name they are not found, and random ones stay."""
    other = shutil.copytree(finished, tmp_path / "other")
    weights = load_file(other / TEXT_WEIGHTS)
    weights["of_another_version.bias"] = weights.pop("text_model.final_layer_norm.bias")
    save_file(weights, other / TEXT_WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold .*final_layer_norm\.bias as the installed"):
        load_trained(other)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold a finished pipeline"):
        load_trained(tmp_path)


# ---------------------------------------------------------------------- the command


def test_the_command_trains_and_judges(tmp_path, capsys, monkeypatch):
    few = functools.partial(gate.judge_pipeline, steps=2)
    monkeypatch.setattr(gate, "judge_pipeline", few)
    out = str(tmp_path / "quick")
    words = ["train-laboratory", "--quick", "--steps", "2", "--quiet", "--out", out]
    words += ["--device", "cpu", "--debug"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == out
    with pytest.raises(SystemExit) as exit_status:
        main([*words, "--judge", "--num-images", "5"])
    assert exit_status.value.code == 1
    assert "NOT passed" in capsys.readouterr().out
    assert json.loads((tmp_path / "quick" / "gate.json").read_text())["passed"] is False


def test_the_events_of_captions_are_those_of_a_seed():
    run_batches = train.TrainingBatches(
        ExactModel(WORLD), torch.linspace(0.9, 0.1, 10), size=6, often=(2, 5)
    )
    assert run_batches.events(3) == run_batches.events(3) != run_batches.events(4)
    assert all(isinstance(each, Event) for each in run_batches.events(0))
