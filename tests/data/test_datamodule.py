"""Batches as a real Trainer hands them on: resumed, divided, resident or not."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ddim.data import LazyImages, MemoryImages
from ddim.data.batches import MicroBatches, finish
from ddim.data.datamodule import ImageDataModule
from ddim.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
N, BATCH = 10, 4


class Lazy(LazyImages):
    """The same images as those in memory, read one at a time."""

    name, transform = "lazy", "none"

    def __init__(self, images):
        self.images, self.shape = images, images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class Recorder(LightningModule):
    """Keeps the batches that it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch)
        assert batch["step"] == self.global_step
        return (self.weight * batch["images"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return MemoryImages("random", torch.randint(0, 256, (N, 3, 4, 6), dtype=torch.uint8, generator=generator))


def train(tmp_path, images, max_steps, total=None, ckpt_path=None, module=None, trainer_options=None, **options):
    """Train to `max_steps` of `total` and return the batches seen and the Trainer."""
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
    module, data = module or Recorder(), ImageDataModule(images, max_steps=total or max_steps, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen, trainer


def same(one, other):
    return len(one) == len(other) and all(
        a["step"] == b["step"] and torch.equal(a["positions"], b["positions"]) and torch.equal(a["images"], b["images"])
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def expected(images):
    """Seven batches, made without Lightning."""
    batches = [MicroBatches(images, BATCH, 3, 7)[step] for step in range(7)]
    return [finish(images.images[b["indices"]], b["step"], b["positions"], 3, True) for b in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["resident", "in memory", "lazy"])
def test_the_trainer_sees_the_addressed_batches(tmp_path, images, expected, kind, workers):
    source = Lazy(images) if kind == "lazy" else images
    resident = {"resident": True, "in memory": False, "lazy": None}[kind]
    seen, trainer = train(tmp_path, source, 7, num_workers=workers, device_resident=resident)
    assert same(seen, expected)
    assert seen[0]["images"].shape == (BATCH, 3, 4, 6)
    assert seen[0]["images"].dtype == torch.float32
    assert trainer.num_training_batches == 7


def test_images_are_resident_by_default_where_memory_is_shared(tmp_path, images, monkeypatch):
    monkeypatch.setattr(MicroBatches, "__init__", check := Spy(MicroBatches.__init__))
    train(tmp_path, images, 1)
    assert check.options["with_images"] is False


def test_images_stay_off_a_device_that_they_would_fill(images, monkeypatch):
    data = ImageDataModule(images, BATCH, 0, 1, flip=False)
    for free, fits in ((4 * images.images.nbytes, True), (4 * images.images.nbytes - 1, False)):
        monkeypatch.setattr("ddim.data.datamodule._free_memory", lambda device, free=free: free)
        assert data._fits(images.images, torch.device("meta")) is fits


class Spy:
    def __init__(self, function):
        self.function = function

    def __get__(self, instance, owner):
        def call(*arguments, **options):
            self.options = options
            return self.function(instance, *arguments, **options)

        return call


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("total", [3, 7], ids=["extended", "interrupted"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(tmp_path, images, accumulate, total, workers):
    options = {"num_workers": workers, "trainer_options": {"accumulate_grad_batches": accumulate}}
    whole, _ = train(tmp_path, images, 7, **options)
    assert len(whole) == 7 * accumulate
    first, trainer = train(tmp_path, images, 3, total=total, **options)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    second, trainer = train(tmp_path, images, 7, ckpt_path=tmp_path / "3.ckpt", **options)
    assert same(first + second, whole)
    assert len(second) == 4 * accumulate
    assert trainer.global_step == 7


def test_accumulated_batches_make_up_the_whole_one(tmp_path, images, expected):
    seen, _ = train(tmp_path, images, 7, trainer_options={"accumulate_grad_batches": 2})
    assert [len(batch["positions"]) for batch in seen] == [BATCH // 2] * 14
    for step, batch in enumerate(expected):
        assert torch.equal(torch.cat([b["images"] for b in seen[2 * step : 2 * step + 2]]), batch["images"])


def test_without_flips_the_pixels_are_the_stored_ones(tmp_path, images):
    seen, _ = train(tmp_path, images, 5, flip=False)
    shown = torch.cat([((b["images"] + 1) * 127.5).round().to(torch.uint8) for b in seen])
    order = [MicroBatches(images, BATCH, 3, 5)[step]["indices"] for step in range(5)]
    assert torch.equal(shown, images.images[torch.cat(order)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "trainer_options": {"accumulate_grad_batches": 2}}, "batch_size=5 .* multiple of 2"),
        ({"total": 3}, r"max_steps=7 must lie in 0 \.\. 3"),
        ({"total": -1}, "max_steps=-1 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_step(tmp_path, images, options, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, images, 7, **options)


def test_lazy_images_cannot_be_resident(images):
    with pytest.raises(UserError, match="device_resident=true needs images in memory, and lazy"):
        ImageDataModule(Lazy(images), BATCH, 0, 1, flip=False, device_resident=True)


class Writer(Recorder):
    """Leaves the batches of each process in a file."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"{self.global_rank}.pt")


def test_two_processes_share_the_batch_of_one(tmp_path, images, expected):
    train(tmp_path, images, 7, module=Writer(tmp_path), trainer_options={"strategy": "ddp_fork", "devices": 2})
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step, batch in enumerate(expected):
        for key in ("positions", "images"):
            assert torch.equal(torch.cat([share[step][key] for share in shares]), batch[key])
