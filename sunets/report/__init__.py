"""Records -> tables, figures and pages. No torch here: a report is made wherever the records are.

`build` makes a benchmark's report and `explain` traces its numbers. `statistics` (intervals, paired differences),
`tables` and `style` are what other reports, such as the ablations', are made with too.
"""
