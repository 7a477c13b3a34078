"""Speed and memory beside others' code, measured in turn in one process: see CONTRIBUTING.md and `make bench`.

python -m benchmarks                    the CPU set: one table, under 10 minutes on 2 cores
python -m benchmarks --accelerator      the set for one GPU
python -m benchmarks.step RECIPE ...    one training step of any recipe beside a peer's
python -m benchmarks.loader             images/s of one core for each form of data
python -m benchmarks.startup            what a user waits for before anything happens
"""
