"""Prompts that ask for what they hold already, and questions of a data set."""

from __future__ import annotations

import json
import random

import pytest

from compresskit.errors import InputError
from compresskit.spec import WorkloadSpec
from compresskit.workload import copying, prompts


class Bytes:
    """One token per byte, in front of them a BOS; the chat marks are tokens of their own."""

    eos_ids = (257,)
    bos_id = 256
    has_chat_template = True

    def encode(self, text, *, special=True):
        return [256] * special + list(text.encode())

    def decode(self, ids):
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def chat(self, text):
        return [258, *text.encode(), 259, 260]


LINES = "".join(f"line {number} of the text\n" for number in range(400))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(LINES)
    return path


def make(text, tokens=200, new=60, count=5, **options):
    spec = WorkloadSpec(text=text, prompt_tokens=tokens, new_tokens=new, **options)
    return prompts(Bytes(), spec, count=count, seed=1)


@pytest.mark.parametrize("chat", [False, True])
def test_a_copy_is_a_passage_the_request_and_the_passage_begun(text, chat):
    found = make(f"copy:{text}", chat=chat)
    assert [len(row) for row in found.ids] == [200] * 5
    for row in found.ids:
        whole = Bytes().decode(row)
        said = "The same text once more:\n\n"
        before, _, after = whole.partition(said)
        passage, begun = (after[:-8], whole[-8:]) if chat else (before[:-2], after)
        assert passage in LINES
        # From the beginning of a line, which is what makes the next word known.
        assert LINES[LINES.index(passage) - 1] == "\n"
        assert begun == passage[:8]
        assert len(passage) >= 60
    assert found.facts.source == f"copy of {text}"


def test_an_edit_renames_a_variable_of_generated_code():
    found = make("edit", tokens=400)
    for row in found.ids:
        whole = Bytes().decode(row)
        code, _, request = whole.partition("\n\nThe same code, `")
        old, _, rest = request.partition("` renamed to `")
        new = rest.partition("`")[0]
        assert old != new
        assert old in code
        assert new not in code
        assert len(row) == 400
        assert rest.partition(":\n\n")[2] == code.replace(old, new)[:8]


def test_generated_code_is_python():
    code = copying.code(random.Random(3), "total")
    compile(code, "generated", "exec")
    assert code == copying.code(random.Random(3), "total")
    assert code != copying.code(random.Random(4), "total")


@pytest.mark.parametrize("source", ["copy", "edit"])
def test_a_prompt_that_holds_less_than_the_answer_is_refused_with_the_length_it_needs(source, text):
    source = f"copy:{text}" if source == "copy" else source
    with pytest.raises(InputError, match="at least") as refused:
        make(source, tokens=100, new=90)
    needed = int(str(refused.value).rsplit("at least ", 1)[1].split()[0])
    assert len(make(source, tokens=needed, new=90, count=1).ids[0]) == needed
    with pytest.raises(InputError, match="at least"):
        make(source, tokens=needed - 1, new=90)


def test_edits_take_no_text(text):
    with pytest.raises(InputError, match="write only 'edit'"):
        make(f"edit:{text}")


ROWS = [
    {"category": "qa", "turns": ["What is one?", "And two?"]},
    {"category": "math", "turns": ["Add 1 and 2."]},
    {"category": "stem", "question": "Why is the sky blue?"},
    {"category": "qa", "prompt": "A very long question that does not fit " * 9},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("", {"What is one?", "Add 1 and 2.", "Why is the sky blue?"}),
        ("#qa", {"What is one?"}),
        ("#mt_bench", {"Add 1 and 2.", "Why is the sky blue?"}),
    ],
)
def test_questions_come_as_they_are_and_too_long_ones_do_not(questions, kind, asked):
    found = make(f"questions:{questions}{kind}", count=len(asked))
    assert {Bytes().decode(row) for row in found.ids} == asked
    assert found.facts.source == f"questions:question.jsonl{kind}"
    with pytest.raises(InputError, match="Allow longer prompts"):
        make(f"questions:{questions}{kind}", count=len(asked) + 1)


def test_questions_go_into_the_chat_template(questions):
    (row,) = make(f"questions:{questions}#math", count=1, chat=True).ids
    assert row == Bytes().chat("Add 1 and 2.")


def test_questions_of_a_data_set(questions):
    found = make(f"questions:datasets:{questions}#math", count=1)
    assert Bytes().decode(found.ids[0]) == "Add 1 and 2."


def test_bad_questions_say_where(questions, tmp_path):
    with pytest.raises(InputError, match=r"no question of the kind 'poetry'. There are math, qa"):
        make(f"questions:{questions}#poetry")
    with pytest.raises(InputError, match="cannot be read"):
        make(f"questions:{tmp_path / 'missing.jsonl'}")
    with pytest.raises(InputError, match="name a file"):
        make("questions:")
    questions.write_text('{"turns": ["fine"]}\nnot json\n')
    with pytest.raises(InputError, match="line 2: not JSON"):
        make(f"questions:{questions}")
    questions.write_text('{"turns": ["fine"]}\n{"answer": 3}\n')
    with pytest.raises(InputError, match="line 2: no question"):
        make(f"questions:{questions}")


def test_a_rate_of_questions_goes_by_the_tokens_that_they_have(questions):
    from compresskit import metrics, runner
    from compresskit.spec import ModelSpec, ProtocolSpec, RunSpec

    spec = RunSpec(
        model=ModelSpec(name="tiny"),
        device="cpu",
        workload=WorkloadSpec(
            text=f"questions:{questions}#mt_bench",
            prompt_tokens=200,
            new_tokens=4,
            batch_sizes=(2,),
        ),
        protocol=ProtocolSpec(passes=("latency",), warmups=0, repeats=1),
    )
    record = runner.run(spec)
    assert record.status == "ok", record.reason
    (sample,) = record.blocks[0].passes.latency.samples
    asked = [len(text) for text in ("Add 1 and 2.", "Why is the sky blue?")]
    assert 2 < sample.prompt_tokens < max(asked)
    assert sample.prompt_tokens != 200
    rate = metrics.METRICS["prefill_tokens_per_s"].samples(record)
    assert rate == [2 * sample.prompt_tokens / sample.arrivals[0].seconds]
