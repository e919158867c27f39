"""The loops of other libraries with an attached optimizer: accelerate's and Hugging Face's."""

import importlib
import os

import pytest
import torch
from torch import nn

import fisher_lab as fl
from fisher_lab import optim
from tests.optim.support import batch, net

LIKELIHOOD = fl.Categorical()

pytestmark = pytest.mark.transformers


def test_a_loop_of_accelerate_observes_and_steps():
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    opt = optim.KFAC(model, LIKELIHOOD, 0.1, observe_every=1)
    opt.attach()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    model, prepared, data = accelerator.prepare(model, opt, data)
    before = [p.detach().clone() for p in model.parameters()]
    for some_x, some_y in data:
        with accelerator.accumulate(model):
            accelerator.backward(LIKELIHOOD.loss(model(some_x), some_y))
            prepared.step()
            prepared.zero_grad()
    assert opt.steps == 2
    assert opt.observed_at == 1
    for p, q in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, q)


def test_the_trainer_of_transformers_with_an_attached_optimizer(tmp_path):
    """Its own loop: accumulation, an evaluation in the middle, a checkpoint."""
    transformers = importlib.import_module("transformers")
    os.environ.setdefault("WANDB_DISABLED", "true")
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(13, (24, 5))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in tokens]
    # the position embedding is one row for all examples: left to AdamW
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    opt = optim.KFAC(model, nn.CrossEntropyLoss(), 0.05, observe_every=2, layers=linear)
    opt.attach()
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(opt, scheduler),
    )
    trainer.train()
    assert opt.steps == 6
    assert opt.observed_at == 4
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert all(c.moments is not None for c in opt.curvature.values())
