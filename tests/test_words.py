"""Directions in words: slopes and shares against float64 computed another way, and how tokens are written."""

from copy import deepcopy
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
import torch
import transformers as hf

import fisher
from residual_fisher import load_fisher_matrices
from residual_fisher.model import loading
from residual_fisher.model.words import prompt_words_test, summary_line, token_shares, token_writer
from residual_fisher.pipeline.block_lanczos import leading_eigenpairs
import scripts
from test_fisher import assert_close, directions, point_of
import tiny

# With and without what rounds, caps, scales or shifts logits, and what is no plain attention.
NAMES = ["llama", "gpt2", "gemma2", "cohere", "phi", "bloom"]
LAYER = 1
STEP = 5e-4  # relative: what a finite step adds to a slope, at most 1e-4 of the largest, with room


# --- slopes and shares ---------------------------------------------------------------------------


def finite_differences(name: str, ids: torch.Tensor, u: torch.Tensor, everywhere: bool = False) -> torch.Tensor:
    """d log p_t of all tokens along each of u (n, d), (n, V): two forward passes in float64, no derivative.

    Some norms round to float32 whatever the model's dtype: steps smaller than this one would show that.
    """
    model, step = tiny.shared(name, torch.float64), 0.03
    layer = tiny.layers_of(model)[LAYER]

    def moved(delta: torch.Tensor) -> torch.Tensor:
        return tiny.plain_log_probs(model, ids, layer, delta, everywhere)

    return torch.stack([(moved(step * row) - moved(-step * row)) / (2 * step) for row in u.double()])


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_finite_differences_of_log_probabilities(name):
    ids, point = point_of(name)
    u = torch.nn.functional.normalize(directions(tiny.DEPTH, 2), dim=-1)
    expected = finite_differences(name, ids, u[LAYER])
    top, whole = fisher.top_k(point, 20), fisher.full_vocabulary(point)
    assert_close(whole.slopes(u)[LAYER], expected, STEP)
    assert_close(top.slopes(u)[LAYER], expected[:, top.tokens], STEP)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_along_iterated_eigenvectors_need_no_pass_of_their_own(name):
    model, (ids, lengths) = tiny.shared(name), tiny.prompts()
    point = fisher.linearize_prompts(model, tiny.layers_of(model)[LAYER], ids, lengths)
    found = leading_eigenpairs(point, 3)
    slopes = point.output_head().times(found.pushed)[0]
    for row, length in enumerate(lengths.tolist()):
        expected = finite_differences(name, ids[row, :length], found.eigen.vectors[0, row], everywhere=True)
        assert_close(slopes[row], expected, STEP)


@pytest.mark.parametrize("name", NAMES)
def test_the_shares_of_all_counted_tokens_make_the_eigenvalue(name):
    _, point = point_of(name)
    for matrix in (fisher.top_k(point, 20), fisher.full_vocabulary(point)):
        eigen = matrix.eigenpairs(3)
        slopes, p = matrix.slopes(eigen.vectors), matrix.weights
        assert_close((p * slopes**2).sum(-1), eigen.values.double())
        every = token_shares(slopes, p, matrix.tokens, num=slopes.shape[-1])
        assert (every.shares.sum(-1) - 1).abs().max() < 1e-5
        assert (every.shares.diff() <= 0).all()
        few = token_shares(slopes, p, matrix.tokens, num=3)
        assert all(torch.equal(part, whole[..., :3]) for part, whole in zip(few[:3], every[:3], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_token_with_a_positive_slope_gains_probability_along_v(name):
    _, point = point_of(name)
    matrix = fisher.full_vocabulary(point)
    eigen = matrix.eigenpairs()
    said = token_shares(matrix.slopes(eigen.vectors), matrix.weights)
    steps = (2 * 1e-3 / eigen.values).sqrt() * eigen.vectors[:, 0]  # a thousandth of a nat
    moved = fisher.perturb(point, steps, torch.arange(tiny.DEPTH)).log_softmax(-1)
    for layer in range(tiny.DEPTH):
        ids = said.ids[layer, 0, :4]  # those that move most
        gained = moved[layer, ids] - point.log_probs[ids]
        assert torch.equal(gained > 0, said.slopes[layer, 0, :4] > 0)


def test_where_nothing_is_felt_no_token_has_a_share():
    said = token_shares(torch.zeros(2, 5), torch.full((5,), 0.2), num=3)
    assert not said.shares.any()
    assert said.records((), str) == [[], []]
    assert summary_line([]) == "- ← → -"


# --- the pipeline's records ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, "all"])
def test_a_records_tokens_are_those_of_its_prompt_alone(
    count, chat_directory, chat_tokenizer, dataset, finished_pipeline, tmp_path, request
):
    output = finished_pipeline
    if count == "all":
        request.getfixturevalue("without_pictures")
        output = tmp_path / "out"
        options = {"top_k_tokens": "all", "num_prompts": 3}
        assert scripts.compute_fisher(chat_directory, dataset, output, **options) == 0
    model, show = loading.load(str(chat_directory), "float64", "cpu")[0], token_writer(chat_tokenizer)
    matrices = load_fisher_matrices(output)
    for record in scripts.records(output)[:: 9 if count == 6 else 1]:
        turn = [{"role": "user", "content": record["prompt"]}]
        text = chat_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(chat_tokenizer(text, add_special_tokens=False)["input_ids"])
        rows, p = tiny.jacobian(model, ids, tiny.layers_of(model)[1], everywhere=True)
        counted = p.argsort(descending=True)[: None if count == "all" else count]
        assert len(record["directions"]) == 3
        for direction, v in zip(record["directions"], matrices[record["index"]].V[:3], strict=True):
            slopes = rows[counted] @ torch.from_numpy(v).double()
            shares = torch.zeros(len(p), dtype=torch.float64)
            shares[counted] = p[counted] * slopes**2 / (p[counted] * slopes**2).sum()
            found = torch.tensor([token["id"] for token in direction])
            assert len(found.unique()) == 6
            assert np.array([t["share"] for t in direction]) == pytest.approx(shares[found].numpy(), abs=1e-3)
            assert shares[found] == pytest.approx(shares.sort(descending=True).values[:6], abs=1e-3)
            expected = (rows[found] @ torch.from_numpy(v).double()).numpy()
            largest = np.abs(expected).max()
            assert np.array([t["slope"] for t in direction]) == pytest.approx(expected, abs=1e-3 * largest)
            assert [t["token"] for t in direction] == [show(token) for token in found.tolist()]


# --- how tokens are written ----------------------------------------------------------------------

TEXTS = [" ", "  ", "\n", "\t", "\\n", "\\", "·", "\x1b", "\x85", "\xa0", "\u200b", "\u0301", "wild", " wild", "é", "“"]


def byte_pieces() -> list[str]:
    """TEXTS and parts of characters, as a byte-level vocabulary writes them."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = [split.pre_tokenize_str(text)[0][0] for text in TEXTS]
    parts = [whole[TEXTS.index(text)][part] for text in ("“", "·", "\x85") for part in (slice(1), slice(1, None))]
    return [*whole, *dict.fromkeys(parts), whole[TEXTS.index(" ")] + whole[TEXTS.index("“")][:2]]


BYTES = {"\n": "<0x0A>", "\t": "<0x09>", "\x1b": "<0x1B>"}
SENTENCEPIECES = [*(BYTES.get(text, text.replace(" ", "▁")) for text in TEXTS), "<0xE2>", "<0xB7>", "<0x85>"]
LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
VOCABULARIES = {
    "byte-level": (byte_pieces(), decoders.ByteLevel()),
    "byte fallback": (SENTENCEPIECES, LLAMA_2),
    "metaspace": ([text.replace(" ", "▁") for text in TEXTS], decoders.Metaspace()),
}


def tokenizer_of(pieces: list[str], decoder) -> hf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoder
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def assert_readable_and_distinct(shown: list[str]):
    assert len(set(shown)) == len(shown)
    assert all(text and text.isprintable() and " " not in text for text in shown)


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_no_two_tokens_look_alike_and_none_is_invisible(kind):
    pieces, decoder = VOCABULARIES[kind]
    show = token_writer(tokenizer_of(pieces, decoder))
    shown = [show(token) for token in range(len(pieces))]
    assert_readable_and_distinct(shown)
    found = dict(zip(TEXTS, shown, strict=False))
    assert (found["\n"], found["\t"], found["\x1b"]) == ("\\n", "\\t", "\\x1b")
    assert [found[text] for text in (" ", "  ", " wild", "wild", "é")] == ["·", "··", "·wild", "wild", "é"]
    assert (found["\\n"], found["·"], found["\u200b"], found["\u0301"]) == ("\\\\n", "\\u00b7", "\\u200b", "\\u0301")
    if kind == "byte-level":
        assert shown[len(TEXTS) : len(TEXTS) + 2] == ["\\xe2", "\\x80\\x9c"] and shown[-1] == "·\\xe2\\x80"


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_all_tokens_of_a_trained_vocabulary_are_told_apart(name, request):
    tokenizer = request.getfixturevalue(name)
    show = token_writer(tokenizer)
    assert_readable_and_distinct([show(token) for token in range(len(tokenizer))])


def test_rows_of_the_head_beyond_the_tokenizer_are_shown_by_number(byte_level):
    assert token_writer(byte_level)(len(byte_level) + 3) == f"<{len(byte_level) + 3}>"


def test_a_tokenizer_written_in_python_may_raise_for_them():
    class Pythonic:
        def convert_ids_to_tokens(self, token: int) -> str:
            return ["a"][token]

        def decode(self, ids: list[int], **options) -> str:
            return "".join(map(self.convert_ids_to_tokens, ids))

    assert [token_writer(Pythonic())(token) for token in (0, 5)] == ["a", "<5>"]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_prompt_holds_the_tokens_that_its_words_begin_with(name, request):
    tokenizer = request.getfixturevalue(name)
    show = token_writer(tokenizer)
    found = prompt_words_test(tokenizer, show)

    def first(text: str) -> str:
        """What an answer that begins with a text begins with."""
        return next(shown for id_ in tokenizer.encode(text, add_special_tokens=False) if (shown := show(id_)) != "·")

    prompt = "Which animals are wild?"
    held = [first(text) for text in ("animals", " animals", "wild", "Which", "Animals", " Wild")]
    assert all(found(prompt, held))
    # "are" and "animals" are not split so that they begin with the token "a"
    assert found(prompt, ["zebra", "·", "", "a", "\\xe2"]) == [False] * 5
    assert found("光と水", ["水", "木", "·水"]) == [True, False, True]
    assert found("", ["a"]) == [False]


PROMPT = """Which animals are wild in the Łódź zoo, and WHICH live alone? __init__ x2 ıλι Straße ½ ﬁne ⑴ éclair ÉTÉ
Москва ещё ёлка 光と水の物語 ｆｕｌｌ 하 한국 naïve n\u0303a \u0301a 😀wild😀 <unk> [UNK] don't"""


@pytest.mark.parametrize("normalizer", [None, normalizers.BertNormalizer(), normalizers.NFKC()], ids=str)
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_a_token_is_in_the_prompt_just_if_a_word_split_by_the_tokenizer_begins_with_it(name, normalizer, request):
    """Also a part of a character, an unknown word, and what the tokenizer has changed (case, accents, forms)."""
    tokenizer = deepcopy(request.getfixturevalue(name))
    if normalizer:
        tokenizer.backend_tokenizer.normalizer = normalizer
    show = token_writer(tokenizer)

    def first(text: str) -> str | None:
        shown = (show(id_).strip("·") for id_ in tokenizer.encode(text, add_special_tokens=False))
        return next(filter(None, shown), None)

    words = set(re.findall(r"\w+", PROMPT))
    begin = {first(space + word) for w in words for word in (w, w[:1].upper() + w[1:]) for space in ("", " ")}
    pieces = {
        id_ for word in (*words, *map(str.upper, words), *map(str.lower, words)) for id_ in tokenizer.encode(word)
    }
    tokens = sorted({*map(show, pieces), *map(show, range(200))})
    texts = [token.strip("·") for token in tokens]
    expected = [text in begin or (not text.isascii() and text in PROMPT) for text in texts]
    assert 20 < sum(expected) < len(tokens) - 20
    contained = prompt_words_test(tokenizer, show)
    assert contained(PROMPT, tokens) == expected
    assert [contained(PROMPT, [token])[0] for token in tokens] == expected


def test_only_words_that_a_token_may_begin_are_split(byte_level, animals):
    prompt, show = " ".join(animals), token_writer(byte_level)
    contained, wild = prompt_words_test(byte_level, show), show(byte_level.encode(" wild")[0])
    words, letters = set(re.findall(r"\w+", prompt)), wild.strip("·")
    with scripts.calls_of(hf.PreTrainedTokenizerFast, "encode") as calls:
        assert contained(prompt, [wild, "\\n", "**"]) == [True, False, False]
    assert 0 < len(calls) < len(words) / 4  # 4 a word is all of them
    assert all(text.strip().lower().startswith(letters) for _, text in calls)


def test_the_words_of_a_prompt_are_found_while_another_thread_tokenizes(byte_level):
    """Encoding sets a tokenizer's truncation, so it must not be done with the one that the other thread uses."""
    test = prompt_words_test(byte_level, token_writer(byte_level))
    byte_level.backend_tokenizer.enable_truncation(2)  # as the other thread has done when it encodes
    try:
        test("Which animals are wild?", ["wild"])
        assert byte_level.backend_tokenizer.truncation["max_length"] == 2
    finally:
        byte_level.backend_tokenizer.no_truncation()


def test_a_line_has_the_tokens_of_either_side_by_their_shares():
    said = [{"token": token, "slope": slope} for token, slope in (("a", 1), ("b", -2), ("c", 3), ("d", -1), ("e", 1))]
    assert summary_line(said) == "b d ← → a c e"
    assert summary_line(said[::2], 2) == "- ← → a c"
