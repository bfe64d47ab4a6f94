"""Pipeline schedules: what each device runs in one training step, in which order, and how long.

Needs neither torch nor a model.

In: the name of a schedule kind, K devices, M micro-batches; to simulate, also the times of stages.
Out: `Scheduled`, one list of actions per device; `Timeline`, when each action starts and ends.

Files, in reading order:

- `actions`: the program type `Scheduled`, its actions, and the checks that it cannot deadlock.
- `schedule_kind`: the description of one kind: its order and stages per device.
- `kinds`: every schedule kind (GPipe, 1F1B, zero bubble, ...) in one table, `KINDS`.
- `v_shapes`: the order functions of V-Min and V-Half.
- `device_schedule`: a kind for K devices: where each stage is, and the `Scheduled` of any M.
- `build`: the name of a kind and sizes → `Scheduled`.
- `queues`: the sizes of the queues between stages, with which a schedule runs to its end.
- `offloading`: which micro-batches leave their device after F, and before what they return.
- `simulator`: `Scheduled` and times → `Timeline`, with peak memory.
- `timeline`: a simulated or measured step: its checks, Gantt chart and trace file.
- `clock`: `Scheduled` as a table, a column for each unit of time.
- `user_schedule`: a user's lists of actions → `Scheduled`.
- `user_kind`: a user's function of K and M, or a `Scheduled`, as a kind.
- `csv_format`: `Scheduled` ↔ the CSV format of torch.distributed.pipelining.
"""

from __future__ import annotations

from .actions import Action, Scheduled
from .build import schedule, schedule_for
from .clock import clock_table
from .csv_format import read_schedule, write_schedule
from .device_schedule import DeviceSchedule
from .kinds import DEFAULT_KIND, KINDS
from .offloading import Move, Offload, called_moves, memory_moves, offloads
from .queues import Queue, StageMessages, queue_sizes
from .schedule_kind import ScheduleKind
from .simulator import simulate, simulate_actions
from .timeline import Span, Timeline, check_unit, trace_file
from .user_kind import is_own, schedule_of_function, schedule_of_rows
from .user_schedule import scheduled_from_lists

__all__ = [
    "DEFAULT_KIND",
    "KINDS",
    "Action",
    "DeviceSchedule",
    "Move",
    "Offload",
    "Queue",
    "ScheduleKind",
    "Scheduled",
    "Span",
    "StageMessages",
    "Timeline",
    "called_moves",
    "check_unit",
    "clock_table",
    "is_own",
    "memory_moves",
    "offloads",
    "queue_sizes",
    "read_schedule",
    "schedule",
    "schedule_for",
    "schedule_of_function",
    "schedule_of_rows",
    "scheduled_from_lists",
    "simulate",
    "simulate_actions",
    "trace_file",
    "write_schedule",
]
