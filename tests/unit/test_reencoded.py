"""speculative/reencoded and tokenizers: drafts that pass from one vocabulary to another as text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit import assets
from compresskit.decode import pad
from compresskit.errors import Conflict, ModelError
from compresskit.hf.tokenizer import load_tokenizer, vocabulary
from compresskit.spec import SamplingSpec

TOKENS = 512
NAME = "speculative/reencoded"


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory):
    """tiny:draft with every token under another id: the same model, another vocabulary."""
    folder = tmp_path_factory.mktemp("models") / "renumbered"
    shutil.copytree(assets.tiny_path("draft"), folder)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    place = [0] * TOKENS
    for new, old in enumerate(order.tolist()):
        place[old] = new
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][order].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    table = document["model"]["vocab"]
    document["model"]["vocab"] = {token: place[number] for token, number in table.items()}
    for token in document["added_tokens"]:
        token["id"] = place[token["id"]]
    processor = document.get("post_processor") or {}
    for part in (processor, *processor.get("processors", ())):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [place[number] for number in special["ids"]]
    file.write_text(json.dumps(document), encoding="utf-8")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(config.get(key), int):
                config[key] = place[config[key]]
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def prompts(system, sizes):
    ids = system.tokenizer.encode(assets.text_path("heldout").read_text(encoding="utf-8")[:2000])
    return [ids[:size] for size in sizes]


@pytest.fixture(scope="module")
def plain(open_stack):
    with open_stack() as opened:
        yield opened.system


def test_the_model_is_the_same_and_its_vocabulary_is_not(renumbered):
    ours, theirs = vocabulary(assets.tiny_path("draft")), vocabulary(renumbered)
    assert set(ours) == set(theirs)
    assert ours != theirs
    text = "Anna has a red ball."
    assert load_tokenizer(renumbered, None).encode(text) != load_tokenizer(
        assets.tiny_path("draft"), None
    ).encode(text)


def test_tokens_are_those_of_plain_decoding_and_drafts_are_as_good(
    open_stack, lab, plain, renumbered
):
    """Through text and back, the guesses are those of the same model in the target's own ids."""
    steps = []
    for method in (f"{NAME}:model={renumbered}", "speculative/draft_model"):
        with open_stack(method) as opened:
            steps.append([])
            for ids in prompts(plain, (50, 90, 20)):
                request = lab.request(torch.tensor([ids]), 40)
                chunks = list(opened.system.generate(request))
                assert lab.rows(chunks) == lab.rows(plain.generate(request))
                steps[-1].append(sum(chunk.accepted for chunk in chunks))
    assert steps[0] == steps[1]
    assert sum(steps[0]) > 40


def test_rows_of_a_batch_get_what_they_get_alone(open_stack, lab, plain, renumbered):
    rows = prompts(plain, (1, 5, 12, 30))
    tokens, mask = pad(rows, device=torch.device("cpu"))
    alone = [lab.rows(plain.generate(lab.request(torch.tensor([ids]), 20)))[0] for ids in rows]
    with open_stack(f"{NAME}:model={renumbered}") as opened:
        chunks = list(opened.system.generate(lab.request(tokens, 20, mask=mask)))
    assert lab.rows(chunks) == alone
    assert sum(chunk.accepted for chunk in chunks) > 0


def test_guesses_are_certain_and_never_unknown_ids(open_stack, lab, renumbered):
    with open_stack(f"{NAME}:model={renumbered},draft=6") as opened:
        system = opened.system
        (ids,) = prompts(system, (40,))
        request = lab.request(
            torch.tensor([ids]), 30, sampling=SamplingSpec(temperature=1.0), seed=3
        )
        drafter = system.decode.__self__.drafter(system, request)
        with torch.inference_mode():
            drafter.observe([ids])
            (draft,) = drafter.draft([3])
            assert draft.q is None
            assert 0 < len(draft.tokens) <= 3
            drafter.known = 0
            assert drafter.draft([3])[0].tokens == []
        assert len(lab.rows(system.generate(request))[0]) == 30


def test_a_text_that_ends_within_a_character_gets_no_draft(open_stack, lab, renumbered):
    with open_stack(f"{NAME}:model={renumbered}") as opened:
        system = opened.system
        whole = system.tokenizer.encode("naïve ☃")
        for ids, asked in ((whole, True), (whole[:-1], False)):
            request = lab.request(torch.tensor([ids]), 5)
            drafter = system.decode.__self__.drafter(system, request)
            assert (drafter._translated(ids) is not None) == asked


def test_a_text_that_outgrows_the_room_gets_no_draft(open_stack, lab, renumbered):
    with open_stack(f"{NAME}:model={renumbered}") as opened:
        system = opened.system
        (ids,) = prompts(system, (40,))
        request = lab.request(torch.tensor([ids]), 5)
        drafter = system.decode.__self__.drafter(system, request)
        drafter.reader.room = len(drafter._translated(ids)) + drafter.limit
        assert drafter._translated(ids) is not None
        drafter.reader.room -= 1
        assert drafter._translated(ids) is None


# Who takes which


def test_a_draft_of_another_vocabulary_is_refused_where_ids_must_agree(open_stack, renumbered):
    for method in ("speculative/draft_model", "speculative/hf_assisted"):
        with (
            pytest.raises(Conflict, match="another vocabulary than tiny"),
            open_stack(f"{method}:model={renumbered}"),
        ):
            pass


def test_a_recurrent_draft_is_refused(open_stack, renumbered, tmp_path):
    folder = tmp_path / "recurrent"
    shutil.copytree(renumbered, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["layer_types"] = ["linear_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (
        pytest.raises(Conflict, match="recurrent state"),
        open_stack(f"{NAME}:model={folder}"),
    ):
        pass


@pytest.mark.parametrize("role", ["target", "draft", "moe"])
def test_a_vocabulary_read_from_the_file_is_the_tokenizers(role):
    path = assets.tiny_path(role)
    assert vocabulary(path) == load_tokenizer(path, None).inner.get_vocab()


def test_vocabularies_in_lists_and_broken_files(tmp_path):
    file = tmp_path / "tokenizer.json"
    unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    file.write_text(json.dumps(unigram), encoding="utf-8")
    assert vocabulary(tmp_path) == {"a": 0, "b": 1}
    for broken in ("{", "[]", '{"model": {}}'):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(ModelError, match="not a tokenizer"):
            vocabulary(tmp_path)
