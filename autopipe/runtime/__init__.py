"""Execute generated programs: workers, transfers, random numbers, autograd.

It does not use models, graphs or passes. Read in this order:

    `executor`    `Program` and `Run`: the methods that generated code calls
    `graphs`      phases that are captured once and replayed
    `random`      `MicroBatchContext`: `ctx` in generated code; seeded random ops
    `workers`     run the workers of a step at the same time, one thread each
    `worker_threads`  threads that are kept from step to step
    `thread_settings`  what a thread takes over from its caller
    `mailbox`     bounded queues between workers
    `backpressure`  senders wait for the devices of receivers
    `transfer`    `WorkerDevice`; copies between devices, ordered by events
    `saved_values`  what stages have saved for backwards
    `offload`     copies of saved values to the host's memory and back
    `caller_streams`  the order between workers and the caller's streams
    `backends`    everything that depends on the device type: streams, events, timing
    `microbatch`  sizes of micro-batches; cut a batch, combine results
    `autograd`    the pipeline as one autograd node
    `memory`      count the bytes of saved activations
    `failure`     report the stage, micro-batch and node of an exception
    `load`        load generated source code as Python functions
    `recording`   when the actions of a run started, waited and ended
    `recorded_run`  a `Run` that records them
    `labelled_run`  a `Run` whose actions have names in torch's profiler
    `actions`     how these two wrap generated functions

In: a `Program` (functions of generated code, with sizes, devices and strides), tensors.
Out: results, gradients, updated buffers; or a `StageError`.
"""
