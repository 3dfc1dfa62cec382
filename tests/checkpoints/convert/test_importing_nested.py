"""Import: training files of other code bases, dictionaries of state dicts; networks that are none of ours."""

import pytest
import torch
from layouts import GIVEN, NETWORK, NO_AVERAGE, UNLABELLED, bring, import_refusal, official, same, save, weights
from lightning.pytorch.callbacks import WeightAveraging
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from ddim.diffusion.schedule import linear_schedule
from ddim.networks import UNet

pytestmark = pytest.mark.integration

ONLINE, EMA = weights(NETWORK, 5), weights(NETWORK, 6)
BETAS = (1 - linear_schedule(20).alpha_bar[1:] / linear_schedule(20).alpha_bar[:-1]).float()
ANY_AVERAGE = (
    "the file does not state which average its averaged weights are (torch's AveragedModel can keep any), and they are "
    "labelled ema"
)
ADAM = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4}]}


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


# What a training of denoising-diffusion-pytorch stores: also tensors of the diffusion, and the EMA's copy of the model.
MODEL = {"betas": BETAS, "alphas_cumprod": BETAS, **under("model.", ONLINE)}
EMA_OBJECT = {"initted": torch.tensor(True), "step": torch.tensor(3), **under("online_model.model.", ONLINE)}
LUCIDRAINS = {
    "step": 9,
    "model": MODEL,
    "ema": EMA_OBJECT | under("ema_model.model.", EMA),
    "opt": ADAM,
    "scaler": None,
}
BOTH = {"ema": EMA, "online": ONLINE}
# What torch's AveragedModel and LitEma of latent diffusion store; a test below makes the first with torch's own code.
AVERAGED = {"n_averaged": torch.tensor(7)} | under("module.", EMA)
LIT_EMA = under("model.diffusion_model.", ONLINE) | {"model_ema.decay": torch.tensor(0.9999)}
LIT_EMA |= {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in EMA.items()}
SHADOW = {"decay": 0.999, "num_updates": 7, "shadow": EMA, "backup": {}}
# A file -> (its content, label -> weights in it, its step).
FILES = {
    "pytorch-ddpm": (
        {"net_model": ONLINE, "ema_model": EMA, "sched": {"last_epoch": 3}, "optim": ADAM, "step": 9, "x_T": BETAS},
        BOTH,
        9,
    ),
    "denoising-diffusion-pytorch": (LUCIDRAINS, BOTH, 9),
    "model and ema": ({"model": ONLINE, "ema": EMA, "version": "1"}, BOTH, None),
    "wrapped": ({"model": under("module.", ONLINE), "ema": under("_orig_mod.", EMA)}, BOTH, None),
    "one dictionary": (under("model.", ONLINE) | under("model_ema.", EMA), BOTH, None),
    "EMA beside bare names": (ONLINE | under("ema.", EMA), BOTH, None),
    "EMA alone": ({"ema_model": EMA}, {"ema": EMA}, None),
    "online alone": ({"net_model": ONLINE}, {"online": ONLINE}, None),
    "EMA of another kind": ({"model": ONLINE, "ema": {"shadow_params": [BETAS]}}, {"online": ONLINE}, None),
    "state_dict": ({"state_dict": ONLINE, "epoch": 3, "global_step": 9}, {"unlabelled": ONLINE}, 9),
    "a decay is no EMA": ({"state_dict": ONLINE, "ema_decay": 0.9999}, {"unlabelled": ONLINE}, None),
    "nor in a tensor": ({"state_dict": ONLINE, "ema": {"decay": torch.tensor(0.9)}}, {"unlabelled": ONLINE}, None),
    "LitEma": ({"state_dict": LIT_EMA, "epoch": 3, "global_step": 9}, BOTH, 9),
    "LitEma, without a dictionary around": (LIT_EMA, BOTH, None),
    "LitEma of another network": (
        {"state_dict": under("model.", ONLINE) | {"model_ema.conv_inweight": torch.zeros(3)}, "epoch": 3},
        {"online": ONLINE},
        None,
    ),
    "AveragedModel": (AVERAGED, {"ema": EMA}, None),
    "AveragedModel as ema": ({"model": ONLINE, "ema": AVERAGED, "step": 9}, BOTH, 9),
    "AveragedModel by another name": ({"model": ONLINE, "swa": AVERAGED}, BOTH, None),
    "AveragedModel in a module": ({"state_dict": under("net.", ONLINE) | under("average.", AVERAGED)}, BOTH, None),
    "WeightAveraging": (
        {
            "state_dict": under("net.", EMA),
            "current_model_state": under("net.", ONLINE),
            "averaging_state": {"n_averaged": torch.tensor(7)},
            "global_step": 9,
        },
        BOTH,
        9,
    ),
    "WeightAveraging of a module's net_model": (
        {"state_dict": under("net_model.", EMA), "current_model_state": under("net_model.", ONLINE)},
        BOTH,
        None,
    ),
    "EMAWeightAveraging": (
        {"state_dict": EMA, "current_model_state": ONLINE, "callbacks": {"EMAWeightAveraging": {"latest": 7}}},
        BOTH,
        None,
    ),
    "shadow": ({"model": ONLINE, "ema": SHADOW}, BOTH, None),
    "shadow alone": ({"ema": SHADOW}, {"ema": EMA}, None),
    "shadow of a callback": ({"state_dict": ONLINE, "callbacks": {"EMA": {"shadow": EMA}}}, BOTH, None),
    "a prefix": ({"state_dict": under("network.", ONLINE)}, {"unlabelled": ONLINE}, None),
}


@pytest.mark.parametrize("name", FILES)
def test_the_weights_of_every_entry_are_read_and_labelled(tmp_path, name):
    content, sets, step = FILES[name]
    path = save(content, tmp_path / "ckpt.pt")
    for asked in ("auto", "ema", "online"):
        label = "ema" if asked == "auto" and "ema" in sets else asked
        if "unlabelled" in sets:  # the file does not say, so the user may
            label, held = ("unlabelled" if asked == "auto" else asked), sets["unlabelled"]
        elif label in sets or asked == "auto":
            label = label if label in sets else "online"
            held = sets[label]
        else:  # a label of the user does not overrule what the file is
            message = import_refusal(path, weights=asked, network=GIVEN, overwrite=True)
            assert message == f"{path} holds {' and '.join(sets)} weights only; choose weights=auto."
            continue
        done = bring(path, weights=asked, network=GIVEN, overwrite=True)
        assert same(done.model.state, held)
        assert (done.model.weights, done.model.step, done.model.origin["layout"]) == (label, step, "nested")


def test_what_is_unknown_of_a_nested_file_is_warned_of(tmp_path):
    expected = {"state_dict": [UNLABELLED], "pytorch-ddpm": [], "online alone": [NO_AVERAGE]}
    expected["EMA of another kind"] = ["its EMA weights are stored in another way and were not read", NO_AVERAGE]
    expected["LitEma of another network"] = expected["EMA of another kind"]
    expected |= {key: [ANY_AVERAGE] for key in ("AveragedModel", "AveragedModel by another name", "WeightAveraging")}
    expected |= {
        "LitEma": [],
        "EMAWeightAveraging": [],
        "AveragedModel as ema": [],
        "shadow": [],
        "a decay is no EMA": [UNLABELLED],
    }
    for name, warnings in expected.items():
        assert bring(save(FILES[name][0], tmp_path / f"{name}.pt"), network=GIVEN).warnings == warnings


def test_the_averages_of_libraries_are_as_assumed(tmp_path):
    """AveragedModel's own state dict, in each place; and the names that Lightning's callback gives to it."""
    network, averaged = UNet(NETWORK), AveragedModel(UNet(NETWORK))
    network.load_state_dict(ONLINE)
    averaged.update_parameters(network)
    state = averaged.state_dict()
    assert set(state) == {"n_averaged", *under("module.", ONLINE)}
    files = {"alone": state, "beside": {"model": EMA, "ema": state}, "list": [EMA, ADAM, 0, 9, state]}
    checkpoint, callback = {"state_dict": EMA}, WeightAveraging()
    callback._average_model = averaged
    callback.on_save_checkpoint(None, None, checkpoint)
    for name, content in (files | {"WeightAveraging": checkpoint}).items():
        path = save(content, tmp_path / f"{name}.pt")
        done = bring(path, network=GIVEN)
        assert (done.model.weights, same(done.model.state, ONLINE)) == ("ema", True)
        if name != "alone":
            assert same(bring(path, network=GIVEN, weights="online", overwrite=True).model.state, EMA)


def test_an_average_in_the_official_list_is_read(tmp_path, model):
    content = official(model, ONLINE)
    content[-1] = AVERAGED
    done = bring(save(content, tmp_path / "ckpt.pth"), network=GIVEN)
    assert (done.model.weights, same(done.model.state, EMA)) == ("ema", True)


def test_the_schedule_of_a_nested_file_is_that_of_its_betas(tmp_path):
    schedule = bring(save(LUCIDRAINS, tmp_path / "model-1.pt"), network=GIVEN).model.spec.schedule
    assert schedule.T == 20
    assert torch.allclose(schedule.alpha_bar, linear_schedule(20).alpha_bar, rtol=1e-6)


def test_nested_weights_of_diffusers_names_are_read(folder, state):
    content = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    path = save({"model": content, "epoch": 1}, folder.parent / "checkpoint.pt")
    assert same(bring(path, network=GIVEN).model.state, state)


@pytest.mark.parametrize("entries", [("a", "b"), ("ema", "ema_model"), ("net_model", "online")])
def test_a_file_of_several_networks_is_refused(tmp_path, entries):
    path = save(dict.fromkeys(entries, ONLINE) | {"epoch": 1}, tmp_path / "several.pt")
    message = import_refusal(path, network=GIVEN)
    assert message.startswith(f"{path} holds several networks ({', '.join(entries)}); store the state dict of one")


# A parameter of the U-Net of another code base -> its name in the refusal.
OTHERS = {
    "input_blocks.0.0.weight": "improved-diffusion",
    "model.diffusion_model.input_blocks.0.0.weight": "latent diffusion",
    "time_embedding.timembedding.1.weight": "pytorch-ddpm",
    "ema_model.model.init_conv.weight": "denoising-diffusion-pytorch",
    "module.all_modules.0.weight": "score_sde",
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_network_of_another_code_base_is_named(tmp_path, name):
    state = {name: torch.zeros(4, 4), "out.2.bias": torch.zeros(3)}
    save_file(state, tmp_path / "x.safetensors")
    contents = {"flat": state, "nested": {"state_dict": state, "epoch": 1}, "official": [state, {}, 0, 1, state]}
    paths = [save(content, tmp_path / f"{layout}.pt") for layout, content in contents.items()]
    for path in (tmp_path / "x.safetensors", *paths):
        message = import_refusal(path)
        assert message.startswith(f"{path} holds the U-Net of ")
        assert OTHERS[name] in message
