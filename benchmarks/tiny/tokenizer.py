"""The tokenizer of the tiny models: byte-level BPE of 512 entries, trained on the corpus.

    5 special tokens + 256 bytes + 251 merges

Every byte is an entry, so any UTF-8 text survives encode and decode. Digits always stand alone:
" 4821" is four tokens wherever it appears, which is what makes a value the same string when stated
and when recalled. As with words, a space before the first digit belongs to it: the value then
follows its name directly. An earlier recipe with a token of its own for that space recalled words
(100 %) but not whose number was asked (35 %, hardly more than guessing); other parts of the recipe
changed with it, so the space alone is not shown to be the cause.

Encoding adds `<|bos|>` unless `add_special_tokens=False`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from benchmarks.tiny.corpus import TRAIN, documents
from benchmarks.tiny.domains import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 512
CONTEXT = 2048
SPECIALS = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = 0, 1, 2
DOCUMENTS = 4000
"""Training documents whose texts decide the merges."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '\n' if not loop.first }}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% else %}{{ '<|user|>\n' }}"
    "{% endif %}{{ message['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
"""System messages are written as user turns: the models never saw a third role."""


def _texts() -> Iterator[str]:
    for text in documents(TRAIN[:DOCUMENTS]):
        # Literal turn markers would otherwise be merged like words.
        if text.domain != "chat":
            yield text.text
    # Names are the keys of recall: mentioned often enough, each becomes one token.
    for name in NAMES:
        yield f"What is the code of {name}? {name}\n" * 200


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same corpus always gives the same merges."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
