"""Pipeline schedules: what each device runs in one training step, in which order, and how long.

Needs neither torch nor a model.

In: the name of a schedule kind, K devices, M micro-batches; to simulate, also the times of stages.
Out: `Scheduled`, one list of actions per device; `Timeline`, when each action starts and ends.

Files, in reading order:

- `actions`: the program type `Scheduled`, its actions, and the checks that it cannot deadlock.
- `schedule_kind`: the description of one kind: its order, stages per device, whether it runs here.
- `kinds`: every schedule kind (GPipe, 1F1B, zero bubble, ...) in one table, `KINDS`.
- `build`: a kind and sizes → `Scheduled`.
- `queues`: the sizes of the queues between stages, with which a schedule runs to its end.
- `simulator`: `Scheduled` and times → `Timeline`, with peak memory.
- `timeline`: the simulated step: its checks, Gantt chart and trace file.
"""

from __future__ import annotations

from .actions import Action, Scheduled
from .build import schedule
from .kinds import DEFAULT_KIND, EXECUTED, KINDS
from .queues import Queue, StageMessages, queue_sizes
from .schedule_kind import ScheduleKind
from .simulator import simulate, simulate_actions
from .timeline import Span, Timeline

__all__ = [
    "DEFAULT_KIND",
    "EXECUTED",
    "KINDS",
    "Action",
    "Queue",
    "ScheduleKind",
    "Scheduled",
    "Span",
    "StageMessages",
    "Timeline",
    "queue_sizes",
    "schedule",
    "simulate",
    "simulate_actions",
]
