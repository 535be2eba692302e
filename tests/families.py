"""Every causal language model of transformers, tiny, against float64: `python tests/families.py [TYPE ...]`.

Without types it takes them all, about eight minutes, and writes the table in docs/families.md. The reference uses
nothing of this project: the model in float64, one plain forward pass of the whole prompt with a bias at each layer,
a backward pass for every token of the vocabulary, and F as it is defined.
"""

from collections import Counter
import copy
from pathlib import Path
import re
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import fisher
from residual_fisher.common.program import UserError
from residual_fisher.model import loading
from residual_fisher.model.passes import require_causal
import tiny

D, DEPTH, VOCABULARY = 32, 4, 97

# Values for the words that configurations have for the same thing; what a configuration lacks is left out.
SIZES = [
    (D, "hidden_size d_model n_embd emb_dim dim embed_dim embedding_size word_embed_proj_dim hidden_dim lru_width"),
    (D, "text_hidden_size attention_hidden_size adapter_in_dim"),
    (48, "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff mlp_dim mlp_hidden_size"),
    (48, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp"),
    (48, "moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size dense_intermediate_size"),
    (48, "moe_latent_size"),
    (DEPTH, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads"),
    (4, "linear_num_heads linear_num_value_heads index_n_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k"),
    (2, "top_k_experts linear_num_key_heads swa_num_key_value_heads zero_expert_num num_global_key_value_heads"),
    (8, "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels head_size d_kv d_head"),
    (8, "state_size ssm_state_size mamba_d_state mamba_head_dim mamba_headdim linear_key_head_dim global_head_dim"),
    (8, "linear_value_head_dim linear_head_dim rotary_dim swa_head_dim swa_v_head_dim index_head_dim index_topk"),
    (8, "hidden_size_per_layer_input laurel_rank"),
    (16, "q_lora_rank kv_lora_rank mamba_d_head mamba_dt_rank time_step_rank o_lora_rank adapter_rank"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts n_groups mamba_n_groups"),
    (1, "mamba_ngroups first_k_dense_replace num_dense_layers attn_layer_offset"),
    (2, "attn_layer_period expert_layer_period"),
    (4, "layer_group_size chunk_size"),
    (5, "sliding_window sliding_window_size attention_chunk_size attention_window"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length original_max_position_embeddings"),
    (VOCABULARY, "vocab_size n_vocab vocab_size_per_layer_input"),
    (0.3, "initializer_range init_std"),
    (True, "is_decoder"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
]
SMALL = {word: value for value, words in SIZES for word in words.split()}
HYBRID = ["linear_attention", "hybrid"] * (DEPTH // 2)
FULL = {"layer_types": ["full_attention"] * DEPTH}
ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
# What the words above leave undecided, by model type.
SPECIAL = {
    "cohere_compass_text": {**FULL, "rope_parameters": {"full_attention": ROTATION}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": D, "ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]], "window_size": 5},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "ple_embed_dim": 16,
    },
    "cpmant": {"prompt_types": 3, "prompt_length": 2, "segment_types": 3, "position_bias_max_distance": 64},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"use_mamba_kernels": False},  # a package for GPUs
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "qwen2_5_vl_text": {"rope_parameters": {**ROTATION, "mrope_section": [1, 1, 2]}},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_values(config_class: type, model_type: str) -> dict:
    """Keyword arguments that make a configuration tiny, and those of the configurations inside."""
    plain = config_class()
    given = plain.to_dict()
    values = {word: SMALL[word] for word in given if word in SMALL and isinstance(given[word], int | float)}
    for word in config_class.sub_configs:
        inner = getattr(plain, word, None)
        if inner is not None:
            values[word] = small_values(type(inner), inner.model_type)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:  # latent attention has a key for each head
        values["num_key_value_heads"] = values["num_attention_heads"]
    return {**values, **SPECIAL.get(model_type, {})}


def build(model_type: str) -> nn.Module:
    """A tiny random model of a type, frozen and in evaluation mode: the same on every call."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**small_values(config_class, model_type))
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = hf.AutoModelForCausalLM if causal else hf.AutoModelForImageTextToText
    # Torch 2.6 has no grouped product, and what transformers puts in its place has no batching rule.
    options = {"attn_implementation": "eager"} if hasattr(torch, "_grouped_mm") else loading.PLAIN
    model = auto.from_config(config, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def shared(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of tiny.py, in this dtype; or of a type of its own, of which some cannot be run in float64."""
    return tiny.shared(name, dtype) if name in tiny.CONFIGS else build(name)


# --- the reference -------------------------------------------------------------------------------


class Reference:
    """What one layer's residual stream does to the prediction of one prompt, in float64, the long way."""

    def __init__(self, model: nn.Module, layer: str, ids: Tensor, everywhere: bool):
        self.model, self.ids, self.everywhere = model, ids, everywhere
        self.layer = self.model.get_submodule(layer)
        bias = torch.zeros(1, dtype=model.dtype)  # of the width that the stream turns out to have
        bias, log_probs = self.log_probs(bias)
        rows = [torch.autograd.grad(one, bias, retain_graph=True)[0] for one in log_probs]
        self.p, self.jacobian = log_probs.detach().exp(), torch.stack(rows)  # (V,), (V, d)

    def log_probs(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The bias that was added, at the last token or everywhere, and the log-probabilities (V,)."""
        added = []

        def add(module, args, output):
            h = output[0] if isinstance(output, tuple | list) else output
            added.append(bias.expand(h.shape[-1]).clone().requires_grad_())
            places = torch.ones(h.shape[-2], 1) if self.everywhere else torch.eye(h.shape[-2])[-1][:, None]
            moved = h + places.to(h) * added[-1]
            return moved if moved is h or not isinstance(output, tuple | list) else type(output)((moved, *output[1:]))

        handle = self.layer.register_forward_hook(add)
        try:
            with torch.enable_grad():
                logits = self.model(self.ids[None], use_cache=False).logits[0, -1]
        finally:
            handle.remove()
        assert len(added) == 1, f"the layer ran {len(added)} times"
        return added[0], logits.log_softmax(-1)

    def fisher(self, k: int) -> Tensor:
        """F (d, d) of the k most probable tokens."""
        top = self.p.argsort(descending=True)[:k]
        return sum(self.p[t] * torch.outer(self.jacobian[t], self.jacobian[t]) for t in top)

    def kl(self, delta: Tensor) -> float:
        moved = self.log_probs(delta.to(self.p))[1].detach()
        return float((self.p * (self.p.log() - moved)).sum())


# --- what the project makes of a family ----------------------------------------------------------

TOKENS, K = 12, 20
# Relative to the largest entry of F: float32 leaves a few 1e-6 in a network of four layers, and 1e-4 where its weights
# are as large as here and layers many (recurrences).
RIGHT = 1e-3


class Verdict(NamedTuple):
    """What came out for one type: an error relative to the largest entry of F, or the line of a refusal."""

    mode: str  # of the prefix
    experiment: float | str
    pipeline: float | str


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def in_float64(model: nn.Module) -> nn.Module:
    """A copy; in float32 if the model itself insists on it."""
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # fused kernels know no float64
    try:
        wide(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except RuntimeError:
        return copy.deepcopy(model)
    return wide


def examine_experiment(model: nn.Module, wide: nn.Module) -> tuple[str, float]:
    """The mode of the prefix; the largest error of F over some and all tokens, and of the KL of two perturbations."""
    ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    layers = loading.decoder_layers(model)
    chosen = [0, len(layers) // 2]
    point = fisher.linearize(model, ids, chosen)
    fisher.check_prediction(point, lambda moved: fisher.perturb(point, moved, 0))
    top, whole = fisher.top_k(point, K), fisher.full_vocabulary(point)
    deltas = torch.stack([0.3 * whole.eigenpairs().vectors[i, 0] / whole.eigenpairs().values[i].sqrt() for i in (0, 1)])
    kl = fisher.kl_divergence(point.log_probs, fisher.perturb(point, deltas, torch.tensor(chosen)))
    errors = []
    for i, number in enumerate(chosen):
        reference = Reference(wide, list(layers)[number], ids, everywhere=False)
        matrix, exact = reference.fisher(K), reference.fisher(VOCABULARY)
        expected = reference.kl(deltas[i])
        errors += [error_of(top.matrix[i], matrix), error_of(whole.matrix[i], exact), abs(float(kl[i]) / expected - 1)]
    return point.reading.mode.value, max(errors)


def examine_pipeline(model: nn.Module, wide: nn.Module) -> float:
    """The largest error of F for a bias at every token, of two prompts in a batch."""
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([TOKENS, TOKENS // 2])
    path, module = list(loading.decoder_layers(model).items())[1]
    require_causal(model, ids, (lengths - 1))
    top = fisher.top_k(fisher.linearize_prompts(model, module, ids, lengths), K)
    several = zip(ids, lengths.tolist(), strict=True)
    expected = [Reference(wide, path, row[:length], everywhere=True).fisher(K) for row, length in several]
    return max(error_of(matrix, right) for matrix, right in zip(top.matrix[0], expected, strict=True))


def examine(model_type: str) -> Verdict:
    """What becomes of a type. Exceptions other than a refusal are raised."""
    model = build(model_type)
    wide = in_float64(model)
    mode, results = "", []
    for look in (examine_experiment, examine_pipeline):
        try:
            found = look(model, wide)
            mode, error = found if isinstance(found, tuple) else (mode, found)
            results.append(error)
        except (UserError, fisher.UnsupportedModelError) as refusal:
            results.append(str(refusal))
    return Verdict(mode, *results)


# --- the table -----------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
START = "| model type | way | experiment | pipeline |\n|---|---|---|---|\n"
# Types that also see images, run on text: not of the mapping of causal language models.
MULTIMODAL = ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "internvl", "paligemma", "smolvlm"]


def row(model_type: str) -> tuple[str, str]:
    """A type's line of the table, and in a word what became of it: right, refused, wrong, or not built."""
    try:
        build(model_type)
    except Exception as error:  # a configuration that takes more than small numbers, or another package
        return f"| {model_type} | | not built: {type(error).__name__} | |\n", "not built"
    verdict = examine(model_type)
    cells = [result if isinstance(result, str) else "right" if result < RIGHT else "WRONG" for result in verdict[1:]]
    cells = ["the same" if i and cell == cells[0] != "right" else cell for i, cell in enumerate(cells)]
    outcome = next((word for word in ("WRONG", "right") if word == cells[0]), "refused")
    return f"| {model_type} | {verdict.mode} | {cells[0]} | {cells[1]} |\n", f"{outcome} {verdict.mode}".strip()


def main(model_types: list[str]) -> int:
    hf.logging.set_verbosity_error()
    rows, seen = [], Counter()
    for model_type in model_types or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL]:
        line, outcome = row(model_type)
        print(line, end="", flush=True)
        rows.append(line)
        seen[outcome] += 1
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(seen.items()))
    print(counts)
    if not model_types:
        text = PAGE.read_text(encoding="utf-8").partition(START)[0]
        text = re.sub(r"(?m)^Experiment: .*$", f"Experiment: {counts}.", text)
        PAGE.write_text(text + START + "".join(rows), encoding="utf-8")
    return int(any("WRONG" in line for line in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
