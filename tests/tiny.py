"""Tiny random models of many architectures, and what they compute, worked out the long way in float64."""

from collections.abc import Sequence
from functools import cache

from packaging.version import Version
import torch
from torch import Tensor, nn
import transformers as hf

from residual_fisher.model.loading import PLAIN

D, DEPTH, VOCABULARY = 32, 3, 97
COMMON = {
    "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# The sliding windows are shorter than the prompts of the tests.
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama-tied": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=4),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=SLIDING, query_pre_attn_scalar=8,
        final_logit_softcapping=2.0, attn_logit_softcapping=3.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=SLIDING, query_pre_attn_scalar=8
    ),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=D, n_layer=DEPTH, n_head=4, vocab_size=VOCABULARY, n_positions=64, initializer_range=0.3
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "phi": lambda: hf.PhiConfig(**GROUPED),  # its head has a bias
    "opt": lambda: hf.OPTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=4, vocab_size=VOCABULARY, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.3,
    ),
    "bloom": lambda: hf.BloomConfig(
        hidden_size=D, n_layer=DEPTH, n_head=4, vocab_size=VOCABULARY, initializer_range=0.3
    ),
    "falcon": lambda: hf.FalconConfig(**COMMON, new_decoder_architecture=False),
    "falcon-alibi": lambda: hf.FalconConfig(
        **COMMON, alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False
    ),
    "cohere": lambda: hf.CohereConfig(**GROUPED, logit_scale=0.5),
    "granite": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "gpt-oss": lambda: hf.GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
}  # fmt: skip

ORIGINAL = 12  # the length above which these rotate positions otherwise
ROTATING = {
    "longrope": lambda: hf.Phi3Config(
        **GROUPED, original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 64 / ORIGINAL,
            "short_factor": [1.0] * 4, "long_factor": [4.0, 7.0, 10.0, 13.0],
        },
    ),
    "dynamic": lambda: hf.LlamaConfig(
        **{**GROUPED, "max_position_embeddings": ORIGINAL},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}  # fmt: skip


def before(version: str) -> bool:
    """Whether the transformers here is older than this."""
    return Version(hf.__version__) < Version(version)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same random model on every call, in the dtype asked for."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config((CONFIGS | ROTATING)[name](), dtype=torch.float32, **PLAIN)
    model = model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        head.bias.normal_()
    return model.to(dtype)


_build_once = cache(build)


def shared(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`build`, once a session: for tests that leave the model as it is."""
    return _build_once(name, dtype)


def prompt(tokens: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))


LENGTHS = [9, 3, 6]


def prompts(lengths: Sequence[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    """A batch of random prompts, each padded on the right with a token that must not matter; and their lengths."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(lengths)
    ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = 5
    return ids, lengths


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, found without the code under test."""
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH))


def plain_log_probs(
    model: nn.Module,
    ids: Tensor,
    layer: nn.Module | None = None,
    delta: Tensor | None = None,
    everywhere: bool = False,
) -> Tensor:
    """Next-token log-probabilities by one full forward pass; `delta` (d,) is added at the last token, or at all."""

    def add(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        perturbed = h + delta if everywhere else torch.cat([h[:, :-1], h[:, -1:] + delta], dim=1)
        return (perturbed, *output[1:]) if isinstance(output, tuple) else perturbed

    handle = layer.register_forward_hook(add) if layer is not None else None
    try:
        return model(ids[None], use_cache=False).logits[0, -1].log_softmax(-1)
    finally:
        if handle is not None:
            handle.remove()


def jacobian(model: nn.Module, ids: Tensor, layer: nn.Module, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """(V, d) derivatives of all log-probabilities in a perturbation at the last token, or at all; and p (V,)."""
    zero = torch.zeros(D, dtype=model.dtype)

    def log_probs(delta: Tensor) -> Tensor:
        return plain_log_probs(model, ids, layer, delta, everywhere)

    if model.config.model_type == "bloom":  # its GELU is an autograd function that jacrev cannot enter
        rows = torch.autograd.functional.jacobian(log_probs, zero)
    else:
        rows = torch.func.jacrev(log_probs)(zero)
    return rows, plain_log_probs(model, ids).exp()


def brute_force_fisher(
    model: nn.Module, ids: Tensor, layer: nn.Module, k: int | None = None, everywhere: bool = False
) -> Tensor:
    """F (d, d) of the k most probable tokens, or of all, as a plain sum of outer products."""
    return sum_of_outer_products(*jacobian(model, ids, layer, everywhere), k)


def sum_of_outer_products(rows: Tensor, p: Tensor, k: int | None = None) -> Tensor:
    tokens = p.argsort(descending=True)[:k]
    return sum(p[t] * torch.outer(rows[t], rows[t]) for t in tokens)


# --- references in float64, each worked out once a session ----------------------------------------


@cache
def _reference(name: str, ids: tuple[int, ...], layer: int, everywhere: bool) -> tuple[Tensor, Tensor]:
    reference = shared(name, torch.float64)
    return jacobian(reference, torch.tensor(ids), layers_of(reference)[layer], everywhere)


def reference_jacobian(name: str, ids: Tensor, layer: int, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """`jacobian` of the model in float64."""
    return _reference(name, tuple(ids.tolist()), layer, everywhere)


def reference_fisher(name: str, ids: Tensor, layer: int, k: int | None = None, everywhere: bool = False) -> Tensor:
    """`brute_force_fisher` of the model in float64."""
    return sum_of_outer_products(*reference_jacobian(name, ids, layer, everywhere), k)


def reference_layers(name: str, ids: Tensor, k: int | None = None) -> Tensor:
    """F (layers, d, d) at the last token of one prompt."""
    return torch.stack([reference_fisher(name, ids, layer, k) for layer in range(DEPTH)])


def reference_prompts(name: str, layer: int, ids: Tensor, lengths: Tensor, k: int | None = None) -> Tensor:
    """F (prompts, d, d) of a bias at every token of each prompt of a batch."""
    several = zip(ids, lengths.tolist(), strict=True)
    return torch.stack([reference_fisher(name, row[:length], layer, k, everywhere=True) for row, length in several])


def reference_log_probs(name: str, ids: Tensor) -> Tensor:
    return plain_log_probs(shared(name, torch.float64), ids)
