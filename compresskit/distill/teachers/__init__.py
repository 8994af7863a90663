"""Where the teacher's opinion of a batch comes from.

    online     the model reads the batch: every kind of loss, any text, one forward pass a step
    cache      what it said before, from disk: sparse, and no forward pass at all
    on_policy  the student writes part of the batch itself; an online teacher then judges that

All are a `protocol.Teacher`: batch in, target out. An on-policy batch is made before the teacher sees
it, so it needs nothing of the teacher but that it is online.
"""
