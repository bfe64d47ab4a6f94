"""Compare a pipeline with the model itself, on one batch.

Read in this order:

    `step_snapshot`  outputs, gradients and buffers of one training step
    `deterministic`  run a model without randomness, with BatchNorm per micro-batch
    `locate`         the first value that differs
    `compare`        the comparison: `Pipeline.verify`
"""
