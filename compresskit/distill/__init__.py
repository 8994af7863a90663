"""Make a student of a model, teach it, and say what that cost.

    recipe    everything that repeats a training, as frozen data with a digest
    data      text or token rows ──► rows of one length, in an order that follows from the step
    batch     what goes into one step: rows, and what the teacher says about them
    teachers  where that comes from: the model itself, a cache on disk, the student's own text
    losses    divergences between two distributions, never a whole matrix of logits at a time
    lesson    student, projections and losses as one module: what is trained
    finish    rounding in the forward pass, so that the student expects its quantisation
    trainer   the loop: accelerate, budgets, checkpoints
    looks     held-out text, scored now and then; the best student where training may stop early
    state     what a checkpoint holds, and how a training goes on from it

Student makers are in `compresskit.hf.student`, since they cut transformers models; the finished
student takes its teacher's place through `distill/student`.
"""
