"""Tensors of any layout in a safetensors file."""

import resource

import pytest
import torch
from stored import same

from ddim.io import read_safetensors, write_safetensors

BASE = torch.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": BASE.transpose(0, 2)},
        {"a": BASE[:, ::2]},
        {"a": BASE[1:]},
        {"a": BASE[:1].expand(2, 3, 4)},
        {"a": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        {"a": BASE.clone().requires_grad_()},
        {"a": torch.nn.Parameter(BASE)},
        dict(zip("ab", BASE.chunk(2), strict=True)),
        {"a": BASE, "b": BASE.transpose(0, 1)},
        {"a": torch.tensor(3.0), "b": torch.zeros(0), "c": torch.zeros(2, 0)},
        {name: BASE.to(getattr(torch, name)) for name in ("float64", "bfloat16", "float16", "int64", "uint8", "bool")},
        {},
    ],
    ids=[
        "transposed",
        "strided",
        "part",
        "expanded",
        "channels_last",
        "gradient",
        "parameter",
        "parts of one",
        "transposed of one",
        "empty",
        "types",
        "none",
    ],
)
def test_tensors_of_any_layout_are_written_with_their_values(path, tensors):
    write_safetensors(path, tensors, {"key": "väl\nue"})
    back, metadata = read_safetensors(path)
    assert same(back, {name: value.detach() for name, value in tensors.items()})
    assert metadata == {"format": "pt", "key": "väl\nue"}


@pytest.mark.parametrize(
    "tensors",
    [{"a": BASE, "b": BASE}, {"a": BASE, "b": BASE.view(-1)}, {"a": BASE[0], "b": BASE.view(-1)[6:]}],
    ids=["same", "view", "overlapping"],
)
def test_tensors_that_share_their_storage_are_written_each_for_itself(path, tensors):
    write_safetensors(path, tensors, {})
    assert same(read_safetensors(path)[0], tensors)


def test_writing_leaves_the_tensors_as_they_are(path):
    tensor = BASE.transpose(0, 2)
    stride = tensor.stride()
    write_safetensors(path, {"a": tensor}, {})
    assert tensor.stride() == stride
    assert torch.equal(BASE, torch.arange(24.0).reshape(2, 3, 4))


def test_a_file_that_does_not_fit_is_an_error_of_the_system_that_names_it(path):
    """The library's own error says neither which file it was nor, but in words, what is wrong."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_safetensors(path, {"a": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert [*path.parent.iterdir()] == []
