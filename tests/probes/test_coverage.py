"""What PEFT can adapt, one by one: delta is that of the effective weight, or it is refused by name.

Each model is trained a few steps under the public tracker. The reference knows nothing of factors: the layer is fed the
identity (or every token, or merged by PEFT) in float64 before training and after each step, and the difference of the
two dense matrices is decomposed.

Bound: 1e-6 σ₁. Columns are stored as float32, 6e-8 relative, and nothing else is lost.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import small_models
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, CordaConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from linchain_analysis import LinChainConfig, Tracker, load_run, method_config
from linchain_analysis.probes import Chain, find_chains

Array = NDArray[np.float64]
BOUND = 1e-6
NUM_STEPS = 3
PROJECTIONS = ["q_proj", "v_proj"]


@dataclass
class Subject:
    """A model that trains.

    Attributes:
        model: With its adapters.
        loss: Of a step.
        optimizer: AdamW over what trains where it is None.
        rebuild: Makes the same model again, where it cannot be copied.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    rebuild: Callable[[], nn.Module] | None = None

    def optimize(self) -> torch.optim.Optimizer:
        return self.optimizer or torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)


# --- the dense twin --------------------------------------------------------------------------------------------------


def effective_weights(subject: Subject) -> dict[str, Array]:
    """The effective weight of each layer whose delta is recorded, in float64."""
    if subject.rebuild is None:
        twin = copy.deepcopy(subject.model)
    else:
        twin = subject.rebuild()
        twin.load_state_dict(subject.model.state_dict())
    twin = twin.double().eval()
    chains = [chain for chain in find_chains(twin) if chain.refused is None]
    found = {}
    for chain in chains:
        alone = copy.deepcopy(chain.adapted) if subject.rebuild is None else chain.adapted
        alone.set_adapter(chain.adapter)  # of several adapters, this one
        found[chain.module] = effective_weight(alone).detach().numpy()
    return found


def effective_weight(layer: Any) -> Tensor:
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings))
    if isinstance(base, nn.MultiheadAttention):
        layer.merge()
        return base.in_proj_weight
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        layer.merge()
        return base.weight.flatten(1)
    length = base.weight.shape[0] if type(base).__name__ == "Conv1D" else base.in_features
    identity = torch.eye(length, dtype=torch.float64)
    return layer(identity) - layer(torch.zeros_like(identity))  # without the bias


# --- small models ----------------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    """Convolutions of every dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.conv3 = nn.Conv3d(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.pointwise(self.dilated(self.conv2(x)))
        return self.conv1(hidden.flatten(2)).square().mean() + self.conv3(x[:, None]).square().mean()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0].square().mean()


class Shared(nn.Module):
    """A module under two names, and another with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(self.first(x))).square().mean()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bej", x, self.weight).square().mean()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


def on_noise(model: nn.Module, *shape: int) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        output = model(torch.randn(shape, generator=torch.Generator().manual_seed(step)))
        return output.square().mean()

    return loss


def small(build: Callable[[], nn.Module], config: Any, *shape: int) -> Subject:
    torch.manual_seed(0)
    model = get_peft_model(build(), config)
    return Subject(model, on_noise(model, *shape))


CONVOLUTIONS = ["conv1", "conv2", "pointwise", "conv3"]


def pictures(config: Any) -> Subject:
    return small(Pictures, config, 2, 3, 6, 6)


def llama(config: Any, **changes: Any) -> Subject:
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama(num_hidden_layers=1, **changes), config)
    return Subject(model, language(model))


def language(model: nn.Module) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        return model(**small_models.batch("llama", seed=step)).loss

    return loss


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options})


# --- what is measured ------------------------------------------------------------------------------------------------


def eva() -> Subject:
    subject = llama(lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)))
    batches = [small_models.batch("llama", seed=seed, size=8) for seed in range(4)]
    peft.initialize_lora_eva_weights(subject.model, batches, show_progress_bar=False)
    return subject


def lora_ga() -> Subject:
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=1)
    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.tuners.lora.preprocess_loraga(base, config, lambda: language(base)(7).backward())
    model = get_peft_model(base, config)
    return Subject(model, language(model))


def corda() -> Subject:
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=1)
    config = lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))

    def run() -> None:
        with torch.no_grad():
            for seed in range(8):
                base(**small_models.batch("llama", seed=seed, size=1))

    preprocess_corda(base, config, run_model=run)
    model = get_peft_model(base, config)
    return Subject(model, language(model))


def loraplus() -> Subject:
    subject = llama(lora())
    subject.optimizer = create_loraplus_optimizer(subject.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    return subject


def lorafa() -> Subject:
    subject = llama(lora())
    subject.optimizer = create_lorafa_optimizer(subject.model, r=4, lora_alpha=8, lr=1e-2)
    return subject


def two_adapters() -> Subject:
    torch.manual_seed(0)
    model = get_peft_model(small_models.llama(num_hidden_layers=1), lora(), adapter_name="first")
    model.add_adapter("second", lora(r=2, init_lora_weights="orthogonal"))
    model.base_model.set_adapter(["first", "second"])
    return Subject(model, language(model))


def two_models_of_adapters() -> Subject:
    """A model that was adapted twice."""
    torch.manual_seed(0)
    inner = get_peft_model(small_models.llama(num_hidden_layers=1), lora())
    model = get_peft_model(inner, lora(target_modules=["k_proj"]))
    return Subject(model, language(model))


def tied_adapters(config: Callable[..., Any]) -> Subject:
    """The factors of the head are those of the embedding, in the same memory."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
        return get_peft_model(small_models.llama(num_hidden_layers=1, tie_word_embeddings=True), config(**options))

    model = build()
    return Subject(model, language(model), rebuild=build)


def continued() -> Subject:
    """An adapter whose product is not zero when tracking begins, and whose scale was changed."""
    subject = llama(lora(init_lora_weights=False))
    for chain in find_chains(subject.model):
        chain.adapted.scale_layer(0.5)
    return subject


def bf16() -> Subject:
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=1).to(torch.bfloat16)
    model = get_peft_model(base, method_config("linchain-3-4", PROJECTIONS), autocast_adapter_dtype=False)
    return Subject(model, language(model))


def gpt2(config: Any) -> Subject:
    torch.manual_seed(0)
    model = get_peft_model(small_models.gpt2(), config)
    return Subject(model, lambda step: model(**small_models.batch("gpt2", seed=step)).loss)


MEASURED: dict[str, Callable[[], Subject]] = {
    "lora": lambda: llama(lora()),
    "lora on everything": lambda: llama(lora(target_modules="all-linear")),
    "rslora": lambda: llama(lora(use_rslora=True)),
    "gaussian": lambda: llama(lora(init_lora_weights="gaussian")),
    "pissa": lambda: llama(lora(init_lora_weights="pissa")),
    "pissa_niter": lambda: llama(lora(init_lora_weights="pissa_niter_4")),
    "olora": lambda: llama(lora(init_lora_weights="olora")),
    "orthogonal": lambda: llama(lora(init_lora_weights="orthogonal")),
    "mica": lambda: llama(lora(init_lora_weights="mica")),
    "mica on an embedding": lambda: llama(lora(init_lora_weights="mica", target_modules=["embed_tokens"])),
    "eva": eva,
    "lora_ga": lora_ga,
    "corda": corda,
    "velora": lambda: llama(lora(velora_config=VeloraConfig(num_groups=4))),
    "qalora without a quantised layer": lambda: llama(lora(use_qalora=True, qalora_group_size=4)),
    "lora+": loraplus,
    "lora-fa": lorafa,
    "bias of the base": lambda: llama(lora(bias="lora_only"), attention_bias=True),
    "every bias": lambda: llama(lora(bias="all"), attention_bias=True),
    "lora_bias": lambda: llama(lora(lora_bias=True), attention_bias=True),
    "dropout": lambda: llama(lora(lora_dropout=0.2)),
    "patterns": lambda: llama(lora(rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3})),
    "embedding": lambda: llama(lora(target_modules=["embed_tokens", "q_proj"])),
    "both ends of tied weights": lambda: llama(
        lora(target_modules=["embed_tokens", "lm_head"]), tie_word_embeddings=True
    ),
    "tied adapters": lambda: tied_adapters(LoraConfig),
    "tied chains": lambda: tied_adapters(LinChainConfig),
    "layer_replication": lambda: llama(lora(layer_replication=[(0, 1), (0, 1)])),
    "modules_to_save": lambda: llama(lora(modules_to_save=["lm_head"])),
    "tokens beside": lambda: llama(lora(trainable_token_indices=[3, 4])),
    "target_parameters": lambda: llama(lora(target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"])),
    "chain on target_parameters": lambda: llama(
        LinChainConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"])
    ),
    "two adapters on a layer": two_adapters,
    "adapted twice": two_models_of_adapters,
    "continued": continued,
    "bf16": bf16,
    "gpt2": lambda: gpt2(lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "chain on gpt2": lambda: gpt2(method_config("linchain-3-4", ["c_attn", "c_fc"], fan_in_fan_out=True)),
    "convolutions": lambda: pictures(lora(target_modules=[*CONVOLUTIONS, "dilated"])),
    "chain on convolutions": lambda: pictures(LinChainConfig(r=4, target_modules=CONVOLUTIONS)),
    "input projection of attention": lambda: small(Attention, lora(target_modules=["attn"]), 3, 5, 16),
    "shared modules": lambda: small(Shared, lora(target_modules=["first", "again", "tied"]), 5, 12),
    "moslora": lambda: llama(method_config("moslora-4", PROJECTIONS)),
    "linchain-0": lambda: llama(method_config("linchain-0-4", PROJECTIONS)),
    "linchain-3": lambda: llama(method_config("linchain-3-4", "all-linear")),
    "linchain-2-8": lambda: llama(method_config("linchain-2-8", PROJECTIONS)),
    "linchain orthogonal": lambda: llama(method_config("linchain-3-4-orthogonal", PROJECTIONS)),
    "linchain rslora": lambda: llama(method_config("linchain-3-4", PROJECTIONS, use_rslora=True)),
}
PRESETS = ["full", "standard"]


@pytest.fixture(scope="module")
def worst() -> Iterator[dict[str, float]]:
    found: dict[str, float] = {}
    yield found
    top = sorted(found, key=found.__getitem__)[-3:]
    print("\nlargest errors of delta / σ₁: " + ", ".join(f"{found[name]:.1e} ({name})" for name in top[::-1]))


@pytest.mark.parametrize("name", MEASURED)
def test_delta_is_the_change_of_the_effective_weight(tmp_path: Path, worst: dict[str, float], name: str) -> None:
    subject = MEASURED[name]()
    optimizer = subject.optimize()
    preset = PRESETS[list(MEASURED).index(name) % 2]
    weights = [effective_weights(subject)]
    with Tracker(subject.model, optimizer, tmp_path / "run", preset=preset, strict=True):
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            subject.loss(step).backward()
            optimizer.step()
            weights.append(effective_weights(subject))
    assert weights[0]
    run = load_run(tmp_path / "run")
    measured = [record for record in run.manifest.modules if record.refused is None]
    assert {record.module for record in measured} == set(weights[0])
    modules = run.modules.set_index(["step", "module"])
    for record in measured:
        for step in range(1, NUM_STEPS + 1):
            row = modules.loc[(step, record.module)]
            delta = weights[step][record.module] - weights[0][record.module]
            update = weights[step][record.module] - weights[step - 1][record.module]
            expected = np.linalg.svd(delta, compute_uv=False)
            sigma = np.zeros(max(len(expected), len(row["spectrum"])))
            sigma[: len(row["spectrum"])] = row["spectrum"]
            assert np.isfinite(sigma).all()
            assert expected[0] > 1e-5
            error = float(np.abs(sigma[: len(expected)] - expected).max() / expected[0])
            worst[name] = max(error, worst.get(name, 0.0))
            assert error <= BOUND, (record.module, step)
            assert row["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=BOUND)
            # The reference subtracts products; updates here are above 1e-2 of delta.
            assert row["delta_update_norm"] == pytest.approx(np.linalg.norm(update), rel=1e-5)


@pytest.mark.parametrize("name", ["lora", "linchain-3", "pissa", "convolutions", "embedding"])
def test_norms_alone_are_those_of_the_effective_weight(tmp_path: Path, name: str) -> None:
    subject = MEASURED[name]()
    optimizer = subject.optimize()
    start = effective_weights(subject)
    with Tracker(subject.model, optimizer, tmp_path / "run", preset="light", strict=True):
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            subject.loss(step).backward()
            before = effective_weights(subject)
            optimizer.step()
    modules = load_run(tmp_path / "run").modules
    for module, weight in effective_weights(subject).items():
        row = modules[(modules["module"] == module) & (modules["step"] == NUM_STEPS)].iloc[0]
        # `light` multiplies columns of length 1 in float32.
        assert row["delta_norm"] == pytest.approx(np.linalg.norm(weight - start[module]), rel=1e-5)
        assert row["delta_update_norm"] == pytest.approx(np.linalg.norm(weight - before[module]), rel=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def train_base() -> Subject:
    subject = llama(lora())
    subject.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.requires_grad_(True)
    return subject


def save_experts(folder: Path) -> list[str]:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = get_peft_model(small_models.llama(num_hidden_layers=1), lora(init_lora_weights=False))
        paths.append(str(folder / str(seed)))
        model.save_pretrained(paths[-1])
    return paths


def arrow(folder: Path) -> Subject:
    """Experts that train under a router."""
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=1)
    model = create_arrow_model(base, save_experts(folder), ArrowConfig(top_k=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "task_" in name)
    return Subject(model, language(model))


def xlora(folder: Path) -> Subject:
    adapters = {str(i): path for i, path in enumerate(save_experts(folder))}
    base = small_models.llama(num_hidden_layers=1, use_cache=False)
    options = {"hidden_size": 32, "xlora_depth": 1, "adapters": adapters, "use_trainable_adapters": True}
    model = get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", **options))
    return Subject(model, language(model))


def adapted_head_with_trained_tokens() -> Subject:
    """The head is tied to an embedding of which some rows train."""
    config = lora(target_modules=["lm_head"], trainable_token_indices=[3, 4])
    return llama(config, tie_word_embeddings=True)


def mixed() -> Subject:
    torch.manual_seed(0)
    model = peft.PeftMixedModel(small_models.llama(num_hidden_layers=1), lora(), "a")
    model.add_adapter("b", peft.LoHaConfig(target_modules=["q_proj"], r=2))
    model.set_adapter(["a", "b"])
    return Subject(model, language(model))


def other(config: Any, **options: Any) -> Callable[[Path], Subject]:
    return lambda _: small(two_layers, config(target_modules=["0", "2"], **options), 4, 32)


# Per case: what makes the model, and a word of the reason.
REFUSED: dict[str, tuple[Callable[[Path], Subject], str]] = {
    "dora": (lambda _: llama(lora(use_dora=True)), "DoRA"),
    "dora on convolutions": (lambda _: pictures(lora(target_modules=["conv2"], use_dora=True)), "DoRA"),
    "dora on an embedding": (lambda _: llama(lora(target_modules=["embed_tokens"], use_dora=True)), "DoRA"),
    "kasa": (lambda _: llama(lora(kasa_config=KasaConfig())), "Kasa"),
    "monteclora": (lambda _: llama(lora(monteclora_config=MontecloraConfig())), "Monteclora"),
    "alora": (lambda _: llama(lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5])), "ALora"),
    "bdlora": (
        lambda _: llama(
            lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2))
        ),
        "BdLora",
    ),
    "arrow": (arrow, "Arrow"),
    "xlora": (xlora, "X-LoRA"),
    "base trains": (lambda _: train_base(), "base weight trains"),
    "head tied to trained tokens": (lambda _: adapted_head_with_trained_tokens(), "base weight trains"),
    "groups": (
        lambda _: small(lambda: nn.Sequential(nn.Conv1d(8, 8, 3, groups=4)), lora(target_modules=["0"]), 2, 8, 6),
        "4 groups",
    ),
    "experts": (
        lambda _: small(
            lambda: nn.Sequential(Experts()), lora(target_modules=[], target_parameters=["0.weight"]), 4, 8
        ),
        "3 experts",
    ),
    "output projection of attention": (lambda _: small(Attention, lora(target_modules=["attn"]), 3, 5, 16), "twice"),
    "mixed": (lambda _: mixed(), "peft.tuners.loha"),
    "adalora": (other(peft.AdaLoraConfig, total_step=10), "peft.tuners.adalora"),
    "beft": (other(peft.BeftConfig), "peft.tuners.beft"),
    "boft": (other(peft.BOFTConfig, boft_block_size=4), "peft.tuners.boft"),
    "c3a": (other(peft.C3AConfig, block_size=16), "peft.tuners.c3a"),
    "deft": (other(peft.DeftConfig), "peft.tuners.deft"),
    "delora": (other(peft.DeloraConfig), "peft.tuners.delora"),
    "fourierft": (other(peft.FourierFTConfig, n_frequency=20), "peft.tuners.fourierft"),
    "frod": (other(peft.FrodConfig), "peft.tuners.frod"),
    "glora": (other(peft.GloraConfig), "peft.tuners.glora"),
    "gralora": (other(peft.GraloraConfig, r=4), "peft.tuners.gralora"),
    "hira": (other(peft.HiraConfig, r=4), "peft.tuners.hira"),
    "hra": (other(peft.HRAConfig), "peft.tuners.hra"),
    "ia3": (other(peft.IA3Config, feedforward_modules=[]), "peft.tuners.ia3"),
    "lily": (other(peft.LilyConfig), "peft.tuners.lily"),
    "ln_tuning": (other(peft.LNTuningConfig), "peft.tuners.ln_tuning"),
    "loha": (other(peft.LoHaConfig), "peft.tuners.loha"),
    "lokr": (other(peft.LoKrConfig), "peft.tuners.lokr"),
    "miss": (other(peft.MissConfig, r=4), "peft.tuners.miss"),
    "oft": (other(peft.OFTConfig, oft_block_size=4, r=0), "peft.tuners.oft"),
    "osf": (other(peft.OSFConfig), "peft.tuners.osf"),
    "peanut": (other(peft.PeanutConfig), "peft.tuners.peanut"),
    "psoft": (other(peft.PsoftConfig, r=4), "peft.tuners.psoft"),
    "pvera": (other(peft.PveraConfig, r=4), "peft.tuners.pvera"),
    "randlora": (other(peft.RandLoraConfig), "peft.tuners.randlora"),
    "road": (other(peft.RoadConfig, group_size=4), "peft.tuners.road"),
    "shira": (other(peft.ShiraConfig, r=2), "peft.tuners.shira"),
    "supertuning": (other(peft.SupertuningConfig), "peft.tuners.supertuning"),
    "tinylora": (other(peft.TinyLoraConfig), "peft.tuners.tinylora"),
    "trainable_tokens": (
        lambda _: llama(peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 4, 5])),
        "peft.tuners.trainable_tokens",
    ),
    "unilora": (other(peft.UniLoraConfig), "peft.tuners.unilora"),
    "vblora": (other(peft.VBLoRAConfig, vector_length=4, num_vectors=8), "peft.tuners.vblora"),
    "vera": (other(peft.VeraConfig, r=4), "peft.tuners.vera"),
    "waveft": (other(peft.WaveFTConfig, n_frequency=20), "peft.tuners.waveft"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    build, word = REFUSED[name]
    subject = build(tmp_path)
    optimizer = subject.optimize()
    chains = find_chains(subject.model, optimizer)
    assert_whole(subject.model, chains)
    before = {id(f.parameter): f.parameter.detach().clone() for chain in chains for f in chain.factors}
    preset = PRESETS[list(REFUSED).index(name) % 2]
    with (
        caplog.at_level(logging.WARNING),
        Tracker(subject.model, optimizer, tmp_path / "run", preset=preset, strict=True),
    ):
        optimizer.zero_grad()
        subject.loss(0).backward()
        gradients = {key: g.grad.clone() for key, g in by_identity(chains).items() if g.grad is not None}
        optimizer.step()
    run = load_run(tmp_path / "run")
    refused = [record for record in run.manifest.modules if record.refused is not None and word in record.refused]
    assert refused
    assert f"is not recorded: {refused[0].refused}" in caplog.text
    modules = run.modules.set_index("module")
    factors = run.factors.set_index(["module", "factor"])
    moved = 0.0
    for record in refused:
        assert modules.loc[record.module, "spectrum"] is None
        assert np.isnan(modules.loc[record.module, "delta_norm"])
        assert np.isnan(modules.loc[record.module, "delta_update_norm"])
        chain = next(chain for chain in chains if chain.module == record.module)
        for factor in chain.factors:
            row = factors.loc[(record.module, factor.name)]
            change = (factor.parameter.detach() - before[id(factor.parameter)]).double().norm().item()
            gradient = gradients.get(id(factor.parameter))
            assert row["update_norm"] == pytest.approx(change, rel=1e-6, abs=1e-12)
            if gradient is None:
                assert np.isnan(row["grad_norm"])
            else:
                assert row["grad_norm"] == pytest.approx(gradient.double().norm().item(), rel=1e-6, abs=1e-12)
            moved += change
    assert moved > 0


def by_identity(chains: list[Chain]) -> dict[int, nn.Parameter]:
    return {id(factor.parameter): factor.parameter for chain in chains for factor in chain.factors}


def assert_whole(model: nn.Module, chains: list[Chain]) -> None:
    """Every parameter that an adapted layer trains is read."""
    known = by_identity(chains)
    for name, parameter in model.named_parameters():
        beside = name.endswith(".bias") or "base_layer" in name or "xlora_classifier" in name
        if parameter.requires_grad and not beside:
            assert id(parameter) in known, name


def test_adapters_that_are_no_layers_leave_the_table_of_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subject = llama(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    optimizer = subject.optimize()
    with Tracker(subject.model, optimizer, tmp_path / "run", strict=True):
        subject.loss(0).backward()
        optimizer.step()
    assert "found none; only the table `steps` is recorded" in caplog.text
    run = load_run(tmp_path / "run")
    assert len(run.steps) == 1
    assert len(run.modules) == 0


def test_a_base_weight_that_trains_later_makes_delta_undefined(tmp_path: Path) -> None:
    """What is refused at the start is not found out in between: from then on delta is NaN."""
    subject = llama(lora())
    optimizer = subject.optimize()
    with Tracker(subject.model, optimizer, tmp_path / "run", strict=True):
        for step in range(2):
            optimizer.zero_grad()
            subject.loss(step).backward()
            optimizer.step()
            subject.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.requires_grad_(True)
    modules = load_run(tmp_path / "run").modules.set_index(["step", "module"])
    name = "model.layers.0.self_attn"
    assert modules.loc[(1, f"{name}.q_proj"), "delta_norm"] > 0
    assert np.isnan(modules.loc[(2, f"{name}.q_proj"), "delta_norm"])
    assert modules.loc[(2, f"{name}.v_proj"), "delta_norm"] > 0


def test_a_scale_that_changes_is_part_of_the_change(tmp_path: Path) -> None:
    """Delta is s(t) · product(t) − s(0) · product(0)."""
    subject = llama(lora(init_lora_weights="pissa"))
    optimizer = subject.optimize()
    start = effective_weights(subject)
    with Tracker(subject.model, optimizer, tmp_path / "run", strict=True):
        for step in range(2):
            optimizer.zero_grad()
            subject.loss(step).backward()
            optimizer.step()
            if step == 0:
                for chain in find_chains(subject.model):
                    chain.adapted.scale_layer(0.9)
    modules = load_run(tmp_path / "run").modules.set_index(["step", "module"])
    for name, weight in effective_weights(subject).items():
        expected = np.linalg.svd(weight - start[name], compute_uv=False)
        sigma = modules.loc[(2, name), "spectrum"]
        np.testing.assert_allclose(sigma, expected[: len(sigma)], rtol=0, atol=BOUND * expected[0])


def test_the_layers_of_attention_change_by_twice_the_product() -> None:
    """Why `nn.MultiheadAttention.out_proj` is refused; once PEFT mends this, the refusal can go."""
    torch.manual_seed(0)
    plain = Attention().attn
    weight, x = plain.out_proj.weight.detach().clone(), torch.randn(3, 5, 16)
    subject = small(Attention, lora(target_modules=["attn"], init_lora_weights=False), 3, 5, 16)
    layer = subject.model.base_model.model.attn
    inside = layer.base_layer.out_proj
    weight = inside.get_base_layer().weight.detach().clone()
    with torch.no_grad():
        output = layer(x, x, x)[0]
        plain.in_proj_weight.copy_(layer.in_proj_weight + layer.get_delta_weight("default"))
        plain.in_proj_bias.copy_(layer.in_proj_bias)
        plain.out_proj.bias.copy_(inside.get_base_layer().bias)
        for times in (1, 2):
            plain.out_proj.weight.copy_(weight + times * inside.get_delta_weight("default"))
            same = torch.allclose(plain(x, x, x)[0], output, atol=1e-5)
            assert same == (times == 2)


# --- the options of PEFT's configuration -----------------------------------------------------------------------------

# Every option of LoraConfig: the case above that tries it, or why it needs none.
OPTIONS = {
    "alora_invocation_tokens": "alora",
    "alpha_pattern": "patterns",
    "arrow_config": "arrow",
    "bias": "every bias",
    "corda_config": "corda",
    "ensure_weight_tying": "tied adapters",
    "eva_config": "eva",
    "fan_in_fan_out": "gpt2",
    "init_lora_weights": "pissa",
    "kasa_config": "kasa",
    "layer_replication": "layer_replication",
    "lora_alpha": "lora",
    "lora_bias": "lora_bias",
    "lora_dropout": "dropout",
    "lora_ga_config": "lora_ga",
    "modules_to_save": "modules_to_save",
    "monteclora_config": "monteclora",
    "qalora_group_size": "qalora without a quantised layer",
    "r": "lora",
    "rank_pattern": "patterns",
    "target_modules": "lora",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "head tied to trained tokens",
    "use_bdlora": "bdlora",
    "use_dora": "dora",
    "use_qalora": "qalora without a quantised layer",
    "use_rslora": "rslora",
    "velora_config": "velora",
    # which modules are adapted
    "exclude_modules": "",
    "layers_pattern": "",
    "layers_to_transform": "",
    # where and how, or only for the record
    "auto_mapping": "",
    "base_model_name_or_path": "",
    "inference_mode": "",
    "peft_type": "",
    "peft_version": "",
    "revision": "",
    "runtime_config": "",
    "task_type": "",
    # needs bitsandbytes: starts like pissa
    "loftq_config": "",
    # needs Megatron: refused by the class of its layer
    "megatron_config": "",
    "megatron_core": "",
}


def test_every_option_of_lora_has_been_looked_at() -> None:
    """A new option of PEFT is a new way to be silently wrong: try it above, then enter it."""
    assert {option.name for option in dataclasses.fields(LoraConfig)} == set(OPTIONS)
    assert {case for case in OPTIONS.values() if case} <= {*MEASURED, *REFUSED}


def test_tensor_parallel_layers_are_refused() -> None:
    subject = llama(lora())
    assert isinstance(subject.model, PeftModel)
    subject.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer._hf_tp_plan = "colwise"
    reasons = {chain.kind: chain.refused for chain in find_chains(subject.model)}
    assert reasons["v_proj"] is None
    assert "tensor parallelism" in str(reasons["q_proj"])
