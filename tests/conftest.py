"""What the tests share: tiny random models of each family, the real base model, and texts of our own.

The tiny models are made by transformers in temporary folders; nothing here asks the network, except
that `base` lets data/base_model.py fetch the base model when data/base is not there yet.
"""
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may ask the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from data.base_model import ensure_base

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny: on a busy machine more threads only wait for each other

# Weights are large (0.2, not 0.02): with the usual small ones attention is all but uniform, and a model
# with the wrong rotary positions would agree with the right one to four digits.
SMALL = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
         "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 256}

STORY = """
The lighthouse keeper of Little Skerry owned eleven pillows, one for every kind of weather. The
first was stuffed with goose down and served on calm nights. The second held dried lavender, because
fog made her restless. When the wind came from the north she took the wool one, and when it came
from the west she took two at once and put one of them over her ears. Nobody on the mainland knew
about this. They only saw the light turn, once every 12 seconds, and thought that a person so
regular must be rather dull.

In the spring of the year in which the supply boat was late, a young engineer came out to measure
the tower. He had a notebook, a folding ruler and no pillow at all. "I can sleep on anything," he
said, and for three nights he did: on a coil of rope, on a sack of potatoes and on the second volume
of an encyclopedia. On the fourth night a storm broke a window, and he could not sleep on anything
any more. The keeper looked at him for a while. Then she went upstairs, stood in front of her shelf
and thought about which pillow a person like that would need.

It was not the one that she would have taken herself. She chose the ninth, filled with buckwheat,
which rustles when one turns the head, since a man who counts things all day should have something
to listen to at night. He slept until noon. When he asked her how she had known, she said that she
had not known: she had tried many pillows on many guests over 30 years, had remembered who woke up
smiling, and had made fewer mistakes each year.

The engineer wrote this down in his notebook, under the height of the tower (38.5 metres) and the
thickness of the wall. Much later, when he taught at a school on the mainland, he told his pupils
that there are two ways to help somebody who cannot do a thing yet. One can change the person, which
is slow, or one can put the right thing under the person's head, which is quick, provided that
somebody has learned how to choose. Most of them laughed. A girl in the last row asked how many
pillows one should own to begin with, and he found that he had no answer.
"""


def pad_rows(rows, left=True, width=0):
    """Lists of ids -> ids (B, T), padded with id 0 at the left or the right, and what is real (B, T)."""
    width = max(width, *map(len, rows), 0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, own in enumerate(rows):
        place = slice(width - len(own), width) if left else slice(len(own))
        ids[row, place], real[row, place] = torch.tensor(own), True
    return ids, real


def pytest_report_header():
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


@pytest.fixture(scope="session")
def story() -> str:
    """About 500 tokens of plain English with some numbers, one line a paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in STORY.split("\n\n")) + "\n"


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """make_folder(family, **config) -> (folder, transformers' model in fp32): tiny and random."""
    def make(family: str, dtype=torch.float32, shard="1GB", **changes):
        config = transformers.AutoConfig.for_model(family, **(SMALL | changes))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # transformers starts norms at 1 and biases at 0, where mistakes do not show
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(family)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        # read again: .to(bfloat16) rounds the rotary frequencies as well, which no file holds
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager")
        return folder, model.eval().requires_grad_(False)
    return make


@pytest.fixture(scope="session")
def llama(make_folder):
    """The plain tiny Llama: (folder, transformers' model)."""
    return make_folder("llama")


@pytest.fixture(scope="session")
def base():
    """The folder of the real base model, fetched and converted if it is not there yet."""
    return ensure_base("smollm2")


@pytest.fixture(scope="session")
def base_model(base):
    """The real base model in fp32, shared: no test may change it."""
    import model
    return model.load(base)


@pytest.fixture(scope="session")
def base_reference(base):
    """The same weights in transformers, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def base_tokenizer(base):
    from data.tokenizer import Tokenizer
    return Tokenizer(base)
