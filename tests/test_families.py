"""Model families beyond those of tiny.py: each is read in a mode that is right, or refused in a line."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import families
import fisher
from residual_fisher.common.program import UserError
from residual_fisher.model import loading, reading
from residual_fisher.model.passes import edit_stream, require_causal
from residual_fisher.model.reading import PrefixMode, choose_mode, read
import scripts
import tiny

MODES = {
    "gemma4_text": PrefixMode.SHARED,
    "got_ocr2": PrefixMode.SHARED,  # with a vision tower as deep as the decoder
    "phimoe": PrefixMode.SHARED,  # experts, whose sums change their order with the batch
    # since then, its keys change after they are cached
    "deepseek_v3": PrefixMode.SHARED if tiny.before("5.15") else PrefixMode.COPIED,
    "gpt_bigcode": PrefixMode.COPIED,
    "xmod": PrefixMode.COPIED,
    "mamba": PrefixMode.WHOLE,
    "rwkv": PrefixMode.WHOLE,
    "jamba": PrefixMode.WHOLE,
    "qwen3_next": PrefixMode.WHOLE,
    "zaya": PrefixMode.WHOLE,  # its layers' cache is a subclass of the plain one
    "lfm2_moe": PrefixMode.WHOLE,
}


def known(*model_types: str) -> list:
    """Parameters of a test: types of model, skipped where transformers lacks them."""
    lacks = "this version of transformers lacks"
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in families.CONFIG_MAPPING, reason=f"{lacks} {name}"))
        for name in model_types
    ]


@pytest.mark.parametrize("model_type", known(*MODES))
def test_a_family_is_read_in_a_mode_that_is_right(model_type):
    verdict = families.examine(model_type)
    assert verdict.mode == MODES[model_type].value
    assert verdict.experiment < families.RIGHT and verdict.pipeline < families.RIGHT


@pytest.mark.parametrize("model_type", known("deepseek_v4", "xlnet", "reformer"))
def test_a_family_that_does_not_fit_is_refused_in_a_line(model_type):
    verdict = families.examine(model_type)
    for said in verdict[1:]:
        assert isinstance(said, str) and "\n" not in said


def test_all_three_modes_agree_where_all_are_possible():
    model, ids = tiny.shared("llama"), tiny.prompt()
    layers, deltas, at = tiny.layers_of(model), torch.randn(3, tiny.D), torch.tensor([0, 1, 2])
    found = [read(model, ids, mode).perturbed_logits(layers, deltas, at) for mode in PrefixMode]
    assert torch.allclose(found[0], found[1], atol=1e-4) and torch.allclose(found[0], found[2], atol=1e-4)
    assert choose_mode(model, ids) is PrefixMode.SHARED


def test_a_linearization_by_whole_prompts_is_that_of_a_batch():
    model, ids = families.build("jamba"), tiny.prompt()
    point = fisher.linearize(model, ids, [1])
    module = list(loading.decoder_layers(model).values())[1]
    batch = fisher.linearize_prompts(model, module, ids[None], torch.tensor([len(ids)]), last_only=True)
    ours, theirs = fisher.top_k(point, 20).matrix[0], fisher.top_k(batch, 20).matrix[0, 0]
    assert point.reading.mode is PrefixMode.WHOLE
    assert (ours - theirs).abs().max() <= 3e-5 * theirs.abs().max()


@pytest.mark.parametrize("model_type", known("zaya", "gpt_bigcode"))
def test_a_second_linearization_equals_the_first(model_type):
    """A state that a pass had changed would show."""
    model, ids = families.build(model_type), tiny.prompt()
    first, second = (fisher.linearize(model, ids).log_probs for _ in range(2))
    assert torch.equal(first, second)


def test_a_longer_prompt_is_tried_anew():
    model = tiny.build("llama")
    with scripts.calls_of(reading, "_plain_passes") as tried:
        for length in (5, 3, 5, 9, 8):
            fisher.linearize(model, tiny.prompt(length))
    assert [len(ids) for _, ids in tried] == [5, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_that_is_the_first_rotated_otherwise_is_read_as_a_whole(dtype):
    """Whatever was read before. In bfloat16 a misread prefix may pass for rounding (0.3 nats)."""
    model, reference = tiny.build("longrope", dtype), tiny.shared("longrope", torch.float64)
    for above in (8, 1, 0, 2, -4, 1):
        ids = tiny.prompt(tiny.ORIGINAL + above)
        point = fisher.linearize(model, ids)
        assert point.reading.mode is (PrefixMode.WHOLE if above == 1 else PrefixMode.SHARED)
        if dtype == torch.float32:  # a misread prefix changes log-probabilities by whole nats
            delta = 0.1 * point.activations[1]
            moved = fisher.perturb(point, delta[None], at=1)[0].log_softmax(-1)
            plain = (
                tiny.plain_log_probs(reference, ids),
                tiny.plain_log_probs(reference, ids, tiny.layers_of(reference)[1], delta.double()),
            )
            assert torch.allclose(torch.stack([point.log_probs, moved]).double(), torch.stack(plain), atol=1e-4)


def test_lengths_at_which_the_rotation_depends_on_earlier_prompts_are_refused():
    model, ids = tiny.build("dynamic"), tiny.prompt(tiny.ORIGINAL + 1)
    found, expected = fisher.linearize(model, ids[1:]), tiny.plain_log_probs(tiny.build("dynamic"), ids[1:])
    assert torch.allclose(found.log_probs, expected, atol=1e-4)
    with pytest.raises(fisher.UnsupportedModelError, match="above 12 tokens"):
        fisher.linearize(model, ids)
    with pytest.raises(fisher.UnsupportedModelError, match="above 12 tokens"):
        fisher.linearize_prompts(model, tiny.layers_of(model)[1], ids[None], torch.tensor([len(ids)]))


def test_a_mode_is_chosen_anew_in_another_dtype(monkeypatch):
    model, prefill = tiny.build("llama"), reading.prefill

    def misread_in_half_precision(model: nn.Module, ids: torch.Tensor):
        return prefill(model, ids.flip(-1) if model.dtype == torch.bfloat16 else ids)

    monkeypatch.setattr(reading, "prefill", misread_in_half_precision)
    for dtype, mode in (
        (torch.float32, PrefixMode.SHARED),
        (torch.bfloat16, PrefixMode.WHOLE),
        (torch.float32, PrefixMode.SHARED),
    ):
        assert fisher.linearize(model.to(dtype), tiny.prompt()).reading.mode is mode


def test_a_mode_is_chosen_anew_for_another_attention():
    model = tiny.build("llama")
    with scripts.calls_of(reading, "_plain_passes") as tried:
        for kind in ("eager", "sdpa", "eager"):
            model.set_attn_implementation(kind)
            fisher.linearize(model, tiny.prompt())
    assert len(tried) == 2


def test_a_lack_of_memory_is_not_called_an_unsupported_model():
    model = tiny.build("llama")
    no_room = scripts.calls_of(model.model.layers[1], "forward", torch.OutOfMemoryError("CUDA out of memory"))
    with no_room, pytest.raises(torch.OutOfMemoryError):
        fisher.linearize(model, tiny.prompt())


def test_a_model_that_sees_what_comes_after_a_token_is_not_causal():
    model = families.build("xlnet")
    with pytest.raises(fisher.UnsupportedModelError, match="it is not causal"):
        require_causal(model, tiny.prompt()[None], torch.tensor([6]))


# --- F against a small perturbation ---------------------------------------------------------------


def round_to_8_bits(module: nn.Module, args: tuple) -> tuple:
    """As activations are quantised: the gradient is not the derivative of what this does."""
    unit = args[0].abs().amax(-1, keepdim=True) / 127
    return ((args[0] / unit).round() * unit,)


def check(point: fisher.Point) -> bool:
    return fisher.check_prediction(point, lambda deltas: fisher.perturb(point, deltas, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bloom", "gpt-oss"])
def test_a_small_perturbation_does_what_fisher_says(name, dtype):
    told = check(fisher.linearize(tiny.shared(name, dtype), tiny.prompt()))
    assert told or (name, dtype) == ("gemma2", torch.bfloat16)  # capped logits, whose changes its rounding drowns


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_activations_are_found(dtype):
    model, tokenizer = fisher.load(dtype=dtype, device="cpu")
    ids = tokenizer("The zoo keeps many wild").input_ids
    assert check(fisher.linearize(model, ids, [0, 15]))
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(round_to_8_bits)
    with pytest.raises(fisher.UnsupportedModelError, match="times as much as its gradients say"):
        check(fisher.linearize(model, ids, [0, 15]))


def test_a_certain_prediction_is_not_held_against_a_model():
    model = tiny.build("llama")
    model.lm_head.weight *= 1e4
    assert check(fisher.linearize(model, tiny.prompt())) is False


# --- finding things -------------------------------------------------------------------------------


def test_a_vision_tower_as_deep_as_the_decoder_is_not_taken_for_it():
    for model_type in ("llava", "git", "phi4_multimodal"):
        assert "vision" not in next(iter(loading.decoder_layers(families.build(model_type))))


def test_a_module_of_a_model_without_a_list_of_layers_is_found_by_its_path():
    model = tiny.build("llama")
    model.config.num_hidden_layers = 7
    assert loading.find_module(model, "model.layers.1") == ("model.layers.1", model.model.layers[1])
    with pytest.raises(UserError, match="no list of 7 decoder layers"):
        loading.find_module(model, "1")


class Output(NamedTuple):
    h: torch.Tensor
    rest: str


@pytest.mark.parametrize("kind", [lambda *v: v, lambda *v: list(v), Output], ids=["tuple", "list", "named tuple"])
def test_what_a_layer_returns_keeps_its_kind(kind):
    output = kind(torch.ones(1, 2, 3), "rest")
    edited = edit_stream(nn.Identity(), lambda h: h + 1)[1](nn.Identity(), (), output)
    assert type(edited) is type(output) and edited[1] == "rest"
    assert torch.equal(edited[0], torch.full((1, 2, 3), 2.0))
