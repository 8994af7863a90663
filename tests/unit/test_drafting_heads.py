"""speculative/heads: what is trained, what is kept, and what a tree of drafts is made of."""

from __future__ import annotations

import itertools

import pytest
import torch

from compresskit import assets, catalogue
from compresskit.decode import pad
from compresskit.errors import Conflict, ModelError, SpecError
from compresskit.hf.features import fingerprint, frozen_head, states
from compresskit.methods.speculative import _heads
from compresskit.methods.speculative._draft import NOTHING, ROOT, Evidence
from compresskit.methods.speculative._head_tree import HeadsDrafter, Node, grow
from compresskit.methods.speculative._heads import Heads, examples

NAME = "speculative/heads"
SMALL = "draft=2,nodes=6,samples=16,row_tokens=128"


# Features


@torch.inference_mode()
def test_features_are_what_the_models_own_head_reads(lab, architecture):
    system = lab.system(architecture)
    tokens, seen = lab.prompt(20), []
    logits = system.step(tokens, system.new_cache(0), keep=20, features=seen)
    (trained_on,) = states(system.model, [tokens])
    torch.testing.assert_close(seen[0], trained_on)
    torch.testing.assert_close(frozen_head(system.model)(trained_on), logits)


def test_examples_pair_a_feature_with_tokens_further_on():
    rows = torch.arange(20).view(2, 10)
    found = examples(rows, rows.unsqueeze(-1).double(), 3)
    # The token after the feature is the model's own to say.
    assert found.features[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert found.tokens[0].tolist() == [2, 3, 4]
    assert found.tokens[-1].tolist() == [17, 18, 19]


def test_rows_that_are_counted_on_are_not_trained_on():
    learn, held = _heads.split(range(32))
    assert held == [7, 15, 23, 31]
    assert sorted(learn + held) == list(range(32))


@torch.inference_mode()
def test_untrained_heads_say_what_the_model_says(lab):
    system = lab.system("llama")
    (seen,) = states(system.model, [lab.prompt(9)])
    top = frozen_head(system.model)
    said = _heads.logits(Heads(2, 32), top, seen[0])
    torch.testing.assert_close(said, top(seen).expand(2, -1, -1))


# The tree


def worth(tree, accuracy):
    """Sum of the values of the nodes: how many draft tokens are right on average."""
    values = []
    for node in tree:
        above = 1.0 if node.parent == ROOT else values[node.parent]
        values.append(above * accuracy[node.head][node.rank])
    return sum(values)


def every_tree(accuracy, nodes):
    """Every set of `nodes` candidate paths that holds the beginnings of its paths."""
    ranks = range(len(accuracy[0]))
    paths = [
        path
        for depth in range(1, len(accuracy) + 1)
        for path in itertools.product(ranks, repeat=depth)
    ]
    for chosen in itertools.combinations(paths, nodes):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield chosen


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_no_tree_of_that_size_is_worth_more(nodes):
    accuracy = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.05]]
    best = max(
        sum(
            torch.tensor([accuracy[head][rank] for head, rank in enumerate(path)]).prod().item()
            for path in chosen
        )
        for chosen in every_tree(accuracy, nodes)
    )
    tree = grow(accuracy, nodes)
    assert len(tree) == nodes
    assert worth(tree, accuracy) == pytest.approx(best)


def test_a_tree_has_parents_first_and_no_child_twice():
    tree = grow([[0.5 / (rank + 1) for rank in range(10)]] * 4, 60)
    assert len(tree) == 60
    for index, node in enumerate(tree):
        assert node.parent < index
        assert node.head == (0 if node.parent == ROOT else tree[node.parent].head + 1)
    assert len({(node.parent, node.rank) for node in tree}) == 60


def test_candidates_that_are_never_right_are_left_out():
    assert grow([[0.5, 0.0], [0.0, 0.0]], 9) == [Node(ROOT, 0, 0)]
    assert grow([[0.0]], 9) == []


def test_a_draft_holds_each_heads_candidates_down_to_the_limit():
    # Heads that pass features on, and a head that gives feature i to token i.
    drafter = HeadsDrafter(
        Heads(2, 4), torch.nn.Identity(), [Node(ROOT, 0, 0), Node(0, 1, 1), Node(ROOT, 0, 2)]
    )
    features = torch.tensor([[[9.0, 0, 0, 0], [1.0, 4.0, 3.0, 2.0]], [[0.0, 1.0, 2.0, 3.0]] * 2])
    drafter.observe([[5]], Evidence([[1, 2], [3]], features, [[0, 1], [0]], features))
    first, second = drafter.draft([2, 1])
    assert (first.tokens, first.parents) == ([1, 2, 3], [ROOT, 0, ROOT])
    assert (second.tokens, second.parents) == ([3, 1], [ROOT, ROOT])
    assert drafter.draft([0, -1]) == [NOTHING] * 2


# Trained on the tiny model


def accepted(system, lab):
    """The answer to a prompt, and how many tokens of drafts are in it."""
    text = assets.text_path("heldout").read_text(encoding="utf-8")[:400]
    request = lab.request(torch.tensor([system.tokenizer.encode(text)]), 60)
    chunks = list(system.generate(request))
    return lab.rows(chunks), sum(chunk.accepted for chunk in chunks)


@pytest.fixture(scope="module")
def file(tmp_path_factory, open_stack):
    """A file of trained heads."""
    path = tmp_path_factory.mktemp("heads") / "below" / "tiny.safetensors"
    with open_stack(f"{NAME}:{SMALL},steps=150,path={path}") as opened:
        assert opened.system.facts["draft_heads"]["from"] == "training"
        assert opened.setup.calibration_tokens == 16 * 127  # and a BOS a row
    return path


def test_trained_heads_accept_more_than_untrained_ones_and_change_nothing(open_stack, lab, file):
    with open_stack() as opened:
        answer, _ = accepted(opened.system, lab)
    with open_stack(f"{NAME}:{SMALL},steps=0") as opened:
        tokens, untrained = accepted(opened.system, lab)
        assert tokens == answer
    with open_stack(f"{NAME}:{SMALL},path={file}") as opened:
        assert opened.system.facts["draft_heads"]["from"] == "path"
        assert opened.setup.calibration_tokens == 0
        tokens, trained = accepted(opened.system, lab)
        assert tokens == answer
        (heads,) = opened.system.beside
        assert sum(p.numel() for p in heads.parameters()) == 2 * (128 * 128 + 128)
    assert trained > untrained


def test_rows_of_a_batch_get_what_they_get_alone(open_stack, lab, file):
    rows = [lab.prompt(n, seed=n, vocabulary=500)[0].tolist() for n in (1, 5, 12, 30)]
    tokens, mask = pad(rows, device=torch.device("cpu"))
    with open_stack() as opened:
        plain = opened.system
        alone = [lab.rows(plain.generate(lab.request(torch.tensor([ids]), 20)))[0] for ids in rows]
    with open_stack(f"{NAME}:{SMALL},path={file}") as opened:
        chunks = list(opened.system.generate(lab.request(tokens, 20, mask=mask)))
    assert lab.rows(chunks) == alone
    assert sum(chunk.accepted for chunk in chunks) > 0


@pytest.mark.slow
def test_compiled_steps_hand_out_the_features(open_stack, lab, file):
    request = lab.request(lab.prompt(12, vocabulary=500), 20)
    with open_stack(f"{NAME}:{SMALL},path={file}") as opened:
        eager = [(chunk.tokens.tolist(), chunk.drafts) for chunk in opened.system.generate(request)]
    with open_stack(f"{NAME}:{SMALL},path={file}", mode="compiled") as opened:
        chunks = list(opened.system.generate(request))
    assert [(chunk.tokens.tolist(), chunk.drafts) for chunk in chunks] == eager


def test_heads_of_another_model_are_refused(open_stack, file):
    with (
        pytest.raises(Conflict, match="trained for another model"),
        open_stack(f"{NAME}:{SMALL},path={file}", model="tiny:moe"),
    ):
        pass


def test_another_number_of_heads_is_refused(open_stack, file):
    with (
        pytest.raises(Conflict, match="holds 2 heads, draft=3 needs 3"),
        open_stack(f"{NAME}:draft=3,path={file}"),
    ):
        pass


def test_a_file_that_holds_no_heads_is_refused(open_stack, tmp_path):
    path = tmp_path / "heads.safetensors"
    path.write_bytes(b"not heads")
    with pytest.raises(ModelError, match="no drafting heads"), open_stack(f"{NAME}:path={path}"):
        pass


def test_training_on_the_evaluation_text_is_refused(open_stack):
    with (
        pytest.raises(SpecError, match="acceptance is measured on"),
        open_stack(f"{NAME}:text=embedded"),
    ):
        pass


def test_a_packed_head_passes_no_gradient(open_stack):
    with (
        pytest.raises(Conflict, match="packed here and passes no gradient"),
        open_stack("quant/int8:head=true", f"{NAME}:{SMALL}"),
    ):
        pass


def test_the_fingerprint_outlives_a_change_of_precision(lab):
    model = lab.system("llama").model
    assert fingerprint(model) == fingerprint(lab.system("llama", double=True).model)
    assert fingerprint(model) != fingerprint(lab.system("qwen2").model)
    assert catalogue.get(NAME).example["draft"] == 2
