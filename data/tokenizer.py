"""Text <-> token ids with tiktoken, built from the model's own tokenizer.json. Nothing is fetched.

A byte-level BPE tokenizer is three things: a pattern that cuts text into pieces, an ordered list of
merges (which two neighbours become one token first), and the id of each token. Hugging Face keeps all
three in tokenizer.json; tiktoken wants the pattern and a rank for every token. Ranks here are places in the
merge list, and one table maps them to the model's ids, so the ids may be in any order and may have gaps.

Simplified: byte-level BPE alone (GPT-2, Llama 3, Qwen, SmolLM); SentencePiece files are refused by name.
Special tokens inside text are text: a user cannot type a control token.

Try: python -c "from data.tokenizer import Tokenizer as T; print(T('data/base').encode('It is 10 pm.'))"
"""
import json
import unicodedata
from itertools import takewhile
from pathlib import Path

import tiktoken

# What ByteLevel(use_regex) cuts by: contractions, words, numbers, marks, white space (GPT-2's rule).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With Digits(individual_digits) before it (SmolLM): each digit stands alone and takes no leading space; white
# space before a digit ends its piece there, hence \p{N} in the look-ahead. GPT-2's own pattern gives
# other ids for most numbers.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LONGEST_TEXT = 200_000  # characters; in a million blanks the stack of tiktoken's pattern overflows: panic


def check_fields(content: dict, file: Path, **kinds) -> dict:
    """`content` of a JSON file; ValueError: a field is missing or of another kind. A number must be above 0,
    finite and not absurd: a billion layers would be built before a tensor is missed."""
    for field, kind in kinds.items():
        value, number = content.get(field), kind in (int, float)
        right = isinstance(value, (int, float) if kind is float else kind)
        right &= kind is bool or not isinstance(value, bool)  # Python counts True as an int
        if not right or number and not 0 < value < (1 << 24 if kind is int else 1e30):
            what = "a number above 0" if number else getattr(kind, "__name__", kind)
            found = json.dumps(value)[:60] if field in content else "missing"
            raise ValueError(f"{file}: field '{field}' must be {what}, it is {found}; fetch or make the "
                             "folder again.")
    return content


def read_json(file: Path, **kinds) -> dict:
    """A JSON object with fields of these kinds; FileNotFoundError or ValueError in one sentence."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; is {file.parent} the right folder?")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); make or fetch it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a JSON object is expected, this is a {type(content).__name__}; make or "
                         "fetch it again.")
    return check_fields(content, file, **kinds)


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
    """encode / decode for the model in `folder`; `eos` ends an answer, `bos` (maybe empty) starts a text."""

    def __init__(self, folder: str | Path):
        file = Path(folder) / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a model folder needs its tokenizer.json "
                                    "(SentencePiece's tokenizer.model alone is not supported); fetch it.")
        try:
            self.read(file)
        except (LookupError, TypeError, AttributeError) as error:  # JSON of another shape
            raise ValueError(f"{file}: no tokenizer that can be read ({type(error).__name__}: {error}); "
                             "fetch the model again.") from None

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
        added = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        self.unknown = vocab.get(bpe.get("unk_token"), added.get(bpe.get("unk_token")))

        # Rank order: the 256 bytes, then the merges. tiktoken panics on a byte without a rank, and SmolLM2
        # lacks 21 of them: they get one too, which the table maps to the unknown token (or to nothing: -1).
        ranks = {bytes([b]): b for b in range(256)}
        by_byte = {b: c for c, b in alphabet.items()}
        missing = -1 if self.unknown is None else self.unknown
        self.ids = [vocab.get(by_byte[b], missing) for b in range(256)]
        merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        tokens = [left + right for left, right in merges]
        if bpe.get("ignore_merges"):  # Llama 3: a piece that is a token is taken whole, merges or not
            tokens += [t for t in vocab if all(c in alphabet for c in t)]
        for token in tokens:
            as_bytes = bytes(alphabet[c] for c in token)
            if as_bytes not in ranks:  # two merges can make one token: the earlier gives its rank
                ranks[as_bytes] = len(self.ids)
                self.ids.append(vocab[token])
        # No special token is given to tiktoken: what a user types can then never become one.
        self.bpe = tiktoken.Encoding(file.parent.name, pat_str=pattern,
                                     mergeable_ranks=ranks, special_tokens={})
        self.bytes = {self.ids[rank]: token for token, rank in ranks.items() if self.ids[rank] != missing}
        # control tokens show as nothing; Qwen3's <think>, added but not special, as itself
        self.bytes.update({t["id"]: b"" if t.get("special", True) else t["content"].encode()
                           for t in spec.get("added_tokens", [])})

        config = read_json(file.parent / "config.json")
        eos = config.get("eos_token_id")
        self.eos: int = eos[0] if isinstance(eos, list) else eos
        # bos: the control tokens that Hugging Face puts before any text (Llama 3's begin_of_text)
        processor = spec.get("post_processor") or {}
        template = next((step["single"] for step in processor.get("processors", [processor])
                         if step.get("type") == "TemplateProcessing"), [])
        self.bos: list[int] = [added[piece["SpecialToken"]["id"]]
                               for piece in takewhile(lambda piece: "SpecialToken" in piece, template)]
        rows = config.get("vocab_size", 1 << 31)  # of the embedding; often more than there are ids
        if wrong := [i for i in [*self.ids, *self.bos, self.eos] if type(i) is not int or not -1 <= i < rows]:
            raise ValueError(f"{file}: its ids (and eos_token_id) must be whole numbers below config.json's "
                             f"vocab_size {rows}, but {wrong[0]} is there; take both files of one model.")

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no bos, no eos, and nothing in it is read as a control token."""
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text):,} characters is too long for any context; shorten it.")
        # half a surrogate pair (a shell can bring one; records that have one are refused) becomes U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for i in map(self.ids.__getitem__, self.bpe.encode_ordinary(text)) if i >= 0]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control tokens vanish, bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")
