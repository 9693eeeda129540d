"""Evaluation: benchmarks through lighteval, and our own scorers; no training engine is used.

| to ...                                         | open |
|------------------------------------------------|------|
| add a benchmark, see where its rows come from  | datasets.yaml |
| see how a row becomes a prompt and a score     | tasks.py; its typed table, light to import: task_table.py |
| follow a suite from its job file to results    | suite.py, job.py |
| see where a model answers, servers and samples  | backends.py, endpoint.py, served.py, sampling.py |
| use lighteval's own command line               | smollm3.py, __main__.py |
| see what lighteval gets wrong, and the fixes   | compat.py |
| test long context, needles included            | long_context.py, likelihood.py |
| compare texts across tokenizers                | bits_per_byte.py |
| test the switch between the two modes          | mode_switch.py |
| run code that a model wrote                    | sandbox/outside.py, sandbox/inside.py; LiveCodeBench: contest.py |
| get intervals, or win rates                    | intervals.py, win_rate.py |
| evaluate without the hub                       | package_data.py |
"""
