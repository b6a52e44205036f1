"""What is measured about a task beside its weights: Fisher information, Kronecker factors, projected curvature.

All of it comes from the per-sample gradients of a classifier's loss, which one ordinary backward pass of a batch
contains: for a layer y = W x with tokens t, the gradient of sample n is

    G_n = sum_t g_{n,t} x_{n,t}^T         x its input, g the gradient of its output

Notation: N samples, W is m x n, S the tagged basis of p atoms.

    taps.py           per-sample gradients, layer by layer, while the backward pass goes on
    accumulators.py   what is summed up from them
    sweep.py          one pass over the data, on one process or many; labels; the determinism probe
    files.py          fisher.safetensors and kronecker.safetensors, small ones too
    estimation.py     from a checkpoint and a task to such a file, through the cache
    finding.py        which statistics a merge has, and which are to be estimated
    hessian.py        the exact projected Hessian of small models, to judge the others by
    training.py       Fisher information out of a training run
"""
