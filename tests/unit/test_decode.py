"""The plain loop: it equals transformers' own, whatever the batch, and stops where it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from compresskit.decode import autoregressive, pad
from compresskit.errors import InputError
from compresskit.spec import SamplingSpec


def generate(system, tokens, new, **options):
    """What transformers' own greedy search says."""
    out = system.model.generate(
        tokens,
        max_new_tokens=new,
        do_sample=False,
        attention_mask=torch.ones_like(tokens),
        **options,
    )
    return out[0, tokens.shape[-1] :].tolist()


def test_greedy_equals_transformers_token_by_token(lab, architecture):
    system = lab.system(architecture)
    for seed, length in enumerate((1, 7, 30)):
        tokens = lab.prompt(length, seed=seed)
        ours = lab.rows(system.generate(lab.request(tokens, 24)))
        assert ours == [generate(system, tokens, 24)]


def test_a_left_padded_batch_equals_its_rows_alone(lab, architecture):
    system = lab.system(architecture)
    prompts = [lab.prompt(length, seed=length)[0].tolist() for length in (3, 25, 11)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    together = lab.rows(system.generate(lab.request(tokens, 20, mask=mask)))
    alone = [lab.rows(system.generate(lab.request(torch.tensor([ids]), 20)))[0] for ids in prompts]
    assert together == alone


def test_padding_without_a_mask_would_change_the_tokens(lab):
    system = lab.system("llama")
    prompts = [lab.prompt(length, seed=length)[0].tolist() for length in (3, 25)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    unmasked = lab.rows(system.generate(lab.request(tokens, 20)))
    assert unmasked != lab.rows(system.generate(lab.request(tokens, 20, mask=mask)))


def test_rows_of_equal_length_need_no_mask():
    tokens, mask = pad([[1, 2], [3, 4]], device=torch.device("cpu"))
    assert tokens.tolist() == [[1, 2], [3, 4]]
    assert mask is None


def test_sampling_repeats_with_its_seed_and_changes_with_another(lab):
    system = lab.system("llama")
    sampling = SamplingSpec(temperature=1.0, top_p=0.95)

    def run(seed):
        return lab.rows(
            system.generate(lab.request(lab.prompt(9), 16, sampling=sampling, seed=seed))
        )

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_sampled_tokens_follow_the_model(lab):
    system = lab.system("llama", vocabulary=8)
    tokens = lab.prompt(4, vocabulary=8)
    expected = system.step(tokens, system.new_cache(5))[0, -1].softmax(-1)
    sampling = SamplingSpec(temperature=1.0)
    request = lab.request(tokens.expand(4000, -1), 1, sampling=sampling, seed=1)
    drawn = torch.tensor([row[0] for row in lab.rows(system.generate(request))])
    counts = torch.bincount(drawn, minlength=8)
    assert (
        stats.chisquare(
            counts.numpy(), (expected.detach().double() * 4000).numpy(), sum_check=False
        ).pvalue
        > 1e-3
    )


def test_a_row_ends_with_its_stop_token_while_others_go_on(lab):
    system = lab.system("llama")
    prompts = [lab.prompt(6, seed=seed)[0].tolist() for seed in (1, 2)]
    tokens, mask = pad(prompts, device=torch.device("cpu"))
    free = lab.rows(system.generate(lab.request(tokens, 20, mask=mask)))
    stop = next(token for token in free[0][3:] if token not in free[1])
    stopped = lab.rows(system.generate(lab.request(tokens, 20, mask=mask, stop=(stop,))))
    assert stopped == [free[0][: free[0].index(stop) + 1], free[1]]


def test_the_loop_ends_once_every_row_has_stopped(lab):
    system = lab.system("llama")
    tokens = lab.prompt(6)
    free = lab.rows(system.generate(lab.request(tokens, 20)))[0]
    chunks = list(system.generate(lab.request(tokens, 20, stop=(free[4],))))
    assert len(chunks) == free.index(free[4]) + 1


def test_the_last_token_is_not_fed_back(lab):
    system = lab.system("llama")
    caches = []

    def new_cache(capacity):
        caches.append(system.new_cache(capacity))
        return caches[-1]

    list(replace(system, new_cache=new_cache).generate(lab.request(lab.prompt(6), 5)))
    assert caches[0].get_seq_length() == 6 + 5 - 1


@pytest.mark.parametrize(("length", "new"), [(0, 4), (4, 0), (250, 7)])
def test_requests_that_cannot_be_decoded_are_refused(lab, length, new):
    system = lab.system("llama")
    with pytest.raises(InputError):
        next(autoregressive(system, lab.request(lab.prompt(length), new)))
