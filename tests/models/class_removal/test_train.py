"""Training: what a step draws, and that nothing but the number of steps decides the result.

The networks are those for 8 x 8 pixels, on a handful of digits for a handful of steps.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dng_math import NoiseSchedule
from dng_models.class_removal import networks, train, training_config
from dng_models.class_removal.data import Dataset, load_dataset
from dng_models.class_removal.train import LOSS, STATE, denoising_loss, draws, train_diffusion
from dng_models.class_removal.training_config import TrainConfig, default_config
from dng_models.support import files

ROOT = Path(__file__).resolve().parents[3]
# States and lines of the log fall on different steps on purpose.
TINY = TrainConfig(steps=10, batch_size=4, warmup_steps=2, checkpoint_every=4, log_every=3)


@pytest.fixture(autouse=True, scope="module")
def short_end():
    """Samples and losses at the end of a training are tested on their own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "GRID_STEPS", 2)
        monkeypatch.setattr(train, "LOSS_BINS", 2)
        monkeypatch.setattr(train, "LOSS_COPIES", 8)
        yield


@pytest.fixture(scope="module")
def digits():
    return load_dataset()


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """What an uninterrupted training leaves."""
    return train_diffusion(digits, tmp_path_factory.mktemp("whole"), TINY, device="cpu")


def weights(folder):
    return files.load_tensors(folder / networks.WEIGHTS)[0]


def assert_same_bits(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def stop_at(monkeypatch, step):
    """Make a training fail before that step, as if the machine had gone down."""

    def drawn(config, k, *arguments):
        if k == step:
            raise InterruptedError
        return draws(config, k, *arguments)

    monkeypatch.setattr(train, "draws", drawn)


def interrupted(monkeypatch, digits, out, step, config=TINY, **options):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(InterruptedError):
            train_diffusion(digits, out, config, device="cpu", **options)
    return out


# ---------------------------------------------------------------------- what a step draws


CONFIG = TrainConfig(batch_size=12, label_dropout=0.3, flip=True)
SHAPE = (1, 2, 2)


def test_a_batch_is_a_function_of_seed_and_step():
    first = draws(CONFIG, 7, 100, SHAPE)
    draws(CONFIG, 8, 100, SHAPE)
    for one, again in zip(first, draws(CONFIG, 7, 100, SHAPE), strict=True):
        np.testing.assert_array_equal(one, again)
    for other in (draws(CONFIG, 8, 100, SHAPE), draws(replace(CONFIG, seed=1), 7, 100, SHAPE)):
        for one, another in zip(first, other, strict=True):
            assert not np.array_equal(one, another)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_processes_share_one_batch(processes):
    whole = draws(CONFIG, 3, 100, SHAPE)
    parts = [whole.part(i, processes) for i in range(processes)]
    for together, *shared in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(shared), together)


@pytest.mark.parametrize("n", [5, 12, 30])
def test_every_epoch_visits_every_image_once(n):
    rows = np.concatenate([draws(CONFIG, k, n, SHAPE).rows for k in range(10)])
    epochs = (
        rows.reshape(-1, n) if len(rows) % n == 0 else rows[: len(rows) // n * n].reshape(-1, n)
    )
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_time_steps_are_one_in_each_interval():
    for k in range(20):
        times = draws(replace(CONFIG, batch_size=20), k, 100, SHAPE).times
        assert sorted(times // 50) == list(range(20))


def test_noise_is_standard_normal_and_the_shares_are_kept():
    """10^5 values: five standard errors each."""
    many = replace(CONFIG, batch_size=100_000)
    drawn = draws(many, 0, 100, (1, 1, 1))
    assert abs(drawn.noise.mean()) < 5 / 316 and abs(drawn.noise.var() - 1) < 5 * 2**0.5 / 316
    assert abs(drawn.unlabelled.mean() - 0.3) < 5 * 0.46 / 316
    assert abs(drawn.flipped.mean() - 0.5) < 5 * 0.5 / 316
    assert not draws(replace(many, flip=False), 0, 100, (1, 1, 1)).flipped.any()


# ---------------------------------------------------------------------- what a training leaves


def test_a_finished_training_is_a_folder_of_diffusers(finished):
    net = diffusers.UNet2DModel.from_pretrained(finished, use_safetensors=True)
    assert net.config["sample_size"] == 8
    loaded = networks.load_network(finished).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in net.state_dict().items())
    left = {path.name for path in finished.iterdir()}
    assert left == {
        networks.CONFIG,
        networks.WEIGHTS,
        networks.METADATA,
        LOSS,
        train.GRID,
    }


def test_the_metadata_says_what_was_done(finished, digits):
    told = networks.read_metadata(finished)
    assert told["steps"] == 10 and told["num_images"] == 1437
    assert told["classes"] == told["trained_on"] == list(digits.classes)
    assert told["configuration"]["fingerprint"] == digits.train.fingerprint
    assert told["configuration"]["size"] == "small"
    assert len(told["train_loss"]) == len(told["held_out_loss"]) == 2
    assert told["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_loss_is_logged(finished):
    lines = [json.loads(line) for line in (finished / LOSS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert lines[-1]["learning_rate"] == 0.0
    assert networks.read_metadata(finished)["loss"] == lines[-1]["loss"]


def test_samples_are_drawn(finished):
    with Image.open(finished / train.GRID) as grid:
        assert grid.mode == "L" and grid.size == (89, 89)


def test_the_result_is_the_average_of_the_weights(digits, tmp_path):
    """Over two steps, written out: decays 1/10 and 2/11."""
    config = replace(TINY, steps=2, checkpoint_every=1, keep_state=True)
    run = train._Run(digits.train, tmp_path, config, {}, train._accelerator(config, "cpu"), False)
    seen = [run.parameters[0].detach().clone()]
    run.resume()
    save = run.save
    run.save = lambda: (save(), seen.append(run.parameters[0].detach().clone()))
    run.train(progress=False)
    expected = seen[0]
    for value, decay in zip(seen[1:], (1 / 10, 2 / 11), strict=True):
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(run.average[0], expected)


def test_a_training_does_not_see_what_is_held_out(digits, finished, tmp_path):
    changed = replace(digits, images=digits.images.clone())
    changed.images[changed.is_held_out] = 0.0
    assert_same_bits(train_diffusion(changed, tmp_path, TINY, device="cpu"), finished)


def test_a_conditional_network_and_one_of_a_class(digits, tmp_path):
    both = train_diffusion(digits, tmp_path / "a", TINY, conditional=True, device="cpu")
    assert networks.load_network(both).config["num_class_embeds"] == 11
    with Image.open(both / train.GRID) as grid:
        assert grid.size == (89, 89)
    one = train_diffusion(digits.only("3"), tmp_path / "b", TINY, device="cpu")
    told = networks.read_metadata(one)
    assert told["trained_on"] == ["3"] and told["classes"] == list(digits.classes)
    assert told["num_images"] == len(digits.train.only("3"))


def test_without_any_label_a_conditional_network_only_knows_none(digits, tmp_path):
    """Label dropout 1: the embeddings of the classes keep their first values."""
    config = replace(TINY, label_dropout=1.0)
    out = train_diffusion(digits, tmp_path, config, conditional=True, device="cpu")
    torch.manual_seed(config.seed)
    first = networks.make_unet(8, 1, num_classes=10).class_embedding.weight
    trained = weights(out)["class_embedding.weight"]
    torch.testing.assert_close(trained[:10], first[:10].detach(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(trained[10], first[10], atol=1e-4)


def test_it_learns(digits, tmp_path):
    """Sixty steps: from about 1, the variance of the noise, to less than 0.6."""
    config = replace(TINY, steps=60, batch_size=16, log_every=20, checkpoint_every=100)
    train_diffusion(digits, tmp_path, config, device="cpu")
    assert networks.read_metadata(tmp_path)["loss"] < 0.6


def test_grids_on_the_way(digits, tmp_path):
    train_diffusion(digits, tmp_path, replace(TINY, grid_every=5), device="cpu")
    assert (tmp_path / "samples-000005.png").is_file()
    assert not (tmp_path / "samples-000010.png").exists()


def test_flips_and_reduced_precision(digits, tmp_path):
    out = train_diffusion(
        digits, tmp_path, replace(TINY, flip=True, mixed_precision="bf16"), device="cpu"
    )
    assert all(value.isfinite().all() for value in weights(out).values())


# ---------------------------------------------------------------------- stopped and started


@pytest.mark.parametrize("step", [2, 5, 8, 9])
def test_a_training_that_was_stopped_ends_with_the_same_bits(
    digits, finished, tmp_path, monkeypatch, step
):
    out = interrupted(monkeypatch, digits, tmp_path, step)
    assert (out / STATE).exists() == (step >= 4)
    train_diffusion(digits, out, TINY, device="cpu")
    assert_same_bits(out, finished)
    assert (out / LOSS).read_text() == (finished / LOSS).read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads({threads})
from dng_models.support import files
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.train import TrainConfig, train_diffusion
replace, states = os.replace, []
def kill_at_the_second_state(source, target):
    if Path(target).name == "state.safetensors":
        states.append(target)
        if len(states) == 2:
            os.truncate(source, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_at_the_second_state
train_diffusion(load_dataset(), sys.argv[1], {config!r}, device="cpu")
"""


@pytest.mark.slow
def test_a_process_that_was_killed_in_the_middle_of_a_write(digits, finished, tmp_path):
    code = KILLED.format(config=TINY, threads=torch.get_num_threads())
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    # It was at step 8: the state is that of step 4, the log goes on to 6, a half state is left.
    assert json.loads(files.load_tensors(tmp_path / STATE)[1]["step"]) == 4
    assert [json.loads(x)["step"] for x in (tmp_path / LOSS).read_text().splitlines()] == [3, 6]
    train_diffusion(digits, tmp_path, TINY, device="cpu")
    assert_same_bits(tmp_path, finished)
    assert (tmp_path / LOSS).read_text() == (finished / LOSS).read_text()


def test_a_line_of_the_log_that_was_cut_is_dropped(digits, finished, tmp_path, monkeypatch):
    out = interrupted(monkeypatch, digits, tmp_path, 5)
    with (out / LOSS).open("a") as log:
        log.write('{"learning_rate": 0.0')
    train_diffusion(digits, out, TINY, device="cpu")
    assert (out / LOSS).read_text() == (finished / LOSS).read_text()


def test_what_is_finished_is_not_trained_again(digits, finished, monkeypatch):
    stop_at(monkeypatch, 0)
    before = (finished / networks.WEIGHTS).stat().st_mtime_ns
    config = replace(TINY, log_every=7, keep_state=True)
    assert train_diffusion(digits, finished, config, device="cpu") == finished
    assert (finished / networks.WEIGHTS).stat().st_mtime_ns == before


CHANGES = [
    ({"steps": 11}, "steps is 10 there and 11 here"),
    ({"batch_size": 8}, "batch_size is 4 there and 8 here"),
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"size": "paper"}, "size is 'small' there and 'paper' here"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_network_of_another_configuration(digits, finished, change, message):
    with pytest.raises(ValueError, match=f"training.json is of another configuration: {message}"):
        train_diffusion(digits, finished, replace(TINY, **change), device="cpu")


def test_a_state_of_another_configuration(digits, tmp_path, monkeypatch):
    out = interrupted(monkeypatch, digits, tmp_path, 5)
    before = (out / STATE).read_bytes()
    for change, message in CHANGES[:3]:
        with pytest.raises(ValueError, match=f"{STATE} is of another configuration: {message}"):
            train_diffusion(digits, out, replace(TINY, **change), device="cpu")
    with pytest.raises(ValueError, match="conditional is False there and True here"):
        train_diffusion(digits, out, TINY, conditional=True, device="cpu")
    with pytest.raises(ValueError, match="fingerprint is"):
        train_diffusion(digits.without("3"), out, TINY, device="cpu")
    assert (out / STATE).read_bytes() == before


def test_a_state_that_is_kept_goes_on_when_the_network_is_gone(digits, finished, tmp_path):
    config = replace(TINY, keep_state=True)
    train_diffusion(digits, tmp_path, config, device="cpu")
    (tmp_path / networks.METADATA).unlink()
    train_diffusion(digits, tmp_path, config, device="cpu")
    assert_same_bits(tmp_path, finished)
    assert (tmp_path / STATE).is_file()


# ---------------------------------------------------------------------- damage


def test_a_damaged_state_is_named(digits, tmp_path, monkeypatch):
    out = interrupted(monkeypatch, digits, tmp_path, 5)
    (out / STATE).write_bytes((out / STATE).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{STATE} is not a whole safetensors file"):
        train_diffusion(digits, out, TINY, device="cpu")


def test_a_foreign_state_is_named(digits, tmp_path, monkeypatch):
    files.save_tensors(tmp_path / STATE, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{STATE} is not the state of a training here"):
        train_diffusion(digits, tmp_path, TINY, device="cpu")
    out = interrupted(monkeypatch, digits, tmp_path / "other", 5)
    tensors, metadata = files.load_tensors(out / STATE)
    del tensors["average.conv_in.weight"]
    files.save_tensors(out / STATE, tensors, metadata)
    with pytest.raises(ValueError, match=f"{STATE} is not the state of a training here"):
        train_diffusion(digits, out, TINY, device="cpu")


@pytest.mark.parametrize("write", [2, 3, 4, 5, 6])
def test_a_full_disk_loses_nothing(digits, finished, tmp_path, monkeypatch, write):
    """The second to the last write of a training: a state, the samples, the network's files."""
    replace_file, count = os.replace, []

    def full(source, target):
        count.append(target)
        if len(count) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="was not written: No space left on device") as caught:
            train_diffusion(digits, tmp_path, TINY, device="cpu")
    assert str(count[-1]) in str(caught.value)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    files.load_tensors(tmp_path / STATE)
    train_diffusion(digits, tmp_path, TINY, device="cpu")
    assert_same_bits(tmp_path, finished)
    assert (tmp_path / LOSS).read_text() == (finished / LOSS).read_text()


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(digits, tmp_path):
    images = digits.images.clone()
    images[:] = torch.inf
    with pytest.raises(ValueError, match="the loss is nan at step 3: choose a lower learning_rate"):
        train_diffusion(replace(digits, images=images), tmp_path, TINY, device="cpu")
    assert not (tmp_path / STATE).exists()


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", 0, ValueError),
        ("batch_size", 1.5, TypeError),
        ("learning_rate", 0.0, ValueError),
        ("warmup_steps", -1, ValueError),
        ("ema_decay", 1.0, ValueError),
        ("grad_clip", -1.0, ValueError),
        ("label_dropout", 1.1, ValueError),
        ("flip", 1, TypeError),
        ("size", "huge", ValueError),
        ("mixed_precision", "fp8", ValueError),
        ("seed", -1, ValueError),
        ("checkpoint_every", 0, ValueError),
        ("log_every", 0, ValueError),
        ("grid_every", -1, ValueError),
        ("keep_state", None, TypeError),
    ],
)
def test_fields_that_are_not_allowed(field, value, error):
    with pytest.raises(error, match=f"{field} must be"):
        TrainConfig(**{field: value})


def test_arguments_that_are_not_allowed(digits, tmp_path):
    with pytest.raises(TypeError, match="dataset must be a Dataset, got 'digits'"):
        train_diffusion("digits", tmp_path, TINY)
    with pytest.raises(ValueError, match="dataset must have images to train on"):
        train_diffusion(digits.held_out, tmp_path, TINY)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be one that is here, 'cpu'.*got 'cuda'"):
            train_diffusion(digits, tmp_path, TINY, device="cuda")
    assert os.listdir(tmp_path) == []


def blank(side, n=20):
    labels = torch.arange(n) % 2
    return Dataset(torch.zeros(n, 1, side, side), labels, ("a", "b"), f"blank {side}")


def test_defaults_by_the_size_of_the_images():
    for kind in training_config.KINDS:
        small, middle, large = (default_config(blank(side), kind) for side in (8, 28, 32))
        assert large.steps > small.steps and middle.steps < large.steps
        assert large.flip and not small.flip and not middle.flip
    assert default_config(blank(8), "class").steps < default_config(blank(8), "base").steps
    with pytest.raises(ValueError, match="kind must be one of 'base', 'class', 'conditional'"):
        default_config(blank(8), "both")


# ---------------------------------------------------------------------- measuring


class Known(torch.nn.Module):
    """The exact prediction of noise on an image that is known."""

    def __init__(self, image):
        super().__init__()
        self.image = torch.nn.Parameter(image)
        schedule = NoiseSchedule.linear()
        self.alpha, self.sigma = (
            torch.tensor(values[1:])[:, None, None, None]
            for values in (schedule.alpha, schedule.sigma)
        )

    def forward(self, x, t, class_labels=None):
        sample = (x - self.alpha[t] * self.image) / self.sigma[t]
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample)


def test_the_loss_of_a_network_that_knows_the_image_is_zero():
    image = torch.rand(1, 1, 4, 4)
    loss = denoising_loss(Known(image), image.expand(7, -1, -1, -1), bins=4, batch_size=50)
    np.testing.assert_allclose(loss, 0.0, atol=1e-8)


def test_the_loss_of_a_wrong_image_is_what_it_costs():
    """alpha^2/sigma^2 times the squared error of x0, averaged over the time steps."""
    zero, one = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    loss = denoising_loss(Known(zero), one, bins=2, copies=1000)
    schedule = NoiseSchedule.linear()
    cost = (schedule.alpha[1:] / schedule.sigma[1:]) ** 2
    np.testing.assert_allclose(loss, [cost[:500].mean(), cost[500:].mean()], rtol=1e-5)


def test_the_loss_is_the_same_in_any_batch(finished, digits):
    net = networks.load_network(finished)
    images = digits.held_out.images
    whole, parts = (
        denoising_loss(net, images, bins=2, copies=50, batch_size=size) for size in (50, 7)
    )
    np.testing.assert_allclose(whole, parts, rtol=1e-5)


# ---------------------------------------------------------------------- processes


TWO = """
import sys, torch
torch.set_num_threads(1)
from accelerate import PartialState
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.train import TrainConfig, train_diffusion
train_diffusion(load_dataset(), sys.argv[1], {config!r}, conditional=True, device="cpu")
# In one write: print makes two, and another process may write in between.
sys.stdout.write("processes: %d\\n" % PartialState().num_processes)
"""


def launch(tmp_path, script, out):
    """In two processes.  (On a CPU, ``accelerate launch --num_processes 2`` starts only one.)"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(tmp_path / "script.py"), str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_the_same_network(digits, tmp_path):
    out = tmp_path / "two"
    run = launch(tmp_path, TWO.format(config=TINY), out)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("processes: 2") == 2
    alone = train_diffusion(digits, tmp_path / "one", TINY, conditional=True, device="cpu")
    ours, theirs = weights(alone), weights(out)
    for name, value in ours.items():
        # Adam divides by the gradient's size: where that is rounding, so is what it does.
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    logs = [[json.loads(x) for x in (o / LOSS).read_text().splitlines()] for o in (alone, out)]
    for one, two in zip(*logs, strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share(tmp_path):
    script = TWO.format(config=replace(TINY, batch_size=5))
    run = launch(tmp_path, script, tmp_path / "two")
    assert run.returncode != 0
    assert "batch_size must be a multiple of the number of processes, 2; got 5" in run.stderr


# ---------------------------------------------------------------------- one at a time, and whole


def test_a_second_training_in_a_folder_is_refused(digits, tmp_path):
    refused = []

    def second():
        try:
            train_diffusion(digits, tmp_path, TINY, device="cpu")
        except BlockingIOError as error:
            refused.append(str(error))

    with files.only_writer(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "is being written to by process" in refused[0]
    assert os.listdir(tmp_path) == []


def test_what_a_training_left_that_was_killed_at_its_end_goes(digits, finished, tmp_path):
    """Its network is there, and the state, a half file and the lock too."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in (STATE, files.LOCK, f".{STATE}.abcd1234.part"):
        (out / name).write_bytes(b"left")
    train_diffusion(digits, out, TINY, device="cpu")
    assert sorted(os.listdir(out)) == sorted(os.listdir(finished))


def test_a_state_that_was_to_be_kept_stays(digits, tmp_path):
    train_diffusion(digits, tmp_path, replace(TINY, keep_state=True), device="cpu")
    train_diffusion(digits, tmp_path, TINY, device="cpu")
    assert (tmp_path / STATE).is_file()


@pytest.mark.parametrize("name", [networks.CONFIG, networks.WEIGHTS])
def test_a_network_of_which_a_file_is_gone_is_made_again(digits, finished, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert networks.is_there(out)
    (out / name).unlink()
    assert not networks.is_there(out)
    train_diffusion(digits, out, TINY, device="cpu")
    assert_same_bits(out, finished)


def test_a_network_whose_training_goes_on_is_not_there(finished, tmp_path):
    out = tmp_path / "out"
    assert not networks.is_there(out)
    shutil.copytree(finished, out)
    (out / networks.METADATA).unlink()
    assert networks.is_there(out)  # as others save one
    (out / STATE).write_bytes(b"")
    assert not networks.is_there(out)
