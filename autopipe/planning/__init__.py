"""Plans: what each device runs, its memory and time, and the search for the best plan.

Read in this order:

    `plan_parts`       the parts of a plan: stages, times, segments
    `plan_data`        the data of a plan, and values computed from them
    `plans`            `Plan`: a plan that can be checked, printed, saved and loaded
    `plan_notes`       what a plan says in words
    `stage_timers`     who gives the times of a stage
    `make_plan`        a split program and its phases → a plan
    `fitting`          the policies with which a cut fits its memory limits
    `estimate_errors`  correct estimates by traces
    `cut_trials`       the best cut for one number of micro-batches
    `search`           the best of all numbers of micro-batches
    `remedies`         changes that would help if nothing fits
    `profile_calls`    measure ops on a device
    `profile_cache`    keep their times on disk
    `profile_stages`   measure whole stages on a device
    `measured_timeline`  what a run recorded → a timeline
    `measured_data`    measured steps, and what is computed from them
    `measured`         `Measured`: steps that can be printed and planned with
    `measured_costs`   measured steps → times of ops
    `choice`           options and a captured graph → the plan to run
"""
