"""Models of the transformers library, small and with random weights, entry by entry against one
example at a time.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import fisher_lab as fl
from fisher_lab._passes.setup import Setup
from fisher_lab._passes.source import Source
from tests import naive
from tests.real import oracle

pytestmark = pytest.mark.transformers

N, L, VOCABULARY = 4, 5, 11
METHODS = {
    "KFAC": naive.naive_kfac,
    "EKFAC": naive.naive_ekfac,
    "TKFAC": naive.naive_tkfac,
    "TN": naive.naive_tn,
    "MiniBlock": naive.naive_mini_block,
    "TENGraD": naive.naive_tengrad,
    "KPSVD": naive.naive_kpsvd,
}


@dataclass
class Case:
    """A model, its inputs as a mapping, the loss module, labels, and what the model is called with
    for one example.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    y: Tensor

    def call(self, n: int) -> Tensor:
        """The logits of example n alone, `[1, *output]`."""
        return self.model(**{key: value[n : n + 1] for key, value in self.inputs.items()}).logits

    def loss(self, z: Tensor, n: int) -> Tensor:
        """Minus log likelihood of example n, summed over its positions."""
        return cross_entropy(z.flatten(0, -2), self.y[n : n + 1].flatten(), reduction="sum")


def tokens(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (N, L), generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Float64, evaluation mode, every parameter random."""
    draw = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def gpt2(transformers: Any, **options: Any) -> Case:
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=4,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=L,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **options,
    )
    return Case(
        randomised(transformers.GPT2LMHeadModel(config)), {"input_ids": tokens(0)}, tokens(1)
    )


def llama(transformers: Any) -> Case:
    config = transformers.LlamaConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
    )
    return Case(
        randomised(transformers.LlamaForCausalLM(config)), {"input_ids": tokens(0)}, tokens(1)
    )


def bert(transformers: Any) -> Case:
    config = transformers.BertConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=L,
        num_labels=3,
        attn_implementation="eager",
    )
    mask = torch.ones(N, L, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2, 2:] = 0
    y = torch.tensor([0, 2, 1, 1])
    model = randomised(transformers.BertForSequenceClassification(config))
    return Case(model, {"input_ids": tokens(0), "attention_mask": mask}, y)


def vit(transformers: Any) -> Case:
    config = transformers.ViTConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
        attn_implementation="eager",
    )
    images = torch.randn(
        N, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    model = randomised(transformers.ViTForImageClassification(config))
    return Case(model, {"pixel_values": images}, torch.tensor([0, 2, 1, 1]))


CASES: dict[str, Callable[[Any], Case]] = {"GPT-2": gpt2, "Llama": llama, "BERT": bert, "ViT": vit}
SINGLE = {"Llama", "ViT"}  # compute a norm or a softmax in single precision whatever the model's


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, imported when a test asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("transformers")
    module.logging.set_verbosity_error()
    return module


def with_ones(x: Tensor, module: nn.Module) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return (
        torch.cat([x, x.new_ones(len(x), 1)], 1) if getattr(module, "bias", None) is not None else x
    )


def form(
    module: nn.Module,
) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], tuple[int, ...], bool] | None:
    """How a module's input is unrolled, how its gradients form W, its kernel and bias; None for the
    gradient form.
    """
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        pack = lambda w, *b: torch.cat([w, *(x[:, None] for x in b)], 1)  # noqa: E731
        return lambda x: with_ones(x, module), pack, (module.in_features,), bias
    if type(module).__name__ == "Conv1D":
        pack = lambda w, *b: torch.cat([w.T, *(x[:, None] for x in b)], 1)  # noqa: E731
        return lambda x: with_ones(x, module), pack, (module.weight.shape[0],), bias
    if isinstance(module, nn.Embedding):
        rows = [row for row in range(module.num_embeddings) if row != module.padding_idx]

        def unroll(x: Tensor) -> Tensor:
            return one_hot(x.flatten(), module.num_embeddings).double()[:, rows]

        return unroll, lambda w: w[rows].T, (len(rows),), False
    return None


def packed(*gradients: Tensor) -> Tensor:
    """All gradients one after the other."""
    return torch.cat([x.flatten() for x in gradients])


@pytest.mark.parametrize("name", CASES)
def test_every_block_equals_the_oracle(transformers: Any, name: str) -> None:
    """Exact blocks of all layers, and every approximation of the layers with inputs and output
    gradients.
    """
    case = CASES[name](transformers)
    tolerance = 1e-5 if name in SINGLE else 1e-9
    data = (case.inputs, case.y)
    likelihood = fl.Categorical()
    setup = Setup(case.model, likelihood, data)
    assert (Source(setup).precision == torch.float32) == (name in SINGLE)
    exact = fl.estimate(fl.Exact(), case.model, likelihood, data)
    owners = {
        n for n, m in case.model.named_modules() if any(True for _ in m.parameters(recurse=False))
    }
    assert set(exact) == owners
    estimates = {
        method: fl.estimate(getattr(fl, method)(), case.model, likelihood, data)
        for method in METHODS
    }
    for layer, block in exact.items():
        module = case.model.get_submodule(layer)
        known = form(module)
        pack = packed if known is None else known[1]
        if isinstance(module, nn.Conv2d):
            pack = lambda w, b: torch.cat([w.flatten(1), b[:, None]], 1)  # noqa: E731
        parameters = list(module.parameters(recurse=False))
        expected = oracle.dense_block(case.model, case.call, N, parameters, pack, case.loss)
        close(block.dense(), expected, tolerance, f"{layer}: exact")
        if known is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        unroll, _, kernel, bias = known
        stats = oracle.layer_stats(
            case.model, case.call, N, module, unroll, case.loss, kernel, bias
        )
        for method, formula in METHODS.items():
            if method in ("EKFAC",) and name in SINGLE:
                continue  # eigenvectors of nearly equal eigenvalues turn by more than the rounding
            close(estimates[method][layer].dense(), formula(stats), tolerance, f"{layer}: {method}")


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error < tolerance, f"{what}: relative deviation {error:.1e}"


def test_lora_on_a_frozen_model(transformers: Any) -> None:
    """Only the adapters are measured; what is frozen is left out and said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = importlib.import_module("peft")
        case = llama(transformers)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, lora_alpha=4
        )
        model = peft.get_peft_model(case.model, config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    case.model = model
    comparison = fl.compare(
        model, fl.Categorical(), (case.inputs, case.y), [fl.KFAC()], errors=["frobenius"]
    )
    assert len(comparison.layers) == 4
    assert all("lora_" in name for name in comparison.layers)
    assert comparison.settings["precision"].startswith("float32")
    assert all(row.noise > 1e-6 for row in comparison.rows)
    for layer, block in fl.estimate(
        fl.Exact(), model, fl.Categorical(), (case.inputs, case.y)
    ).items():
        parameters = list(model.get_submodule(layer).parameters(recurse=False))
        expected = oracle.dense_block(model, case.call, N, parameters, lambda w: w, case.loss)
        close(block.dense(), expected, 1e-5, layer)


def test_dora_on_a_frozen_model(transformers: Any) -> None:
    """The low-rank factors, of which the norm of the weight is made too, and the magnitudes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = importlib.import_module("peft")
        case = llama(transformers)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
        model = peft.get_peft_model(case.model, config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                draw = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    case.model = model
    likelihood = fl.Categorical()
    found = fl.estimate(fl.Exact(), model, likelihood, (case.inputs, case.y))
    assert sum("magnitude" in layer for layer in found) == 2
    assert len(found) == 6
    for layer, block in found.items():
        parameters = list(model.get_submodule(layer).parameters(recurse=False))
        expected = oracle.dense_block(model, case.call, N, parameters, lambda w: w, case.loss)
        close(block.dense(), expected, 1e-5, layer)
    opt = fl.optim.KFAC(model, likelihood)
    data = {**case.inputs, "labels": case.y}
    records = fl.training.fit(model, opt, likelihood, data, 3, batch=N)
    assert records[-1]["loss"] < records[0]["loss"]


def test_tied_embeddings_of_gpt2(transformers: Any) -> None:
    """Embedding and output layer are one block, and exact."""
    case = gpt2(transformers)
    case.model.lm_head.weight = case.model.transformer.wte.weight
    found = fl.estimate(fl.Exact(), case.model, fl.Categorical(), (case.inputs, case.y))
    weight = case.model.transformer.wte.weight
    expected = oracle.dense_block(case.model, case.call, N, [weight], packed, case.loss)
    close(found["transformer.wte"].dense(), expected, 1e-9, "tied")


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_other_kinds_of_fisher(transformers: Any, fisher: Any) -> None:
    """Labels in the mapping, as the library's own batches have them; both truths agree on every
    layer.
    """
    case = bert(transformers)
    data = {**case.inputs, "labels": case.y}
    comparison = fl.compare(
        case.model,
        nn.CrossEntropyLoss(),
        data,
        [fl.KFAC(), fl.TN()],
        fisher=fisher,
        errors=["frobenius", "off_block"],
    )
    assert max(row.checked for row in comparison.rows) < 1e-9
    blocks = fl.exact_fisher(case.model, nn.CrossEntropyLoss(), data, fisher=fisher)
    found = fl.estimate(fl.Exact(), case.model, nn.CrossEntropyLoss(), data, fisher=fisher)
    for layer in found:
        if tuple(found[layer].shape) == tuple(blocks[layer].shape):
            close(found[layer].dense(), blocks[layer].dense(), 1e-9, layer)


def test_batches_of_a_loader(transformers: Any) -> None:
    """Several mappings in a list or a DataLoader give what one gives."""
    case = bert(transformers)
    rows = [{**{k: v[n] for k, v in case.inputs.items()}, "labels": case.y[n]} for n in range(N)]
    loader = torch.utils.data.DataLoader(rows, batch_size=3)
    whole = {**case.inputs, "labels": case.y}
    one = fl.estimate(fl.KFAC(), case.model, nn.CrossEntropyLoss(), whole)
    several = fl.estimate(fl.KFAC(), case.model, nn.CrossEntropyLoss(), loader)
    for layer in one:
        close(several[layer].dense(), one[layer].dense(), 1e-9, layer)


def test_an_optimizer_trains_one(transformers: Any) -> None:
    """Outputs that are objects, and inputs by name, inside observing()."""
    case = bert(transformers)
    model = case.model.float()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    opt = fl.optim.KFAC(model, nn.CrossEntropyLoss(), 0.1, layers=linear, damping=0.1)
    losses = []
    for _ in range(5):
        with opt.observing():
            z = model(**case.inputs).logits
        loss = cross_entropy(z, case.y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
