"""Bytes of weights by class, and what of them a step reads: by hand on the tiny models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compresskit.measure.memory.moved import moved_bytes
from compresskit.measure.memory.weights import pieces, resident_weights, weight_bytes

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 4, 128, 384, 4, 2, 32, 512
LINEAR = LAYERS * (WIDTH * (HEADS + 2 * KV_HEADS) * HEAD + HEADS * HEAD * WIDTH + 3 * WIDTH * INNER)
NORM = (2 * LAYERS + 1) * WIDTH
EMBEDDING = VOCABULARY * WIDTH
FREQUENCIES = 2 * HEAD // 2  # rotary, and its copy


def test_the_numbers_above_are_the_tiny_models(open_stack):
    with open_stack() as opened:
        config = opened.system.model.config
        assert opened.parameters == LINEAR + NORM + EMBEDDING
        assert (config.num_hidden_layers, config.hidden_size) == (LAYERS, WIDTH)
        assert (config.intermediate_size, config.vocab_size) == (INNER, VOCABULARY)


def test_dense_weights_are_told_apart_and_a_tied_head_counts_once(open_stack):
    with open_stack() as opened:
        assert weight_bytes(opened.system.model) == {
            "embedding": 4 * EMBEDDING,
            "dense": 4 * LINEAR,
            "norm": 4 * NORM,
            "buffer": 4 * FREQUENCIES,
        }


def test_int8_holds_a_byte_a_weight_and_a_scale_a_row(open_stack):
    rows = LAYERS * ((HEADS + 2 * KV_HEADS) * HEAD + WIDTH + 2 * INNER + WIDTH) + VOCABULARY
    with open_stack("quant/int8") as opened:
        held = weight_bytes(opened.system.model)
    assert held["codes"] == LINEAR + EMBEDDING
    assert held["scales"] in (2 * rows, 4 * rows)  # bfloat16 where it is packed, float32 elsewhere
    assert held["embedding"] == 4 * EMBEDDING  # stays for the look-up
    assert "dense" not in held


def test_int4_holds_half_a_byte_a_weight_and_two_numbers_a_group(open_stack):
    with open_stack("quant/int4:group=32") as opened:
        held = weight_bytes(opened.system.model)
    # All rows are multiples of 64 and all widths of 32, so that nothing is padded.
    assert held["packed"] == (LINEAR + EMBEDDING) // 2
    assert held["scales"] == held["zero_points"]
    assert held["scales"] in (2 * (LINEAR + EMBEDDING) // 32, 4 * (LINEAR + EMBEDDING) // 32)


def test_a_dense_copy_that_a_module_keeps_is_weighed(open_stack):
    with open_stack("quant/int8") as opened:
        layer = opened.system.model.model.layers[0]
        before = weight_bytes(opened.system.model)
        layer.original = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)
        after = weight_bytes(opened.system.model)
    assert after.pop("dense") == 4 * WIDTH * WIDTH
    assert after == before


def test_shared_storage_is_counted_once():
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    apart = nn.Sequential(first, second)
    assert weight_bytes(apart) == {"dense": 2 * 4 * 8 * 4}
    second.weight = first.weight
    assert weight_bytes(apart) == {"dense": 4 * 8 * 4}
    second.weight = nn.Parameter(first.weight.detach()[:2])  # another parameter, a view
    assert weight_bytes(apart) == {"dense": 4 * 8 * 4}


class Packed(nn.Module):
    def __init__(self, codes):
        super().__init__()
        self.codes = codes
        self.register_buffer("words", torch.zeros(1000))

    def held_bytes(self):
        return {"packed": 7, "scales": 2}

    def held_tensors(self):
        return [self.codes]


def test_a_packed_module_answers_for_itself_and_once():
    codes = torch.zeros(7, dtype=torch.uint8)
    model = nn.Sequential(Packed(codes), nn.Linear(2, 1), Packed(codes))
    assert weight_bytes(model) == {"packed": 7, "scales": 2, "dense": 12}
    model = nn.Sequential(Packed(codes), Packed(codes.clone()))
    assert weight_bytes(model) == {"packed": 14, "scales": 4}


def test_what_a_graph_froze_counts_where_it_is_not_the_models():
    class Step:
        def __init__(self, *tensors):
            self.tensors = list(tensors)

        def constants(self):
            return self.tensors

    layer = nn.Linear(8, 4, bias=False)
    copy = torch.zeros(4, 8)
    held = weight_bytes(layer, Step(layer.weight, layer.weight.detach().t(), copy, copy[1:]))
    assert held == {"dense": 128, "constants": 128}


def test_of_mapped_weights_only_what_was_touched_is_resident(open_stack):
    with open_stack() as opened:
        found = resident_weights(pieces(opened.system.model))
        if found.reading.kind == "estimated":
            pytest.skip("/proc/self/pagemap cannot be read here")
        held = sum(weight_bytes(opened.system.model).values())
        assert 0 < found.reading.value < held
        ids = torch.arange(20).unsqueeze(0)
        with torch.inference_mode():
            opened.system.step(ids, opened.system.new_cache(20))
        after = resident_weights(pieces(opened.system.model))
        # Whole pages: the file's first one also holds its header.
        assert held <= after.reading.value < held + 64 * 4096
        assert after.of_files > 0.9 * held


# What a decode step has to read


def test_a_dense_step_reads_every_weight_once_and_the_cache(open_stack):
    with open_stack() as opened:
        for batch in (1, 4):
            cache = {"keys_values": 1000, "slack": 77}
            assert moved_bytes(opened.system.model, cache, batch=batch) == {
                "head": 4 * EMBEDDING,  # tied: the table is read as a head
                "linear": 4 * LINEAR,
                "norm": 4 * NORM,
                "cache": 1000,
            }


def test_a_quantised_step_reads_codes_and_looks_up_one_row_of_the_embedding(open_stack):
    with open_stack("quant/int8") as opened:
        held = weight_bytes(opened.system.model)
        moved = moved_bytes(opened.system.model, {}, batch=3)
    assert moved == {
        "embedding": 3 * 4 * WIDTH,
        "codes": held["codes"],
        "scales": held["scales"],
        "norm": 4 * NORM,
    }


def test_a_head_of_its_own_is_read_and_the_table_is_not(lab):
    system = lab.system("gpt_neox")
    model = system.model
    embedding, top = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    moved = moved_bytes(model, {}, batch=2)
    assert moved["head"] == top.nbytes
    assert moved["embedding"] == 2 * embedding[0].nbytes
    rest = sum(p.nbytes for p in model.parameters()) - top.nbytes - embedding.nbytes
    assert moved["linear"] + moved["norm"] == rest


def test_a_mixture_reads_two_of_its_eight_experts(open_stack):
    with open_stack(model="tiny:moe") as opened:
        model = opened.system.model
        config = model.config
        assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
        moved = moved_bytes(model, {}, batch=1)
        one = 3 * config.hidden_size * config.intermediate_size * 4
        assert moved["experts"] == config.num_hidden_layers * 2 * one
        every = sum(p.nbytes for p in model.parameters())
        unused = config.num_hidden_layers * 6 * one
        assert sum(moved.values()) == every - unused
        # Which experts several tokens need together depends on where they are sent.
        assert moved_bytes(model, {}, batch=2) is None
