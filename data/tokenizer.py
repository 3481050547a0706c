"""Text <-> token ids with tiktoken, built from the model's own tokenizer.json. Nothing is fetched.

A byte-level BPE tokenizer is three things: a pattern that cuts text into pieces, an ordered list of merges
(which two neighbours become one token first), and the id of each token. Hugging Face keeps all three in
tokenizer.json; tiktoken wants the pattern and a rank for every token. A rank here is a place in the list of
merges, and one table maps ranks to the model's ids, so ids may be in any order and may have gaps.

Simplified: byte-level BPE only (GPT-2, Llama 3, Qwen, SmolLM); a SentencePiece file is refused by name.
Special tokens inside a text are plain text: a user cannot type a control token.

Try: python -c "from data.tokenizer import Tokenizer as T; print(T('data/base').encode('It is 10 pm.'))"
"""
import unicodedata
from itertools import takewhile
from pathlib import Path

import tiktoken

from data.files import read_json

# What ByteLevel(use_regex) cuts by: contractions, words, numbers, punctuation, white space (GPT-2's rule).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With Digits(individual_digits) before it (SmolLM): each digit is a piece of its own and takes no leading
# space, so white space before a digit ends its piece there: hence \p{N} in the look-ahead.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LONGEST_TEXT = 200_000  # characters; a million blanks overflow the stack of tiktoken's pattern: a panic


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in tokenizer.json: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def split_pattern(pre_tokenizer: dict | None, file: Path) -> str:
    """The one regular expression that does what this file's chain of pre-tokenizers does, or a ValueError."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] if step else None for step in steps]
    last = steps[-1] or {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        own_regex = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and own_regex:
            return DIGITS_PATTERN
        if kinds == ["Split", "ByteLevel"] and not own_regex:  # Llama 3, Qwen: the pattern stands in the file
            pattern = steps[0]["pattern"].get("Regex")
            if pattern and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
                return pattern
    raise ValueError(f"{file}: pre-tokenizer {kinds} is not supported; use a byte-level BPE model such as "
                     "SmolLM2, Llama 3 or Qwen.")


class Tokenizer:
    """encode / decode for the model in `folder`. `bos` (maybe empty) starts a text, `eos` ends an answer in
    training, and each id of `ends` ends one in generation: chat models often have several."""

    def __init__(self, folder: str | Path):
        file = Path(folder) / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a model folder needs its tokenizer.json "
                                    "(SentencePiece's tokenizer.model alone is not supported); fetch it.")
        try:
            self.read(file)
        except (LookupError, TypeError, AttributeError) as error:  # JSON of another shape
            raise ValueError(f"{file}: not a tokenizer that can be read ({type(error).__name__}: "
                             f"{error}); fetch the model again.") from None

    def read(self, file: Path) -> None:
        spec = read_json(file)
        bpe = spec["model"]
        if bpe["type"] != "BPE" or bpe.get("byte_fallback"):
            raise ValueError(f"{file}: a {bpe['type']} tokenizer (or one with byte fallback) is not "
                             "byte-level BPE; use a model such as SmolLM2, Llama 3 or Qwen.")
        normalizer = (spec.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise ValueError(f"{file}: normalizer {normalizer} is not supported; only NFC or none is.")
        self.nfc = normalizer == "NFC"
        pattern = split_pattern(spec.get("pre_tokenizer"), file)  # first: it refuses what is not byte-level

        alphabet = byte_alphabet()
        vocab = bpe["vocab"]
        added_tokens = spec.get("added_tokens") or []
        added = {t["content"]: t["id"] for t in added_tokens}
        self.unknown = vocab.get(bpe.get("unk_token"), added.get(bpe.get("unk_token")))

        # Ranks: the 256 bytes, then the merges. TRAP: tiktoken panics on a byte without a rank, and SmolLM2
        # lacks 21 bytes. They get a rank too, which the table maps to the unknown token (or to nothing: -1).
        ranks = {bytes([b]): b for b in range(256)}
        by_byte = {b: c for c, b in alphabet.items()}
        missing = -1 if self.unknown is None else self.unknown
        self.ids = [vocab.get(by_byte[b], missing) for b in range(256)]
        merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        tokens = [left + right for left, right in merges]
        if bpe.get("ignore_merges"):  # Llama 3: a piece that is a token is never split
            tokens += [t for t in vocab if all(c in alphabet for c in t)]
        for token in tokens:
            as_bytes = bytes(alphabet[c] for c in token)
            if as_bytes not in ranks:  # two merges can make one token: the earlier one counts
                ranks[as_bytes] = len(self.ids)
                self.ids.append(vocab[token])
        # tiktoken gets no special tokens, so no text can become one.
        self.bpe = tiktoken.Encoding(file.parent.name, pat_str=pattern,
                                     mergeable_ranks=ranks, special_tokens={})
        self.bytes = {self.ids[rank]: token for token, rank in ranks.items() if self.ids[rank] != missing}
        # Control tokens decode to nothing; Qwen3's <think>, added but not special, to itself.
        self.bytes.update({t["id"]: b"" if t.get("special", True) else t["content"].encode()
                           for t in added_tokens})

        config, ends = read_json(file.parent / "config.json"), []
        generation = file.parent / "generation_config.json"
        for source in (config, read_json(generation) if generation.exists() else {}):
            ids = source.get("eos_token_id")
            ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not ends:
            raise ValueError(f"{file.parent}: neither config.json nor generation_config.json has "
                             "eos_token_id; fetch the model again.")
        self.eos, self.ends = ends[0], frozenset(ends)
        # bos: the control tokens that Hugging Face puts before any text (Llama 3: begin_of_text)
        processor = spec.get("post_processor") or {}
        template = next((step["single"] for step in processor.get("processors", [processor])
                         if step.get("type") == "TemplateProcessing"), [])
        self.bos: list[int] = [added[piece["SpecialToken"]["id"]]
                               for piece in takewhile(lambda piece: "SpecialToken" in piece, template)]
        rows = config.get("vocab_size", 1 << 31)  # of the embedding; often more than there are ids
        least = [*((i, -1) for i in self.ids), *((i, 0) for i in [*self.bos, *ends])]  # -1: a byte without id
        if wrong := [i for i, low in least if type(i) is not int or not low <= i < rows]:
            raise ValueError(f"{file}: its ids (and eos_token_id) must be whole numbers below config.json's "
                             f"vocab_size {rows}, but {wrong[0]} is there; take both files of one model.")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no bos, no eos, and nothing in it is read as a control token."""
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text):,} characters is too long for any context; shorten it.")
        # Half a surrogate pair becomes U+FFFD. A shell can bring one; records with one are refused.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for i in map(self.ids.__getitem__, self.bpe.encode_ordinary(text)) if i >= 0]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`. Control tokens vanish; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")
