"""The optimizers unchanged inside Lightning's Trainer: fit, checkpoint, resume."""

import importlib
import warnings

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.optim.support import PRESETS, batch, net, preset

LIKELIHOOD = fl.Categorical()

pytestmark = pytest.mark.lightning


@pytest.fixture
def lightning():
    """The library, which warns of others' deprecations when it is imported and used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("lightning")


def module(lightning, name, schedule=False, attached=False):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(net(torch.float32), nn.LayerNorm(3))

        def training_step(self, pair, index):
            x, y = pair
            if attached:
                return LIKELIHOOD.loss(self.net(x), y)
            with self.trainer.optimizers[0].observing():
                z = self.net(x)
            return LIKELIHOOD.loss(z, y)

        def configure_optimizers(self):
            opt = preset(name, self.net, LIKELIHOOD, 0.01, observe_every=2)
            if attached:
                opt.attach()
            if not schedule:
                return opt
            return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)]

    return Classifier()


def loader():
    x, y = batch(24, torch.float32)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 6)


def trainer(lightning, folder, epochs, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **quiet, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRESETS)
def test_lightning_trains_as_a_plain_loop_does(lightning, name, tmp_path):
    found = module(lightning, name)
    trainer(lightning, tmp_path, 2, enable_checkpointing=False).fit(found, loader())
    plain = nn.Sequential(net(torch.float32), nn.LayerNorm(3))
    opt = preset(name, plain, LIKELIHOOD, 0.01, observe_every=2)
    for _ in range(2):
        for x, y in loader():
            with opt.observing():
                z = plain(x)
            opt.zero_grad()
            LIKELIHOOD.loss(z, y).backward()
            opt.step()
    assert all(
        torch.equal(p, q) for p, q in zip(found.net.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_an_attached_optimizer_trains_alike(lightning, tmp_path):
    trained = []
    for attached in (False, True):
        found = module(lightning, "KFAC", attached=attached)
        trainer(lightning, tmp_path, 2, enable_checkpointing=False).fit(found, loader())
        trained.append(list(found.net.parameters()))
    for p, q in zip(*trained, strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_from_its_checkpoint_exactly(lightning, tmp_path):
    whole = module(lightning, "TNT", schedule=True)
    trainer(lightning, tmp_path, 3, enable_checkpointing=False).fit(whole, loader())
    first = trainer(lightning, tmp_path, 1)
    first.fit(module(lightning, "TNT", schedule=True), loader())
    first.save_checkpoint(tmp_path / "run.ckpt")
    rest = module(lightning, "TNT", schedule=True)
    trainer(lightning, tmp_path, 3).fit(rest, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert all(
        torch.equal(p, q)
        for p, q in zip(rest.net.parameters(), whole.net.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning_accumulates_and_clips(lightning, tmp_path):
    found = module(lightning, "KFAC")
    options = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "enable_checkpointing": False,
    }
    trainer(lightning, tmp_path, 1, **options).fit(found, loader())
    assert found.trainer.optimizers[0].steps == 2
    assert isinstance(found.trainer.optimizers[0], optim.KFAC)
