"""From a question (model, likelihood, data) to LayerStats: the copy, the batches, the labels, hooks
and sweeps.
"""
