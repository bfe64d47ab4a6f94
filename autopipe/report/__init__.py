"""Show plans and stages: text tables, the HTML page, `pipe.stages`.

`columns` (a table's columns), `plan_text` (text of a plan), `stages` (`pipe.stages`),
`memory_view` (`pipe.memory`), `measured_text` (`print(measured)`), `step_timelines`
(`pipe.timeline()`); of the page:
`page_data` (numbers that are drawn), `svg` (primitives), `bars_figure`, `graph_figure`,
`timeline_figure`, `measured_section`, `chunks_figure`, `page_tables`, `style`, `page`.
"""
