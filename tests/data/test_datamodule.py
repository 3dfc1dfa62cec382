"""The batches that a real Trainer gets: resumed, divided, images on the device or not."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ddim.data import LazyImages, MemoryImages, normalize
from ddim.data.batches import MicroBatches, random_flip
from ddim.data.datamodule import ImageDataModule
from ddim.errors import UserError

N, BATCH = 10, 4


class Lazy(LazyImages):
    """The same images as those in memory, read one at a time."""

    name, transform = "lazy", "none"

    def __init__(self, images):
        self.images, self.shape, self.labels = images, images.shape, getattr(images, "labels", None)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class Recorder(LightningModule):
    """Stores the batches it gets; `folder` receives those of each process."""

    def __init__(self, folder=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.folder = [], folder

    def training_step(self, batch):
        self.seen.append(batch)
        assert batch["step"] == self.global_step
        return (self.weight * batch["images"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (N, 3, 4, 6), dtype=torch.uint8, generator=generator)
    return MemoryImages("random", pixels, 100 + torch.arange(N), tuple(map(str, range(200))))  # each of its own label


@pytest.fixture
def train(tmp_path, images):
    """train(7, ...): train to that step and return the batches and the Trainer; options go to the data module."""

    def train(max_steps, total=None, ckpt_path=None, module=None, source=images, trainer_options=None, **options):
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            max_steps=max_steps,
            max_epochs=-1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **(trainer_options or {}),
        )
        options = {"batch_size": BATCH, "seed": 3, "flip": True} | options
        module, data = module or Recorder(), ImageDataModule(source, max_steps=total or max_steps, **options)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module.seen, trainer

    return train


def same(one, other):
    return len(one) == len(other) and all(
        a["step"] == b["step"] and all(torch.equal(a[key], b[key]) for key in ("positions", "images", "labels"))
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def expected(images):
    """Seven batches, made without Lightning."""
    batches = MicroBatches(N, BATCH, 3, 7)
    return [
        {"step": k, "positions": (at := batches[k]["positions"])}
        | {"images": normalize(random_flip(images.images[batches[k]["indices"]], 3, k, at))}
        | {"labels": 100 + batches[k]["indices"]}
        for k in range(7)
    ]


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["resident", "in memory", "lazy"])
def test_trainer_gets_the_addressed_batches(train, images, expected, kind, workers):
    source = Lazy(images) if kind == "lazy" else images
    resident = {"resident": True, "in memory": False, "lazy": None}[kind]
    seen, trainer = train(7, source=source, num_workers=workers, device_resident=resident)
    assert same(seen, expected)
    assert seen[0]["images"].shape == (BATCH, 3, 4, 6)
    assert (seen[0]["images"].dtype, seen[0]["labels"].dtype) == (torch.float32, torch.int64)
    assert trainer.num_training_batches == 7


def test_images_are_resident_by_default_on_shared_memory(train, monkeypatch):
    monkeypatch.setattr(MemoryImages, "batch", lambda *args: pytest.fail("read from the host"))
    assert len(train(1)[0]) == 1


def test_images_stay_off_a_device_that_they_would_fill(images, monkeypatch):
    data = ImageDataModule(images, BATCH, 0, 1, flip=False)
    for free, fits in ((4 * images.images.nbytes, True), (4 * images.images.nbytes - 1, False)):
        memory = SimpleNamespace(mem_get_info=lambda device, free=free: (free, 2 * free))
        monkeypatch.setattr(torch, "get_device_module", lambda device, memory=memory: memory)
        assert data._fits(images.images, torch.device("meta")) is fits


class Unreadable(Lazy):
    """Images of which none can be read."""

    def batch(self, indices):
        raise UserError("x.png cannot be read; replace it.")


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence(train, images, workers):
    with pytest.raises(UserError) as caught:
        train(1, source=Unreadable(images.images), num_workers=workers)
    assert str(caught.value) == "x.png cannot be read; replace it."


@pytest.mark.integration
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("total", [3, 7], ids=["extended", "interrupted"])
def test_resumed_run_gets_the_batches_of_an_uninterrupted_one(train, tmp_path, accumulate, total, workers):
    options = {"num_workers": workers, "trainer_options": {"accumulate_grad_batches": accumulate}}
    uninterrupted, _ = train(7, **options)
    assert len(uninterrupted) == 7 * accumulate
    first, trainer = train(3, total=total, **options)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    second, trainer = train(7, ckpt_path=tmp_path / "3.ckpt", **options)
    assert same(first + second, uninterrupted)
    assert len(second) == 4 * accumulate
    assert trainer.global_step == 7


def test_accumulated_batches_make_up_the_full_batch(train, expected):
    seen, _ = train(7, trainer_options={"accumulate_grad_batches": 2})
    assert [len(batch["positions"]) for batch in seen] == [BATCH // 2] * 14
    for step, batch in enumerate(expected):
        assert torch.equal(torch.cat([b["images"] for b in seen[2 * step : 2 * step + 2]]), batch["images"])


def test_batches_of_images_without_labels_have_none(train, images):
    assert "labels" not in train(1, source=MemoryImages("random", images.images))[0][0]


def test_without_flip_the_pixels_are_the_stored_ones(train, images):
    seen, _ = train(5, flip=False)
    pixels = torch.cat([((b["images"] + 1) * 127.5).round().to(torch.uint8) for b in seen])
    batches = MicroBatches(N, BATCH, 3, 5)
    assert torch.equal(pixels, images.images[torch.cat([batches[step]["indices"] for step in range(5)])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "trainer_options": {"accumulate_grad_batches": 2}}, "batch_size=5 .* multiple of 2"),
        ({"total": 3}, r"max_steps=7 must lie in 0 \.\. 3"),
        ({"total": -1}, "max_steps=-1 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(train, options, message):
    with pytest.raises(UserError, match=message):
        train(7, **options)


def test_lazy_images_cannot_be_device_resident(images):
    with pytest.raises(UserError, match="device_resident=true needs images in memory, and lazy"):
        ImageDataModule(Lazy(images), BATCH, 0, 1, flip=False, device_resident=True)


@pytest.mark.integration
def test_two_processes_divide_the_batch_of_one(train, tmp_path, expected):
    train(7, module=Recorder(tmp_path), trainer_options={"strategy": "ddp_fork", "devices": 2})
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step, batch in enumerate(expected):
        for key in ("positions", "images", "labels"):
            assert torch.equal(torch.cat([seen[step][key] for seen in by_rank]), batch[key])
