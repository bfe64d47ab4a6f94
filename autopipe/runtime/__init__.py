"""What generated programs call: micro-batches, workers, transfers, randomness, autograd.

Knows nothing of models, graphs or passes; `autopipe.module` hands it plain data.
"""
