import dataclasses
import json
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddim import (
    SPACINGS,
    SamplerSpec,
    leading_tau,
    linear_schedule,
    linear_tau,
    linspace_tau,
    quadratic_tau,
    reference_quad_tau,
    reference_uniform_tau,
    respaced_tau,
    trailing_tau,
)
from ddim.diffusion.labels import spacing_name, title
from ddim.diffusion.sampling import last_state
from ddim.diffusion.spec import NFENotPossible
from ddim.diffusion.timesteps import distinct_evaluations, explicit_tau

EXACT = [name for name in SPACINGS if name not in ("uniform", "quad", "quad_or_full", "leading", "linspace")]

SCHEDULER = {"rule": "diffusers", "eta": None, "spacing": "scheduler", "scheduler": "DDIMScheduler"}


def test_quad_or_full_is_quad_but_for_the_full_chain():
    for S in (1, 10, 50, 999):
        assert SPACINGS["quad_or_full"](1000, S) == reference_quad_tau(1000, S)
    assert SPACINGS["quad_or_full"](1000, 1000) == tuple(range(1, 1001))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
def test_rules_give_exactly_S_increasing_times_that_end_at_T(name, T):
    for S in {1, 2, 3, 10, 50, T // 3, T - 1, T} & set(range(1, T + 1)):
        tau = SPACINGS[name](T, S)
        assert len(tau) == S
        assert tau[0] >= 1
        assert tau[-1] == T
        assert all(b > a for a, b in pairwise(tau))


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("S", [0, -3, 1001])
def test_impossible_S_is_refused_and_named_with_T(name, S):
    with pytest.raises(ValueError, match=rf"S={S} .*T=1000"):
        SPACINGS[name](1000, S)


def test_linear_is_the_floor_of_c_i():
    assert linear_tau(1000, 10) == tuple(range(100, 1001, 100))
    assert linear_tau(1000, 3) == (333, 666, 1000)


def test_quadratic_is_the_floor_of_c_i_squared():
    assert quadratic_tau(1000, 10) == tuple(10 * i * i for i in range(1, 11))
    tau = quadratic_tau(1000, 100)  # c = 0.1: the floors 0, 0, 0, 1, 2, 3, 4, 6, 8, 10, 12 ... repeat at first
    assert tau[:4] == (1, 2, 3, 4)
    assert tau[50:] == tuple(i * i // 10 for i in range(51, 101))
    assert all(t >= i * i // 10 for i, t in enumerate(tau, start=1))


# In the official implementation's indices (the paper's times minus one).
REFERENCE_QUAD = {
    10: "0 9 39 88 158 246 355 483 632 800",
    20: "0 2 8 19 35 55 79 108 141 179 221 268 319 374 434 498 567 640 718 800",
    50: "0 0 1 2 5 8 11 16 21 26 33 40 47 56 65 74 85 96 107 120 133 146 161 176 191 208 225 242 261 280 299 320 341 "
    "362 385 408 431 456 481 506 533 560 587 616 645 674 705 736 767 800",
}


@pytest.mark.parametrize("S", REFERENCE_QUAD)
def test_quad_is_the_released_list(S):
    assert reference_quad_tau(1000, S) == tuple(int(t) + 1 for t in REFERENCE_QUAD[S].split())


@pytest.mark.parametrize("T", [100, 1000, 4000])
def test_quad_is_the_released_formula_for_every_S(T):
    for S in range(1, 101):
        released = np.linspace(0, np.sqrt(T * 0.8), S) ** 2
        assert reference_quad_tau(T, S) == tuple(int(t) + 1 for t in released)


@pytest.mark.parametrize(("S", "distinct"), [(10, 10), (50, 49), (100, 96), (200, 187), (500, 422), (1000, 688)])
def test_quad_repeats_small_times(S, distinct):
    assert distinct_evaluations(reference_quad_tau(1000, S)) == distinct


@pytest.mark.parametrize(
    ("S", "steps"), [(10, 10), (100, 100), (1000, 1000), (15, 16), (12, 13), (300, 334), (600, 1000)]
)
def test_uniform_keeps_its_surplus_steps(S, steps):
    tau = reference_uniform_tau(1000, S)
    assert tau == tuple(t + 1 for t in range(0, 1000, 1000 // S))
    assert len(tau) == steps


def test_leading_trailing_and_linspace_are_their_lists():
    """diffusers' indices plus one; that they agree for every S, tests/checkpoints/convert/test_diffusers_options.py."""
    assert leading_tau(1000, 3) == (1, 334, 667)
    assert leading_tau(1000, 3, steps_offset=2) == (3, 336, 669)
    assert trailing_tau(1000, 3) == (333, 667, 1000)
    assert trailing_tau(10, 4) == (2, 5, 8, 10)  # 2.5, 5, 7.5: half to even
    assert linspace_tau(1000, 3) == (1, 501, 1000)  # index 499.5: half to even
    assert linspace_tau(1000, 1) == (1,)
    assert len(leading_tau(1000, 1000)) == 1000
    for T, S, steps_offset in ((1000, 1000, 1), (1000, 10, 100), (10, 2, -1)):
        with pytest.raises(ValueError, match=f"steps_offset={steps_offset} must be 0 or more"):
            leading_tau(T, S, steps_offset)


def released_sections(T, counts):
    """Improved DDPM's respacing in its own indices, from its description."""
    indices, first = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (1 if i < T % len(counts) else 0)
        position = 0.0
        for _ in range(count):
            indices.append(first + int(np.round(position)))
            position += (size - 1) / (count - 1) if count > 1 else 1
        first += size
    return indices


def test_respacing_is_improved_ddpms():
    assert respaced_tau(1000, "ddim50") == tuple(range(1, 1001, 20))
    assert respaced_tau(1000, "ddim15") == tuple(range(1, 1001, 67))  # the least of the strides 67 to 71
    assert respaced_tau(6, "3") == (1, 3, 6)  # 0, 2.5, 5: half to even
    sections = respaced_tau(300, "10,15,20")
    assert [sum(a < t <= a + 100 for t in sections) for a in (0, 100, 200)] == [10, 15, 20]
    assert sections[:3] == (1, 12, 23)
    assert sections[9:11] == (100, 101)
    for T, name in ((300, "10,15,20"), (1000, "250"), (1000, "10,10,10,10,10,50"), (1001, "1,7,90"), (4000, "100,3,1")):
        expected = [i + 1 for i in released_sections(T, [int(count) for count in name.split(",")])]
        assert respaced_tau(T, name) == tuple(expected)
        assert SamplerSpec(S=None, spacing=name).tau(T) == tuple(expected)
    assert SamplerSpec(spacing="ddim50").tau(1000) == respaced_tau(1000, "ddim50")  # S=50 is the default


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ddim300", "no stride gives exactly 300 times"),
        ("ddim0", "no stride"),
        ("500,501", "a section of 500 of the T=1000 times cannot give 501"),
        ("10,0", "cannot give 0"),
    ],
)
def test_impossible_respacing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        SamplerSpec(S=None, spacing=name).tau(1000)


def test_explicit_times():
    assert explicit_tau(1000, [1, 5, 900]) == (1, 5, 900)
    for bad in ([], [0, 5], [5, 5], [9, 3], [5, 1001]):
        with pytest.raises(ValueError, match=r"in 1\.\.1000"):
            explicit_tau(1000, bad)


def test_sampler_spec_chooses_the_rule():
    assert SamplerSpec(S=20, spacing="quad").tau(1000) == reference_quad_tau(1000, 20)
    assert SamplerSpec(S=None, spacing="explicit", times=(3, 9)).tau(10) == (3, 9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("rule", "eta"), [("ddim", 0.0), ("heun", None), ("unipc", None), ("sigma_hat", None)])
def test_nfe_is_taken_exactly_or_refused(rule, eta, spacing):
    """`uniform` has surplus times, `quad` repeats some, and Heun's rule costs two evaluations but in its last step."""
    schedule, possible, calls = linear_schedule(1000), [], []

    def model(x, t):
        calls.append(t)
        return 0 * x

    for nfe in (2, 3, 5, 6, 10, 15, 51, 99):
        try:
            spec = SamplerSpec(rule, eta, S=None, nfe=nfe, spacing=spacing)
            spec.check(schedule, "eps")
        except NFENotPossible:
            continue
        calls.clear()
        last_state(spec.trajectory(model, schedule, torch.zeros(1, 1, 2, 2)))
        assert len(calls) == nfe == spec.evaluations(schedule)
        assert spec.settings() == SamplerSpec(rule, eta).settings()  # the times decide the numbers, not their name
        possible.append(nfe)
    assert {nfe % 2 for nfe in possible} == ({1} if rule == "heun" else {0, 1})
    with pytest.raises(NFENotPossible, match="nfe=6 is not possible with rule=heun and spacing=linear"):
        SamplerSpec("heun", None, S=None, nfe=6).check(schedule, "eps")
    if spacing == "linear":
        assert possible == [nfe for nfe in (2, 3, 5, 6, 10, 15, 51, 99) if nfe % 2 or rule != "heun"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eta": -1.0}, r"eta=-1.0 must lie in \[0, 1\]"),
        ({"eta": 1.5}, "must lie in"),
        ({"eta": None}, "ddim needs an eta"),
        ({"rule": "sigma_hat", "eta": 0.5}, "sigma_hat does not take eta, .* null .* no arguments"),
        ({"rule": "deis", "eta": None, "order": 5}, "order=5 is not one of 1, 2, 3, 4"),
        ({"rule": "deis", "eta": None, "order": 4, "S": 3}, "rule=deis uses 4 predictions, which 3 steps never have"),
        ({"rule": "ipndm", "eta": None, "S": None, "spacing": "explicit", "times": (1, 5)}, "uses 4 .* 2 steps"),
        ({"rule": "heun", "eta": None, "order": 2}, "rule=heun does not take order"),
        (
            {"rule": "unipc", "eta": None, "kwargs": {"varient": "B1"}},
            "not take varient, .* takes order, variant",
        ),
        ({"rule": "unipc", "eta": None, "kwargs": {"variant": "B3"}}, "variant='B3' is not known; allowed: B1, B2"),
        ({"rule": "unipc", "eta": None, "kwargs": {"variant": 1}}, "variant=1 of rule=unipc must be text"),
        ({"rule": "unipc", "eta": None, "kwargs": {"corrector": "no"}}, "corrector='no' .* must be true or false"),
        ({"rule": "unipc", "eta": None, "kwargs": {"order": True}}, "order=True of rule=unipc must be an integer"),
        ({"rule": "deis", "eta": None, "kwargs": {"lower_order_below": "15"}}, "lower_order_below='15' .* a number"),
        ({"rule": "diffusers"}, "a scheduler of diffusers goes with rule=diffusers, spacing=scheduler, eta=null"),
        ({"rule": "diffusers", "eta": None, "spacing": "scheduler"}, "give scheduler=NAME"),
        ({"rule": "ddim", "scheduler": "DDIMScheduler"}, "goes with rule=diffusers"),
        ({"spacing": "scheduler"}, "goes with rule=diffusers"),
        ({**SCHEDULER, "clip": "x0"}, "the defaults of everything else"),
        ({**SCHEDULER, "order": 2}, "its own options as kwargs"),
        ({"rule": "euler"}, "rule='euler' is not known; allowed: ddim, sigma_hat"),
        ({"spacing": "lead"}, "allowed: linear, quadratic, cosine, uniform, quad, quad_or_full, leading, trailing, li"),
        ({"spacing": "ddim"}, "a file .*, and Improved DDPM's ddimN and N1,N2"),
        ({"spacing": "10,20"}, "S=50 contradicts spacing=10,20, which is 30 times; set S=null"),
        ({"steps_offset": 1}, "steps_offset=1 needs spacing=leading, not linear"),
        ({"clip_range": 2.0}, "need clip=x0 or x0_and_eps"),
        ({"threshold_ratio": 0.9}, "need clip=x0 or x0_and_eps"),
        ({"clip": "x0", "clip_range": 0.0}, "clip_range=0.0 must be positive"),
        ({"clip": "x0", "clip_range": 2.0, "threshold_ratio": 0.9}, "either clip_range or threshold_ratio"),
        ({"clip": "x0", "threshold_ratio": 1.5}, r"threshold_ratio=1.5 must lie in \(0, 1\]"),
        ({"clip": "x0", "threshold_ratio": 0.9, "threshold_max": 0.5}, "threshold_max=0.5 must be at least 1"),
        ({"clip": "x0", "threshold_max": 2.0}, "threshold_max needs a threshold_ratio"),
        ({"clip": "yes"}, "allowed: none, x0, x0_and_eps"),
        ({"last_time": 2}, "last_time=2"),
        ({"S": 0}, "S=0"),
        ({"times": (1, 2)}, "either S"),
        ({"spacing": "explicit"}, "either S"),
        ({"nfe": 5}, "nfe=5 takes the place of S: set S=null, and one of linear, quadratic"),
        ({"nfe": 3, "S": None, "spacing": "explicit", "times": (1, 2, 3)}, "nfe=3 takes the place of S"),
        ({"nfe": 10, "S": None, "spacing": "ddim10"}, "nfe=10 takes the place of S"),
        ({"nfe": 0, "S": None}, "nfe=0 must be at least 1"),
    ],
)
def test_sampler_spec_refuses_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**fields)


@pytest.fixture
def tau_file(tmp_path):
    path = tmp_path / "searched.json"
    path.write_text(json.dumps({"tau": [3, 40, 90], "T": 100, "errors": {}}))
    return path


@pytest.mark.parametrize("S", [None, 3])
def test_a_file_of_times_is_a_spacing_of_any_rule(tau_file, S):
    for rule, eta in (("ddim", 1.0), ("heun", None)):
        sampler = SamplerSpec(rule, eta, S=S, spacing=str(tau_file))
        assert sampler.tau(100) == (3, 40, 90)
        assert sampler.S == 3
        assert spacing_name(sampler, sampler.tau(100), 100) == "searched"
        assert title(sampler).endswith("S=3 searched")


def test_a_sampler_keeps_the_times_that_its_file_had(tau_file):
    """So that the images of an evaluation and its record have the same."""
    sampler = SamplerSpec(S=3, spacing=str(tau_file))
    tau_file.write_text("{}")
    assert sampler.tau(100) == (3, 40, 90)
    with pytest.raises(ValueError, match="damaged"):
        dataclasses.replace(sampler, clip="x0")


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (None, {}, r"cannot be read \(No such file or directory\)"),
        (b"", {}, "is no file of times, or damaged"),
        (b"\xff\xfe\x00", {}, "is no file of times, or damaged"),
        (b"[1, 2]", {}, "is no file of times, or damaged"),
        (b'{"tau": [1, 2]}', {}, r"damaged \(KeyError: 'T'\)"),
        (b'{"T": 100, "tau": 7}', {}, "is no file of times, or damaged"),
        (b'{"T": 100, "tau": null}', {}, "is no file of times, or damaged"),
        (b'{"T": 100, "tau": []}', {}, r"list of times in 1\.\.100"),
        (b'{"T": 100, "tau": [5, 5]}', {}, "each larger than the one before"),
        (b'{"T": 100, "tau": [5, 101]}', {}, r"list of times in 1\.\.100"),
        (b'{"T": 100, "tau": [5, 9.5]}', {}, "must be integers"),
        (b'{"T": true, "tau": [1]}', {}, "must be integers"),
        (b"[" * 100_000, {}, "is no file of times, or damaged"),
        (b'{"T": 100, "tau": [3, 9]}', {"S": 50}, r"S=50 is not the number of times in .*; take S=2 or S=null"),
        (b'{"T": 100, "tau": [3, 9]}', {"times": (3, 9)}, "either S"),
    ],
)
def test_bad_files_of_times_are_refused(tmp_path, content, fields, message):
    if content is not None:
        (tmp_path / "tau.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        SamplerSpec(**{"S": None, "spacing": str(tmp_path / "tau.json")} | fields)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_file_of_times(tmp_path):
    (tmp_path / "tau.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        SamplerSpec(S=None, spacing=str(tmp_path / "tau.json"))


def test_a_fifo_is_no_file_of_times(tmp_path):
    """It would be read for ever."""
    os.mkfifo(tmp_path / "tau.json")
    with pytest.raises(ValueError, match="cannot be read \\(it is no regular file\\)"):
        SamplerSpec(S=None, spacing=str(tmp_path / "tau.json"))


def test_the_home_folder_is_known_in_the_path_of_times(tau_file, monkeypatch):
    monkeypatch.setenv("HOME", str(tau_file.parent))
    assert SamplerSpec(S=None, spacing="~/searched.json").tau(100) == (3, 40, 90)


def test_times_of_another_T_are_refused(tau_file):
    with pytest.raises(ValueError, match=r"holds times of T=100, not of T=1000; search them for this model"):
        SamplerSpec(S=None, spacing=str(tau_file)).tau(1000)
