"""One allocator of per-layer levels under a global budget, for sparsity, bits and rank alike.

``problem`` holds the table (each layer's levels with size and error) and the answer, ``dynamic`` the two dynamic programs,
``evolution`` the search by measured loss, ``tables`` the measurement on a live model. Sources: L-GreCo: Layerwise-Adaptive
Gradient Compression for Efficient and Accurate Deep Learning; Efficient Joint Optimization of Layer-Adaptive Weight Pruning in
Deep Neural Networks (RD-Prune); EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search.
"""
