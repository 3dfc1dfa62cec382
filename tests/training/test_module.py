"""The LightningModule owns no formula: a plain loop does the same."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from ddim.checkpoints.model import load_model, read_checkpoint
from ddim.config import build
from ddim.data.batches import MicroBatches, random_flip
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import normalize
from ddim.diffusion import multinomial
from ddim.diffusion.objective import TIME_SAMPLERS, per_sample_loss, training_noise
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS
from ddim.errors import UserError
from ddim.evaluation.feature_stats import feature_set
from ddim.evaluation.metrics import MetricSpec, frechet_distance
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import generate
from ddim.random import TRAINING_NOISE
from ddim.training.heldout import HeldoutBatch, heldout_loss
from ddim.training.module import DiffusionModule, ObjectiveSpec, OptimSpec
from ddim.training.run import build_module
from ddim.training.spec import TrainSpec


@pytest.mark.parametrize(
    ("schedule", "signal"),
    [
        ({"T": 100}, "0.60"),
        ({"T": 1000}, None),
        ({"T": 50, "name": "cosine"}, None),
        ({"T": 1000, "name": "scaled_linear"}, None),
    ],
)
def test_a_schedule_that_does_not_reach_noise_warns(config, caplog, schedule, signal):
    spec = build(TrainSpec, config(schedule=schedule), "")
    build_module(spec, spec.model_spec())
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == (signal is not None)
    assert all(f"x_T still holds {signal} of the image" in text for text in warnings)


@pytest.fixture
def make(config):
    """make(**changes): the spec of a tiny run, and its module."""

    def make(**changes):
        spec = build(TrainSpec, config(**changes), "")
        return spec, DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed)

    return make


def plain_loop(spec, module):
    """Train as `train` does, without Lightning; return the losses, the weights and their average."""
    network, model, alpha_bar = module.network, module.model, spec.schedule.build().alpha_bar
    T, o, decay = len(alpha_bar) - 1, spec.objective, spec.ema.decay
    adam = torch.optim.Adam(network.parameters(), betas=spec.optim.betas, eps=spec.optim.eps, fused=True)
    average = {name: p.detach().double() for name, p in network.named_parameters()}
    losses = []
    images = load_images(spec.data).images
    batches = MicroBatches(len(images), spec.trainer.batch_size, spec.seed, spec.trainer.max_steps)
    for k in range(spec.trainer.max_steps):
        positions = batches[k]["positions"]
        x0 = normalize(random_flip(images[batches[k]["indices"]], spec.seed, k, positions))
        t = TIME_SAMPLERS[o.times](T, spec.seed, k, positions)
        eps = training_noise(spec.seed, k, positions, x0.shape[1:])
        per_sample = per_sample_loss(model, alpha_bar, x0, t, eps, prediction=o.prediction, reduction=o.reduction)
        loss = per_sample.mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), spec.optim.grad_clip)
        adam.param_groups[0]["lr"] = spec.optim.lr * min(1, (k + 1) / max(1, spec.optim.warmup))
        adam.step()
        losses.append(loss.item())
        for name, p in network.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    return losses, network.state_dict(), average


OFFICIAL = {"objective": {"reduction": "sum", "times": "antithetic"}, "optim": {"warmup": 0}, "ema": {"decay": 0.5}}


@pytest.mark.integration
@pytest.mark.parametrize("changes", [{}, OFFICIAL, {"objective": {"prediction": "v"}}], ids=["ddpm", "official", "v"])
def test_a_plain_loop_trains_the_same_weights(run, make, logged, changes):
    spec, module = make(**changes)
    losses, weights, average = plain_loop(spec, module)
    checkpoint = read_checkpoint(run(**changes))
    assert {f"network.{k}" for k in weights} == set(checkpoint["state_dict"])
    for name, value in weights.items():
        assert torch.equal(value, checkpoint["state_dict"][f"network.{name}"]), name
    shadow = checkpoint["callbacks"]["EMA"]["shadow"]
    assert set(shadow) == set(average)
    for name, value in average.items():
        assert torch.allclose(value, shadow[name].double(), rtol=0, atol=5e-7), name
    assert any(not torch.allclose(shadow[n], weights[n], atol=1e-4) for n in shadow)
    assert list(logged("run", "train/loss").values()) == pytest.approx(losses, rel=1e-6)


def test_initial_weights_depend_only_on_the_seed(make):
    torch.manual_seed(1)
    one = make(seed=3)[1]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = make(seed=3)[1]
    assert torch.equal(torch.get_rng_state(), before)
    # torch's own generator would give the last one the weights of the first.
    others = [make(seed=seed)[1] for seed in (4, 3 + 2**32)]
    weights = [m.network.conv_in.weight for m in (one, two, *others)]
    assert torch.equal(weights[0], weights[1])
    assert not any(torch.equal(weights[0], w) for w in weights[2:])


class Steps(list):
    """(learning rate, norm of the gradient) before each step of Adam."""

    def __init__(self, monkeypatch):
        step = torch.optim.Adam.step

        def record(adam, *args, **kwargs):
            closure = kwargs.pop("closure", None) or (args[0] if args else None)
            if closure is not None:
                with torch.enable_grad():
                    closure()
            norms = [p.grad.norm() for group in adam.param_groups for p in group["params"]]
            self.append((adam.param_groups[0]["lr"], float(torch.stack(norms).norm())))
            return step(adam)

        monkeypatch.setattr(torch.optim.Adam, "step", record)


@pytest.mark.integration
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rate_warms_up_also_across_resuming(run, monkeypatch, warmup):
    steps = Steps(monkeypatch)
    run(optim={"warmup": warmup}, trainer={"max_steps": 3, "accumulate": 2})
    run(optim={"warmup": warmup}, trainer={"max_steps": 6, "accumulate": 2}, checkpoint="last")
    expected = [1e-3 * min(1, k / max(warmup, 1)) for k in range(1, 7)]
    assert [lr for lr, _ in steps] == pytest.approx(expected, rel=1e-12)


@pytest.mark.integration
def test_gradient_is_clipped_unless_grad_clip_is_null(run, monkeypatch):
    steps = Steps(monkeypatch)
    summed = {"objective": {"reduction": "sum"}, "trainer": {"max_steps": 3}}
    run("one", **summed)
    run("half", **summed, optim={"grad_clip": 0.5})
    run("free", **summed, optim={"grad_clip": None})
    norms = [norm for _, norm in steps]
    assert norms[:3] == pytest.approx([1.0] * 3, rel=1e-4)
    assert norms[3:6] == pytest.approx([0.5] * 3, rel=1e-4)
    assert min(norms[6:]) > 10


@pytest.fixture
def loss_at(make, monkeypatch):
    """loss_at(module, step, micro, ...): the loss of one batch from training_step."""
    here = SimpleNamespace(accumulate_grad_batches=2, world_size=1, global_rank=0)
    monkeypatch.setattr(DiffusionModule, "trainer", here)
    monkeypatch.setattr(DiffusionModule, "log", lambda *args, **kwargs: None)
    x0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(4, -1, -1, -1)

    def loss_at(module, step, micro, rank=0):
        here.global_rank, here.world_size = rank, rank + 1
        with torch.no_grad():
            return float(
                module.training_step({"images": x0, "step": step, "positions": torch.arange(4)}, micro)["loss"]
            )

    return loss_at


def test_weights_and_dropout_of_a_seed_are_pinned(make):
    """torch's normals on a CPU depend on its vector instructions in the last bits, its uniform numbers do not."""
    module = make(network={"dropout": 0.5})[1]
    weights = [0.1526867, -0.0217955, -0.1878619, -0.0892086, -0.1938100, -0.0402162, -0.1705552, -0.1774269]
    assert next(module.network.parameters()).flatten()[:8].tolist() == pytest.approx(weights, abs=1e-6)
    module.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0)
    with module._addressed_dropout(3, 0):
        drawn = torch.rand(8).tolist()
    expected = [0.2939335, 0.0040761, 0.0487904, 0.7872888, 0.7089028, 0.5737826, 0.9308267, 0.8245105]
    assert drawn == pytest.approx(expected, abs=1e-6)


def test_dropout_is_addressed(loss_at, make):
    module = make(network={"dropout": 0.5})[1]
    masks = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(lambda layer, inputs, output: masks.append(output == 0))

    def mask(*address, **process):
        masks.clear()
        loss_at(module, *address, **process)
        zero = torch.cat([m.flatten() for m in masks])
        assert abs(zero.double().mean() - 0.5) < 4 * 0.5 / len(zero) ** 0.5  # standard errors
        return tuple(zero.tolist())

    torch.manual_seed(0)
    before = torch.get_rng_state()
    here = mask(3, 0)
    torch.rand(7)
    assert mask(3, 0) == mask(3, 2) == here  # 0 and 2 are the first of two accumulated micro-batches
    torch.manual_seed(0)
    assert mask(3, 0, rank=1) == mask(3, 1)  # the second half of the batch, whoever computes it
    module.seed += 1
    other_seed = mask(3, 0)
    module.seed -= 1
    assert len({here, other_seed, mask(3, 1), mask(3, 1, rank=1), mask(4, 0)}) == 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("objective", [ObjectiveSpec(), ObjectiveSpec("x0", "sum", "antithetic")])
def test_the_loss_is_that_of_the_objective(loss_at, make, objective):
    """Times and noise depend only on seed, step and position."""
    spec, module = make()
    module.objective = objective
    x0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(4, -1, -1, -1)
    positions = torch.arange(4)
    t = TIME_SAMPLERS[objective.times](20, spec.seed, 9, positions)
    eps = training_noise(spec.seed, 9, positions, (1, 8, 8))
    a_t = spec.schedule.build().alpha_bar[t].reshape(4, 1, 1, 1)
    x_t = (a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps).float()
    error = module.network(x_t, t - 1) - (x0 if objective.prediction == "x0" else eps)
    square = error.double() ** 2
    expected = square.detach().mean() if objective.reduction == "mean" else square.detach().sum() / 4
    assert loss_at(module, 9, 0) == pytest.approx(float(expected), rel=1e-5)


CATEGORICAL = {
    "network": {"name": "categorical_unet", "categories": 3, "ch_mult": [1, 1], "attn_resolutions": [4]},
    "objective": {"prediction": "x0", "multinomial": "kl"},
    "grid": {"sampler": {"rule": "multinomial", "eta": None, "S": 5}},
}


def test_the_loss_on_categories_is_that_of_the_objective(loss_at, make):
    spec, module = make(**CATEGORICAL)
    x0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).expand(4, -1, -1, -1)
    positions, schedule = torch.arange(4), spec.schedule.build()
    t = TIME_SAMPLERS["uniform"](20, spec.seed, 9, positions)
    words = multinomial.words_of(spec.seed, TRAINING_NOISE, 9, positions, (1, 8, 8))
    expected = multinomial.per_sample_loss(module.model, schedule.alpha_bar, x0, t, words, 3, "kl").mean()
    assert loss_at(module, 9, 0) == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.integration
@pytest.mark.slow
def test_training_on_categories_lowers_the_distance(run):
    """And the held-out loss; and the samples are of three grey levels."""
    changes = {**CATEGORICAL, "objective": {"prediction": "x0", "multinomial": "cross_entropy"}, "ema": None}
    changes |= {"optim": {"lr": 1e-2}, "schedule": {"name": "cosine", "T": 100, "zero_terminal_snr": True}}
    compute, sampler = ComputeSpec("cpu"), build(SamplerSpec, CATEGORICAL["grid"]["sampler"], "")
    metric = MetricSpec("digits_classifier")
    extractor = metric.build_extractor("cpu")

    def features(pixels):
        return feature_set(extractor.extract(pixels), extractor.layers[0])

    digits = load_images(DataSpec("digits", (8, 8), 1, flip=False), "train").images
    real, losses, distances = features(digits), [], []
    for steps in (1, 60):
        trainer = {"max_steps": steps, "batch_size": 64}
        model = load_model(run(f"run{steps}", **changes, trainer=trainer), "online")
        pixels = generate(model, sampler, range(300), 0, compute)
        assert set(pixels.unique().tolist()) <= {0, 128, 255}
        distances.append(frechet_distance(features(pixels), real, metric)["fd"])
        held = [HeldoutBatch(range(300), digits[:300], None)]
        losses.append(heldout_loss(model, held, "mean", 0, compute, SINGLE_PROCESS)["loss"])
    assert distances[1] < distances[0] / 2
    assert losses[1] < losses[0] < 1.2 * math.log(3)


@pytest.mark.integration
def test_bf16_mixed_keeps_weights_and_schedule_exact(run, make, logged, tmp_path):
    spec, module = make(trainer={"max_steps": 3})
    seen = []
    module.network.register_forward_hook(lambda network, inputs, output: seen.append(output.dtype))
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=3,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, ImageDataModule(load_images(spec.data), 8, spec.seed, 3, spec.data.flip))
    assert seen == [torch.bfloat16] * 3
    assert module.alpha_bar.dtype == torch.float64
    assert torch.equal(module.alpha_bar, spec.schedule.build().alpha_bar)
    run("full")
    last = run("mixed", trainer={"precision": "bf16-mixed"})
    assert {v.dtype for v in read_checkpoint(last)["state_dict"].values()} == {torch.float32}
    full, mixed = (list(logged(name, "train/loss").values()) for name in ("full", "mixed"))
    assert full != mixed
    assert mixed == pytest.approx(full, rel=0.05)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", 0.0), ("warmup", -1), ("weight_decay", -0.1), ("grad_clip", 0.0), ("grad_clip", -1.0), ("eps", -1e-8)),
        *(("betas", betas) for betas in ((0.9, 1.0), (-0.1, 0.999), (0.9, math.nan))),
    ],
)
def test_wrong_optimiser_settings_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        replace(OptimSpec(), **{key: value})


def test_adam_gets_every_setting(make):
    settings = {"lr": 0.5, "betas": [0.1, 0.2], "eps": 0.3, "weight_decay": 0.4, "warmup": 0}
    adam = make(optim=settings)[1].configure_optimizers()["optimizer"]
    assert type(adam) is torch.optim.Adam
    group = adam.param_groups[0]
    assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.5,
        "betas": (0.1, 0.2),
        "eps": 0.3,
        "weight_decay": 0.4,
    }


@pytest.mark.integration
def test_winograd_trains_like_direct_convolutions(run, same, compiler):
    options = {"network": {"ch": 32}, "optim": {"eps": 1e-3}}  # a small eps makes a full step of rounding noise
    direct = run("direct", **options)
    fast = run("fast", **options, trainer={"winograd": True, "channels_last": True})
    assert same(direct, fast, atol=1e-5)
    assert not same(direct, fast)


def test_winograd_with_bf16_is_refused(config):
    with pytest.raises(UserError, match="winograd=true needs precision=32-true"):
        build(TrainSpec, config(trainer={"winograd": True, "precision": "bf16-mixed"}), "")
