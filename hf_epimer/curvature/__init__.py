"""What is measured about a task beside its weights: Fisher information, Kronecker factors, projected curvature.

All of it comes from the per-sample gradients of a classifier's loss, which one ordinary backward pass of a batch
contains: for a layer y = W x with tokens t, the gradient of sample n is

    G_n = sum_t g_{n,t} x_{n,t}^T         x its input, g the gradient of its output

Notation: N samples, W is m x n, S the tagged basis of p atoms. What the statistics are stands in
`hf_epimer.methods.statistic`.

    request.py        what is asked for: checkpoint, images, gradients; data only
    per_sample.py     per-sample gradients, layer by layer, while the backward pass goes on
    accumulators.py   what is summed up from them
    data_pass.py      one pass over the data, on one process or many; labels; the determinism probe
    estimate.py       from a request to a file of statistics, through the cache
    files.py          such files, small ones too
    measure.py        `hf-epimer fisher`: a file for a checkpoint, written or pushed
    card.py           what the checkpoint's card says about it
    trainer.py        Fisher information out of a training run
    hessian.py        the exact projected Hessian of small models, and
    comparison.py     how near each approximation comes to it
"""
