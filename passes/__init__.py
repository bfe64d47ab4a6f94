"""The compiler: pure functions from one frozen program type to the next.

`driver` runs them in order; `ir` has the types. Packages by floor, lowest first (imports go down):

    devices, partition, remat_policies, schedule   models of devices, cuts, policies, schedules;
                                                   without torch
    _torch, ops                                    torch's private names; custom operators
    ir                                             the program types
    graph                                          analyze and edit fx graphs
    batch, cost, phases, codegen                   batch dimension; costs; F, R, B, W; source text
    capture, split                                 from a model to a graph; from a graph to stages
    driver                                         all passes in order
"""
