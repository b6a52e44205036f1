"""The mathematics, in torch alone: no files, no Hub, no model classes.

Notation, used in every docstring below (METHODS carry the same letters):

    W_0, W_t   base and fine-tuned weight of one layer, m x n           T     number of tasks
    D_t        task vector W_t - W_0                                    l_t   task weights, sum l_t = 1
    k          rank kept per task and layer                             p     k T, dimension of the layer's subspace
    U, V       whitened factors of the tagged basis, m x p and n x p    S     m n x p, columns vec(U_i V_i^T)
    v_t        diagonal empirical Fisher, m x n                         H_t   projected metric S^T diag(v_t) S, p x p
    c_t        coordinates of D_t, length p                             x     coordinates of the merged task vector

    linalg      truncated SVD, polar factor, conjugate gradients, extreme eigenvalues
    subspace    the tagged basis (eq 10) and coordinates in it
    metric      projected metrics as linear operators (eq 12)
    frechet     the Fréchet mean (eq 13) and eta (Theorem 3)
    diagnostics what the theory says before a merge: eta, the error bound (Theorem 2), isotropy, energy kept
"""
