"""Images of a user as x_T: what the file holds, what comes back from it, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from two_processes import run_in_processes

import ddim
from ddim import GuidanceSpec
from ddim.checkpoints import LoadedModel
from ddim.data.images import normalize
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.sampling import last_state
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation import encoding
from ddim.evaluation.encoding import EncodeSpec, decode_with, write_encoded
from ddim.figures.panels import load_panel
from ddim.figures.paper_figures import FigureSpec, PictureSpec, write_figures
from ddim.inference.compute import ComputeSpec
from ddim.inference.encoded_files import EncodedImages, in_precision_of, load_encoded
from ddim.inference.sample_files import SampleSpec, write_samples
from ddim.io import read_safetensors, write_safetensors

pytestmark = pytest.mark.integration
CPU = ComputeSpec("cpu", batch_size=2)
NAMES = ["a.png", "b.png", "deep/c.png", "e.png", "z.png"]


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path, pixels: torch.Tensor) -> EncodeSpec:
    for name, image in zip(NAMES, pixels, strict=True):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "mine" / name)
    sampler = SamplerSpec(S=5)
    return EncodeSpec(str(checkpoint), str(tmp_path / "mine"), str(tmp_path / "out"), "mine", CPU, sampler)


def sampling(spec: EncodeSpec, **changes: Any) -> SampleSpec:
    values = {"sampler": spec.sampler, "x_T": str(spec.path), "format": "png"} | changes
    return SampleSpec(spec.checkpoint, f"{spec.output_dir}/decoded", CPU, **values)


def read(folder: Path) -> torch.Tensor:
    files = sorted(folder.glob("*.png"))
    assert [file.stem for file in files] == [f"{i:06d}" for i in range(len(files))]
    return torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in files])


def test_the_file_holds_x_T_and_where_it_is_from(
    spec: EncodeSpec, model: LoadedModel, pixels: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        write_encoded(spec)
    tensors, as_json = read_safetensors(spec.path)
    metadata = {key: json.loads(value) for key, value in as_json.items() if key != "format"}
    tau = ddim.linear_tau(50, 5)
    expected = ddim.encode(model, model.spec.schedule, normalize(pixels), tau)
    assert set(tensors) == {"x_T"}
    assert torch.allclose(tensors["x_T"], expected, atol=1e-4)
    assert f"standard deviation of x_T is {expected.std():.3g};" in caplog.text
    stated = {"tau": list(tau), "files": NAMES, "weights": "ema", "weights_hash": model.weights_hash, "nfe": 5}
    assert stated.items() <= metadata.items()
    assert metadata["inversion"] == {"method": "paper"}
    assert [*Path(spec.output_dir).glob("unfinished/*/*")] == []
    with pytest.raises(UserError, match="exists already"):
        write_encoded(spec)


@pytest.mark.parametrize("inversion", ["paper", "bdia"])
@pytest.mark.parametrize("guidance", [GuidanceSpec(0.0), GuidanceSpec(0.5, (1, 30))])
def test_a_label_is_encoded_with_and_decoded_with(
    spec: EncodeSpec,
    pixels: torch.Tensor,
    conditional_checkpoint: Path,
    inversion: str,
    guidance: GuidanceSpec,
    caplog: Any,
) -> None:
    spec = dataclasses.replace(spec, checkpoint=str(conditional_checkpoint), label=3, guidance=guidance)
    spec = dataclasses.replace(spec, inversion=inversion)
    write_encoded(spec)
    _, as_json = read_safetensors(spec.path)
    interval = {"interval": [1, 30]} if guidance.w else {}
    assert json.loads(as_json["condition"]) == {"label": 3, "w": guidance.w, **interval}
    assert int(as_json["nfe"]) == (9 if guidance.w else 5)  # asked at 1, 10, 20, 30, 40
    words = ["label=3", f"guidance.w={guidance.w:g}", *["guidance.interval=[1,30]"] * bool(guidance.w)]
    assert decode_with(spec)[-len(words) :] == words
    assert json.loads(as_json["decode_with"]) == " ".join(decode_with(spec))
    rule = {"rule": "bdia", "eta": None} if inversion == "bdia" else {}
    sampler = dataclasses.replace(spec.sampler, **rule)
    write_samples(sampling(spec, sampler=sampler, label=3, guidance=guidance))
    assert "label and guidance" not in caplog.text
    if inversion == "bdia":
        assert (read(Path(spec.output_dir) / "decoded").int() - pixels).abs().max() <= 1
    write_samples(sampling(spec, sampler=sampler, label=4, format="grid"))
    assert "label and guidance this sampler does not have" in caplog.text
    with pytest.raises(UserError, match="encoding takes one label"):
        write_encoded(dataclasses.replace(spec, label="all", name="other"))


@pytest.mark.parametrize("inversion", ["paper", "diffusers", "fixed_point", "bdia"])
def test_decoding_the_file_is_the_round_trip(
    spec: EncodeSpec, inversion: str, model: LoadedModel, pixels: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataclasses.replace(spec, inversion=inversion)
    write_encoded(spec)
    rule, how = ("bdia", None) if inversion == "bdia" else ("ddim", 0.0), Inversion(inversion)
    [folder] = write_samples(sampling(spec, sampler=dataclasses.replace(spec.sampler, rule=rule[0], eta=rule[1])))
    tau, x_0 = ddim.linear_tau(50, 5), normalize(pixels)
    *_, before, last = how.encode(model, model.spec.schedule, x_0, tau)
    x = last_state(how.decode(model, model.spec.schedule, last.x, tau, second=before.x))
    apart = (read(folder).int() - ((x + 1) * 127.5 + 0.5).floor().clamp(0, 255)).abs().max()
    assert int(apart) <= 1
    assert (inversion == "bdia") == torch.equal(read(folder), pixels)
    assert not caplog.messages


def test_x_T_does_not_depend_on_batches_and_interruptions(spec: EncodeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoded(spec)
    expected = read_safetensors(spec.path)[0]["x_T"]
    other = dataclasses.replace(spec, output_dir=spec.output_dir + "2", compute=ComputeSpec("cpu", batch_size=3))
    real, calls = encoding.encode_batch, iter(range(1))

    def interrupted(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(encoding, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_encoded(other)
    assert not other.path.exists()
    done: list[int] = []
    monkeypatch.setattr(encoding, "encode_batch", lambda *a: (done.append(len(a[3])), real(*a))[1])
    write_encoded(other)
    assert done == [2]
    assert torch.allclose(read_safetensors(other.path)[0]["x_T"], expected, atol=1e-5)


def test_parts_of_other_code_are_warned_of_and_recorded(
    spec: EncodeSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim.evaluation.shards.code_revision", lambda: "older")
    monkeypatch.setattr(encoding, "save_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_encoded(spec)
    monkeypatch.undo()
    write_encoded(spec)
    assert "a part of it was computed by the code of older and stays as it is" in caplog.text
    assert json.loads(read_safetensors(spec.path)[1]["other_revisions"]) == ["older"]


def encode_in_a_process(processes: Processes, spec: EncodeSpec) -> None:
    write_encoded(spec, processes)


def test_two_processes_encode_what_one_does(spec: EncodeSpec, tmp_path: Path) -> None:
    spec = dataclasses.replace(spec, inversion="bdia")
    write_encoded(spec)
    other = dataclasses.replace(spec, output_dir=spec.output_dir + "2")
    run_in_processes(encode_in_a_process, other, to=tmp_path / "results")
    one, two = (read_safetensors(s.path)[0] for s in (spec, other))
    assert one.keys() == two.keys() == {"x_T", "second"}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"S": 4}, "times"),
        ({"eta": 1.0}, "rule"),
        ({"rule": "bdia", "eta": None, "S": 3}, "times and rule"),
        ({"last_time": 1}, "last time"),
        ({"clip": "x0"}, "clip policy"),
        ({"corrector_steps": 1}, "number of corrector steps"),
    ],
)
def test_another_sampler_is_said(
    spec: EncodeSpec, changes: dict[str, Any], differs: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_encoded(spec)
    write_samples(sampling(spec, sampler=dataclasses.replace(spec.sampler, **changes)))
    [said] = caplog.messages
    assert f"was encoded for sampler=ddim sampler.S=5, whose {differs} this sampler does not have" in said


def test_a_corrector_decodes_bdia_without_its_second_state(spec: EncodeSpec, caplog: pytest.LogCaptureFixture) -> None:
    """With it, the first step and the corrector after it would be left out, and their evaluations counted."""
    spec = dataclasses.replace(spec, inversion="bdia")
    write_encoded(spec)
    write_samples(sampling(spec, sampler=SamplerSpec("bdia", None, S=5, corrector_steps=1)))
    assert len(read(Path(spec.output_dir, "decoded"))) == len(NAMES)
    assert "whose number of corrector steps this sampler does not have" in caplog.text


def test_first_and_n_choose_among_the_images(spec: EncodeSpec, pixels: torch.Tensor) -> None:
    spec = dataclasses.replace(spec, inversion="bdia")
    write_encoded(spec)
    sampler = SamplerSpec("bdia", None, 5)
    write_samples(sampling(spec, sampler=sampler, first=1, n=2))
    files = sorted(Path(spec.output_dir, "decoded").glob("*.png"))
    assert [file.name for file in files] == ["000001.png", "000002.png"]
    assert np.array_equal(np.array(Image.open(files[1])), pixels[2, 0].numpy())
    for format in ("grid", "gif"):
        assert write_samples(sampling(spec, sampler=sampler, format=format))[0].is_file()
    with pytest.raises(UserError, match=r"holds the images 0 \.\. 4, not 5"):
        write_samples(sampling(spec, first=5))


def test_figures_interpolate_between_encoded_images(
    spec: EncodeSpec, tmp_path: Path, pixels: torch.Tensor, model: LoadedModel
) -> None:
    write_encoded(dataclasses.replace(spec, sampler=SamplerSpec(S=50)))
    figures = FigureSpec(PictureSpec("interpolation"), spec.checkpoint, "f", str(tmp_path / "figures"), CPU, points=3)
    figures = dataclasses.replace(figures, x_T=str(spec.path), indices=(1, 4))
    panel = load_panel(write_figures(figures)[1])
    x_T = load_encoded(str(spec.path), model).x_T
    halfway = ddim.slerp(x_T[1:2], x_T[4:5], 0.5)
    expected = ddim.sample(model, model.spec.schedule, torch.cat([x_T[1:2], halfway, x_T[4:5]]), range(1, 51))
    assert torch.allclose(panel.images[0], expected, rtol=1e-3, atol=1e-2)
    assert panel.metadata["x_T"]["files"] == NAMES
    with pytest.raises(UserError, match="not 7"):
        write_figures(dataclasses.replace(figures, indices=(1, 7), name="g", output_dir=str(tmp_path / "g")))
    with pytest.raises(UserError, match="pairs of images, not 5"):
        write_figures(dataclasses.replace(figures, indices=None, output_dir=str(tmp_path / "h")))


def test_figures_say_that_bdia_needs_two_states(
    spec: EncodeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataclasses.replace(spec, inversion="bdia")
    write_encoded(spec)
    sampler = SamplerSpec("bdia", None, S=5)
    figures = FigureSpec(PictureSpec("interpolation"), spec.checkpoint, "f", str(tmp_path), CPU, sampler)
    write_figures(dataclasses.replace(figures, x_T=str(spec.path), indices=(1, 4), points=3))
    assert "figures start from x_T alone, and BDIA needs two states" in caplog.text


@pytest.mark.parametrize("encoded_in", [False, True])
def test_images_are_decoded_in_the_precision_of_encoding(encoded_in: bool) -> None:
    """Unless another is given: a GPU would take bfloat16 by itself, in which BDIA is not exact."""
    encoded = EncodedImages(torch.zeros(1, 1, 8, 8), None, {"bf16": encoded_in})
    automatic = ComputeSpec("cpu", bf16=None, tf32=None, winograd=None)
    chosen = in_precision_of(encoded, automatic)
    assert chosen == dataclasses.replace(automatic, bf16=encoded_in, tf32=False)
    given = ComputeSpec("cpu", bf16=True, tf32=True)
    assert in_precision_of(encoded, given) == given
    in_tf32 = dataclasses.replace(encoded, metadata={"bf16": False, "tf32": True})
    assert in_precision_of(in_tf32, automatic).tf32


def test_decode_with_is_the_sampler_in_words(spec: EncodeSpec) -> None:
    explicit = SamplerSpec(S=None, spacing="explicit", times=(5, 40))
    for sampler, words in (
        (SamplerSpec(S=5), "sampler=ddim sampler.S=5"),
        (explicit, "sampler=ddim sampler.S=null sampler.spacing=explicit sampler.times=[5,40]"),
    ):
        assert decode_with(dataclasses.replace(spec, sampler=sampler)) == words.split()


def test_images_of_another_shape_are_refused_before_work(
    spec: EncodeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_batch", lambda *_: pytest.fail("an image was encoded"))
        Image.new("L", (10, 12)).save(tmp_path / "mine" / "large.png")
        with pytest.raises(UserError, match=r"large.png is 12 x 10 .*the checkpoint's size=\[8, 8\]; set resize=true"):
            write_encoded(spec)
        Image.new("RGB", (8, 8)).save(tmp_path / "mine" / "large.png")
        with pytest.raises(UserError, match=r"in colour, but the checkpoint's channels=1; set convert=true"):
            write_encoded(spec)
        with pytest.raises(UserError, match=r"the folder source=nowhere does not exist"):
            write_encoded(dataclasses.replace(spec, source="nowhere"))
    Image.new("RGB", (10, 12)).save(tmp_path / "mine" / "large.png")
    write_encoded(dataclasses.replace(spec, resize=True, convert=True))
    assert read_safetensors(spec.path)[0]["x_T"].shape == (6, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": SamplerSpec(eta=1.0)}, "deterministic"),
        ({"sampler": SamplerSpec(clip="x0"), "inversion": "bdia"}, "do not clip"),
        ({"inversion": "exact"}, "inversion='exact' is not known"),
        ({"name": "a/b"}, "a file name"),
    ],
)
def test_encodings_that_do_not_exist_are_refused(spec: EncodeSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


def test_files_that_are_not_for_the_model_are_refused(spec: EncodeSpec, tmp_path: Path) -> None:
    write_encoded(spec)
    other = tmp_path / "other.safetensors"
    tensors, metadata = read_safetensors(spec.path)
    write_safetensors(other, {"x": tensors["x_T"]}, {})
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, tensors, {name: text for name, text in metadata.items() if name != "sampler"})
    wide, wrong = tmp_path / "wide.safetensors", tmp_path / "text.txt"
    write_safetensors(wide, {"x_T": torch.zeros(2, 1, 9, 8)}, metadata)
    wrong.write_text("text")
    for path, changes, message in (
        (spec.path, {"weights": "online"}, r"was encoded with the weights \w+, not with \w+ \(online\)"),
        (other, {}, "holds no encoded images"),
        (bare, {}, "holds no encoded images"),
        (wrong, {}, "holds no encoded images"),
        (wide, {}, re.escape("of the shape (2, 1, 9, 8), not float32")),
        (tmp_path / "nowhere", {}, "there is no file x_T="),
        (tmp_path, {}, "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            write_samples(sampling(spec, x_T=str(path), **changes))
