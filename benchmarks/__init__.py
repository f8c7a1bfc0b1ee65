"""What the design's promises cost, measured: `make bench`, or `python -m benchmarks`.

Every number that compares two things is a ratio of times that were taken in turn (A B A B …) in one
run, so that a busy machine slows both. A file for each question: `layouts`, `logprobs`, `align`,
`rewards`, `breakdown`.
"""
