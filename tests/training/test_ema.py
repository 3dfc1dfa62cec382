"""The average of the weights: its formula, several rates, storing and resuming, sampling from it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddim import initial_noise, linear_schedule, linear_tau, sample
from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import UserError
from ddim.training.ema import EMA, EMASpec
from ddim.training.module import DiffusionModule
from ddim.training.spec import TrainSpec


def average(spec, weights, batches_per_step=1, logged=None):
    """Return the shadow after the initial weights[0] became weights[1], weights[2], ... step by step; float64 (n,)."""
    logged = [] if logged is None else logged
    module = nn.Module()
    module.network = nn.Module()
    module.network.w = nn.Parameter(weights[0].clone())
    module.network.register_buffer("constant", torch.tensor(0.1))
    module.log = lambda name, value: logged.append(value)
    ema, trainer = EMA(spec), SimpleNamespace(global_step=0, log_every_n_steps=1)
    ema.on_train_start(trainer, module)
    for step, w in enumerate(weights[1:], start=1):
        for batch in range(batches_per_step):
            if batch == batches_per_step - 1:
                trainer.global_step = step
                module.network.w.data.copy_(w)
            ema.on_train_batch_end(trainer, module, None, None, batch)
    assert set(ema.shadow) == {"w"}  # no buffers
    assert torch.equal(module.network.w, weights[-1])
    return ema.shadow["w"]


@pytest.fixture
def weights():
    return list(torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999])
def test_the_average_is_the_closed_form(weights, decay):
    n = len(weights) - 1
    expected = decay**n * weights[0] + (1 - decay) * sum(decay ** (n - k) * weights[k] for k in range(1, n + 1))
    assert torch.allclose(average(EMASpec(decay), weights), expected, rtol=0, atol=1e-14)


def test_warm_up_follows_its_formula(weights):
    expected, rates, logged = weights[0], [], []
    for k, w in enumerate(weights[1:], start=1):
        decay = min(0.42, (1 + k) / (10 + k))  # 2/11, 3/12, ... 7/16 = 0.44
        expected = decay * expected + (1 - decay) * w
        rates.append(decay)
    assert torch.allclose(average(EMASpec(0.42, warmup=True), weights, logged=logged), expected, rtol=0, atol=1e-14)
    assert logged == rates
    assert not torch.allclose(average(EMASpec(0.42), weights), expected, rtol=0, atol=1e-3)


def test_accumulated_batches_are_one_step(weights):
    assert torch.equal(average(EMASpec(0.7), weights, batches_per_step=3), average(EMASpec(0.7), weights))


def test_constant_weights_do_not_drift():
    weights = [torch.full((3,), 0.1)] * 300
    assert torch.equal(average(EMASpec(0.9999), weights), weights[0])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay=.* must lie in \[0, 1\)"):
        EMASpec(decay)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_restores_the_online_weights(fails):
    module = nn.Module()
    module.network = nn.Linear(3, 2)
    online = {k: v.clone() for k, v in module.network.state_dict().items()}
    ema = EMA(EMASpec())
    ema.shadow.update({k: torch.full_like(v, 0.1) for k, v in online.items()})
    shadow = {k: v.clone() for k, v in ema.shadow.items()}

    def use():
        with ema.applied(module):
            assert all(torch.equal(v, shadow[k]) for k, v in module.network.state_dict().items())
            module.network.weight.data.add_(1)  # also undone
            if fails:
                raise KeyError("inside")

    if fails:
        with pytest.raises(KeyError, match="inside"):
            use()
    else:
        use()
    assert all(torch.equal(v, online[k]) for k, v in module.network.state_dict().items())
    assert all(torch.equal(v, shadow[k]) for k, v in ema.shadow.items())


@pytest.mark.parametrize("decay", [[], [0.9, 0.9], [0.9, 1.0]])
def test_wrong_lists_of_rates_are_refused(run, decay):
    with pytest.raises(UserError, match="ema: decay="):
        run(ema={"decay": decay})


@pytest.mark.integration
def test_a_checkpoint_alone_gives_the_samples_of_the_average(run, monkeypatch):
    """The networks at the end of training, averaged and online, against what load_model makes of the file."""
    end = {}

    def keep(self, trainer, module):
        end["online"] = {k: v.clone() for k, v in module.network.state_dict().items()}
        with self.applied(module):
            module.network.eval()
            end["samples"] = draw(module.model)
            module.network.train()

    monkeypatch.setattr(EMA, "on_train_end", keep)
    # The schedule of this test, not that of the file.
    x_T, schedule = initial_noise(range(3), (1, 8, 8), seed=1), linear_schedule(20)

    def draw(model):
        return sample(model, schedule, x_T, linear_tau(20, 5), seed=1)

    path = run(network={"dropout": 0.5}, optim={"lr": 0.01})
    default, ema, online = load_model(path), load_model(path, "ema"), load_model(path, weights="online")
    assert (default.weights, ema.weights, online.weights) == ("ema", "ema", "online")
    assert default.step == 6
    assert torch.equal(draw(default), end["samples"])
    assert torch.equal(draw(ema), end["samples"])
    assert all(torch.equal(v, end["online"][k]) for k, v in online.network.state_dict().items())
    assert (draw(online) - draw(ema)).abs().max() > 1e-3
    assert ema.weights_hash == default.weights_hash != online.weights_hash
    assert torch.equal(default.spec.schedule.alpha_bar, schedule.alpha_bar)


@pytest.mark.integration
def test_run_without_ema_has_only_online_weights(run):
    path = run(ema=None)
    assert "EMA" not in read_checkpoint(path)["callbacks"]
    with pytest.raises(UserError, match=r"last.ckpt holds no EMA weights .* choose weights=online"):
        load_model(path)
    assert load_model(path, "online").step == 6


@pytest.mark.integration
def test_resumed_run_continues_from_the_stored_average(run, config, monkeypatch):
    seen = []
    on_train_start = EMA.on_train_start

    def record(self, trainer, module):
        on_train_start(self, trainer, module)
        seen.append({k: v.clone() for k, v in self.shadow.items()})

    monkeypatch.setattr(EMA, "on_train_start", record)
    path = run()
    stored = read_checkpoint(path)["callbacks"]["EMA"]
    assert stored["decay"] == 0.9
    assert stored["updates"] == 6
    run(trainer={"max_steps": 7}, checkpoint="last")
    fresh, resumed = seen
    online = load_model(path, "online").network.state_dict()
    assert all(torch.equal(v, stored["shadow"][k]) for k, v in resumed.items())
    assert any(not torch.equal(v, online[k]) for k, v in resumed.items())
    assert not any(v.requires_grad for v in resumed.values())
    spec = build(TrainSpec, config(), "")
    initial = DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed).network.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in initial.items())


@pytest.mark.integration
def test_several_averages_equal_those_of_separate_runs(run):
    rates = (0.9, 0.5, 0.999)
    several = run("several", ema={"decay": list(rates)})
    for rate in rates:
        separate = run(f"separate {rate}", ema={"decay": rate})
        label = "ema" if rate == rates[0] else f"ema_{rate}"
        assert load_model(several, label).weights_hash == load_model(separate).weights_hash
        assert load_model(several, label).weights == label
    with pytest.raises(UserError, match=r"unknown weights 'ema_0.8'.*allowed: online, ema, ema_0.5, ema_0.999"):
        load_model(several, "ema_0.8")
    with pytest.raises(UserError, match="unknown weights 'emma'"):
        load_model(several, "emma")


@pytest.mark.integration
def test_several_averages_resume_exactly(run, killed_run):
    options = {"ema": {"decay": [0.9, 0.5]}, "trainer": {"max_steps": 6, "checkpoint_every": 2}}
    uninterrupted = run("uninterrupted", **options)
    killed_run(5, 0, "killed", **options)
    resumed = run("killed", **options, checkpoint="last")
    for label in ("online", "ema", "ema_0.5"):
        assert load_model(uninterrupted, label).weights_hash == load_model(resumed, label).weights_hash
