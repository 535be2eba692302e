"""Every number on one GPU, on two and in half precision, against the CPU in the same dtype."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from accelerate import dispatch_model
import numpy as np
import pytest
import torch
from torch import nn

import fisher
from residual_fisher.common.program import UserError
from residual_fisher.model import loading, points
from residual_fisher.model.passes import Chunks, hooked, use_attention
from residual_fisher.pipeline import batches
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
import scripts
from test_fisher import K, directions
from test_full_vocabulary import APART, FLAT, HostWaits, wide
import tiny

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(GPUS == 0, reason="no GPU here")]
needs_two = pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs here")

# Relative to the largest number. A GPU sums in another order than a CPU: what differs is the rounding of a
# three-layer network, in bfloat16 of 8 bits a number. From float64 what is left is that of the float32 results: F is a
# sum of K = 20 products, each device's off by up to (K + 3) / 2 units of 1.2e-7 (1.6e-6 was seen on an H100).
RELATIVE = {torch.float64: 3e-6, torch.float32: 3e-5, torch.bfloat16: 0.2, torch.float16: 0.2}
PLACES = [pytest.param(1, id="one GPU"), pytest.param(2, id="two GPUs", marks=needs_two)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_gpus(model: nn.Module, gpus: int) -> nn.Module:
    return model.to("cuda:0") if gpus == 1 else dispatch_model(model, after_layer_1(model))


def after_layer_1(model: nn.Module) -> dict[str, int]:
    """A device map: what runs before the last layer on the first GPU, that layer and the rest on the second."""
    layers = loading.decoder_layers(model)
    others = [path for path, m in model.named_modules() if not any(m.children()) and not path.startswith((*layers,))]
    called = []
    hooks = [
        (model.get_submodule(path).register_forward_pre_hook, lambda *_, path=path: called.append(path))
        for path in [*layers, *others]
    ]
    with torch.no_grad(), hooked(*hooks):
        model(tiny.prompt()[None])
    late = set(called[called.index(list(layers)[-1]) :])
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        late -= {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    return {path: int(path in late) for path in [*layers, *others]}


def of_one_prompt(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every function of fisher.py makes of a prompt's last token."""
    point = fisher.linearize(model, tiny.prompt())
    device = point.log_probs.device
    tokens = torch.arange(K, device=device)
    top, full, u = fisher.top_k(point, K), fisher.full_vocabulary(point), directions(tiny.DEPTH, 4).to(device)
    logits = fisher.perturb(point, directions(7, seed=2).to(device), torch.tensor([0, 0, 0, 1, 2, 2, 2]))
    return {
        "activations": point.activations,
        "log-probabilities": point.log_probs,
        "G": fisher.pull_back(point, point.cotangents(tokens), Chunks(7)),
        "F of k tokens": top.matrix,
        "its eigenvalues": top.eigenpairs(3).values,
        # itself, it turns where two are close
        "u F u of its first eigenvector": top.curvature(top.eigenpairs().vectors),
        "F": full.matrix,
        "eigenvalues of F": full.eigenpairs(3).values,
        "J u": fisher.PushForward(point)(u, Chunks(5)),
        "u F u": fisher.full_curvature(point, u),
        "logits after a perturbation": logits,
        "KL": fisher.kl_divergence(point.log_probs, logits),
    }


def of_a_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every function that takes one makes of a batch of whole prompts."""
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[0], *tiny.prompts())
    at_last = fisher.linearize_prompts(model, tiny.layers_of(model)[0], *tiny.prompts(), last_only=True)
    top, u = fisher.top_k(point, K), directions(1, len(tiny.LENGTHS), 2).to(point.log_probs.device)
    return {
        "activations": point.activations,
        "log-probabilities": point.log_probs,
        "F of k tokens": top.matrix,
        "its eigenvalues": top.eigenpairs(3).values,
        "F at the last token": fisher.full_vocabulary(at_last).matrix,
        "u F u": fisher.full_curvature(point, u),
        "eigenvalues of F, iterated": leading_eigenpairs(point, 2).eigen.values,
    }


@cache
def on_cpu(name: str, dtype: torch.dtype) -> tuple[dict, dict]:
    return of_one_prompt(tiny.shared(name, dtype)), of_a_batch(tiny.shared(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gpus", PLACES)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_all_numbers_are_those_of_the_cpu(name, gpus, dtype):
    model = on_gpus(tiny.build(name, dtype), gpus)
    assert len({p.device for p in model.parameters()}) == gpus
    for found, expected in zip((of_one_prompt(model), of_a_batch(model)), on_cpu(name, dtype), strict=True):
        for what, value in found.items():
            assert value.device.type == "cuda", what
            off = (value.cpu() - expected[what]).abs().max()
            assert off <= room_for(what, dtype, expected), f"{what} differs by {off:.1e}"


def room_for(what: str, dtype: torch.dtype, expected: dict[str, torch.Tensor]) -> float:
    """The largest difference that rounding may cause."""
    room = RELATIVE[dtype] * float(expected[what].abs().max())
    if what != "KL" or dtype != torch.float64:
        return room
    # Log-probabilities, logits and KL are float32 whatever the model's dtype. KL is a few tenths of a nat here, and the
    # difference of two numbers as large as the largest logit, about 10: the log-sum-exp of the logits and their mean.
    # Each is rounded on the GPU and on the CPU, so four times, by the spacing of float32 there. That is 1e-5 of KL.
    largest = max(float(expected[name].abs().max()) for name in ("log-probabilities", "logits after a perturbation"))
    rounding = 4 * torch.finfo(torch.float32).eps * largest
    return min(rounding, room * RELATIVE[torch.float32] / RELATIVE[dtype])  # no more than in a float32 model


class Head(nn.Module):
    """As linear as before, which fisher.py cannot know."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("gpus", PLACES)
def test_a_head_that_is_not_linear_is_differentiated_on_gpus_too(gpus):
    model = tiny.build("llama")
    tokens = torch.arange(K)
    expected = fisher.linearize(model, tiny.prompt()).cotangents(tokens)
    model.lm_head = Head(model.lm_head.weight)
    point = fisher.linearize(on_gpus(model, gpus), tiny.prompt())
    found = point.cotangents(tokens.to(point.log_probs.device)).cpu()
    assert (found - expected).abs().max() <= RELATIVE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("gpus", PLACES)
def test_gradients_out_of_memory_continue_with_smaller_chunks(gpus):
    point = fisher.linearize(on_gpus(tiny.build("llama"), gpus), tiny.prompt())
    rows, chunks = point.cotangents(torch.arange(K, device=point.log_probs.device)), Chunks(10)
    expected, gradients = fisher.pull_back(point, rows), points.batched_gradients

    def with_little_room(model, outputs, inputs, cotangents):
        if len(cotangents[0]) > 5:
            torch.empty(1 << 50, device=outputs[0].device)
        return gradients(model, outputs, inputs, cotangents)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="going on with batches of 5"):
        patch.setattr(points, "batched_gradients", with_little_room)
        found = fisher.pull_back(point, rows, chunks)
    assert chunks.size == 5
    assert (found - expected).abs().max() <= RELATIVE[torch.float32] * expected.abs().max()


# --- arithmetic ----------------------------------------------------------------------------------


@pytest.fixture
def own_arithmetic() -> Iterator[None]:
    """The process is as before when the test ends."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("own_arithmetic")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-oss"])
def test_every_pass_has_deterministic_kernels_none_of_them_cudnns(name):
    """Fused attention in bfloat16, plain attention, and a backward pass that is differentiated."""
    model = tiny.build(name, torch.bfloat16).to("cuda:0")
    loading.fix_arithmetic(model)
    about = loading.describe(model)
    assert about["deterministic"] and about["attention_kernels"] == ["flash", "mem_efficient", "math"]
    ids, lengths = tiny.prompts()
    batch = (model, tiny.layers_of(model)[0], ids, lengths)
    leading_eigenpairs(fisher.linearize_prompts(*batch), 2)
    fisher.full_vocabulary(fisher.linearize(model, tiny.prompt())).eigenpairs(3)
    use_attention(model, "sdpa")
    points = [fisher.linearize_prompts(*batch) for _ in range(2)]
    first, second = (fisher.top_k(point, K, Chunks(1)).eigenpairs(3) for point in points)
    assert all(map(torch.equal, first, second))
    assert not any("Cudnn" in type(node).__name__ for node in graph_of(points[0].logits))


def graph_of(tensor: torch.Tensor) -> set:
    """All nodes of its backward graph."""
    nodes, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead += [before for before, _ in node.next_functions]
    return nodes


@pytest.mark.usefixtures("own_arithmetic")
def test_a_model_without_a_deterministic_kernel_goes_without_and_the_run_says_so():
    model = tiny.build("llama").to("cuda:0")
    where, value = torch.tensor([0], device="cuda:0"), torch.zeros(1, device="cuda:0")

    def put(*_) -> None:
        torch.zeros(2, device="cuda:0").put_(where, value)

    model.model.norm.register_forward_pre_hook(put)
    with pytest.warns(UserWarning, match="equal runs of LlamaForCausalLM may differ by rounding: put_ does not have"):
        loading.fix_arithmetic(model)
    assert loading.describe(model)["deterministic"] is False
    fisher.top_k(fisher.linearize(model, tiny.prompt()), K)


@pytest.mark.parametrize("fault", ["raised", "NaN", "another's vectors"])
def test_what_the_gpus_eigensolver_does_not_solve_is_solved_on_the_cpu(fault, monkeypatch):
    own, places = torch.linalg.eigh, []

    def faulty(matrix):
        places.append(matrix.device.type)
        values, vectors = own(matrix.cpu())
        if places[-1] == "cpu":
            return values, vectors
        if fault == "raised":
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        wrong = vectors * torch.nan if fault == "NaN" else vectors.flip(-2)
        return values.cuda(), wrong.cuda()

    gradients, weights = directions(3, K), torch.rand(K, generator=torch.Generator().manual_seed(0))
    expected = fisher.eigenpairs(gradients, weights, 4)
    monkeypatch.setattr(torch.linalg, "eigh", faulty)
    found = fisher.eigenpairs(gradients.cuda(), weights.cuda(), 4)
    assert places == ["cuda", "cpu"]
    assert torch.allclose(found.values.cpu(), expected.values, rtol=1e-6)  # float32 results of float64 arithmetic
    assert ((found.vectors.cpu() * expected.vectors).sum(-1) > 0.9999).all()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: own(torch.full_like(matrix.cpu(), torch.nan)))
    with pytest.raises(torch.linalg.LinAlgError):
        fisher.eigenpairs(gradients.cuda(), weights.cuda(), 4)


def test_the_solver_of_wide_matrices_never_copies_a_vector_to_the_host():
    """The host waits where residuals are looked at, whatever the number of products."""
    found, _ = wide(APART, FLAT)
    on_gpu = replace(found, matrix=found.matrix.cuda(), top_gradient=found.top_gradient.cuda())
    with scripts.calls_of(torch.Tensor, "cpu") as copies, HostWaits() as waits:
        eigen = on_gpu.eigenpairs(10)
    assert not copies and waits.count <= 40  # 180 products of each, looked at ten times
    expected = found.eigenpairs(10)
    assert torch.allclose(eigen.values.cpu(), expected.values, rtol=1e-5)
    assert ((eigen.vectors.cpu() * expected.vectors).sum(-1) > 0.9999).all()


# --- loading -------------------------------------------------------------------------------------


def spread(monkeypatch, places: tuple[int | str, ...]) -> None:
    """Makes every model one that is too large for one GPU: its layers go to `places`, all else to the first GPU."""
    load = loading.AutoModelForCausalLM.from_pretrained
    layers = {f"model.layers.{layer}": place for layer, place in enumerate(places)}
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, **layers, "model.norm": places[-1], "lm_head": places[-1]}
    monkeypatch.setattr(loading, "_exceeds_gpu", lambda *_: True)

    def from_pretrained(*words, **options):
        if options["device_map"] == "auto":
            options["device_map"] = where
        return load(*words, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_a_model_is_loaded_straight_to_its_gpu_which_becomes_the_current_one(model_directory):
    for gpu in range(GPUS)[::-1]:
        model, _ = loading.load(str(model_directory), device=f"cuda:{gpu}")
        assert {t.device for t in model.state_dict().values()} == {torch.device("cuda", gpu)}
        assert torch.cuda.current_device() == gpu
        assert model.dtype == torch.bfloat16


def test_a_model_that_would_be_offloaded_is_refused(model_directory, monkeypatch):
    spread(monkeypatch, (0, "cpu", 0))
    too_large = r"larger than the free memory of the GPUs.*a smaller dtype, more GPUs"
    with pytest.raises(UserError, match=too_large) as caught:
        loading.load(str(model_directory))
    assert "\n" not in str(caught.value)


def test_an_offloaded_head_is_not_called_nonlinear():
    model = tiny.build("llama")
    where = {"model": 0, "lm_head": "cpu"}
    point = fisher.linearize(dispatch_model(model, where, main_device=0), tiny.prompt())
    with pytest.raises(fisher.UnsupportedModelError, match="needs the output head on a device, and it is offloaded"):
        fisher.full_vocabulary(point)


# --- the scripts ---------------------------------------------------------------------------------


@pytest.fixture
def place(request, monkeypatch) -> str:
    """--device of a script that runs on one GPU; or on two, of which the model needs both."""
    if request.param == 1:
        return "cuda:0"
    spread(monkeypatch, (0, 0, 1))
    return "auto"


EXPERIMENT = [
    *("--scale-unit", "nats", "--scales", "-1", "0", "0.1", "1", "--dtype", "float32"),
    *("--compare-exact", "--trust-radius", "--continue", "4", "--steer", "--steer-steps", "3"),
]


@pytest.fixture(scope="module")
def experiment_on_cpu(model_directory, tmp_path_factory):
    output = tmp_path_factory.mktemp("cpu") / "experiment"
    assert scripts.core_experiment(model_directory, output, *EXPERIMENT) == 0
    return scripts.experiment_results(output)


@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.usefixtures("without_pictures", "own_arithmetic")
def test_the_experiment_writes_what_it_writes_on_the_cpu(place, model_directory, experiment_on_cpu, tmp_path):
    assert scripts.core_experiment(model_directory, tmp_path / "gpu", *EXPERIMENT, "--device", place) == 0
    found, expected = scripts.experiment_results(tmp_path / "gpu"), experiment_on_cpu
    assert found[0]["environment"]["deterministic"] is True
    for name in ("eigenvalues", "eigenvectors", "activations", "exact_eigenvalues"):
        if name in expected[1]:
            assert np.allclose(found[1][name], expected[1][name], rtol=1e-4, atol=1e-4)
    assert found[0]["sentences"] == expected[0]["sentences"]
    for part in ("fisher", "perturbation_results"):
        for (path, ours), (_, theirs) in zip(
            *(numbers_in(results[0][part]) for results in (found, expected)), strict=True
        ):
            room = 0.03 if "trust_radius" in path else 1e-3  # the radius is that of a section
            assert ours == pytest.approx(theirs, rel=room, abs=1e-5), path
    said = [[[e["text"] for e in entries_in(s)] for s in results[0]["continuations"]] for results in (found, expected)]
    assert said[0] == said[1]
    costs = [dict(numbers_in(results[0]["steering"])) for results in (found, expected)]
    assert len(costs[1]) > 20 and costs[0].keys() == costs[1].keys()
    for path, theirs in costs[1].items():
        assert costs[0][path] == pytest.approx(theirs, rel=0.02, abs=1e-4), path


def entries_in(continued: dict) -> Iterator[dict]:
    yield continued["none"]
    for layer in (value for key, value in continued.items() if key != "none"):
        yield from (entry for at_scale in layer.values() for entry in at_scale.values())


def numbers_in(value, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a part of the results, with its path."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(item, f"{path}/{key}")


@pytest.mark.parametrize("top_k_tokens", [6, "all"])
@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.usefixtures("without_pictures", "own_arithmetic")
def test_the_pipeline_writes_what_it_writes_on_the_cpu(place, top_k_tokens, chat_directory, dataset, tmp_path):
    options = {"num_prompts": 8, "dtype": "float32", "top_k_tokens": top_k_tokens}
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "gpu", **options, device=place) == 0
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "cpu", **options) == 0
    found, expected = scripts.arrays(tmp_path / "gpu"), scripts.arrays(tmp_path / "cpu")
    assert list(found) == list(expected)
    for i in range(8):
        products = [(a[f"U_{i}"] * a[f"S_{i}"]) @ a[f"V_{i}"] for a in (found, expected)]
        assert np.abs(found[f"S_{i}"] - expected[f"S_{i}"]).max() <= 1e-4 * expected[f"S_{i}"].max()
        assert np.abs(products[0] - products[1]).max() <= 1e-3 * np.abs(products[1]).max()
    tokens = [[record["top_token"] for record in scripts.records(tmp_path / place)] for place in ("gpu", "cpu")]
    assert tokens[0] == tokens[1]


@pytest.mark.usefixtures("without_pictures", "own_arithmetic")
def test_batches_are_sized_from_free_memory(chat_directory, dataset, tmp_path, monkeypatch, capsys):
    """If none is free, no pass takes more tokens than one that has fitted, and none fails."""
    options = {"dtype": "float32", "num_prompts": 16, "device": "cuda:0"}
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "whole", **options) == 0
    monkeypatch.setattr(batches, "free_memory", lambda gpu: 0)
    assert scripts.compute_fisher(chat_directory, dataset, tmp_path / "parts", **options) == 0
    assert "out of memory" not in capsys.readouterr().err
    whole, parts = (scripts.records(tmp_path / name) for name in ("whole", "parts"))
    longest = max(record["tokens"] for record in whole)
    assert not any("tokens_at_once" in record for record in whole)
    at_once = [record["tokens_at_once"] for record in parts if "tokens_at_once" in record]
    assert len(at_once) >= 8 and max(at_once) <= longest
    for found, expected in zip(parts, whole, strict=True):
        assert found["singular_values"] == pytest.approx(expected["singular_values"], rel=1e-4)


@pytest.mark.usefixtures("without_pictures", "own_arithmetic")
def test_stages_are_timed_on_the_models_own_gpu(model_directory, tmp_path):
    last = torch.device("cuda", GPUS - 1)
    with scripts.calls_of(torch.cuda, "synchronize") as calls:
        assert scripts.core_experiment(model_directory, tmp_path / "out", "--device", str(last)) == 0
    assert set(calls) == {(last,)}
