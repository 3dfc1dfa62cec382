"""Validation of configurations: values are accepted as written, or refused in a sentence that lists what is allowed."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ddim.config import FilePath, build, check_name, choose, config_context, convert, suggest
from ddim.data.datasets import DataSpec
from ddim.diffusion.schedule import ScheduleSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.metrics import MetricSpec
from ddim.inference.compute import ComputeSpec
from ddim.inference.sample_files import SampleSpec
from ddim.networks import UNetSpec
from ddim.training.callbacks import GridSpec
from ddim.training.ema import EMASpec
from ddim.training.loggers import LoggerSpec
from ddim.training.module import ObjectiveSpec, OptimSpec
from ddim.training.spec import TrainerSpec, TrainSpec


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int]
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must not be negative.")


@dataclass(frozen=True)
class Outer:
    count: int
    name: str
    inner: Inner
    maybe: Inner | None = None
    flags: tuple[bool, ...] = ()
    kind: Literal["left", "right"] = "left"
    extra: dict[str, Any] = field(default_factory=dict)
    devices: int | str = "auto"


GOOD: dict[str, Any] = {"count": 3, "name": "x", "inner": {"size": [2, 3]}}


def refusal(values: Any, where: str = "top") -> str:
    with pytest.raises(UserError) as caught:
        build(Outer, values, where)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_mapping_becomes_a_spec_with_its_defaults() -> None:
    assert build(Outer, GOOD, "top") == Outer(3, "x", Inner((2, 3), 0.5), None, (), "left", {}, "auto")


def test_nested_values_are_built_too() -> None:
    values = {**GOOD, "maybe": {"size": [1, 1], "rate": 2}, "flags": [True, False], "extra": {"any": [1, "b"]}}
    spec = build(Outer, values, "")
    assert spec.maybe == Inner((1, 1), 2.0)
    assert isinstance(spec.maybe.rate, float)
    assert spec.flags == (True, False)
    assert spec.extra == {"any": [1, "b"]}
    assert build(Outer, {**values, "inner": Inner((5, 5))}, "").inner == Inner((5, 5))  # built already


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {**GOOD, "cuont": 1},
            "unknown key top.cuont (did you mean count?); allowed: count, name, inner, maybe, flags,",
        ),
        ({**GOOD, "zzz": 1}, "unknown key top.zzz; allowed: count, name,"),
        (
            {**GOOD, "inner": {"size": [1, 2], "rat": 1}},
            "unknown key top.inner.rat (did you mean rate?); allowed: size, r",
        ),
        ({"name": "x", "inner": {"size": [1, 2]}}, "top lacks the key count."),
        ({"inner": {"size": [1, 2]}}, "top lacks the keys count, name."),
        ({**GOOD, "inner": {}}, "top.inner lacks the key size."),
        ({**GOOD, "inner": {"size": [1, 2], "rate": -1}}, "top.inner: rate=-1.0 must not be negative."),
        ({**GOOD, "inner": 5}, "top.inner must be a mapping with the keys size, rate, not 5."),
        ({**GOOD, "inner": None}, "top.inner must be a mapping"),
        ([1], "top must be a mapping with the keys count, name,"),
    ],
)
def test_wrong_keys_are_named(values: Any, message: str) -> None:
    assert refusal(values).startswith(message)


def test_messages_at_the_top_level_have_no_prefix() -> None:
    assert refusal({**GOOD, "nmae": 1}, "").startswith("unknown key nmae (did you mean name?)")
    assert refusal({**GOOD, "count": "1"}, "").startswith("count='1' must be")
    assert refusal({}, "") == "the configuration lacks the keys count, name, inner."


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (-0.5, float, -0.5),
        (True, bool, True),
        ("3", str, "3"),
        (None, int | None, None),
        (3, int | None, 3),
        (3, float | None, 3.0),
        (2, int | str, 2),
        ("auto", int | str, "auto"),
        ("b", Literal["a", "b"], "b"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([], tuple[int, ...], ()),
        ((1, 0.5), tuple[float, float], (1.0, 0.5)),
        (["a"], tuple[Literal["a", "b"], ...], ("a",)),
        (None, tuple[int, ...] | None, None),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ({"whatever": {1, 2}}, Any, {"whatever": {1, 2}}),
        ("~/a", FilePath, f"{Path.home()}/a"),
        ("~/a", FilePath | None, f"{Path.home()}/a"),
        ("a/~", FilePath, "a/~"),
        ("~/a", str, "~/a"),
    ],
    ids=str,
)
def test_values_that_fit(value: Any, hint: Any, expected: Any) -> None:
    converted = convert(value, hint, "x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "x=True must be an integer, not true or false."),
        (False, float, "x=False must be a number, not true or false."),
        (1, bool, "x=1 must be true or false, not an integer."),
        ("true", bool, "x='true' must be true or false, not text."),
        (1.0, int, "x=1.0 must be an integer, not a number."),
        ("1", int, "x='1' must be an integer, not text."),
        ("0.5", float, "x='0.5' must be a number, not text."),
        (3, str, "x=3 must be text, not an integer."),
        (None, int, "x=None must be an integer, not null."),
        (float("nan"), float, "x=nan must be a finite number."),
        (float("inf"), float, "x=inf must be a finite number."),
        (-float("inf"), float | None, "x=-inf must be a finite number."),
        ("1", int | None, "x='1' must be an integer, not text."),
        (True, int | str, "x=True must be an integer or text."),
        (1.5, int | str, "x=1.5 must be an integer or text."),
        ("lefft", Literal["left", "right"], "x='lefft' is not known (did you mean left?); allowed: left, right."),
        (["left"], Literal["left", "right"], "x=['left'] is not known"),
        (5, tuple[int, ...], "x=5 must be a list, such as [5]."),
        (64, tuple[int, int], "x=64 must be a list, such as [64,64]."),
        ("12", tuple[int, ...], "x='12' must be a list."),
        ({1: 2}, tuple[int, ...], "x={1: 2} must be a list."),
        ([1, "2"], tuple[int, ...], "x[1]='2' must be an integer, not text."),
        ([1], tuple[int, int], "x=[1] must have 2 entries."),
        ([1, 2, 3], tuple[int, int], "x=[1, 2, 3] must have 2 entries."),
        ([1, True], tuple[int, int] | None, "x[1]=True must be an integer"),
        (5, dict[str, Any], "x must be a mapping, not 5."),
        (5, FilePath, "x=5 must be text, not an integer."),
        ("", FilePath | None, "x='' must be a path; write . for the folder you are in."),
        ("a\0b", FilePath, "x='a\\x00b' must be a path"),
        ([1], Inner, "x must be a mapping with the keys size, rate, not [1]."),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(value, hint, "x")
    assert str(caught.value).startswith(message)


def test_config_context_names_the_part_of_value_errors_only() -> None:
    with pytest.raises(UserError, match=r"^sampler: too large$") as caught, config_context("sampler"):
        raise ValueError("too large")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(UserError, match=r"^too large$"), config_context(""):
        raise ValueError("too large")
    with pytest.raises(UserError, match=r"^clear already$"), config_context("sampler"):
        raise UserError("clear already")
    with pytest.raises(TypeError, match="a defect"), config_context("sampler"):
        raise TypeError("a defect")


def test_choose_takes_from_a_registry() -> None:
    registry = {"linear": 1, "cosine": 2}
    assert choose("schedule", "cosine", registry) == 2
    with pytest.raises(
        UserError, match=r"^unknown schedule 'cosin' \(did you mean cosine\?\); allowed: linear, cosine\.$"
    ):
        choose("schedule", "cosin", registry)


@pytest.mark.parametrize("name", ["a", "a.b", " ", "ä", "~", 255 * "n", "-m"])
def test_names_of_files_are_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "a/", "../a", "a\\b", "a\0b", "a\nb", "\udcff", 256 * "n", 128 * "ä"]
)
def test_what_is_no_file_name_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be a file name without a folder; choose that by output_dir=\.\.\."):
        check_name(name)


def test_suggest_is_empty_when_nothing_is_similar() -> None:
    assert suggest("zzz", ["eta", "S"]) == ""
    assert suggest("etta", ["eta", "S"]) == " (did you mean eta?)"


CIFAR10 = DataSpec("cifar10", (32, 32), 3)
CPU = ComputeSpec("cpu")
INCEPTION = MetricSpec("inception")
SPECS = [
    CIFAR10,
    DataSpec("lsun", (256, 128), 3, category="bedroom", flip=False),
    SamplerSpec(),
    SamplerSpec("sigma_hat", None, None, "explicit", (1, 5)),
    ScheduleSpec(),
    ScheduleSpec("custom", betas=(0.1, 0.2)),
    CPU,
    INCEPTION,
    UNetSpec((32, 32)),
    ObjectiveSpec(),
    OptimSpec(grad_clip=None),
    EMASpec(),
    GridSpec(),
    LoggerSpec(),
    TrainerSpec(),
    TrainSpec("run", "out", CIFAR10, {"name": "unet"}),
    TrainSpec("run", "out", CIFAR10, {}, ema=None),
    EvaluateSpec(
        checkpoint="a.ckpt",
        name="run",
        output_dir="out",
        data=CIFAR10,
        metric=INCEPTION,
        sampler=SamplerSpec(),
        compute=CPU,
    ),
    SampleSpec("a.ckpt", "out", CPU),
]


def plain(value: Any) -> Any:
    """As YAML gives it: lists for tuples."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_every_spec_survives_plain_values(spec: Any) -> None:
    assert build(type(spec), plain(dataclasses.asdict(spec)), "") == spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_every_spec_refuses_an_unknown_key(spec: Any) -> None:
    with pytest.raises(UserError, match="unknown key etta"):
        build(type(spec), plain(dataclasses.asdict(spec)) | {"etta": 1}, "")
