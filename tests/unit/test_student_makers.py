"""Every maker on every architecture: what it makes runs, survives the disk, and is as large as predicted."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from compresskit.assets import tiny_path
from compresskit.errors import Conflict, InputError, SpecError, UnknownName
from compresskit.hf import blocks, view
from compresskit.hf.student import bpe
from compresskit.hf.student.layers import Layers, influence
from compresskit.hf.student.maker import Draft
from compresskit.hf.student.parse import MAKERS, make, parse, shape
from compresskit.hf.student.scratch import Scratch
from compresskit.hf.student.sizes import size_of_config, size_of_model
from compresskit.hf.student.width import neurons
from compresskit.hf.tiny import ARCHITECTURES, random_model

STUDENTS = (
    "layers:keep=0.5",
    "layers:blocks=[0,2]",
    "width:ffn=0.5,heads=0.5",
    "scratch:num_hidden_layers=1,hidden_size=32",
    "vocabulary:size=300",
    "layers:keep=1,choose=last + width:ffn=48 + vocabulary:size=300",
)
REFUSED = {
    ("width", "mixtral"): "routed experts",
    ("width", "qwen3_moe"): "routed experts",
    ("heads", "gpt2"): "heads of gpt2 cannot be cut",
    ("heads", "gpt_neox"): "heads of gpt_neox cannot be cut",
}
DEEP: dict[str, Any] = {"num_hidden_layers": 4}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_path("target"))


@pytest.fixture(scope="module")
def rows():
    return torch.randint(5, 512, (4, 48), generator=torch.Generator().manual_seed(1))


def teacher(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    options = {"layer_types": KINDS} if architecture == "gemma3" else {}
    return random_model(architecture, dtype=dtype, **DEEP, **options)


def draft(model: Any, tokenizer: Any) -> Draft:
    return Draft(model, tokenizer, tuple(range(model.config.num_hidden_layers)))


def refusal(text: str, architecture: str) -> str | None:
    return next(
        (why for (word, of), why in REFUSED.items() if word in text and of == architecture), None
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("text", STUDENTS)
def test_a_student_runs_survives_the_disk_and_is_as_predicted(
    text, architecture, tokenizer, rows, tmp_path
):
    model = teacher(architecture, torch.bfloat16)
    makers = parse(text)
    if why := refusal(text, architecture):
        with pytest.raises(SpecError, match=why):
            shape(makers, model.config)
        return
    config = copy.deepcopy(model.config)
    predicted = size_of_config(shape(makers, config), torch.bfloat16)
    assert config.to_dict() == model.config.to_dict()

    made = make(makers, draft(model, tokenizer), rows, seed=0)
    student = made.model
    assert size_of_model(student) == predicted
    whole = size_of_model(model)
    assert predicted.parameters < whole.parameters
    assert predicted.weight_bytes < whole.weight_bytes
    assert len(made.blocks) == student.config.num_hidden_layers
    assert not {id(p) for p in student.parameters()} & {id(p) for p in model.parameters()}
    assert all(parameter.requires_grad for parameter in student.parameters())

    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert stored == predicted.weight_bytes
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = rows[:2] % student.config.vocab_size
    with torch.no_grad():
        logits = student(input_ids=tokens, use_cache=False).logits
        assert torch.equal(again(input_ids=tokens, use_cache=False).logits, logits)
        cached = student(input_ids=tokens, use_cache=True)
    assert logits.isfinite().all()
    # The cache has as many layers as the student, and each of its tokens takes the bytes foretold.
    layers = cached.past_key_values.layers
    shorter = student(input_ids=tokens[:1, :5], use_cache=True).past_key_values.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in shorter)
    assert len(layers) == student.config.num_hidden_layers
    assert held == 5 * predicted.kv_bytes_per_token


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropping_blocks_computes_what_skipping_them_does(architecture, tokenizer, rows):
    model = teacher(architecture)
    made = make(parse("layers:blocks=[0,2,3]"), draft(model, tokenizer), rows, seed=0)
    skipping = view.keeping(model, [0, 2, 3])
    with torch.no_grad():
        wanted = skipping(input_ids=rows, use_cache=False).logits
        assert torch.equal(made.model(input_ids=rows, use_cache=False).logits, wanted)
        # Other blocks compute something else.
        other = make(parse("layers:blocks=[0,1,3]"), draft(model, tokenizer), rows, seed=0)
        assert not torch.equal(other.model(input_ids=rows, use_cache=False).logits, wanted)
    assert made.blocks == (0, 2, 3)
    if architecture == "gemma3":
        assert made.model.config.layer_types == [KINDS[index] for index in (0, 2, 3)]


def test_dropping_nothing_but_dead_parts_changes_nothing(tokenizer, rows):
    """Neurons and heads that add nothing are the ones to go; without them the model is the same."""
    model = teacher("qwen2")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 1::2] = 0
            block.self_attn.o_proj.weight[:, 32:] = 0
    made = make(parse("width:ffn=0.5,heads=0.5"), draft(model, tokenizer), rows, seed=0)
    control = make(
        parse("width:ffn=0.5,heads=0.5,choose=random"), draft(model, tokenizer), rows, seed=0
    )
    with torch.no_grad():
        wanted = model(input_ids=rows).logits
        torch.testing.assert_close(made.model(input_ids=rows).logits, wanted)
        assert (control.model(input_ids=rows).logits - wanted).abs().max() > 1
    kept = made.facts["width"]["kept_importance"]
    assert kept["neurons"] == pytest.approx([1.0] * 4) == kept["groups"]
    assert made.facts["width"]["heads"]["groups_kept"] == [[0]] * 4


def test_influence_of_a_block_is_one_minus_the_cosine_that_it_turns_by(rows):
    """A block that passes its input on has none; the others as transformers' hidden states say."""
    model = teacher("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
        states = model(input_ids=rows, output_hidden_states=True).hidden_states
    found = influence(model, [rows[:2], rows[2:]])
    assert found[1] == pytest.approx(0.0, abs=1e-6)
    # The last of transformers' states is behind the final norm, so the last block is left out.
    for index in range(3):
        before, after = states[index].double(), states[index + 1].double()
        dot = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[index] == pytest.approx(1 - dot.mean().item(), abs=1e-6)
    made = make(parse("layers:keep=3"), Draft(model, None, (0, 1, 2, 3)), rows, seed=0)
    assert made.facts["layers"]["dropped"] == [1]
    assert made.facts["layers"]["influence"] == pytest.approx(list(found))


def test_choices_that_look_at_no_text_are_rules(tokenizer, rows):
    model = random_model("llama", num_hidden_layers=7)

    def kept(text: str, seed: int = 0) -> tuple[int, ...]:
        return make(parse(text), draft(model, tokenizer), rows[:0], seed=seed).blocks

    assert kept("layers:keep=3,choose=uniform") == (0, 3, 6)
    assert kept("layers:keep=4,choose=last") == (0, 1, 2, 6)
    assert kept("layers:keep=4,choose=random") == kept("layers:keep=4,choose=random")
    assert len({kept("layers:keep=4,choose=random", seed) for seed in range(8)}) > 1
    with pytest.raises(InputError, match="there are no rows"):
        kept("layers:keep=3")


def test_blocks_that_are_dense_by_number_stay_dense(tokenizer, rows):
    model = random_model("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 3])
    made = make(parse("layers:blocks=[1,3]"), draft(model, tokenizer), rows, seed=0)
    assert made.model.config.mlp_only_layers == [1]
    with pytest.raises(SpecError, match="decoder_sparse_step=2"):
        config = random_model("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2).config
        shape(parse("layers:keep=2"), config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scratch_follows_from_the_seed(architecture, tokenizer, rows):
    model = teacher(architecture)
    text = "scratch:num_hidden_layers=2,hidden_size=32,embedding_spread=8"
    one, same, other = (
        make(parse(text), draft(model, tokenizer), rows, seed=seed).model for seed in (3, 3, 4)
    )
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    plain = make(parse(text.replace("=8", "=1")), draft(model, tokenizer), rows, seed=3).model
    weight = plain.get_input_embeddings().weight
    assert torch.equal(one.get_input_embeddings().weight, weight * 8)


def test_scratch_makes_the_shipped_draft_as_its_recipe_did(tokenizer, rows):
    """Weight for weight what `benchmarks/tiny` begins the draft with."""
    from benchmarks.tiny.models import build_model

    target = AutoModelForCausalLM.from_pretrained(tiny_path("target"))
    sizes = "num_hidden_layers=2,hidden_size=64,intermediate_size=256"
    made = make(
        parse(f"scratch:{sizes},embedding_spread=8"), draft(target, tokenizer), rows, seed=20
    )
    with torch.random.fork_rng():
        wanted = build_model("draft", 20)
    for (name, weight), (other, found) in zip(
        wanted.named_parameters(), made.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, found), name
    assert made.blocks == (1, 3)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", SpecError, "no maker is named"),
        ("layer:keep=1", UnknownName, "Did you mean 'layers'"),
        ("layers:kep=1", SpecError, "Did you mean 'keep'"),
        ("layers:keep=1.5", SpecError, "layers"),
        ("layers:keep=0", SpecError, "layers"),
        ("layers:keep=0.5,blocks=[1]", SpecError, "leave keep and choose out"),
        ("layers:blocks=[2,1]", SpecError, "rising order"),
        ("width", SpecError, "say ffn=, heads= or both"),
        ("width:choose=random", SpecError, "say ffn=, heads= or both"),
        ("vocabulary", SpecError, "size"),
        ("layers:keep=1 + layers:keep=1", SpecError, "layers is there twice"),
        ("layers:keep=1 + scratch", SpecError, "Put scratch first"),
        ("scratch + width:ffn=0.5", SpecError, "nothing in random weights that width"),
        ("vocabulary:size=300 + layers", SpecError, "Put vocabulary last"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(text, error, says):
    with pytest.raises(error, match=says) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers:keep=4", "keeps 4 of 4 blocks"),
        ("layers:keep=0.99", "keeps 4 of 4 blocks"),
        ("layers:blocks=[0,4]", "List some of 0 to 3"),
        ("width:ffn=128", "leaves 128 of 128 neurons"),
        ("width:heads=3", "multiple of 2 below 4"),
        ("width:heads=4", "multiple of 2 below 4"),
        ("width:heads=0.9", "leaves 2 of 2 groups"),
        ("vocabulary:size=512", "no fewer than the 512 tokens"),
        ("scratch:hiden_size=32", "Did you mean 'hidden_size'"),
        ("scratch:vocab_size=300", "Add vocabulary:size=N"),
        ("scratch:eos_token_id=3", "comes with the teacher"),
        ("scratch:hidden_size=wide", "scratch: llama does not take it"),
        ("scratch:num_attention_heads=3", "3 query heads cannot share 2"),
        ("scratch:head_dim=15", "must be even"),
        ("scratch:hidden_size=0", "hidden_size must be at least 1"),
        ("scratch:num_key_value_heads=0", "num_key_value_heads must be at least 1"),
    ],
)
def test_what_does_not_suit_the_teacher_is_refused_before_any_weights(text, says):
    with pytest.raises(SpecError, match=says) as caught:
        shape(parse(text), teacher("llama").config)
    assert "\n" not in str(caught.value)


def test_a_width_that_heads_do_not_divide_is_refused_where_it_is_not_given():
    with pytest.raises(SpecError, match="multiple of 4, such as 32"):
        shape(parse("scratch:hidden_size=34"), teacher("gpt_neox").config)


def test_lists_for_blocks_are_cut_or_asked_for():
    config = teacher("gemma3").config
    assert shape(parse("scratch:num_hidden_layers=3"), config).layer_types == KINDS[:3]
    with pytest.raises(SpecError, match=r"Say layer_types=\[\.\.\.\] too"):
        shape(parse("scratch:num_hidden_layers=5"), config)
    listed = json.dumps(["full_attention"] * 5)
    made = shape(parse(f"scratch:num_hidden_layers=5,layer_types={listed}"), config)
    assert made.layer_types == ["full_attention"] * 5


def test_quantised_and_nested_teachers_are_refused(tokenizer, rows):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = copy.deepcopy(teacher("llama").config)
    config.quantization_config = {"quant_method": "gptq"}
    nested = CONFIG_MAPPING["gemma3"]()
    for text in STUDENTS[:5]:
        with pytest.raises(SpecError, match="checkpoint is quantised"):
            shape(parse(text), config)
        with pytest.raises(SpecError, match="inside a larger one"):
            shape(parse(text), nested)

    class Packed(nn.Module):
        def held_bytes(self) -> dict[str, int]:
            return {"weight": 1}

    model = teacher("llama")
    model.model.layers[0].mlp.up_proj = Packed()
    with pytest.raises(Conflict, match=r"up_proj is packed. Load the teacher dense"):
        make(parse("layers:blocks=[0]"), draft(model, tokenizer), rows, seed=0)


def test_a_model_with_more_than_its_config_says_is_refused(tokenizer, rows):
    model = teacher("llama")
    model.model.layers[1].mlp.up_proj.bias = nn.Parameter(torch.zeros(128))
    with pytest.raises(
        Conflict, match=r"keeps more than its config says.*layers\.1\.mlp\.up_proj\.bias"
    ):
        make(parse("layers:blocks=[0,1]"), draft(model, tokenizer), rows, seed=0)
    # The block that has it may go.
    assert make(parse("layers:blocks=[0,2]"), draft(model, tokenizer), rows, seed=0).blocks == (
        0,
        2,
    )


@pytest.mark.parametrize("text", STUDENTS)
def test_making_a_student_draws_from_its_own_seed_only(text, tokenizer, rows):
    before = torch.get_rng_state()
    model = teacher("llama")
    shape(parse(text), model.config)
    made = [make(parse(text), draft(model, tokenizer), rows, seed=1).model for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for one, again in zip(*(student.parameters() for student in made), strict=True):
        assert torch.equal(one, again)


def test_makers_survive_their_own_json():
    for text in (*STUDENTS, "scratch:num_hidden_layers=1,rope_parameters={}"):
        for maker in parse(text):
            document = maker.model_dump(mode="json")
            assert type(maker).decode(document, where="again") == maker
    assert set(MAKERS) == {"layers", "width", "scratch", "given", "vocabulary"}
    assert isinstance(parse("layers")[0], Layers)
    assert isinstance(parse("scratch")[0], Scratch)


@pytest.mark.parametrize(
    ("wanted", "size", "left"),
    [
        (0.5, 1536, 768),
        (0.75, 384, 288),
        (0.3, 1536, 448),
        (0.5, 48, 24),
        (100, 384, 100),
        (0.1, 60, 6),
    ],
)
def test_shares_of_neurons_are_rounded_to_what_kernels_like(wanted, size, left):
    assert neurons(wanted, size) == left
    assert isinstance(wanted, int) or abs(left / (wanted * size) - 1) <= 1 / 16


def test_a_share_of_heads_is_one_that_the_config_takes():
    """Llama's config wants heads that divide the hidden size: of 8, 6 do not divide 64, 4 do."""
    config = random_model("llama", num_attention_heads=8, num_key_value_heads=8).config
    assert shape(parse("width:heads=0.7"), config).num_attention_heads == 4
    qwen = random_model("qwen3", num_attention_heads=8, num_key_value_heads=8).config
    assert shape(parse("width:heads=0.7"), qwen).num_attention_heads == 6
    with pytest.raises(SpecError, match=r"not a multiple of the number of attention heads \(6\)"):
        shape(parse("width:heads=6"), config)


def test_blocks_are_where_the_makers_look_for_them():
    """The path that `layers` renumbers under is one that transformers loads from."""
    for architecture in ARCHITECTURES:
        model = random_model(architecture)
        path = blocks.find(model)[0].name.rpartition(".")[0]
        assert any(name.startswith(f"{path}.0.") for name in model.state_dict())


def test_only_byte_pair_tokenizers_are_trimmed():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    )
    with pytest.raises(Conflict, match="Unigram"):
        bpe.trim(unigram, 1, [1, 1], needed=[])
