"""Long-context tasks: can the model still use what was said long ago?

A likelihood is an average over a text, and most of a text can be predicted from its last sentence. These
tasks, in the style of RULER (Hsieh et al. 2024, arXiv 2404.06654), ask for one thing said far back:

    niah_single        one needle in a haystack
    niah_multikey      several needles, one is asked for
    niah_multivalue    several needles of one key, all are asked for
    variable_tracking  a chain of assignments, followed to its end
    common_words       the words that a long list repeats most

    draft     a text that can be made longer by the sentence, with its needles and questions
    english, tinytext   the two languages that drafts are written in
    niah, tracking, words      the tasks; `tasks` lists them
    prompts   drafts cut to a number of tokens
    answer    greedy answers through a cache, the question in view of the compression or not
    judge     artefact, full cache and controls on the same prompts

All texts are made up here from a seed: nothing to download, nothing a model could have read before.
"""
