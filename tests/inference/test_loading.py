"""A loaded checkpoint says what its decoded weights say, for every family there is a pico checkpoint of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import roundel
from models import pico
from models.raw import plant
from roundel.calibration.skeleton import Skeleton
from roundel.checkpoint import open_checkpoint
from roundel.data.bundled import bundled_model
from roundel.errors import BackendError, PlanError, RecipeError, SourceError
from roundel.inference.linear import QuantLinear

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIGS: dict[str, dict[str, Any]] = {"gpt_oss": {"quantization_config": None}}


def made(model_type: str, folder: Path, **wishes: Any) -> Path:
    """A rounded pico checkpoint."""
    source = pico.build(model_type, folder / "source", **CONFIGS.get(model_type, {}))
    roundel.quantize(source, folder / "out", workers=1, **({"scheme": "W4A16G32"} | wishes))
    return folder / "out"


def said(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def expected(folder: Path, ids: Tensor = IDS) -> Tensor:
    """Logits of the decoded weights: the skeleton, which equals what transformers loads, given them."""
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint.source.config, checkpoint.family, checkpoint.tensor_names)
    pieces = (*skeleton.blocks, skeleton.tail)
    names = {*skeleton.entry_tensors, *(name for piece in pieces for name in piece.tensors)}
    weights = {name: checkpoint.tensor(name).float() for name in names}
    checkpoint.close()
    with torch.no_grad():
        x = skeleton.enter(ids, weights)
        for piece in pieces:
            x = piece.forward(x, weights)
    return x


def near(found: Tensor, wanted: Tensor, share: float = 1e-5) -> bool:
    return bool((found - wanted).abs().max() < share * wanted.abs().max())


FEW = 5e-4  # what few inputs, rounded to 16 bits layer after layer, may change the logits by


def packed_layers(model: Any) -> dict[str, QuantLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("model_type", [t for t in pico.PICO_TYPES if t != "gpt2"])
def test_every_family(model_type: str, tmp_path: Path) -> None:
    folder = made(model_type, tmp_path)
    model = roundel.load(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    inside = {n for n in checkpoint.layers if ".mtp" not in n and not n.startswith(("mtp", "model.layers.2."))}
    assert set(packed_layers(model)) == inside
    assert not any(p.is_meta for p in model.parameters())
    assert near(said(model), expected(folder), FEW)
    one = IDS[:1, :1]  # few enough inputs for the kernels that multiply packed words
    assert near(said(model, one), expected(folder, one), FEW)
    assert near(said(roundel.load(folder, backend="torch")), expected(folder))


@pytest.mark.parametrize(
    ("scheme", "format_"),
    [
        *((f"W{bits}A16G32{kind}", "auto_round") for bits in range(2, 9) for kind in ("", "_ASYM")),
        *((f"W{bits}A16G32{kind}", "auto_gptq") for bits in (2, 3, 4, 8) for kind in ("", "_ASYM")),
        *((f"W4A16G32{kind}", "auto_awq") for kind in ("", "_ASYM")),
        *((scheme, format_) for scheme in ("MXFP4", "MXFP8") for format_ in ("auto_round", "llm_compressor")),
    ],
)
def test_every_scheme_and_format(scheme: str, format_: str, tmp_path: Path) -> None:
    folder = made("llama", tmp_path, scheme=scheme, format=format_)
    for ids, share in ((IDS, 1e-5), (IDS[:1, :1], FEW)):
        assert near(said(roundel.load(folder), ids), expected(folder, ids), share)


@pytest.mark.parametrize("kind", pico.FOREIGN)
def test_checkpoints_of_other_tools(kind: str, tmp_path: Path) -> None:
    pico.build_foreign(kind, tmp_path)
    model = roundel.load(tmp_path)
    assert {m.backend for m in packed_layers(model).values()} == {"torch" if kind.startswith("fp8") else "numba"}
    assert near(said(model), expected(tmp_path), FEW)


def test_it_says_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    roundel.load(made("llama", tmp_path), tick=lambda *at: told.append(at))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0 and 0.5 < shares[-1] <= 1
    assert "model.layers.1.mlp.up_proj.weight" in {name for _, name in told}


def test_a_float_checkpoint_is_loaded_too(tmp_path: Path) -> None:
    folder = pico.build("qwen2", tmp_path)
    model = roundel.load(folder)
    assert not packed_layers(model)
    assert near(said(model), expected(folder))


def test_backends_agree(tmp_path: Path) -> None:
    folder = made("qwen2", tmp_path, scheme="W3A16G32_ASYM")
    logits = {}
    for backend in ("torch", "numba"):
        model = roundel.load(folder, backend=backend)
        assert {m.backend for m in packed_layers(model).values()} == {backend}
        logits[backend] = said(model, IDS[:1, :3])
    assert near(logits["numba"], logits["torch"], FEW)


def test_mixed_widths_and_a_rounded_head(tmp_path: Path) -> None:
    mix = {"down_proj": {"bits": 8}, "k_proj": {"bits": 5}, "q_proj": {"bits": 16}}
    folder = made("gemma2", tmp_path, layer_config=mix, quant_lm_head=True)
    model = roundel.load(folder)
    layers = packed_layers(model)
    assert "lm_head" in layers and not any("q_proj" in name for name in layers)
    assert {m.backend for n, m in layers.items() if "k_proj" in n} == {"numba"}
    assert near(said(model), expected(folder), FEW)


def test_kept_matrices_stay_as_narrow_as_they_are_stored(tmp_path: Path) -> None:
    model = roundel.load(made("gemma2", tmp_path))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.dtype == torch.bfloat16 and head.weight is embedding.weight
    assert said(model).dtype == torch.float32


def test_activations_of_another_dtype(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    model = roundel.load(folder, dtype=torch.bfloat16)
    logits = said(model)
    wanted = expected(folder)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_it_generates(tmp_path: Path) -> None:
    roundel.quantize(bundled_model(), tmp_path, workers=1)
    model = roundel.load(tmp_path)
    found = model.generate(IDS[:1], max_new_tokens=8, do_sample=False)
    ids = IDS[:1]
    for _ in range(8):  # the same without a cache
        ids = torch.cat([ids, said(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=-1)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradients_are_those_of_decoded_weights(backend: str | None, tmp_path: Path) -> None:
    """Through rounded layers and a kept head, for a prompt and for few tokens."""
    folder = made("llama", tmp_path)
    model, rounded = roundel.load(folder, backend=backend), open_checkpoint(folder)
    decoded = AutoModelForCausalLM.from_config(model.config)
    decoded.load_state_dict({name: rounded.tensor(name).float() for name in rounded.tensor_names}, strict=False)
    rounded.close()
    for ids in (IDS, IDS[:1, :4]):
        found, wanted = (
            decoded.get_input_embeddings()(ids).detach().requires_grad_(),
            decoded.get_input_embeddings()(ids).detach().requires_grad_(),
        )
        model(inputs_embeds=found, labels=ids).loss.backward()
        decoded(inputs_embeds=wanted, labels=ids).loss.backward()
        assert found.grad is not None and wanted.grad is not None
        assert near(found.grad, wanted.grad, 1e-5 if backend else 10 * FEW)


def test_it_stays_where_it_was_loaded(tmp_path: Path) -> None:
    model = roundel.load(made("llama", tmp_path))
    assert model.to("cpu") is model
    with pytest.raises(BackendError, match="loaded for cpu and cannot be moved to meta"):
        model.to("meta")
    with pytest.raises(BackendError, match="loaded for cpu by backend numba and cannot be moved to meta"):
        model.model.layers[0].mlp.down_proj.to("meta")
    assert said(model, IDS[:1]).isfinite().all()  # nothing of it has moved


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    with pytest.raises(RecipeError, match="none that torch knows"):
        roundel.load(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="torch sees no such device"):
            roundel.load(folder, device="cuda")


def test_a_backend_that_cannot(tmp_path: Path) -> None:
    folder = made("llama", tmp_path, scheme="MXFP8")
    with pytest.raises(BackendError, match=r"layers\.0.* numba: it multiplies integers and E2M1 in groups"):
        roundel.load(folder, backend="numba")


def test_too_little_memory_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("llama", tmp_path)
    monkeypatch.setattr("roundel.inference.room.free_memory", lambda device="cpu": 1000)
    with pytest.raises(BackendError, match=r"out needs .* GB on cpu and 0\.0 GB are free"):
        roundel.load(folder)


def test_a_config_that_does_not_fit_the_tensors(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(SourceError, match=r"config\.json describes a model in which it is"):
        roundel.load(folder)
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SourceError, match=r"has no tensor for transformers' model\.layers\.2"):
        roundel.load(folder)
    path.write_text(json.dumps(config | {"model_type": "unheard"}))
    with pytest.raises(PlanError, match="does not know the model type 'unheard'"):
        roundel.load(folder)


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    plant(folder, "model.layers.1.mlp.up_proj.scales", 3, float("nan"), "float16")
    with pytest.raises(SourceError, match="up_proj: a stored scale is not finite"):
        roundel.load(folder)


def test_kept_matrices_lie_in_their_file(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint = open_checkpoint(folder)
    wanted = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}
    found = {name: checkpoint.mapped(name) for name in checkpoint.tensor_names}
    checkpoint.close()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    embedding = found["model.embed_tokens.weight"]
    embedding.add_(1)  # which is nobody else's business
    assert torch.equal(embedding, wanted["model.embed_tokens.weight"] + 1)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
