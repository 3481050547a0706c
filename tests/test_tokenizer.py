"""data/tokenizer.py against the `tokenizers` package: the same ids for every text, or a refusal.

    pytest tests/test_tokenizer.py
"""
import functools
import json
import unicodedata

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer import DIGITS_PATTERN, GPT2_PATTERN, Tokenizer, byte_alphabet, split_pattern

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIALS = ["<|unk|>", "<|bos|>", "<|eos|>"]

# Text as people and machines write it: any character, runs of white space and digits, scripts, control
# tokens. \x04 and \U00050000 hold bytes that SmolLM2's vocabulary lacks. Half a surrogate pair is no text,
# but JSON escapes can bring it.
SNIPPETS = [
    "It's", "we'LL", " don't", "DON'T", " 'tis", "10 pm", " 3.14", "1234567", "\u0663\u0664", "½", "x²",
    "naïve", "e\u0301", "Ⅷ", "東京タワー", "안녕", "שלום", "مرحبا", "ไทย", "🙂", "👩\u200d👩\u200d👧", "🇫🇷",
    "\u200f", "\u00a0", "\u3000", "\u2028", "\u0085", "\r\n", "\n\n\n", "\t", "    ", " \n ", "\x00", "\x04",
    "\x1d", "\U00050000", "<|im_start|>", "<|endoftext|>", "<|bos|>", "<|unk|>", "### Response:\n", "_", "--",
    "!?…", "ſ", "ß", "\ud800", "\udc00", "\ud83d\ude00"]
SPACED = " \n\t\r0123456789ab.'"
TEXT = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=6), st.text(SPACED, max_size=8),
                          st.text(st.characters(categories=["Cs", "Lo", "Mn"]), max_size=4)),
                max_size=10).map("".join)
MANY = settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@functools.cache
def reference(folder) -> tokenizers.Tokenizer:
    """The `tokenizers` package on the same file, with control tokens in a text read as plain text."""
    its = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    its.encode_special_tokens = True
    return its


def whole(text: str) -> str:
    """Surrogate pairs joined, lone halves replaced by U+FFFD. `tokenizers` takes neither."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write(folder, spec: dict, eos: object = 2, generation: dict | None = None):
    """A folder with this tokenizer.json, and the end ids in config.json and generation_config.json."""
    folder.mkdir(exist_ok=True)
    for name, content in (("tokenizer", spec), ("config", {} if eos is None else {"eos_token_id": eos}),
                          ("generation_config", generation)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def train(style: str, corpus: str) -> dict:
    """tokenizer.json of a small byte-level BPE in the style of GPT-2, SmolLM2, Llama 3 or Qwen."""
    its = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = {"llama3": LLAMA3_PATTERN, "qwen": QWEN_PATTERN}.get(style)
    first = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else (
        pre_tokenizers.Digits(individual_digits=True))
    second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False) if pattern else plain
    its.pre_tokenizer = plain if style == "gpt2" else pre_tokenizers.Sequence([first, second])
    if style == "qwen":
        its.normalizer = normalizers.NFC()
    its.decoder = decoders.ByteLevel()
    its.train_from_iterator([corpus], trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if style == "llama3":
        its.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])])
    return json.loads(its.to_str())


@pytest.fixture(scope="module", params=["gpt2", "smollm", "llama3", "qwen"])
def trained(request, tmp_path_factory, story):
    """(folder, our tokenizer, theirs) for each style."""
    spec = train(request.param, story + "1234 2024\n\n" * 9)
    folder = write(tmp_path_factory.mktemp(request.param), spec)
    return folder, Tokenizer(folder), reference(folder)


MISSING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1d, 0xc0, 0xc1, 0xf1, 0xf2, *range(0xf5, 0x100)}  # SmolLM2's 21


# ---- the base model's own --------------------------------------------------------------------------------

@MANY
@given(text=TEXT)
@example(text="It is 10 pm.  5 x\n 7")
@example(text="a\x04b\U00050000c")
@example(text="<|im_start|>user<|im_end|>")
@example(text="half a \ud83d, the whole \ud83d\ude00, the other half \ude00")
def test_base_ids_equal_tokenizers(base, base_tokenizer, text):
    """Trap 8: the split pattern is the model's own (SmolLM2 splits digits singly), and nothing a user types
    becomes a control token: only bytes without a token are, each of them, the unknown one."""
    ids, text = base_tokenizer.encode(text), whole(text)
    assert ids == reference(base).encode(text, add_special_tokens=False).ids
    lacking = sum(b in MISSING for b in text.encode())
    control = [i for i in ids if i <= 16]  # SmolLM2's control tokens are the ids 0..16
    assert control == [base_tokenizer.unknown] * lacking
    assert base_tokenizer.decode(ids) == reference(base).decode(ids)
    if not lacking:
        assert base_tokenizer.decode(ids) == text


@MANY
@given(ids=st.lists(st.one_of(st.integers(0, 600), st.integers(0, 49151)), max_size=12))
def test_any_ids_decode_as_tokenizers_does(base, base_tokenizer, ids):
    """What a model says may be cut characters and control tokens (the ids below 17) in any order."""
    assert base_tokenizer.decode(ids) == reference(base).decode(ids)


def test_the_21_bytes_without_a_token(base, base_tokenizer):
    """tiktoken panics on a byte that has no rank; SmolLM2's vocabulary lacks 21 of the 256."""
    vocab = json.loads((base / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    lacking = {byte for char, byte in byte_alphabet().items() if char not in vocab}
    assert lacking == MISSING and len(MISSING) == 21
    assert base_tokenizer.encode("\x04\x06") == [0, 0] and base_tokenizer.unknown == 0
    assert base_tokenizer.encode("\U00050000") == reference(base).encode("\U00050000").ids  # F1 90 80 80


def test_every_token_decodes_as_tokenizers_does(base, base_tokenizer):
    its = reference(base)
    assert max(base_tokenizer.bytes) + 1 == its.get_vocab_size() == 49152
    for i in range(17, 49152):
        assert base_tokenizer.decode([i]) == its.decode([i]), i
    assert base_tokenizer.decode(range(17)) == ""  # control tokens show as nothing
    assert base_tokenizer.decode([10 ** 9]) == ""


def test_base_facts(base_tokenizer):
    assert (base_tokenizer.eos, base_tokenizer.ends, base_tokenizer.bos) == (2, {2}, [])
    assert [base_tokenizer.decode([i]) for i in base_tokenizer.encode("It is 10 pm.")] \
        == ["It", " is", " ", "1", "0", " pm", "."]
    snow = base_tokenizer.encode("☃")
    assert len(snow) > 1 and base_tokenizer.decode(snow[:1]) == "\ufffd"  # a cut character


# ---- other models' styles --------------------------------------------------------------------------------

@MANY
@given(text=TEXT)
@example(text="The lighthouse keeper's 12345 pillows,  e\u0301 \r\n\r\n  end ")
def test_trained_ids_equal_tokenizers(trained, text):
    folder, ours, its = trained
    ids, text = ours.encode(text), whole(text)
    assert ids == its.encode(text, add_special_tokens=False).ids
    assert not set(ids) & {0, 1, 2}  # all 256 bytes have a token here, so never a control token
    assert ours.decode(ids) == its.decode(ids) == (unicodedata.normalize("NFC", text) if ours.nfc else text)


@MANY
@given(ids=st.lists(st.one_of(st.integers(0, 200), st.integers(0, 699)), max_size=12))
def test_trained_ids_decode_as_tokenizers_does(trained, ids):
    folder, ours, its = trained
    assert ours.decode(ids) == its.decode(ids)


def test_trained_facts(trained):
    folder, ours, its = trained
    is_llama3 = its.post_processor is not None
    assert ours.bos == its.encode("").ids == ([1] if is_llama3 else [])
    assert (ours.eos, ours.ends, ours.unknown) == (2, {2}, None)
    assert max(ours.bytes) + 1 == its.get_vocab_size()


def test_half_a_surrogate_pair_before_nfc(tmp_path, story):
    """Pairs are joined first, then normalised: U+1D15E, a musical note, is two characters in NFC."""
    folder, text = write(tmp_path, train("qwen", story)), "\ud834\udd5e e\ud800\u0301"
    assert Tokenizer(folder).encode(text) == reference(folder).encode(whole(text)).ids


def test_added_tokens_that_are_not_special(tmp_path, story):
    """Qwen3's <think> is such a one: transformers shows it in an answer. What a user types stays text."""
    spec = train("qwen", story)
    size = len(spec["model"]["vocab"])
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": size, "content": "<think>", **flags})
    folder = write(tmp_path, spec)
    ours = Tokenizer(folder)
    ids = [1, size, *ours.encode(" hm"), 2]
    assert ours.decode(ids) == reference(folder).decode(ids) == "<think> hm"
    assert size not in ours.encode("<think>")


def test_styles_differ(tmp_path, story):
    """Were one pattern used for all, the tests above would notice: the same text is cut in other places."""
    cuts = {}
    for style in ("gpt2", "smollm", "llama3"):
        ours = Tokenizer(write(tmp_path / style, train(style, story + "1234 2024\n\n" * 9)))
        cuts[style] = [ours.decode([i]) for i in ours.encode("n 2024\n\n")]
    assert len({str(c) for c in cuts.values()}) == 3, cuts


def test_merges_as_pairs(tmp_path, story):
    """tokenizers before 0.20 wrote a merge as one string with a space."""
    spec = train("gpt2", story)
    pairs = Tokenizer(write(tmp_path, spec)).encode(story)
    spec["model"]["merges"] = [" ".join(m) for m in spec["model"]["merges"]]
    assert Tokenizer(write(tmp_path, spec)).encode(story) == pairs and len(pairs) < len(story) / 2


def test_ids_in_any_order(tmp_path, story):
    """Ranks are places in the merge list, not ids: shuffled ids with gaps give the same cut."""
    spec = train("gpt2", story)
    plain = Tokenizer(write(tmp_path / "plain", spec)).encode(story)
    spec["model"]["vocab"] = {t: i if i < 3 else 5000 - 3 * i for t, i in spec["model"]["vocab"].items()}
    folder = write(tmp_path / "shuffled", spec)
    ids = Tokenizer(folder).encode(story)
    assert ids == [i if i < 3 else 5000 - 3 * i for i in plain] == reference(folder).encode(story).ids
    assert Tokenizer(folder).decode(ids) == story


# ---- refusals --------------------------------------------------------------------------------------------

BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PLAIN = {"model": BPE, "pre_tokenizer": BYTE_LEVEL, "normalizer": None}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize("change, named", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
    ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ({"model": BPE | {"byte_fallback": True}}, "byte fallback"),  # a converted SentencePiece file
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, "Sequence"),
    ({"pre_tokenizer": None}, "None"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "ByteLevel"),
    ({"pre_tokenizer": sequence(SPLIT, BYTE_LEVEL)}, "Split"),  # it would cut twice
    ({"pre_tokenizer": sequence(SPLIT | {"behavior": "Removed"}, BYTE_LEVEL | {"use_regex": False})},
     "Split"),
    ({"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)}, "Digits"),
])
def test_refused_by_name(tmp_path, change, named):
    with pytest.raises(ValueError, match=named) as error:
        Tokenizer(write(tmp_path, PLAIN | change))
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize("kind, named", [
    ("bpe", "NFKC"), ("bare bpe", "Metaspace"), ("unigram", "Unigram"), ("llama2", "byte fallback")])
def test_sentencepiece_is_refused(tmp_path, story, kind, named):
    """Real ones, trained here: SentencePiece's BPE, its unigram model, and what transformers makes of the
    tokenizer.model of Llama 2 and TinyLlama."""
    its = (tokenizers.SentencePieceUnigramTokenizer if kind == "unigram"
           else tokenizers.SentencePieceBPETokenizer)()
    its.train_from_iterator([story], vocab_size=200, show_progress=False)
    spec = json.loads(its.to_str())
    if kind == "bare bpe":  # nothing but its pre-tokenizer tells
        spec["normalizer"] = None
    if kind == "llama2":
        spec["model"]["byte_fallback"] = True
        spec |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}}
    with pytest.raises(ValueError, match=named) as error:
        Tokenizer(write(tmp_path, spec))
    assert "\n" not in str(error.value)


def test_plain_is_not_refused(tmp_path):
    """The spec that the refusals above change is itself taken, so each refusal is due to its change."""
    assert Tokenizer(write(tmp_path, PLAIN)).encode("cabc") == [0, 1]  # c has no token, so it vanishes


@pytest.mark.parametrize("eos, generation, ends", [
    (2, None, [2]), ([2, 1], None, [2, 1]), (2, {"eos_token_id": [5, 2]}, [2, 5]),
    ([2, 1], {"eos_token_id": 7}, [2, 1, 7]), (2, {"eos_token_id": None}, [2]), (2, {}, [2]),
    (None, {"eos_token_id": [7, 2]}, [7, 2]), (0, {"eos_token_id": 0}, [0])])
def test_ends_from_both_config_files(tmp_path, eos, generation, ends):
    """Llama 3 lists several end ids; of Qwen's chat models one file names one and the other two. A model is
    trained to say the first one; any of them ends an answer."""
    ours = Tokenizer(write(tmp_path, PLAIN, eos, generation))
    assert ours.eos == ends[0] and ours.ends == set(ends)


@pytest.mark.parametrize("eos, generation, named", [
    (None, None, "neither config.json nor generation_config.json has eos_token_id"),
    ([], {"eos_token_id": None}, "neither config.json nor generation_config.json has eos_token_id"),
    (2, {"eos_token_id": ["2"]}, r"eos_token_id.* must be whole numbers .* but 2 is there"),
    (2, {"eos_token_id": [[2]]}, "not a tokenizer that can be read"),
    (2, [2], "generation_config.json: must be a JSON object, but it is a list")])
def test_ends_that_are_refused(tmp_path, eos, generation, named):
    with pytest.raises(ValueError, match=named) as error:
        Tokenizer(write(tmp_path, PLAIN, eos, generation))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("config, generation, ends", [
    ([128001, 128008, 128009], [128001, 128008, 128009], {128001, 128008, 128009}),  # Llama 3.1, 3.2, 3.3
    (128009, [128001, 128009], {128001, 128009}),  # Llama 3
    (151645, [151645, 151643], {151645, 151643}),  # Qwen2.5, Qwen3
    (2, 2, {2})])  # SmolLM2, Mistral
def test_ends_of_the_models_that_people_take(tmp_path, config, generation, ends):
    """Instruct models, as they are published."""
    ours = Tokenizer(write(tmp_path, PLAIN, config, {"eos_token_id": generation}))
    assert ours.ends == ends


def test_null_in_tokenizer_json_means_absent(tmp_path):
    spec = PLAIN | {"added_tokens": None, "post_processor": None, "normalizer": None}
    assert Tokenizer(write(tmp_path, spec)).encode("cabc") == [0, 1]


def test_patterns(tmp_path):
    digits = {"type": "Digits", "individual_digits": True}
    assert split_pattern(BYTE_LEVEL, tmp_path) == GPT2_PATTERN
    assert split_pattern(sequence(digits, BYTE_LEVEL), tmp_path) == DIGITS_PATTERN


def test_missing_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing.*SentencePiece"):
        Tokenizer(tmp_path)
